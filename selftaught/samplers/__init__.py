"""Where a model can live; `open_sampler` opens one by name."""

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from selftaught.records import Text
from selftaught.samplers.base import Closing, Sampler, SamplingParams

if TYPE_CHECKING:
    from selftaught.samplers.scoring import TransformersScorer

__all__ = ["Closing", "Sampler", "SamplingParams", "as_seen", "open_sampler", "open_scorer"]


def open_sampler(name: str, model: str, **options: object) -> Sampler:
    """A sampler of the named kind for a model; close it, or use it in a `with`.

    Raises:
        ValueError: no sampler has this name, or it has no such option.
    """
    match name:
        case "transformers":
            from selftaught.samplers.transformers_model import TransformersSampler

            _check_options(f"The sampler {name!r}", TransformersSampler, options)
            return TransformersSampler(model, **options)  # type: ignore[arg-type]
        case "vllm":
            from selftaught.samplers.vllm_engine import VllmSampler

            return VllmSampler(model, **options)  # type: ignore[arg-type]
        case "openai":
            from selftaught.samplers.openai_server import OpenAISampler

            _check_options(f"The sampler {name!r}", OpenAISampler, options)
            return OpenAISampler(model, **options)  # type: ignore[arg-type]
        case "ray":
            from selftaught.samplers.ray_pool import RaySampler

            return RaySampler(model, **options)  # type: ignore[arg-type]
        case _:
            raise ValueError(
                f"No sampler is called {name!r}; there are: transformers, vllm, openai, ray."
            )


def open_scorer(model: str, **options: object) -> "TransformersScorer":
    """What tells how likely completions are to a model; close it, or use it in a `with`.

    Raises:
        ValueError: it has no such option.
    """
    from selftaught.samplers.scoring import TransformersScorer

    _check_options("A scorer", TransformersScorer, options)
    return TransformersScorer(model, **options)  # type: ignore[arg-type]


def _check_options(what: str, opened: Callable[..., object], options: Iterable[str]) -> None:
    """Refuse options that the thing opened does not have; its first parameter is the model."""
    known = list(inspect.signature(opened).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(known)}."
        )


def as_seen(model: str, prompt: Text) -> str:
    """The prompt exactly as a model reads it, special tokens and chat template included."""
    from selftaught.samplers.loading import prompt_as_seen

    return prompt_as_seen(model, prompt)
