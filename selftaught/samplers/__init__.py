"""Where a model can live; `open_sampler` opens one by name."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from selftaught.options import check_names, check_options
from selftaught.records import Text
from selftaught.rendering import TemplateOptions
from selftaught.samplers.base import Closing, Sampler, SamplingParams
from selftaught.thought_marks import ThoughtMarks

if TYPE_CHECKING:
    from selftaught.samplers.local.scorer import TransformersScorer

__all__ = [
    "Closing",
    "Engine",
    "Sampler",
    "SamplingParams",
    "as_seen",
    "check_model",
    "check_prompts",
    "check_sampler",
    "count_too_long",
    "open_sampler",
    "open_scorer",
    "prompt_opens_thought",
]


def open_sampler(name: str, model: str, **options: object) -> Sampler:
    """A sampler of the named kind for a model; close it, or use it in a `with`.

    Raises:
        ValueError: no sampler has this name, or it has no such option.
        ImportError: its package is not installed.
    """
    check_sampler(name, options)
    match name:
        case "transformers":
            from selftaught.samplers.local.sampler import TransformersSampler

            return TransformersSampler(model, **options)  # type: ignore[arg-type]
        case "vllm":
            from selftaught.samplers.vllm_engine import VllmSampler

            return VllmSampler(model, **options)  # type: ignore[arg-type]
        case "openai":
            from selftaught.samplers.openai_server import OpenAISampler

            return OpenAISampler(model, **options)  # type: ignore[arg-type]
        case "ray":
            from selftaught.samplers.ray_pool import RaySampler

            return RaySampler(model, open_sampler, **options)  # type: ignore[arg-type]
        case _:
            raise _no_sampler(name)


def check_sampler(name: str, options: Mapping[str, object], *, here: bool = True) -> None:
    """Check the name and the options of a sampler without opening it or reading a model.

    Args:
        here: it is opened in this process, so what it needs must be on this machine.

    Raises:
        ValueError: no sampler has this name, it has no such option, or a value is of another type or
            out of bounds.
        ImportError: its package is not installed.
    """
    what = f"The sampler {name!r}"
    match name:
        case "transformers":
            from selftaught.samplers.local.sampler import TransformersSampler, check_device

            check_options(what, TransformersSampler, options)
            if options.get("batch_size", 1) < 1:  # type: ignore[operator]
                raise ValueError(f"batch_size must be at least 1; got {options['batch_size']}.")
            if here:
                check_device(str(options.get("device", "auto")))
        case "vllm":
            from selftaught.samplers.vllm_engine import check_engine

            check_engine(options, here=here)
        case "openai":
            from selftaught.samplers.openai_server import OpenAISampler, check_values

            check_names(what, OpenAISampler, options)
            check_values(**options)  # type: ignore[arg-type]
            if find_spec("openai") is None:
                raise ImportError(
                    'The package openai is not installed: pip install "selftaught[openai]".'
                )
        case "ray":
            from selftaught.samplers.ray_pool import check_pool

            engine, rest = check_pool(options)
            check_sampler(engine, rest, here=False)
        case _:
            raise _no_sampler(name)


def _no_sampler(name: str) -> ValueError:
    return ValueError(f"No sampler is called {name!r}; there are: transformers, vllm, openai, ray.")


def check_model(model: str) -> None:
    """Check that a folder or hub name holds a causal language model, without reading its weights.

    Raises:
        ValueError: its configuration is not that of a causal language model, or its weight files
            cannot be read.
        OSError: there is no such model.
    """
    from selftaught.samplers.local.model_loading import check_causal
    from selftaught.samplers.weights import check_weights

    check_causal(model)
    check_weights(model)


def check_prompts(
    model: str,
    prompts: Iterable[tuple[str, Text]],
    max_tokens: int,
    sampler: str = "transformers",
    options: Mapping[str, Any] | None = None,
    template: TemplateOptions | None = None,
) -> None:
    """Check that prompts fit into the model's context with `max_tokens`, as its sampler will.

    Args:
        prompts: names, for errors, with prompts.
        sampler, options: what will sample them; vLLM's `max_model_len` is a context of its own.
        template: variables of the chat template, for messages.

    Raises:
        ValueError: a prompt does not fit, is empty, or cannot be rendered; names it.
    """
    from selftaught.samplers.tokens import check_fitting, context_of

    options = options or {}
    engine = options.get("engine", "transformers") if sampler == "ray" else sampler
    check_fitting(model, prompts, max_tokens, context_of(model, engine, options), template)


def count_too_long(
    model: str, prompts: Iterable[Text], length: int, template: TemplateOptions | None = None
) -> int:
    """How many prompts leave no room for a completion and its end token within `length` tokens."""
    from selftaught.samplers.tokens import longer_than

    return longer_than(model, prompts, length - 2, template)


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
    from selftaught.samplers.local.scorer import TransformersScorer

    check_options("A scorer", TransformersScorer, options)
    return TransformersScorer(model, **options)  # type: ignore[arg-type]


def as_seen(model: str, prompt: Text, options: TemplateOptions | None = None) -> str:
    """The prompt exactly as a model reads it, special tokens and chat template included.

    Args:
        options: variables of the chat template (`chat_template_kwargs`), for messages.

    Raises:
        ValueError: the chat template refuses the messages, or no answer to them can be learned.
    """
    from selftaught.samplers.tokens import prompt_as_seen

    return prompt_as_seen(model, prompt, options)


def prompt_opens_thought(
    model: str, prompt: Text, marks: ThoughtMarks, options: TemplateOptions | None = None
) -> bool:
    """Return whether a prompt, as a model reads it, ends inside a thought."""
    from selftaught.samplers.tokens import prompt_opens_thought

    return prompt_opens_thought(model, prompt, marks, options)
