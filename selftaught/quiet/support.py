"""Models whose thoughts can be computed in parallel, and the names of their layers in errors."""

import traceback
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

EMBEDDINGS = "the embeddings"
"""Name of the gradient of the embeddings, which belong to no layer."""


class UnsupportedModel(ValueError):
    """Raised for a model whose thoughts at many positions cannot be computed in parallel."""


def unsupported(base: PreTrainedModel, why: str) -> UnsupportedModel:
    """Return the error for an unsupported model, with the reason and what to use instead."""
    return UnsupportedModel(
        f"{type(base).__name__} cannot think at many positions in parallel: {why}. Use a "
        "model whose layers all use attention through transformers' AttentionInterface, such as "
        "Llama, Mistral, Qwen or Gemma 3."
    )


def decoder_layers(base: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Return the name of the module list with the decoder layers, and the layers; empty if not
    found."""
    count = base.config.get_text_config().num_hidden_layers
    stacks = [
        (name, module) for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]  # fmt: skip
    fitting = [stack for stack in stacks if len(stack[1]) == count]
    name, layers = (fitting or stacks or [("", nn.ModuleList())])[0]
    return name, list(layers)


def layer_name(base: PreTrainedModel, number: int) -> str:
    """Return a description of a layer: its number, class, submodules and name in the model."""
    name, layers = decoder_layers(base)
    if number >= len(layers):
        return f"layer {number} ({type(base).__name__})"
    parts = ", ".join(type(part).__name__ for part in layers[number].children())
    return f"layer {number} ({type(layers[number]).__name__}: {parts}; {name}.{number})"


def check_attention(base: PreTrainedModel) -> None:
    """Check that the attention of a model can be replaced and that layers read only hidden states.

    Raises:
        UnsupportedModel: one of them is not the case; names the layer.
    """
    if not base._can_set_attn_implementation():
        raise unsupported(base, f"the attention of {layer_name(base, 0)} cannot be replaced")
    for name, module in base.named_modules():
        if "indexer" in type(module).__name__.lower():
            raise unsupported(
                base,
                f"{layer_of(base, f'{name}.')} uses sparse attention that selects tokens ({name}, "
                f"{type(module).__name__})",
            )
    config = base.config.get_text_config()
    parts = [name for layer in decoder_layers(base)[1] for name, _ in layer.named_children()]
    if getattr(config, "hidden_size_per_layer_input", None) or any(
        "per_layer" in one for one in parts
    ):
        source = next(
            (
                f" ({name}, {type(module).__name__})"
                for name, module in base.named_modules()
                if "per_layer" in name and isinstance(module, nn.Embedding)
            ),
            "",
        )
        raise unsupported(
            base,
            f"{layer_name(base, 0)} reads per-layer embeddings of every token{source}, which "
            "thoughts do not have",
        )


def layer_of(base: PreTrainedModel, name: str) -> str:
    """Return a description of the layer that contains a parameter or module.

    Outside the layers, it is the description of the module itself.
    """
    stack, layers = decoder_layers(base)
    for number in range(len(layers)):
        if f"{name}.".startswith(f"{stack}.{number}."):
            return layer_name(base, number)
    if name == EMBEDDINGS:
        return layer_name(base, 0)
    owner = base.get_submodule(name.rpartition(".")[0])
    return f"{name.rpartition('.')[0] or 'the model'} ({type(owner).__name__})"


def failing_module(base: PreTrainedModel, error: Exception) -> str:
    """Return a description of the innermost module in which an error was raised, and of its
    layer."""
    names = {id(module): name for name, module in base.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        one = frame.f_locals.get("self")
        found = names.get(id(one), found)
    if not found:
        return layer_name(base, 0)
    module = f"{found} ({type(base.get_submodule(found)).__name__})"
    stack, layers = decoder_layers(base)
    number = next(
        (at for at in range(len(layers)) if f"{found}.".startswith(f"{stack}.{at}.")), None
    )
    return module if number is None else f"{module} in {layer_name(base, number)}"
