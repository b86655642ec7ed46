"""Opening a run, and the stages that all methods share.

A stage is a function that writes a file or a model folder, and skips work whose output already
exists: `seed_examples`, `fit`, `sampled`, `measured`. Each method calls the stages in its own
order.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from selftaught.evaluation.evaluator import Evaluation, evaluate
from selftaught.methods.config import Facts, MethodConfig
from selftaught.methods.points import RunPoints
from selftaught.models.embedded import embedded_model
from selftaught.option_groups import Auto, as_number
from selftaught.prompts import PromptStyle, bare
from selftaught.records import (
    Example,
    Preference,
    Problem,
    Rollout,
    read_examples,
    read_rollouts,
    write_atomically,
    write_jsonl,
)
from selftaught.rollouts.graded import graded_beside, graded_path
from selftaught.rollouts.grading import check_gold
from selftaught.rollouts.selection import (
    DistinctBy,
    NothingToLearn,
    draw_problems,
    example,
    gold_rollouts,
    keep_correct,
    keep_distinct,
    keep_sound,
    make_examples,
    solution_path,
    why_dropped,
)
from selftaught.rollouts.store import collect_up_to
from selftaught.runs.folder import (
    ProgressReporter,
    Row,
    lock_folder,
    read_rows,
    timed,
    write_config,
    write_rows,
)
from selftaught.runs.preflight import check_settings, check_texts, refuse_server
from selftaught.runs.reporting import reported
from selftaught.runs.status import tracked_status
from selftaught.samplers import (
    Engine,
    SamplingParams,
    as_seen,
    count_parameters,
    prompt_opens_thought,
)
from selftaught.tasks import Task, open_task
from selftaught.training import Training
from selftaught.training.launch import Kind, Stage, launch, launch_of

if TYPE_CHECKING:
    from selftaught.rollouts.flags import Flags

C = TypeVar("C", bound=MethodConfig, covariant=True)


@dataclass(frozen=True)
class Run(Generic[C]):
    """An opened run: the task, its problems, and the time spent so far."""

    config: C
    task: Task
    base: str
    """Folder or Hugging Face name of the base model."""
    train: Sequence[Problem]
    test: Sequence[Problem]
    reporter: ProgressReporter
    engine: Engine
    """Samples one model at a time; closed while a model is trained or a verifier scores."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage since the last row of metrics."""
    read: dict[str, Any] = field(default_factory=dict)
    """Cache of data that was read from stores or computed from them."""
    too_long: int = 0
    """Number of training problems whose prompt takes up all of `max_length`."""
    flags: "Flags | None" = None
    """The checks of texts, with `exclude_flagged`."""

    @property
    def tuned(self) -> PromptStyle:
        """Prompt style of fine-tuned models, in training and in sampling."""
        return self.asked if self.asked.as_messages else bare(self.asked)

    @property
    def asked(self) -> PromptStyle:
        """Prompt style of the base model."""
        config = self.config
        return self.task.styled(
            config.prompt,
            system_prompt=config.system_prompt or "",
            chat_template_kwargs=config.chat_template_kwargs,
        )

    @property
    def first_style(self) -> PromptStyle:
        """Prompt style of the first completions."""
        own = any(problem.rationale is not None for problem in self.train)
        return self.tuned if own else self.asked

    @property
    def params(self) -> SamplingParams:
        """Sampling options of the run, with one completion per problem."""
        config = self.config
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens or self.task.max_tokens,
            seed=config.seed,
            thought_marks=self.task.thought_marks,
        )

    def sound(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the correct rollouts; with `check_equations`, only those without a wrong
        equation."""
        right = keep_correct(rollouts)
        return keep_sound(right) if self.config.check_equations else right

    def kept(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts to train on: those of `sound`; with `exclude_flagged`, only those
        that no check flags."""
        return self.unflagged(self.sound(rollouts))

    def unflagged(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts that no check flags; all of them without `exclude_flagged`."""
        return list(rollouts) if self.flags is None else self.flags.unflagged(rollouts)

    def why_flagged(self, rollouts: Sequence[Rollout]) -> dict[str, int]:
        """Return the numbers of flagged rollouts among those of `sound`, by reason."""
        return {} if self.flags is None else self.flags.counts(self.sound(rollouts))


@contextmanager
def running(
    config: MethodConfig, method: str, reporter: ProgressReporter | None
) -> Iterator[tuple[ProgressReporter, Engine]]:
    """Lock a run folder while a method runs in it, and keep its `status.json` up to date.

    Args:
        config: options of the run.
        method: name of the method as `selftaught status` shows it.
        reporter: progress callbacks.

    Yields:
        The progress callbacks, and the sampling engine, which is closed at the end.

    Raises:
        BlockingIOError: another process is running in the folder.
    """
    with (
        lock_folder(config.out),
        tracked_status(config.out / "status.json", method, reporter) as tracked,
        reported(config.out, config.report_to, RunPoints(config.out), tracked) as reporting,
        Engine(config.sampler, config.sampler_options) as engine,
    ):
        yield reporting, engine


def open_task_of(
    config: C,
    reporter: ProgressReporter | None,
    engine: Engine | None,
    needed: Mapping[str, int | None],
) -> tuple[Run[C], dict[str, Sequence[Problem]]]:
    """Open the task of a run, draw the problems of every split, and check their gold answers.

    Args:
        config: options of the run.
        reporter: progress callbacks.
        engine: sampling engine; None: a new one.
        needed: number of problems by split; None means all.

    Returns:
        The run, and the problems by split.

    Raises:
        ValueError: a split is empty, or a gold answer cannot be graded as correct; the message
            names it.
    """
    refuse_server(config.sampler)
    task = open_task(config.task, **config.task_options)
    splits = {
        split: draw_problems(
            task.problems(split), count, f"{config.seed} train" if split == "train" else split
        )
        for split, count in needed.items()
    }
    if not all(splits.values()):
        sizes = ", ".join(f"{len(problems)} {split}" for split, problems in splits.items())
        raise ValueError(
            f"Expected at least one problem in each split of the task {config.task!r}; got {sizes}."
        )
    check_gold([problem for problems in splits.values() for problem in problems], task)
    flags = _opened_flags(config) if config.exclude_flagged else None
    base = str(embedded_model()) if config.model == "embedded" else config.model
    engine = engine or Engine(config.sampler, config.sampler_options)
    config = config.resolved(Facts(count_parameters(base), len(splits["train"]), task))
    run = Run(
        config, task, base, splits["train"], splits["test"], reporter or ProgressReporter(), engine,
        flags=flags,
    )  # fmt: skip
    return run, splits


def _opened_flags(config: MethodConfig) -> "Flags":
    from selftaught.rollouts.flags import Flags
    from selftaught.safety.checks import open_checks

    return Flags(open_checks(config))


def write_options(run: Run, changeable: Sequence[str]) -> None:
    """Write the options of a run to its `config.yaml`.

    Args:
        run: an opened run.
        changeable: options that may differ from those of an earlier run in the same folder.

    Raises:
        ValueError: the folder contains a run with other options.
    """
    config = run.config
    write_config(config.out, config.plain(), changeable, config.updated)


def open_run(
    config: C,
    reporter: ProgressReporter | None = None,
    engine: Engine | None = None,
    trainings: Callable[[C], Sequence[tuple[Kind, Mapping[str, Any]]]] = lambda config: (),
) -> Run[C]:
    """Open the task, draw the problems, and check all gold answers, options and prompts.

    Nothing is sampled, and no weights are loaded. A run and a dry run both start with this.

    Args:
        config: options of the run.
        reporter: progress callbacks.
        engine: sampling engine; None: a new one.
        trainings: returns the kinds of fine-tuning other than that on the seed set, with their
            options.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        ImportError: a package that an option needs is not installed.
        OSError: a file or the model was not found.
    """
    needed = {"train": config.train_problems, "test": config.test_problems}
    run, _ = open_task_of(config, reporter, engine, needed)
    task, base, train, test = run.task, run.base, run.train, run.test
    config, options = run.config, trainer_options(run.config)
    check_settings(config, base, [("sft", options), *trainings(config)])
    own = any(problem.rationale is not None for problem in train)
    check_chat(run.tuned, task, base, train[0], rationales=own)
    asked = [(run.tuned, train), (run.tuned, test)]
    if not own:
        asked.append((run.asked, train))
    too_long = check_texts(
        config, base, asked, (run.tuned, train), run.params.max_tokens, options["max_length"]
    )
    return replace(run, too_long=too_long)


def check_chat(
    style: PromptStyle, task: Task, model: str, problem: Problem, *, rationales: bool
) -> None:
    """Check that a model's chat template can be used for training.

    Args:
        style: prompt style; nothing is checked unless it is a chat style.
        task: the task, whose `thought_marks` are used.
        model: folder or Hugging Face name of the model.
        problem: a problem to render.
        rationales: whether the model is trained on the task's own rationales or answers.

    Raises:
        ValueError: the template ends a prompt with the opening thought mark, so that the task's own
            rationales would be learned as an unfinished thought.
    """
    if not style.as_messages:
        return
    prompt, options = style(problem), style.chat_template_kwargs
    as_seen(model, prompt, options)
    if rationales and prompt_opens_thought(model, prompt, task.thought_marks, options):
        raise ValueError(
            f"The chat template of {model} ends a prompt with {task.thought_marks[0]}, but the "
            "task's own rationales and answers do not close a thought, so a model trained on them "
            "would never give an answer. Turn thinking off, if the template has an option for it "
            "(--chat-template-kwargs.enable_thinking false), or use --prompt few_shot or bare."
        )


# ---------------------------------------------------------------- stages


def seed_examples(run: Run, problems: Sequence[Problem], folder: Path) -> list[Example]:
    """Return D, the seed set: the problems with their gold rationales as completions.

    If no problem has a rationale, D is made of the base model's correct completions.

    Raises:
        NothingToLearn: there are no rationales, and none of the base model's completions was kept.
    """
    written = folder / "seed.jsonl"
    with_rationale = [problem for problem in problems if problem.rationale is not None]
    if not written.exists():
        if with_rationale:
            made = [
                example(run.tuned, one, run.tuned.completion(one.rationale or ""))
                for one in with_rationale
            ]
        else:
            made = make_examples(_own_rationales(run, problems, folder), run.tuned)
        write_jsonl(written, made)
    return read_examples(written)


def _own_rationales(run: Run, problems: Sequence[Problem], folder: Path) -> list[Rollout]:
    """Return correct completions of the base model, which replace gold rationales."""
    n = run.config.seed_samples
    params = replace(
        run.params, n=n, temperature=run.config.temperature if n > 1 else 0.0,
        seed=run.config.seed + 900_000,
    )  # fmt: skip
    rollouts = sampled(run, run.base, problems, run.asked, params, folder / "seed-rollouts.jsonl")
    kept = keep_distinct(run.kept(rollouts))
    if not kept:
        raise NothingToLearn(
            f"The task has no gold rationales, and none of the base model's {len(rollouts)} "
            f"completions was kept ({reasons_dropped(run, rollouts)}). Try more completions per problem "
            "(--seed-samples 8), easier problems, or a stronger model."
        )
    return kept


def seed_rollouts(run: Run, problems: Sequence[Problem], folder: Path) -> list[Rollout]:
    """Return the seed set as correct rollouts; those of the base model have their token ids."""
    gold = gold_rollouts(problems, run.tuned)
    return gold or _own_rationales(run, problems, folder)


def distinct(
    run: Run, rollouts: Sequence[Rollout], by: DistinctBy, edits: float = 0.2
) -> list[Rollout]:
    """Return the kept rollouts without duplicates; see `keep_distinct`.

    Raises:
        ValueError: `by` is "equations", and no rollout contains an equation.
    """
    kept = run.kept(rollouts)
    if by == "equations" and kept and not any(solution_path(one.completion) for one in kept):
        raise ValueError(
            "Expected completions with equations, by which --distinct-by equations compares them; "
            f"none of the {len(kept)} correct completions contains one. Use --distinct-by text, "
            "numbers or edits, with another --out."
        )
    return keep_distinct(kept, by, edits=edits)


def reasons_dropped(run: Run, rollouts: Sequence[Rollout]) -> str:
    """Return the reasons why completions were not kept, with their counts, as text."""
    dropped = why_dropped(rollouts) | run.why_flagged(rollouts)
    reasons = [f"{count} {why}" for why, count in sorted(dropped.items())]
    right = len(keep_correct(rollouts))
    return ", ".join([*reasons, f"{right} right"] if right else reasons)


def fit(
    run: Run, examples: Sequence[Example], out: Path, start: str | None = None,
    own: Mapping[str, Any] | None = None, **changes: Any,
) -> Training:  # fmt: skip
    """Fine-tune a model on examples; the result is written to `out / "model"`.

    Args:
        run: the run.
        examples: training examples; they are written to `out / "examples.jsonl"`.
        out: output folder.
        start: model to fine-tune; None means the base model.
        own: training options that override the fields of the config, but not `config.training`.
        changes: training options that override all others.
    """
    write_jsonl(out / "examples.jsonl", examples)
    options = trainer_options(run.config, **(own or {})) | changes
    return train_on(run, "sft", start or run.base, out / "examples.jsonl", options, len(examples))


def prefer(
    run: Run, start: str, pairs: Sequence[Preference], out: Path, options: Mapping[str, Any]
) -> Training:
    """Train a model with DPO, with itself as the reference; the result is written to `out /
    "model"`.

    Args:
        run: the run.
        start: initial and reference model.
        pairs: preference pairs; they are written to `out / "preferences.jsonl"`.
        out: output folder.
        options: training options from `preference_options`.
    """
    write_jsonl(out / "preferences.jsonl", pairs)
    return train_on(run, "dpo", start, out / "preferences.jsonl", options, len(pairs))


def preference_options(
    config: MethodConfig, *, beta: float, learning_rate: float | Auto, epochs: float,
    max_steps: int, more: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the options of a DPO training under TRL's names.

    Args:
        config: options of the run.
        beta, learning_rate, epochs, max_steps: options of the DPO training.
        more: other fields of `DPOConfig`, which override all others.
    """
    options = {
        name: value
        for name, value in trainer_options(config).items()
        if name not in config.training  # fields of SFTConfig, which do not apply to DPO
    }
    options.setdefault("max_length", config.max_length)
    return options | {"learning_rate": as_number(learning_rate), "num_train_epochs": epochs,
                      "max_steps": max_steps, "beta": beta, **more}  # fmt: skip


def train_on(
    run: Run, kind: Kind, start: str, rows: Path, options: Mapping[str, Any], count: int
) -> Training:
    """Fine-tune a model on a file of `count` rows; write it to `model` beside the file."""
    run.engine.close()
    config, out = run.config, rows.parent
    lora = {"r": config.lora_r, "alpha": config.lora_alpha,
            "target_modules": config.lora_target_modules}  # fmt: skip
    stage = Stage(kind, start, rows, out / "model", out / "training", options,
                  lora if config.use_peft else None)  # fmt: skip
    with (
        timed(run.seconds, "train"),
        run.reporter.progress(f"{out.name}: training", _steps(options, count)) as advance,
    ):
        return launch(stage, launch_of(config), advance)


def training_row(training: Training) -> Row:
    """Return the fields of a metrics row that describe a fine-tuning."""
    return {"steps": training.steps, "loss": training.loss, "tokens": training.tokens,
            "trained on": training.trained_on, "too long": training.too_long,
            "tokenized from text": training.from_text}  # fmt: skip


def ranked_correctly(training: Training) -> str:
    """Return the number of preference pairs, and the reward accuracy over the last tenth of the
    log, as text."""
    found = [each["rewards/accuracies"] for each in training.log if "rewards/accuracies" in each]
    last = found[-max(1, len(found) // 10) :]
    pairs = f"{training.trained_on:,} pairs"
    return f"{pairs}, {sum(last) / len(last):.0%} of the last ranked correctly" if last else pairs


def trainer_options(config: MethodConfig, **own: Any) -> dict[str, Any]:
    """Return the options of a fine-tuning under TRL's names.

    Args:
        config: options of the run.
        own: values that override the fields of the config, but not `config.training`.
    """
    names = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
             "per_device_train_batch_size", "max_length", "bf16", "save_steps", "seed")  # fmt: skip
    found = {name: getattr(config, name) for name in names if hasattr(config, name)}
    found["gradient_accumulation_steps"] = config.accumulation
    return found | own | config.training


def _steps(options: Mapping[str, Any], rows: int) -> int:
    """Return the approximate number of optimizer steps of a training, for its progress bar."""
    if options.get("max_steps", -1) > 0:
        return options["max_steps"]
    size = options.get("per_device_train_batch_size", 8)  # the default of transformers
    batch = size * options.get("gradient_accumulation_steps", 1)
    return round(options.get("num_train_epochs", 3) * max(1, rows / batch))


def sampled(
    run: Run, model: str, problems: Sequence[Problem], style: PromptStyle,
    params: SamplingParams, store: Path,
) -> list[Rollout]:  # fmt: skip
    """Return graded completions of a model, `params.n` per problem; stored ones are used again.

    Args:
        run: the run.
        model: folder or Hugging Face name of the model.
        problems: problems to sample.
        style: prompt style.
        params: sampling options.
        store: file for the completions. The graded ones are written beside it.
    """
    with timed(run.seconds, "sample"):
        sampler = run.engine.of(model)
        with run.reporter.progress(
            f"{store.parent.name}: {store.stem}", len(problems) * params.n
        ) as advance:
            rollouts = collect_up_to(sampler, problems, style, params, store=store, progress=advance)  # fmt: skip
    with timed(run.seconds, "grade"):
        return graded_beside(store, rollouts, run.task)


def measured(run: Run, model: str, name: str, folder: Path) -> Evaluation:
    """Measure the accuracy of a fine-tuned model on the test problems with greedy decoding."""
    return accuracy(run, model, run.test, run.tuned, folder / "test.jsonl", name)


def accuracy(
    run: Run, model: str, problems: Sequence[Problem], style: PromptStyle, store: Path, name: str
) -> Evaluation:
    """Measure the accuracy of a model on problems with greedy decoding."""
    greedy = replace(run.params, n=1, temperature=0.0)
    with timed(run.seconds, "evaluate"):
        sampler = run.engine.of(model)
        with run.reporter.progress(f"{name}: {store.stem}", len(problems)) as advance:
            return evaluate(sampler, run.task, problems, style, greedy,
                            store=store, name=name, progress=advance)  # fmt: skip


# ---------------------------------------------------------------- rows and summaries


def tokens_of(rollouts: Sequence[Rollout]) -> int:
    """Return the number of sampled tokens in the completions."""
    return sum(len(rollout.token_ids or ()) for rollout in rollouts)


def once(run: Run, name: str, make: Callable[[], Row]) -> Row:
    """Return the row of `metrics.jsonl` with this name; if there is none, make and append it.

    A new row gets the seconds of all stages since the previous row.
    """
    metrics = run.config.out / "metrics.jsonl"
    rows = read_rows(metrics)
    found = next((row for row in rows if row["name"] == name), None)
    if found is not None:
        return found
    made = make()
    row = {"name": name, **made, "seconds": dict(run.seconds)}
    run.seconds.clear()
    write_rows(metrics, [*read_rows(metrics), row])
    run.reporter.iteration(row)
    return row


def flagged_row(run: Run, rollouts: Sequence[Rollout]) -> Row:
    """Return the field of a metrics row that counts the rollouts that a check excluded, by reason.

    Empty without `exclude_flagged`.
    """
    return {} if run.flags is None else {"flagged": run.why_flagged(rollouts)}


def flagged_seeds(run: Run, folder: Path) -> Row:
    """Return `flagged_row` for the base model's completions in a folder of the seed set."""
    graded = graded_path(folder / "seed-rollouts.jsonl")
    return flagged_row(run, read_rollouts(graded) if graded.exists() else [])


def trained_row(run: Run, training: Training, evaluation: Evaluation, **more: Any) -> Row:
    """Return a metrics row of a trained model: its folder, its training and its test accuracy."""
    return {
        "model": str(training.model),
        "test": evaluation.to_dict(),
        "training": training_row(training),
        **more,
    }


def write_summary(out: Path, summary: Row) -> Row:
    """Write `summary.json`, which marks a run as finished, and return the summary."""
    write_atomically(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary
