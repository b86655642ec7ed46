"""The stages of a method as commands: sample, grade, select, train, evaluate."""

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selftaught.cli.output import DONE, say, tracked, usage_summary

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selftaught.tasks import Task


@dataclass(frozen=True)
class AskOptions:
    """What a model is asked, and how it is sampled."""

    model: str = "embedded"
    """A Hugging Face name or folder, or "embedded"."""
    task: str = "arithmetic"
    """Which questions: arithmetic, gsm8k, commonsense_qa, competition_math, gym, question_file."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options, such as --task_options.path questions.jsonl."""
    split: str = "train"
    """train, validation or test."""
    limit: int | None = None
    """Only the first so many problems."""
    prompt: Literal["few_shot", "bare", "chat"] = "few_shot"
    """What stands before a question: the task's worked examples, nothing, or a chat template, which
    also gets the task's instruction on how to state the answer."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    hint: bool = False
    """Show the gold answer in the question, as rationalization does."""
    n: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus."""
    max_tokens: int | None = None
    """Room for a rationale; none: the task's own."""
    seed: int = 0
    """Of the draws."""
    sampler: str = "transformers"
    """Where the model lives while it is sampled: transformers; vllm; openai for a server (--base-url
    URL); ray for a cluster; or quiet for one that thinks before every token (a folder made by
    `selftaught quiet train`)."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own options, such as --sampler_options.batch_size 64."""
    out: Path = Path("runs/rollouts.jsonl")
    """The store; repeating the command continues it."""


@dataclass(frozen=True)
class EvaluateOptions(AskOptions):
    """What is measured, and how."""

    split: str = "test"
    """train, validation or test."""
    out: Path = Path("runs/test.jsonl")
    """The store of the rollouts; the graded ones and the result stand beside it."""


@dataclass(frozen=True)
class GradeOptions:
    """By which task's rules rollouts are graded."""

    task: str = "arithmetic"
    """The task whose `extract` and `equal` are used."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    out: Path = Path("runs/graded.jsonl")
    """Where the graded rollouts go; repeating the command continues what was killed."""
    workers: int | None = None
    """Processes; none: as many as the stores repay, one to each core at most."""


@dataclass(frozen=True)
class SelectOptions:
    """Which rollouts stay, and in what form."""

    keep: list[Literal["correct", "sound", "distinct"]] = field(default_factory=lambda: ["correct"])
    """Filters, in order: correct; sound, without a wrong equation; distinct."""
    distinct_by: Literal["text", "equations", "numbers", "edits"] = "text"
    """What makes two rollouts the same; see `selftaught rft --help`."""
    at_most: int | None = None
    """At most so many rollouts per problem."""
    make: Literal["examples"] = "examples"
    """What comes out."""
    task: str = "arithmetic"
    """The task whose prompt the examples get."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    prompt: Literal["few_shot", "bare", "chat"] = "bare"
    """The prompt in training."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    out: Path = Path("runs/examples.jsonl")
    """Where the examples go."""
    workers: int | None = None
    """Processes; none: as many as the stores repay, one to each core at most."""


@dataclass(frozen=True)
class TrainOptions:
    """A fine-tuning; options not named here go to TRL by --training."""

    model: str = "embedded"
    """A Hugging Face name or folder, or "embedded"."""
    data: Path = Path("runs/examples.jsonl")
    """Examples: JSONL with prompt and completion. For dpo preferences: prompt, chosen and rejected, or
    what a method's run wrote as preferences.jsonl."""
    out: Path = Path("runs/model")
    """The model folder to make."""
    max_steps: int = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: float = 3.0
    """Passes over the examples."""
    learning_rate: float = 2e-5
    """Peak learning rate (TRL's default for sft; its default for dpo is 1e-6)."""
    per_device_train_batch_size: int = 8
    """Examples in a step."""
    max_length: int = 1024
    """Longest example in tokens; longer ones are dropped and counted."""
    use_peft: bool = False
    """Train a LoRA adapter and merge it."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter."""
    lora_target_modules: str = "all-linear"
    """Layers with an adapter: "all-linear", or names with commas between."""
    seed: int = 0
    """Of the order of the examples."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's SFTConfig or DPOConfig, such as --training.bf16 true or --training.beta
    0.5."""
    launcher: Literal["inline", "torchrun", "accelerate", "ray"] = "inline"
    """Where it runs: in this process, in several of this machine, or on a Ray cluster (docs/launch.md)."""
    num_processes: int = 1
    """How many share a step; its examples are as many, whatever their number."""
    accelerate_config: Path | None = None
    """A file of `accelerate config` for the launcher accelerate, such as those in configs/."""


def task_flags(task: str, options: dict[str, Any]) -> str:
    """The flags that name a task again."""
    flags = [f" --task {task}"] + [
        f" --task_options.{key} {shlex.quote(str(value))}" for key, value in options.items()
    ]
    return "".join(flags)


def sample(options: "Namespace") -> int:
    from selftaught.rollouts.store import fill
    from selftaught.runs.folder import remember

    ask = AskOptions(**values_of(options))
    _, problems, style, params = _asked(ask)

    with (
        tracked(ask.out, "sample") as watch,
        _opened(ask) as sampler,
        usage_summary(sampler, ask.out),
        watch.progress("sampling", len(problems) * params.n) as advance,
    ):
        count = fill(
            sampler, problems, style, params, store=ask.out, progress=advance,
            origin="rationalized" if ask.hint else "sampled",
        )  # fmt: skip
    remember(ask, ask.out)
    say(f"{count} rollouts in {ask.out}")
    say(f"Next: selftaught grade{task_flags(ask.task, ask.task_options)} {ask.out}")
    return DONE


