"""Checks before a run samples or trains anything. A dry run performs the same checks.

They read the model's configuration, tokenizer and weight file headers, but not its weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selftaught.options import check_options
from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.runs.trackers import check_trackers
from selftaught.samplers import check_model, check_prompts, check_sampler, count_too_long
from selftaught.training import check_lora, lora_config
from selftaught.training.launch import Kind, Launched, launch_of, refuse_unfit, stage_config

Asked = tuple[PromptStyle, Sequence[Problem]]
"""A prompt style with the problems that a run prompts a model with."""


class Settings(Launched, Protocol):
    """The options that all methods share."""

    @property
    def out(self) -> Path: ...
    @property
    def report_to(self) -> Sequence[str]: ...
    @property
    def sampler(self) -> str: ...
    @property
    def sampler_options(self) -> dict[str, Any]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def use_peft(self) -> bool: ...
    @property
    def lora_r(self) -> int: ...
    @property
    def lora_alpha(self) -> int: ...
    @property
    def lora_target_modules(self) -> str: ...


def check_settings(
    config: Settings, base: str, trainings: Sequence[tuple[Kind, Mapping[str, object]]]
) -> None:
    """Check the trackers, the sampler and its options, the launcher, the training options and the base model.

    Args:
        config: The method's configuration.
        base: Folder or Hub name of the base model.
        trainings: The kinds of fine-tuning in the run, each with its options under TRL's names.

    Raises:
        ValueError: An option is invalid. The message names it.
        ImportError: A package is not installed.
        OSError: The model does not exist.
    """
    check_trackers(config.report_to)
    refuse_server(config.sampler)
    check_sampler(config.sampler, config.sampler_options)
    check_model(base)
    for kind, options in trainings:
        refuse_unfit(launch_of(config), options)
        stage_config(kind, config.out, options)
    if config.use_peft:
        adapter = lora_config(r=config.lora_r, alpha=config.lora_alpha,
                              target_modules=config.lora_target_modules)  # fmt: skip
        check_lora(base, adapter)


def refuse_server(sampler: str) -> None:
    """Raise a `ValueError` if a sampler cannot sample the models that a run trains."""
    if sampler == "openai":
        raise ValueError(
            "The sampler 'openai' works with `sample` and `evaluate` only, because a server cannot "
            "load the models that a run trains. Use transformers, vllm or ray."
        )


def check_texts(
    config: Settings, model: str, asked: Iterable[Asked], taught: Asked, max_tokens: int,
    max_length: int | None,
) -> int:  # fmt: skip
    """Check that prompts fit the model's context and training prompts fit `max_length`.

    Args:
        config: The method's configuration.
        model: Folder or Hub name of the model.
        asked: Prompt styles and problems that the run samples completions for.
        taught: Prompt style and problems of the training examples.
        max_tokens: Maximum number of new tokens of a completion.
        max_length: Maximum number of tokens of a training example. None: unlimited.

    Returns:
        The number of training prompts that are too long to add a completion within `max_length`.

    Raises:
        ValueError: A prompt with `max_tokens` exceeds the context, or all training prompts are too
            long.
    """
    for style, problems in asked:
        prompts = ((problem.id, style(problem)) for problem in problems)
        check_prompts(model, prompts, max_tokens, config.sampler, config.sampler_options,
                      style.chat_template_kwargs)  # fmt: skip
    style, problems = taught
    if max_length is None or not problems:
        return 0
    too_long = count_too_long(model, map(style, problems), max_length, style.chat_template_kwargs)
    if too_long == len(problems):
        raise ValueError(
            f"max_length must be long enough for a prompt and a completion; got {max_length}, but "
            f"each of the {len(problems)} training prompts has {max_length - 1} tokens or more. "
            "Increase max_length."
        )
    return too_long


def check_method_options(name: str, config: type, options: Mapping[str, object]) -> None:
    """Check the names and types of a method's options that are given as a mapping.

    Args:
        name: Name of the method, for error messages.
        config: The method's configuration class.
        options: The options.

    Raises:
        ValueError: An option is unknown or has the wrong type. The message names it.
    """
    if "out" in options:
        raise ValueError(
            f"The comparison sets the folder of the method {name!r}. Remove its option 'out'."
        )
    check_options(f"The method {name!r}", config, options)
