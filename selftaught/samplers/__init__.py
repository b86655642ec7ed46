"""Samplers: backends that turn prompts into completions. `open_sampler` opens one by name."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from selftaught.options import Option, check_names, check_options, check_types, options_of
from selftaught.records import Text
from selftaught.rendering import TemplateOptions
from selftaught.samplers.base import Closing, Sampler, SamplingParams
from selftaught.thought_marks import ThoughtMarks

if TYPE_CHECKING:
    from selftaught.samplers.local.scorer import TransformersScorer

__all__ = [
    "SAMPLERS",
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
    "sampler_help",
]

SAMPLERS = {
    "transformers": "any Hugging Face causal language model, in this process",
    "vllm": "vLLM, in a child process",
    "openai": "a server with an OpenAI-compatible API (`sample`, `evaluate` and `solve`)",
    "ray": "several samplers, transformers or vllm, on a Ray cluster",
}
"""Names of the samplers, with a one-line description."""


def open_sampler(name: str, model: str, **options: object) -> Sampler:
    """Open a sampler for a model. Close it, or use it in a `with` statement.

    Args:
        name: "transformers", "vllm", "openai" or "ray".
        model: Model folder or name on the Hugging Face Hub; for "openai", the name on the server.
        options: The sampler's options; see its class.

    Raises:
        ValueError: The name or an option is unknown.
        ImportError: The sampler's package is not installed.
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
    """Check the name and the options of a sampler, without opening it or reading a model.

    Args:
        name: Name of the sampler; see `open_sampler`.
        options: The sampler's options.
        here: Whether the sampler will run on this machine, so that its device and package must be
            available here.

    Raises:
        ValueError: The name or an option is unknown, or a value has the wrong type or is out of
            bounds.
        ImportError: The sampler's package is not installed.
    """
    _check(name, options, here, ())


def _check(name: str, options: Mapping[str, object], here: bool, near: Sequence[str]) -> None:
    """Check a sampler; see `check_sampler`. `near` are more names that an error may suggest."""
    what, see = f"The sampler {name!r}", f"selftaught samplers {name}"
    match name:
        case "transformers":
            from selftaught.samplers.local.sampler import TransformersSampler, check_device

            check_names(what, TransformersSampler, options, see=see, near=near)
            check_types(what, TransformersSampler.__init__, options)
            if isinstance(options.get("tokenizer"), str):
                raise ValueError(
                    "The option 'tokenizer' is a loaded tokenizer, for use from Python; that of a "
                    "model folder is loaded without it."
                )
            size = options.get("batch_size")
            if isinstance(size, int) and size < 1:
                raise ValueError(f"batch_size must be at least 1; got {options['batch_size']}.")
            if here:
                check_device(str(options.get("device", "auto")))
        case "vllm":
            from selftaught.samplers.vllm_arguments import check_engine

            check_engine(options, here=here, near=near)
        case "openai":
            from selftaught.samplers.openai_server import OpenAISampler, check_values

            check_names(what, OpenAISampler, options, see=see)
            check_values(**options)  # type: ignore[arg-type]
            if find_spec("openai") is None:
                raise ImportError(
                    'The package openai is not installed: pip install "selftaught[openai]".'
                )
        case "ray":
            from selftaught.samplers.ray_pool import RaySampler, check_pool

            engine, rest = check_pool(options)
            own = [one.name for one in options_of(RaySampler)[1]]
            _check(engine, rest, here=False, near=own)
        case _:
            raise _no_sampler(name)


def _no_sampler(name: str) -> ValueError:
    if name == "quiet":
        return ValueError("The sampler 'quiet' works with `sample` and `evaluate` only.")
    close = get_close_matches(name, (*SAMPLERS, "quiet"), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"No sampler is called {name!r}; there are: {', '.join(SAMPLERS)}.{hint}")


def sampler_help(name: str) -> tuple[str, list[Option], str]:
    """Return the description of a sampler, its options, and a note on further options.

    Nothing of the sampler's package is imported, and it need not be installed.

    Raises:
        ValueError: The name is unknown.
    """
    match name:
        case "transformers":
            from selftaught.samplers.local.sampler import TransformersSampler

            options = [one for one in options_of(TransformersSampler)[1] if one.name != "tokenizer"]
            return SAMPLERS[name], options, ""
        case "vllm":
            from selftaught.samplers.vllm_arguments import NOT_INSTALLED, engine_arguments
            from selftaught.samplers.vllm_engine import VllmSampler

            found = engine_arguments()
            note = "The options are the engine arguments of vLLM."
            if not found:
                note += f" They are listed here where it is installed. {NOT_INSTALLED}"
            own = options_of(VllmSampler)[1]
            return SAMPLERS[name], own + [one for one in found if one.name != "dtype"], note
        case "openai":
            from selftaught.samplers.openai_server import OpenAISampler

            return SAMPLERS[name], options_of(OpenAISampler)[1], ""
        case "ray":
            from selftaught.samplers.ray_pool import RaySampler

            note = "The options of the engine are accepted too: selftaught samplers transformers (or vllm)."
            return SAMPLERS[name], options_of(RaySampler)[1], note
        case _:
            raise _no_sampler(name)


