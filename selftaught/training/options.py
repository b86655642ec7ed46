"""Training options that are refused before anything is trained or sampled."""

from collections.abc import Callable, Mapping
from typing import Any

from selftaught.options import check_types, is_number

RESERVED = {
    "output_dir": "the run chooses the folder; give --out",
    "resume_from_checkpoint": "a run that is repeated resumes by itself",
    "dataset_kwargs": "examples are tokenized before the trainer gets them",
}
"""Options of TRL and transformers that would be overridden, with the reason."""
NEEDS_EVALUATION = {"eval_strategy": "no", "do_eval": False, "load_best_model_at_end": False}
"""Options that need evaluation data, which a fine-tuning here does not have, and their values without."""
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda n: n >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda n: n >= 1, "at least 1"),
    "max_length": (lambda n: n is None or n >= 3, "at least 3: a prompt, a completion and its end"),
    "max_steps": (lambda n: n == -1 or n >= 1, "at least 1, or -1 for num_train_epochs to decide"),
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
    name: str, kind: Any, page: str, ours: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """A trainer's config made of our defaults and the caller's options.

    Args:
        name: of the config's class, and `page`: where its fields are listed, for errors.
        kind: the class.

    Raises:
        ValueError: an option is unknown, of another type, out of bounds, reserved, or refused by the
            class; names it.
        ImportError: a package that an option needs is not installed.
    """
    for option, why in RESERVED.items():
        if option in options:
            raise ValueError(f"The training option {option!r} cannot be given: {why}.")
    for option, without in NEEDS_EVALUATION.items():
        if option in options and options[option] != without:
            raise ValueError(
                f"The training option {option!r} cannot be {options[option]!r}: a fine-tuning here has "
                "no evaluation data."
            )
    check_types(name, kind, options)
    for option, (holds, wanted) in BOUNDS.items():
        if option in options and not holds(options[option]):
            raise ValueError(f"{option} must be {wanted}; got {options[option]!r}.")
    try:
        config = kind(**(dict(ours) | dict(options)))
    except TypeError as error:
        raise ValueError(f"{name} refused the training options: {error}. {page}") from None
    except ValueError as error:
        raise ValueError(f"{name} refused the training options: {error}") from None
    _check_reports(config.report_to)
    return config


def _check_reports(names: list[str]) -> None:
    """Refuse reports to a service whose package is not installed, which the trainer would."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for one in names:
        if one not in (*available, "none"):
            raise ValueError(
                f"report_to must be none or of {', '.join(available) or 'no other, for none is installed'};"
                f" got {one!r}, which is unknown or whose package is not installed."
            )


def check_lora(model: str, lora: Any) -> None:
    """Check that an adapter fits a model's layers, on a model without weights.

    Raises:
        ValueError: no layer has a name of `target_modules`, a layer cannot have an adapter, or the rank
            is below 1.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    names = lora.target_modules
    try:
        get_peft_model(empty, lora)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"The adapter does not fit {model}: lora_r {lora.r}, lora_alpha {lora.lora_alpha}, "
            f"lora_target_modules {names if isinstance(names, str) else ','.join(sorted(names or ()))} "
            f"({error})."
        ) from None