def grade(options: "Namespace") -> int:
    from selftaught.records import OUTCOMES
    from selftaught.rollouts.streaming import grade_stores
    from selftaught.runs.folder import remember

    stores = [Path(store) for store in options.pop("rollouts")]
    how = GradeOptions(**values_of(options))
    with tracked(how.out, "grade"):
        counts = grade_stores(stores, how.out, how.task, how.task_options, workers=how.workers)
    remember(how, how.out)
    told = ", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in OUTCOMES)
    say(f"{told}: {how.out}")
    return DONE


def select(options: "Namespace") -> int:
    from selftaught.rollouts.streaming import choose
    from selftaught.runs.folder import remember
    from selftaught.tasks import open_task

    stores = [Path(store) for store in options.pop("rollouts")]
    how = SelectOptions(**values_of(options))
    style = _style(open_task(how.task, **how.task_options), how)
    with tracked(how.out, "select"):
        kept, count = choose(
            stores, how.out, how.keep, style,
            distinct_by=how.distinct_by, at_most=how.at_most, workers=how.workers,
        )  # fmt: skip
    remember(how, how.out)
    say(f"{kept} of {count} rollouts kept: {how.out}")
    say(f"Next: selftaught train sft --model MODEL --data {how.out}")
    return DONE


def train(options: "Namespace") -> int:
    from selftaught.runs.folder import remember
    from selftaught.training.launch import PLACE, Stage, launch, launch_of

    kind = options.pop("kind")
    if kind not in ("sft", "dpo"):
        raise ValueError(f"Expected a kind of training, sft or dpo; got {kind!r}.")
    how = TrainOptions(**values_of(options))
    lora = {"r": how.lora_r, "alpha": how.lora_alpha, "target_modules": how.lora_target_modules}
    own = {"model", "data", "out", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training",
           *PLACE}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own} | how.training
    stage = Stage(kind, _model(how.model), how.data, how.out, how.out.with_name(how.out.name + ".training"),
                  given, lora if how.use_peft else None)  # fmt: skip
    with (
        tracked(how.out, "train") as watch,
        watch.progress("training", max(how.max_steps, 0)) as advance,
    ):
        done = launch(stage, launch_of(how), advance)
    remember(how, how.out)
    what = "examples" if kind == "sft" else "preferences"
    told = f", {done.from_text} tokenized from text" if done.from_text else ""
    say(f"{done.steps} steps on {done.trained_on} {what} ({done.too_long} too long{told}), "
         f"loss {done.loss:.3f}: {done.model}")  # fmt: skip
    return DONE


def evaluate(options: "Namespace") -> int:
    from selftaught.evaluation.evaluator import evaluate
    from selftaught.records import write_atomically
    from selftaught.reports.tables import markdown_table
    from selftaught.runs.folder import remember

    ask = EvaluateOptions(**values_of(options))
    task, problems, style, params = _asked(ask)
    with (
        tracked(ask.out, "evaluate") as watch,
        _opened(ask) as sampler,
        usage_summary(sampler, ask.out),
        watch.progress("evaluating", len(problems) * params.n) as advance,
    ):
        evaluation = evaluate(
            sampler, task, problems, style, params, store=ask.out, name=ask.model, progress=advance
        )
    remember(ask, ask.out)
    result = ask.out.with_name(ask.out.stem + ".evaluation.json")
    write_atomically(result, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    print(markdown_table([evaluation]))
    return DONE


def _asked(ask: AskOptions) -> "tuple[Task, Any, Any, Any]":
    """The task, its problems, the prompt and the sampling options of a command."""
    from selftaught.options import check_count
    from selftaught.prompts import hinted
    from selftaught.samplers.base import SamplingParams
    from selftaught.tasks import open_task

    check_count("limit", ask.limit)
    task = open_task(ask.task, **ask.task_options)
    style = _style(task, ask)
    params = SamplingParams(
        n=ask.n, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed,
        max_tokens=ask.max_tokens or task.max_tokens, thought_marks=task.thought_marks,
    )  # fmt: skip
    shown = hinted(style, task.hint) if ask.hint else style
    return task, task.problems(ask.split)[: ask.limit], shown, params


def _opened(ask: AskOptions) -> Any:
    """The sampler of a command; "quiet" is a model that thinks before every token."""
    if ask.sampler == "quiet":
        from selftaught.cli.quiet import quiet_sampler

        return quiet_sampler(ask.model, **ask.sampler_options)
    from selftaught.samplers import open_sampler

    return open_sampler(ask.sampler, _model(ask.model), **ask.sampler_options)


def _style(task: "Task", how: AskOptions | SelectOptions) -> Any:
    return task.styled(
        how.prompt,
        system_prompt=how.system_prompt or "",
        chat_template_kwargs=how.chat_template_kwargs,
    )


def _model(name: str) -> str:
    from selftaught.models.embedded import embedded_model

    return str(embedded_model()) if name == "embedded" else name


def values_of(options: "Namespace") -> dict[str, Any]:
    return {name: options[name] for name in vars(options)}
