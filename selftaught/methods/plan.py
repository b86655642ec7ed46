"""What a run would do: its plan, printed by `--dry-run`."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from selftaught.methods.config import MethodConfig, SeededConfig
from selftaught.methods.estimate import Cost, time_lines
from selftaught.methods.run import Run, trainer_options
from selftaught.metrics import wilson
from selftaught.option_groups import as_number
from selftaught.runs.folder import check_config
from selftaught.samplers import as_seen
from selftaught.training.trainer import shared_batch


def plan(run: Run, work: Sequence[tuple[str, str]], cost: Cost, changeable: Sequence[str]) -> str:
    """Describe what a run would do: model, task, work, and the first prompt as the model would see it.

    Args:
        run: an opened run.
        work: (name, value) pairs on what the method samples and trains.
        cost: the amounts of work.
        changeable: options that may differ from those of an earlier run in the same folder.

    Raises:
        ValueError: the folder contains a run with other options.
    """
    config, problem, style = run.config, run.train[0], run.first_style
    check_config(config.out, config.plain(), changeable, config.updated)
    own = sum(problem.rationale is not None for problem in run.train)
    lines = [
        ("Model", run.base),
        ("Task", f"{config.task}: {len(run.train)} training problems ({own} with a rationale), "
         f"{len(run.test)} test problems"),
        ("Prompt", config.prompt),
        *work,
        ("Batches", batches(config)),
        *time_lines(run, cost),
        *([("Too long", f"{run.too_long} of {len(run.train)} training prompts leave no tokens for "
            f"a completion within max_length {config.max_length}; they are not used for training")]
          if run.too_long else []),
        *_small_data(run),
        ("Folder", str(config.out)),
    ]  # fmt: skip
    answer = "" if problem.tests else f", gold answer {problem.gold}"  # a program may be long
    return "\n".join(
        [
            *(f"{name:<11} {value}" for name, value in lines),
            f"First prompt ({problem.id}{answer}), between the lines:",
            "-" * 72,
            as_seen(run.base, style(problem), style.chat_template_kwargs),
            "-" * 72,
        ]
    )


def _small_data(run: Run) -> list[tuple[str, str]]:
    """Return a note if there are so few problems that the result says little."""
    notes = []
    if len(run.train) < FEW_TRAINING:
        notes.append(f"{len(run.train)} training problems are few; expect little gain")
    if len(run.test) < FEW_TEST:
        low, high = wilson(len(run.test) // 2, len(run.test))
        notes.append(
            f"with {len(run.test)} test problems, the 95% interval of an accuracy near 50% is "
            f"{100 * (high - low):.0f} points wide"
        )
    return [("Note", "; ".join(notes))] if notes else []


FEW_TRAINING, FEW_TEST = 50, 100


def batches(config: MethodConfig) -> str:
    """Describe the batch sizes, LoRA and other training options, for a dry run."""
    one_device = int(as_number(config.per_device_train_batch_size))
    device, steps = shared_batch(one_device, config.accumulation, config.num_processes)
    processes = f" on {config.num_processes} processes" if config.num_processes > 1 else ""
    lora = f"; LoRA of rank {config.lora_r}" if config.use_peft else ""
    more = "".join(f"; {name} {value}" for name, value in config.training.items())
    return (
        f"{config.train_batch_size} examples per optimizer step: {device} per forward pass, "
        f"{steps} accumulated{processes}{lora}{more}"
    )


def epochs_cost(config: SeededConfig, examples: int) -> int:
    """Return the number of training examples of one fine-tuning, counted once per pass."""
    return passes_cost(trainer_options(config), examples)


def passes_cost(options: Mapping[str, Any], examples: int) -> int:
    """Return the number of training examples of one training, counted once per pass.

    Args:
        options: training options under TRL's names.
        examples: number of different examples.
    """
    if options.get("max_steps", -1) > 0:
        size = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        return options["max_steps"] * size
    return ceil(options["num_train_epochs"] * examples)


def preference_cost(options: Mapping[str, Any], pairs: int) -> int:
    """Return the cost of a DPO training, in examples of supervised fine-tuning.

    A pair has two completions, and the reference model scores both, which takes about a third of a
    training step each.
    """
    return ceil(2 * (1 + 1 / 3) * passes_cost(options, pairs))


def seed_size(run: Run[SeededConfig], problems: int) -> int:
    """Return the maximum number of examples in the seed set of `problems` problems."""
    own = any(problem.rationale is not None for problem in run.train)
    return problems if own else problems * run.config.seed_samples


def seed_cost(run: Run[SeededConfig], problems: int | None = None) -> Cost:
    """Return the cost of the seed set and the fine-tuning on it, with its measurement.

    Args:
        run: an opened run.
        problems: number of training problems. None means all.
    """
    size = seed_size(run, len(run.train) if problems is None else problems)
    own = any(problem.rationale is not None for problem in run.train)
    return Cost(
        completions=(0 if own else size) + len(run.test), examples=epochs_cost(run.config, size)
    )


def seed_work(run: Run[SeededConfig]) -> list[tuple[str, str]]:
    """Describe the fine-tuning on the seed set, as (name, value) pairs for a dry run."""
    config = run.config
    own = sum(problem.rationale is not None for problem in run.train)
    passes = f"{config.max_steps} optimizer steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"  # fmt: skip
    return [
        ("First set", f"{own} rationales of the task" if own else
         f"the correct ones of {len(run.train) * config.seed_samples} completions of the base model"),
        ("Training", f"{passes} per model, learning rate "
         f"{config.learning_rate:g}"),
    ]  # fmt: skip
