"""A model with other weights for a moment."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(base: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: the model has the given weights. Not for computing gradients.

    Args:
        base: the model.
        weights: tensors by the names of the parameters that they replace. Tied parameters, which
            have several places but one name, are replaced in all of them.
    """
    names = {id(one): name for name, one in base.named_parameters() if name in weights}
    # The tensor takes the place of the parameter. If it were copied into the parameter, autocast
    # could take a cached 16-bit copy of the other weights.
    places = [
        (module, place, weight)
        for module in (base.modules() if names else ())
        for place, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(weight) in names
    ]
    try:
        for module, place, weight in places:
            module._parameters[place] = weights[names[id(weight)]]  # type: ignore[assignment]
        yield
    finally:
        for module, place, weight in places:
            module._parameters[place] = weight
