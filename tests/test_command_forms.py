"""Every switch and every list option of every command may be written as the help says."""

from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from jsonargparse import Namespace

from selftaught.cli import command as cli
from selftaught.cli import methods as method_commands
from selftaught.cli import pause as pause_commands
from selftaught.cli import quiet as quiet_commands
from selftaught.cli import stages, tools
from selftaught.cli.arguments import plain_forms
from selftaught.cli.audit import AuditOptions
from selftaught.cli.chat import ChatOptions
from selftaught.cli.push import HubOptions, PushOptions
from selftaught.cli.serve import ServeOptions
from selftaught.cli.solve import SolveOptions
from selftaught.cli.subcommands import DryRun
from selftaught.methods.comparison import CompareConfig
from selftaught.methods.rft import RftConfig
from selftaught.methods.star import StarConfig
from selftaught.methods.step_values import StepDpoConfig
from selftaught.methods.vstar import VstarConfig

BEFORE: dict[str, list[str]] = {
    "grade": ["r.jsonl"],
    "select": ["r.jsonl"],
    "train": ["sft"],
    "solve": ["1+1"],
    "report": ["runs/a"],
    "status": ["runs/a"],
    "push": ["runs/a"],
    "show": ["r.jsonl"],
    "audit": ["r.jsonl"],
    "quiet generate": ["Once"],
}
"""What a command wants beside its options."""
CLASSES: dict[str, type] = {
    "star": StarConfig,
    "rft": RftConfig,
    "vstar": VstarConfig,
    "step-dpo": StepDpoConfig,
    "compare": CompareConfig,
    "solve": SolveOptions,
    "serve": ServeOptions,
    "chat": ChatOptions,
    "sample": stages.AskOptions,
    "evaluate": stages.EvaluateOptions,
    "grade": stages.GradeOptions,
    "select": stages.SelectOptions,
    "train": stages.TrainOptions,
    "report": tools.ReportOptions,
    "status": tools.StatusOptions,
    "show": tools.ShowOptions,
    "push": PushOptions,
    "audit": AuditOptions,
    "embedded": tools.EmbeddedOptions,
    **{f"quiet {name}": options for name, options in quiet_commands.OPTIONS.items()},
    **{f"pause {name}": options for name, options in pause_commands.OPTIONS.items()},
}
"""Written by hand; the test below finds a command that is missing."""
DRY = {
    **dict.fromkeys(("star", "rft", "vstar", "step-dpo", "compare"), method_commands.DryRun),
    **dict.fromkeys(("quiet train", "pause train"), DryRun),
}
HUB = dict.fromkeys(
    ("star", "rft", "vstar", "step-dpo", "quiet train", "quiet distill", "pause train"), HubOptions
)


def members(hint: object) -> list[object]:
    return [one for one in get_args(hint) if one is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]  # fmt: skip


def options_of(kind: object) -> list[tuple[str, str, object]]:
    return [
        (command, name, one)
        for group in (CLASSES, DRY, HUB)
        for command, options in group.items()
        for name, hint in get_type_hints(options).items()
        for one in members(hint)
        if name in {field.name for field in fields(options)}
        and (one is kind or get_origin(one) is kind)
    ]


def read(command: str, *given: str) -> Namespace:
    """The options that a command line gives, as the command meets them."""
    _, options = cli.parsed([*command.split(), *BEFORE.get(command, []), *given])
    return options[options.action] if "action" in options else options


def test_the_table_above_names_every_command():
    assert {name.split()[0] for name in CLASSES} | {"get-model", "samplers", "tasks"} == set(
        cli.COMMANDS
    )


@pytest.mark.parametrize(("command", "name"), [one[:2] for one in options_of(bool)])
def test_a_switch_is_written_in_each_of_its_forms(command: str, name: str):
    hyphens = name.replace("_", "-")
    for given, want in [
        ([f"--{name}"], True),
        ([f"--{hyphens}"], True),
        ([f"--no-{hyphens}"], False),
        ([f"--{hyphens}", "false"], False),
        ([f"--{hyphens}", "True"], True),
        ([f"--{name}=false"], False),
        ([f"--{hyphens}", "--out", "x"], True),
    ]:
        if "--out" in given and "out" not in get_type_hints(CLASSES[command]):
            continue
        assert read(command, *given)[name] is want, given


def values_for(inner: object) -> tuple[list[str], list[object]]:
    if inner is int:
        return ["0", "10"], [0, 10]
    if inner is Path:
        return ["1.jsonl", "b.jsonl"], [Path("1.jsonl"), Path("b.jsonl")]
    if get_origin(inner) is Literal:
        two = list(get_args(inner))[:2]
        return two, two
    assert inner is str
    return ["#", "Q: 1"], ["#", "Q: 1"]  # YAML would read a comment and a mapping


@pytest.mark.parametrize(("command", "name", "hint"), options_of(list))
def test_a_list_option_takes_several_values(command: str, name: str, hint: object):
    given, want = values_for(get_args(hint)[0])
    several = [Path(str(one)) if isinstance(want[0], Path) else one for one in
               read(command, f"--{name.replace('_', '-')}", *given)[name]]  # fmt: skip
    assert several == want
    one = read(command, f"--{name}", given[0])[name]
    assert [str(each) for each in one] == [str(want[0])]


def test_there_are_switches_and_lists_to_test():
    switches = {one[:2] for one in options_of(bool)}
    assert {("star", "check_equations"), ("train", "use_peft"), ("status", "as_json")} <= switches
    assert {one[:2] for one in options_of(list)} >= {("pause evaluate", "pauses"), ("rft", "pool")}


def test_a_list_of_named_values_ends_before_what_is_none():
    given = ["select", "--keep", "correct", "sound", "g.jsonl", "--out", "e.jsonl"]
    _, options = cli.parsed(given)
    assert (options.keep, options.rollouts) == (["correct", "sound"], ["g.jsonl"])


def test_a_list_option_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.parsed(["pause", "evaluate", "--pauses", "--out", "x"])
    assert "pauses" in capsys.readouterr().err


def test_what_follows_two_hyphens_alone_is_no_option():
    assert plain_forms(["a", "--", "b"], []) == ["a", "--", "b"]
