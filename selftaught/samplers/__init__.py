"""Where a model can live; `open_sampler` opens one by name."""

from selftaught.samplers.base import Sampler, SamplingParams

__all__ = ["Sampler", "SamplingParams", "open_sampler"]


def open_sampler(name: str, model: str, **options: object) -> Sampler:
    """A sampler of the named kind for a model; close it, or use it in a `with`.

    Raises:
        ValueError: no sampler has this name.
    """
    match name:
        case "transformers":
            from selftaught.samplers.transformers_model import TransformersSampler

            return TransformersSampler(model, **options)  # type: ignore[arg-type]
        case _:
            raise ValueError(f"No sampler is called {name!r}; there is: transformers.")
