"""Validation of training options, before anything is trained or sampled."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from selftaught.options import check_types, is_number

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

Config = TypeVar("Config", bound="TrainingArguments")

RESERVED = {
    "output_dir": "selftaught sets the folder; use --out",
    "resume_from_checkpoint": "a repeated command resumes from its last checkpoint automatically",
    "dataset_kwargs": "selftaught tokenizes the examples before it passes them to the trainer",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push",
         "hub_revision"),
        "the finished model is uploaded by --push-to-hub, or by `selftaught push`",
    ),
    "hub_token": "the token is read from the environment variable HF_TOKEN or from `hf auth login`",
}  # fmt: skip
"""TRL and transformers options that selftaught sets itself, with the reason."""
NEEDS_EVALUATION = {"eval_strategy": "no", "do_eval": False, "load_best_model_at_end": False}
"""Options that need evaluation data, with their values when there is none.

Fine-tuning in selftaught has no evaluation data.
"""
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda n: n >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda n: n >= 1, "at least 1"),
    "max_length": (lambda n: n is None or n >= 3, "at least 3 (prompt, completion, end token)"),
    "max_steps": (lambda n: n == -1 or n >= 1, "at least 1, or -1 to use num_train_epochs"),
    "num_train_epochs": (lambda n: is_number(n) and n > 0, "above 0"),
    "learning_rate": (lambda n: is_number(n) and n > 0, "above 0"),
    "warmup_steps": (lambda n: n >= 0, "0 or more"),
    "weight_decay": (lambda n: is_number(n) and n >= 0, "0 or more"),
    "max_grad_norm": (lambda n: is_number(n) and n >= 0, "0 or more"),
    "save_steps": (lambda n: n > 0, "above 0"),
    "logging_steps": (lambda n: n > 0, "above 0"),
    "seed": (lambda n: 0 <= n < 2**32, "from 0 to 2**32 - 1"),
    "beta": (lambda n: is_number(n) and n > 0, "above 0"),
    "label_smoothing": (lambda n: 0 <= n < 1, "at least 0 and below 1"),
}


def checked_config(
    name: str, kind: "type[Config]", page: str, ours: Mapping[str, Any], options: Mapping[str, Any]
) -> "Config":
    """Build a trainer config from selftaught's defaults and the caller's options.

    Args:
        name: Name of the config class, for error messages.
        kind: The config class.
        page: Sentence with the URL of the class's documentation, for error messages.
        ours: selftaught's defaults.
        options: The caller's options; they override the defaults.

    Raises:
        ValueError: An option is unknown, has the wrong type, is out of bounds, is reserved, or is
            rejected by the class. The message names the option.
        ImportError: A package that an option needs is not installed.
    """
    for option, why in RESERVED.items():
        if option in options:
            raise ValueError(f"The training option {option!r} cannot be given: {why}.")
    for option, without in NEEDS_EVALUATION.items():
        if option in options and options[option] != without:
            raise ValueError(
                f"The training option {option!r} cannot be {options[option]!r}: fine-tuning in "
                "selftaught has no evaluation data. Remove the option."
            )
    check_types(name, kind, options)
    for option, (is_valid, expected) in BOUNDS.items():
        if option in options and not is_valid(options[option]):
            raise ValueError(f"{option} must be {expected}; got {options[option]!r}.")
    try:
        config = kind(**(dict(ours) | dict(options)))
    except TypeError as error:
        raise ValueError(f"{name} refused the training options: {error}. {page}") from None
    except ValueError as error:
        raise ValueError(f"{name} refused the training options: {error}") from None
    _check_reports(list(config.report_to or ()))
    return config


def _check_reports(names: list[str]) -> None:
    """Raise if `report_to` names a service whose package is not installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in (*available, "none"):
            raise ValueError(
                f"report_to must be one of {', '.join(['none', *available])}; got {name!r}, "
                "which is unknown or whose package is not installed."
            )


def training_steps(rows: int, arguments: "TrainingArguments") -> int:
    """Return the number of optimizer steps of a training, as transformers' `Trainer` counts them.

    Args:
        rows: Number of training rows per epoch.
        arguments: The training arguments.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    size = arguments.per_device_train_batch_size * arguments.world_size
    batches = rows // size if arguments.dataloader_drop_last else -(-rows // size)
    per_epoch = max(1, -(-batches // arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)


def check_lora(model: str, lora: "LoraConfig") -> None:
    """Check that a LoRA configuration fits a model's layers, without loading the weights.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        lora: A PEFT `LoraConfig`.

    Raises:
        ValueError: No layer matches `target_modules`, a layer does not support an adapter, or the
            rank is below 1.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    names = lora.target_modules
    targets = names if isinstance(names, str) else ",".join(sorted(names or ()))
    try:
        get_peft_model(empty, lora)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"The LoRA adapter does not fit {model}: lora_r {lora.r}, "
            f"lora_alpha {lora.lora_alpha}, lora_target_modules {targets} ({error})."
        ) from None
