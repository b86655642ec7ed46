"""The command lines of RFT, V-STaR, per-step DPO and their comparison, and of best-of-n."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from selftaught.cli.output import DONE
from selftaught.cli.solve import SolveOptions, solve
from selftaught.printable import printable
from selftaught.runs.folder import Watch, read_json, read_rows

METHODS = {
    "rft": ("selftaught.methods.rft", "RftConfig", "run_rft", "open_rft"),
    "vstar": ("selftaught.methods.vstar", "VstarConfig", "run_vstar", "open_vstar"),
    "step-dpo": ("selftaught.methods.step_dpo", "StepDpoConfig", "run_step_dpo", "open_step_dpo"),
    "compare": ("selftaught.methods.comparison", "CompareConfig", "run_compare", "open_compare"),
}
"""Module, options, function and check of each command."""
TOLD_BY = {"rft": "skip_gold_class", "vstar": "pairs_per_problem", "step-dpo": "wrong_per_problem",
           "compare": "budget"}  # fmt: skip
"""An option that only the configuration of this method's runs has."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> type:
    """Add the options of a command and return the dataclass that holds them.

    Without --model or --config the defaults are those of the small model.
    """
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of options; flags go on top"
    )
    if command == "solve":
        parser.add_argument("question", help="a question; or use --file", nargs="?")
        parser.add_class_arguments(SolveOptions, as_group=False)
        return SolveOptions
    module, options, _, _ = METHODS[command]
    config = getattr(import_module(module), options)
    parser.add_class_arguments(config, as_group=False)
    named = {one.split("=")[0] for one in given}
    if not named & {"--model", "--config"}:
        # The number of completions at a time is an option of the default sampler only.
        small = config.small(**({"sampler_options": {}} if "--sampler" in named else {}))
        parser.set_defaults({one.name: getattr(small, one.name) for one in fields(small)})
    return config


def run(command: str, options: Namespace, bar: Callable[..., Any]) -> int:
    """Run a command; returns its exit code."""
    values = {name: options[name] for name in vars(options)}
    if command == "solve":
        return solve(values, bar)
    module, name, function, opened = METHODS[command]
    room = import_module(module)
    dry_run = values.pop("dry_run")
    config = getattr(room, name)(**values)
    if dry_run:
        from selftaught.methods.run import plan

        print(printable(plan(getattr(room, opened)(config), room.CHANGEABLE)))
        return DONE
    if done := read_rows(config.out / "metrics.jsonl"):
        print(
            printable(f"Continuing {config.out} after {done[-1].get('name', 'another method')!r}.")
        )
    watch = Watch(iteration=lambda row: print(printable(_line(row)), flush=True), progress=bar)
    summary = getattr(room, function)(config, watch)
    lines = ["\n" + (config.out / "report.md").read_text(encoding="utf-8")]
    if "best model" in summary:
        lines.append(f"Model   {summary['best model']}")
    if "verifier" in summary:
        lines.append(f"Verifier {summary['verifier']}")
    lines += [
        f"Page    {config.out / 'report.html'}",
        f"Run     {config.out}  (every rollout, every metric; repeat the command to continue)",
    ]
    print(printable("\n".join(lines)))
    return DONE


def report_of(folder: Path) -> Callable[[Path], Path] | None:
    """What writes the page of a run folder of one of these methods; None for STaR's and other folders.

    Raises:
        ValueError: the folder is another command's, whose page is written by that command or which has
            none; says where its results are.
    """
    status, config = read_json(folder / "status.json") or {}, folder / "config.yaml"
    told = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {}
    if not isinstance(told, dict):
        raise ValueError(f"{config}: expected options and their values, got {type(told).__name__}.")
    found = next((name for name, option in TOLD_BY.items() if option in told), None)
    if found:
        return import_module(METHODS[found][0]).report
    if "preset" in told or status.get("method") == "Quiet-STaR":
        return _quiet_page
    if "pauses" in told:
        raise ValueError(
            f"{folder} holds measurements with pauses, which have no page. Repeat the command with "
            f"--config {config} to print their table; nothing is measured again."
        )
    if (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is a model. Give the run folder that it is in, or measure it: selftaught "
            f"evaluate --model {folder}."
        )
    stores = sorted(path.name for path in folder.glob("*.jsonl"))
    if stores and not told and "metrics.jsonl" not in stores:
        raise ValueError(
            f"{folder} holds stores of single stages ({', '.join(stores[:3])}) and no run; only runs "
            "have a page. `selftaught evaluate` prints a table."
        )
    return None


def _quiet_page(folder: Path) -> Path:
    """The page of a Quiet-STaR run, which its training writes when it ends.

    Raises:
        ValueError: the training has not ended.
    """
    page = folder / "report.html"
    if not page.is_file():
        raise ValueError(
            f"{folder} is a run of Quiet-STaR that has not ended; it writes its page, {page}, when it "
            f"ends. See where it stands with: selftaught status {folder}"
        )
    return page


def _line(row: dict[str, Any]) -> str:
    """What happened in a stage, in one line."""
    if "name" not in row:  # of STaR, inside a comparison
        return f"STaR, iteration {row['iteration']}"
    seconds = f"{sum(row.get('seconds', {}).values()):.0f} s"
    told = []
    if "training" in row:
        training = row["training"]
        told.append(f"{training['steps']} steps on {training['trained on']:,}, loss {training['loss']:.3f}")  # fmt: skip
    if "test" in row:
        test = row["test"]
        told.append(f"test {test['accuracy']:.1%} [{test['low']:.1%}, {test['high']:.1%}]")
    told += [str(row[key]) for key in ("told",) if key in row]
    return f"{row['name']:<24} {' · '.join([*told, seconds])}"
