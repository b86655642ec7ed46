"""Where a model can live; `open_sampler` opens one by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from selftaught.records import Text
from selftaught.rendering import TemplateOptions
from selftaught.samplers.base import Closing, Sampler, SamplingParams
from selftaught.thought_marks import ThoughtMarks

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
    "prompt_opens_thought",
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


def _check_options(what: str, opened: Callable[..., object], options: Iterable[str]) -> None:
    """Refuse options that the thing opened does not have; its first parameter is the model."""
    known = list(inspect.signature(opened).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(known)}."
        )


def as_seen(model: str, prompt: Text, options: TemplateOptions | None = None) -> str:
    """The prompt exactly as a model reads it, special tokens and chat template included.

    Args:
        options: variables of the chat template (`chat_template_kwargs`), for messages.

    Raises:
        ValueError: the chat template refuses the messages, or no answer to them can be learned.
    """
    from selftaught.samplers.loading import prompt_as_seen

    return prompt_as_seen(model, prompt, options)


def prompt_opens_thought(
    model: str, prompt: Text, marks: ThoughtMarks, options: TemplateOptions | None = None
) -> bool:
    """Return whether a prompt, as a model reads it, ends inside a thought."""
    from selftaught.samplers.loading import prompt_opens_thought

    return prompt_opens_thought(model, prompt, marks, options)
