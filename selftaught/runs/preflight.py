"""Checks of a run before it samples or trains anything; a dry run and the run itself call the same.

The model's configuration, tokenizer and weight headers are read, its weights are not.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selftaught.options import check_options
from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.samplers import check_model, check_prompts, check_sampler, count_too_long
from selftaught.training import check_lora, lora_config
from selftaught.training.launch import Kind, Launched, launch_of, refuse_unfit, stage_config

Asked = tuple[PromptStyle, Sequence[Problem]]
"""Problems with the style in which a run puts them to a model."""


class Settings(Launched, Protocol):
    """The options that every method has."""

    @property
    def out(self) -> Path: ...
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
    config: Settings, base: str, trainings: Sequence[tuple[Kind, Mapping[str, Any]]]
) -> None:
    """Check the sampler, its options, the launcher, the training options and the base model.

    Args:
        base: the folder or hub name of the base model.
        trainings: the kinds of fine-tuning in the run with their options, as TRL names them.

    Raises:
        ValueError: one of them cannot be used; names it.
        ImportError: a package is not installed.
        OSError: there is no such model.
    """
    if config.sampler == "openai":
        raise ValueError(
            "The sampler 'openai' is for `sample` and `evaluate` only: a server does not have the "
            "models that a run trains. Choose transformers, vllm or ray."
        )
    check_sampler(config.sampler, config.sampler_options)
    check_model(base)
    for kind, options in trainings:
        refuse_unfit(launch_of(config), options)
        stage_config(kind, config.out, options)
    if config.use_peft:
        adapter = lora_config(r=config.lora_r, alpha=config.lora_alpha,
                              target_modules=config.lora_target_modules)  # fmt: skip
        check_lora(base, adapter)


def check_texts(
    config: Settings, model: str, asked: Iterable[Asked], taught: Asked, max_tokens: int,
    max_length: int | None,
) -> int:  # fmt: skip
    """Check that every prompt fits the model's context, and some the length of training examples.

    Args:
        asked: what the run samples from the model.
        taught: the style of training examples, with the problems they are made of.
        max_length: of a training example, in tokens; None: any.

    Returns:
        How many of the taught prompts leave no room for a completion within `max_length`.

    Raises:
        ValueError: a prompt does not fit the context with `max_tokens`, or no training prompt leaves
            room within `max_length`.
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
            f"max_length must leave room for a completion; got {max_length}, and each of the "
            f"{len(problems)} training prompts has {max_length - 1} tokens or more. Raise max_length."
        )
    return too_long


def check_method_options(name: str, config: type, options: Mapping[str, Any]) -> None:
    """Check the names and types of a method's options that arrive as a mapping.

    Raises:
        ValueError: an option is unknown or of another type; names it.
    """
    if "out" in options:
        raise ValueError(
            f"The method {name!r} gets its folder from the comparison; leave its option 'out' out."
        )
    check_options(f"The method {name!r}", config, options)
