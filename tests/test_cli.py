"""The command line as a user meets it: real processes, real files."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import pytest

from selftaught.cli import main
from selftaught.cli.command import COMMANDS
from selftaught.records import read_jsonl, read_rollouts
from selftaught.tasks import TASKS, _opener, open_task, task_help


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "selftaught.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_comes_within_a_second_and_without_torch(command: str, tmp_path: Path):
    """The time is that of the processor, because the machine may be busy."""
    code = (
        "import sys\nfrom selftaught.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "usage: selftaught" in done.stdout
    assert done.stderr.strip() == "False"


def test_every_option_of_star_says_what_it_is_and_where_it_comes_from(tmp_path: Path):
    message_text = " ".join(run("star", "--help", cwd=tmp_path).stdout.split())
    assert message_text.count("--") > 40
    for source in ("Section 4.1", "Section 3.2", "Appendix H", "Section 4.3"):
        assert source in message_text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_usage_line_and_groups_of_options(command: str, tmp_path: Path):
    """The format is that of the style guide; the names and defaults are those of the dataclasses."""
    message_text = run(command, "--help", cwd=tmp_path).stdout
    usage, about, body = message_text.split("\n\n", 2)
    assert usage.startswith(f"usage: selftaught {command}") and "\n" not in usage
    assert about.endswith(".")
    rest = body.splitlines()
    assert all(len(line) <= 100 for line in [*about.splitlines(), *rest])
    assert not re.search(
        r"--[a-z-]+_[a-z]+ ", message_text.replace("`", " ")
    )  # one spelling is shown
    assert "(type:" not in message_text and "NoneType" not in message_text
    for line in rest:
        assert not line or line.startswith((" ", "See ")) or line.endswith(":")


def test_the_groups_of_a_method_are_those_of_its_dataclasses(tmp_path: Path):
    message_text = run("star", "--help", cwd=tmp_path).stdout
    found = re.findall(r"^([A-Za-z ]+):$", message_text, re.MULTILINE)
    assert found == [
        "STaR", "model and task", "prompt", "sampling", "selection", "checks", "training", "launching", "run",
        "hub", "options",
    ]  # fmt: skip
    assert "--rationalization, --no-rationalization" in message_text
    assert "--learning-rate FLOAT" in message_text
    assert "--k INT [INT ...]" in run("rft", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message_text"),
    [
        (["star", "--itertions", "1"], "Did you mean --iterations?"),
        (["star", "--no-rationalisation"], "Did you mean --rationalization?"),
        (["star", "--learning_rat=1"], "Did you mean --learning-rate?"),
        (["sampel"], "Did you mean sample?"),
        (["star", "--task", "gsm8"], "Did you mean 'gsm8k'?"),
        (["star", "--task_options.digit", "3"], "digits"),
        (["quiet", "train", "--thoughts", "1"], "There is no option --thoughts"),
    ],
)
def test_a_misspelled_name_gets_a_suggestion(
    arguments: list[str], message_text: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message_text in capsys.readouterr().err


def test_tasks_and_the_options_of_each_are_listed(tmp_path: Path, capsys):
    assert main(["tasks"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[: len(TASKS)]]
    assert names == list(TASKS)
    for name in names:
        assert main(["tasks", name]) == 0
        message_text = capsys.readouterr().out
        for option in signature(_opener(name)).parameters:
            found = re.search(
                rf"--task-options\.{option.replace('_', '-')} \S+\s+(\S.*)", message_text
            )
            assert found and len(found[1].split()) > 1, option


def test_samplers_and_the_options_of_each_are_listed(capsys):
    assert main(["samplers"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:5]] == [
        "transformers", "vllm", "openai", "ray", "quiet"]  # fmt: skip
    assert main(["samplers", "transformers"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--sampler-options.batch-size INT Number of completions" in shown
    assert "--sampler-options.dtype {auto,float32,bfloat16} Data type" in shown
    assert "tokenizer" not in shown
    assert main(["samplers", "ray"]) == 0
    assert "--sampler-options.workers INT Number of actors. Default: 2." in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["samplers", "quiet"]) == 0
    assert "--sampler-options.batch-size INT" in capsys.readouterr().out
    assert main(["samplers", "vlm"]) == 2
    assert "Did you mean 'vllm'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["star", "sample", "evaluate", "rft", "compare", "solve"])
def test_help_names_the_command_that_lists_the_options(command: str, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "selftaught samplers NAME" in " ".join(capsys.readouterr().out.split())


OWN_TASK = """
from __future__ import annotations
from pathlib import Path
from selftaught import open_task

def make(n: int = 3, where: Path | None = None, plain=5, scale: float = 1.0):
    assert plain == 5 or plain == "any", plain
    return open_task("arithmetic", train=n)

def anything(**options):
    return open_task("arithmetic", **options)