def check_model(model: str) -> None:
    """Check that a folder or Hub name is a causal language model, without reading its weights.

    Raises:
        ValueError: The configuration is not that of a causal language model, or the weight files
            are damaged or incomplete.
        OSError: The model does not exist.
    """
    from selftaught.samplers.local.model_loading import check_causal
    from selftaught.samplers.weights import check_weights

    check_causal(model)
    check_weights(model)


def count_parameters(model: str) -> int:
    """Return the number of parameters of a model, without reading its weights.

    Args:
        model: Model folder or name on the Hugging Face Hub.

    Raises:
        ValueError: It is not a causal language model, or the weight files are damaged.
        OSError: The model does not exist.
    """
    from selftaught.samplers.local.model_loading import parameters_of

    return parameters_of(model)


def check_prompts(
    model: str,
    prompts: Iterable[tuple[str, Text]],
    max_tokens: int,
    sampler: str = "transformers",
    options: Mapping[str, Any] | None = None,
    template: TemplateOptions | None = None,
) -> None:
    """Check that each prompt with `max_tokens` new tokens fits into the model's context.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        prompts: Prompts, each with a name for error messages.
        max_tokens: Maximum number of new tokens.
        sampler: Name of the sampler that will be used.
        options: The sampler's options. vLLM's `max_model_len` limits the context.
        template: Variables of the chat template. Used only for messages.

    Raises:
        ValueError: A prompt does not fit, is empty, or cannot be rendered. The message names it.
    """
    from selftaught.samplers.tokens import check_fitting, context_of

    options = options or {}
    engine = options.get("engine", "transformers") if sampler == "ray" else sampler
    check_fitting(model, prompts, max_tokens, context_of(model, engine, options), template)


def count_too_long(
    model: str, prompts: Iterable[Text], length: int, template: TemplateOptions | None = None
) -> int:
    """Return how many prompts, with a completion and an end token, exceed `length` tokens."""
    from selftaught.samplers.tokens import longer_than

    return longer_than(model, prompts, length - 2, template)


class Engine(Closing):
    """Keeps the sampler of one model open until another model is requested.

    A loop that evaluates a model and then samples from it loads the model only once; starting vLLM
    can take minutes. Close the engine before other code needs the memory or writes the model's
    folder.

    Args:
        name: Name of the sampler; see `open_sampler`.
        options: The sampler's options.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, options
        self._opened: tuple[str, Sampler] | None = None

    def of(self, model: str) -> Sampler:
        """Return the sampler of a model. The engine closes it, not the caller.

        Raises:
            ValueError: See `open_sampler`.
        """
        if self._opened is None or self._opened[0] != model:
            self.close()
            self._opened = model, open_sampler(self._name, model, **self._options)
        return self._opened[1]

    def close(self) -> None:
        """Close the open sampler, if there is one. `of` opens a new one."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()


def open_scorer(model: str, **options: object) -> "TransformersScorer":
    """Open a scorer, which computes log-probabilities of completions under a model.

    Close it, or use it in a `with` statement.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        options: Options of `TransformersScorer`.

    Raises:
        ValueError: An option is unknown.
    """
    from selftaught.samplers.local.scorer import TransformersScorer

    check_options("A scorer", TransformersScorer, options)
    return TransformersScorer(model, **options)  # type: ignore[arg-type]


def as_seen(model: str, prompt: Text, options: TemplateOptions | None = None) -> str:
    """Return a prompt exactly as the model reads it, with special tokens and chat template.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        prompt: Text or messages.
        options: Variables of the chat template (`chat_template_kwargs`). Used only for messages.

    Raises:
        ValueError: The chat template rejects the messages, or cannot be used for training because
            the end of an answer cannot be determined.
    """
    from selftaught.samplers.tokens import prompt_as_seen

    return prompt_as_seen(model, prompt, options)


def prompt_opens_thought(
    model: str, prompt: Text, marks: ThoughtMarks, options: TemplateOptions | None = None
) -> bool:
    """Return whether a prompt, as rendered for a model, ends inside a thought."""
    from selftaught.samplers.tokens import prompt_opens_thought

    return prompt_opens_thought(model, prompt, marks, options)
