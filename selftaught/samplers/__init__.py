"""Where a model can live; `open_sampler` opens one by name."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from selftaught.option_types import check_types
from selftaught.records import Text
from selftaught.samplers.base import Closing, Sampler, SamplingParams

if TYPE_CHECKING:
    from selftaught.samplers.scoring import TransformersScorer

__all__ = [
    "Closing",
    "Engine",
    "Sampler",
    "SamplingParams",
    "as_seen",
    "open_sampler",
    "open_scorer",
]


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


class Engine(Closing):
    """The sampler of one model at a time, kept open until another model is asked for.

    A loop that measures a model and then samples it opens it once that way; opening takes vLLM up to
    minutes. Close it before anything else wants the memory or writes the model's folder.

    Args:
        name: of the sampler; see `open_sampler`.
        options: the sampler's own.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, options
        self._held: tuple[str, Sampler] | None = None

    def of(self, model: str) -> Sampler:
        """The sampler of a model; it is this engine's to close.

        Raises:
            ValueError: what `open_sampler` refuses.
        """
        if self._held is None or self._held[0] != model:
            self.close()
            self._held = model, open_sampler(self._name, model, **self._options)
        return self._held[1]

    def close(self) -> None:
        """Close the sampler that is open, if one is; `of` opens again."""
        held, self._held = self._held, None
        if held is not None:
            held[1].close()


def open_scorer(model: str, **options: object) -> "TransformersScorer":
    """What tells how likely completions are to a model; close it, or use it in a `with`.

    Raises:
        ValueError: it has no such option.
    """
    from selftaught.samplers.scoring import TransformersScorer

    _check_options("A scorer", TransformersScorer, options)
    return TransformersScorer(model, **options)  # type: ignore[arg-type]


def _check_options(what: str, opened: type, options: Mapping[str, object]) -> None:
    """Refuse options that the class does not have, and values of other types; its first parameter is
    the model."""
    known = list(inspect.signature(opened).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(known)}."
        )
    check_types(what, options, get_type_hints(opened.__init__))


def as_seen(model: str, prompt: Text) -> str:
    """The prompt exactly as a model reads it, special tokens and chat template included."""
    from selftaught.samplers.loading import prompt_as_seen

    return prompt_as_seen(model, prompt)