"""


def test_the_options_of_a_task_in_a_file_are_listed_and_checked(tmp_path: Path, capsys):
    """Without a docstring, and with annotations that are texts."""
    (tmp_path / "own.py").write_text(OWN_TASK)
    own = f"{tmp_path / 'own.py'}:make"
    assert main(["tasks", own]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--task-options.n INT Default: 3. --task-options.where PATH Default: none." in shown
    assert (
        "--task-options.plain VALUE Default: 5. --task-options.scale FLOAT Default: 1.0." in shown
    )
    assert len(open_task(own, n=4, plain="any", scale=2).problems("train")) == 20
    with pytest.raises(
        ValueError, match=r"'n' of the task .* must be int; got 'many'. See: selftaught tasks"
    ):
        open_task(own, n="many")
    with pytest.raises(
        ValueError, match=r"no option 'scal'; .* Did you mean 'scale'[?] See: selftaught tasks"
    ):
        open_task(own, scal=2.0)
    assert len(open_task(own.replace("make", "anything"), train=2).problems("train")) == 10


@pytest.mark.parametrize("name", TASKS)
def test_options_of_tasks_are_checked_by_name_and_type(name: str):
    for one in task_help(name)[1][:-1]:
        required = (
            {"name": "chain_sum"}
            if name == "gym"
            else {"path": "q.jsonl"}
            if name in ("question_file", "code_file")
            else {}
        )
        with pytest.raises(
            ValueError, match=f"The option '{one.name}' of the task '{name}' must be "
        ):
            open_task(name, **(required | {one.name: [1]}))
        with pytest.raises(
            ValueError, match=f"has no option '{one.name}x'; .* See: selftaught tasks"
        ):
            open_task(name, **(required | {one.name + "x": 1}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sampler-options.batchsize", "4"], "Did you mean 'batch_size'? See: selftaught samplers transformers"),
        (["--sampler", "ray", "--sampler-options.worker", "2"], "Did you mean 'workers'?"),
        (["--sampler", "ray", "--sampler-options.workers", "two"], "'workers' of the sampler 'ray' must be int"),
        (["--sampler", "quiet", "--sampler-options.batch-size", "two"], "'batch_size' of the sampler 'quiet' must be int"),
        (["--sampler", "openai", "--sampler-options.retry", "2"], "Did you mean 'retries'? See: selftaught samplers openai"),
    ],
)  # fmt: skip
def test_options_of_samplers_are_checked_before_work(
    given: list[str], message: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("ray")
    assert (
        main(["evaluate", *given, "--task", "question_file", "--task-options.path", "none.jsonl"])
        == 2
    )
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message_text"),
    [
        (["star", "--no_such_option", "1"], "no-such-option"),
        (["rft", "--k", "1,4"], "separated by spaces: --k 1 4; got '1,4'"),
        (["star", "--task", "nonsense", "--out", "r"], "Unknown task 'nonsense'"),
        (["star", "--task_options.digit", "3", "--out", "r"], "has no option 'digit'"),
        (["star", "--iterations", "0", "--out", "r"], "iterations must be at least 1"),
        (["star", "--prompt", "poetry"], "poetry"),
        (["grade", "missing.jsonl"], "missing.jsonl"),
        (["train", "ppo"], "got 'ppo'"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_arguments_are_explained_with_code_2(
    arguments: list[str], message_text: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message_text in capsys.readouterr().err


def test_what_is_true_or_false_may_be_said_in_three_ways(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [
        "vstar",
        "--table",
        "false",
        "--baselines",
        "--no-distinct",
        "--bf16=true",
        "--print-config",
    ]
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 0
    message_text = capsys.readouterr().out
    for setting in ("table: false", "baselines: true", "distinct: false", "bf16: true"):
        assert setting in message_text


@pytest.mark.slow
def test_the_stages_one_by_one_make_a_model(tmp_path: Path):
    small = ["--task_options.train", "20", "--task_options.digits", "1-2"]
    done = run("sample", *small, "--out", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = read_rollouts(tmp_path / "r.jsonl")
    assert done.stderr == ""  # no output on standard error
    assert run("grade", "r.jsonl", "--out", "g.jsonl", cwd=tmp_path).returncode == 0
    graded = read_rollouts(tmp_path / "g.jsonl")
    assert len(graded) == len(stored)
    right = [rollout for rollout in graded if rollout.correct]
    assert len(right) > len(graded) * 0.8
    assert run("select", "g.jsonl", "--out", "e.jsonl", cwd=tmp_path).returncode == 0
    assert len(list(read_jsonl(tmp_path / "e.jsonl"))) == len(right)
    done = run("train", "sft", "--data", "e.jsonl", "--max-steps", "2", "--out", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = ["--task_options.test", "10", "--task_options.digits", "1-2", "--model", "m"]
    done = run("evaluate", *options, "--out", "t.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.evaluation.json").read_text())
    assert f"{result['accuracy']:.1%}" in done.stdout
    assert (tmp_path / "t.config.yaml").exists()


@pytest.mark.slow
def test_the_second_process_in_one_run_stops_at_once(tmp_path: Path):
    first = subprocess.Popen(
        [sys.executable, "-m", "selftaught.cli", "star", "--out", "r"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while not (tmp_path / "r" / "config.yaml").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = run("star", "--out", "r", cwd=tmp_path)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in second.stderr
