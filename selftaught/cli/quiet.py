"""The command line of Quiet-STaR: `selftaught quiet train | distill | evaluate | generate | explore |
audit | export-base`."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.output import DONE
from selftaught.cli.push import HubOptions, check_push, hub_options, push_after
from selftaught.cli.quiet_audit import QuietAuditOptions, audit
from selftaught.cli.quiet_distill import DistillOptions, distill
from selftaught.cli.quiet_plan import show_plan
from selftaught.cli.quiet_think import (
    EvaluateOptions,
    ExploreOptions,
    ExportOptions,
    GenerateOptions,
    evaluate,
    explore,
    export,
    generate,
)
from selftaught.cli.quiet_train import TrainOptions, train
from selftaught.cli.subcommands import DryRun, Subcommand, add_subcommands, chosen_subcommand

SUBCOMMANDS = {
    "train": Subcommand(
        "train a model to think before every token, on plain text",
        (TrainOptions, DryRun, HubOptions),
    ),
    "distill": Subcommand(
        "train a plain model to predict what a trained model predicts with thoughts",
        (DistillOptions, HubOptions),
    ),
    "evaluate": Subcommand(
        "measure the loss in nats per token without and with thoughts", (EvaluateOptions,)
    ),
    "generate": Subcommand(
        "continue a text, with a thought before every new token",
        (GenerateOptions,),
        [("prompt", "Text to continue. - reads it from standard input.", None)],
    ),
    "explore": Subcommand(
        "write an HTML page that shows the thought before every token of a text",
        (ExploreOptions,),
    ),
    "audit": Subcommand(
        "check thoughts for patterns, secrets and whatever a classifier or a function flags",
        (QuietAuditOptions,),
    ),
    "export-base": Subcommand(
        "write the base model inside a trained model, without thoughts",
        (ExportOptions,),
        [
            ("model", "Folder of a trained Quiet-STaR model.", None),
            ("out", "Folder for the base model and its tokenizer. Must be missing or empty.", None),
        ],
    ),
}
OPTIONS = {name: one.options[0] for name, one in SUBCOMMANDS.items()}
"""The dataclass with the options of each subcommand."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the subcommands and return the dataclasses with the options of the chosen one."""
    return add_subcommands(command, parser, given, SUBCOMMANDS)


def run(command: str, options: Namespace) -> int:
    """Run the chosen subcommand and return the exit code."""
    del command
    action, values = chosen_subcommand(options)
    match action:
        case "train":
            dry_run, hub = values.pop("dry_run"), hub_options(values)
            how = TrainOptions(**values)
            if dry_run:
                show_plan(how)
                return DONE
            check_push(hub, how.out)
            if train(how):
                push_after(hub, how.out)
        case "distill":
            hub = hub_options(values)
            distilling = DistillOptions(**values)
            check_push(hub, distilling.out)
            if distill(distilling):
                push_after(hub, distilling.out)
        case "evaluate":
            evaluate(EvaluateOptions(**values))
        case "generate":
            prompt = values.pop("prompt")
            generate(GenerateOptions(**values), prompt)
        case "audit":
            audit(QuietAuditOptions(**values))
        case "export-base":
            export(Path(values["model"]), Path(values["out"]))
        case _:
            explore(ExploreOptions(**values))
    return DONE
