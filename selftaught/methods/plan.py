"""What a run would do: its plan, printed by `--dry-run`."""

from collections.abc import Sequence

from selftaught.methods.config import MethodConfig, SeededConfig
from selftaught.methods.estimate import Cost, time_lines
from selftaught.methods.run import Run
from selftaught.metrics import wilson
from selftaught.option_groups import as_number
from selftaught.runs.folder import check_config
from selftaught.samplers import as_seen


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
    return "\n".join(
        [
            *(f"{name:<11} {value}" for name, value in lines),
            f"First prompt ({problem.id}, gold answer {problem.gold}), between the lines:",
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
    device, steps = config.per_device_train_batch_size, config.accumulation
    processes = f" on {config.num_processes} processes" if config.num_processes > 1 else ""
    lora = f"; LoRA of rank {config.lora_r}" if config.use_peft else ""
    more = "".join(f"; {name} {value}" for name, value in config.training.items())
    return (
        f"{config.train_batch_size} examples per optimizer step: {device} per forward pass, "
        f"{max(1, steps // config.num_processes)} accumulated{processes}{lora}{more}"
    )


def epochs_cost(config: SeededConfig, examples: int) -> int:
    """Return the number of training examples of one fine-tuning, counted once per pass."""
    if config.max_steps > 0:
        return config.max_steps * int(as_number(config.train_batch_size))
    return round(config.num_train_epochs * examples)


def seed_cost(run: Run[SeededConfig], examples: int | None = None) -> Cost:
    """Return the cost of the seed set and the fine-tuning on it, with its measurement."""
    own = any(problem.rationale is not None for problem in run.train)
    drawn = 0 if own else len(run.train) * run.config.seed_samples
    return Cost(
        completions=drawn + len(run.test),
        examples=epochs_cost(run.config, examples or max(drawn, len(run.train))),
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
