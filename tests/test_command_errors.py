"""Whatever goes wrong, a user reads one clear paragraph: no traceback, an exit code, a file to look into."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selftaught.cli import main
from selftaught.models.embedded import embedded_model
from selftaught.runs.folder import link_tree

SMALL = ["--task_options.train", "30", "--task_options.digits", "2-3"]


def run(
    *arguments: str, cwd: Path, file_size: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command, with a limit on the size of files where one is given."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run(
        [sys.executable, "-m", "selftaught.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300, preexec_fn=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def broken_model(folder: Path) -> Path:
    """A model folder whose tokenizer file is empty; transformers meets a KeyError in it."""
    link_tree(embedded_model(), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def test_an_unexpected_error_is_a_paragraph_and_its_traceback_a_file(tmp_path: Path):
    broken_model(tmp_path / "broken")
    done = run("sample", *SMALL, "--model", "broken", "--out", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Its traceback is in r.jsonl.error.log" in done.stderr
    log = (tmp_path / "r.jsonl.error.log").read_text(encoding="utf-8")
    assert log.startswith("selftaught sample ") and "Traceback" in log
    assert json.loads((tmp_path / "r.jsonl.status.json").read_text())["state"] == "failed"


def test_without_a_folder_the_traceback_is_in_a_temporary_file(tmp_path: Path):
    broken_model(tmp_path / "broken")
    done = run("solve", "1+1", "--model", "broken", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    named = re.search(r"traceback is in (\S+)\.\n", done.stderr)
    assert named and "Traceback" in Path(named[1]).read_text(encoding="utf-8")


def test_a_run_folder_gets_the_traceback(tmp_path: Path):
    broken_model(tmp_path / "broken")
    done = run("star", *SMALL, "--model", "broken", "--out", "r", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "r" / "error.log").read_text(encoding="utf-8")


def test_a_grading_worker_that_cannot_start_is_said_in_words(tmp_path: Path):
    pytest.importorskip("math_verify")
    problem = {"id": "p", "question": "?", "gold": "x+1"}
    row = {"problem": problem, "prompt": "?", "completion": "\\boxed{1+x}", "finish_reason": "stop",
           "model": "m", "index": 0, "origin": "sampled"}  # fmt: skip
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'from selftaught.rollouts.grading import serve; serve()' in sys.orig_argv: os._exit(7)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("grade", "r.jsonl", "--task", "competition_math", "--out", "g.jsonl",
               cwd=tmp_path, PYTHONPATH=path)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "grading worker" in done.stderr and "exit code 7" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message_text"),
    [
        (["star", *SMALL, "--sampler_options.batch_size", "many"], "'batch_size' of the sampler 'transformers' must be int or null; got 'many'"),
        (["star", *SMALL, "--sampler_options.dtype", "banana"], "must be 'auto' or 'float32' or 'bfloat16'"),
        (["star", *SMALL, "--sampler_options.device", "banana"], "device"),
        (["star", *SMALL, "--training.output_dir", "/x"], "'output_dir' cannot be given"),
        (["star", *SMALL, "--training.tf32", "maybe"], "'tf32' of TRL's SFTConfig must be bool or null; got 'maybe'"),
        (["star", *SMALL, "--training.max_grad_norm", "big"], "'max_grad_norm' of TRL's SFTConfig must be float"),
        (["train", "dpo", "--training.output_dir", "/x"], "'output_dir' cannot be given"),
        (["compare", *SMALL, "--rft.k", "x"], "'k' of the method 'rft' must be list[int]"),
        (["compare", *SMALL, "--star.out", "x"], "Remove its option 'out'"),
        (["compare", *SMALL, "--vstar.nonsense", "x"], "'vstar' has no option 'nonsense'"),
        (["solve", "1+1", "--sampler_options.batch_size", "many"], "'batch_size' of the sampler 'transformers' must be int"),
        (["sample", *SMALL, "--limit", "-3"], "limit must be at least 1; got -3"),
        (["evaluate", *SMALL, "--limit", "0"], "limit must be at least 1; got 0"),
        (["pause", "evaluate", "--limit", "-3"], "limit must be at least 1; got -3"),
        (["quiet", "evaluate", "--limit", "-3", "--text", "x.txt"], None),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_refused_by_name(
    arguments: list[str], message_text: str | None, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message_text is None or message_text in printed
    assert "did not expect" not in printed


def test_a_question_without_a_readable_answer_ends_with_code_3(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["solve", "What is 7+8?", "--n", "4"]) == 3
    printed = capsys.readouterr()
    assert "no answer could be read from any of the 4 candidates" in printed.err
    assert "answer  None" not in printed.out
    assert main(["solve", "7+8", "--n", "2"]) == 0
    (tmp_path / "q.txt").write_text("What is 7+8?\n", encoding="utf-8")
    assert main(["solve", "--file", "q.txt", "--out", "a.jsonl", "--n", "2"]) == 3
    (tmp_path / "q2.txt").write_text("What is 7+8?\n7+8\n", encoding="utf-8")
    assert main(["solve", "--file", "q2.txt", "--out", "b.jsonl", "--n", "2"]) == 0
    assert "1 of 2 questions answered" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.jsonl.status.json").read_text())["state"] == "done"
    assert (tmp_path / "b.config.yaml").exists()


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_full_disk_names_the_path_and_ends_the_status(limit: int, tmp_path: Path):
    """A limit on the size of a file stands in for the disk: the same error of `write`, another number."""
    many = ["--task_options.train", "300", "--task_options.digits", "3"]
    done = run("sample", *many, "--out", "r.jsonl", cwd=tmp_path, file_size=limit)
    assert done.returncode == 2
    assert "r.jsonl" in done.stderr and "repeat the command" in done.stderr
    assert "Traceback" not in done.stderr
    message_text = json.loads((tmp_path / "r.jsonl.status.json").read_text())
    assert message_text["state"] == "failed"
    done = run("sample", *many, "--out", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "300 rollouts" in done.stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path):
    (tmp_path / "r").mkdir()
    script = f"{sys.executable} -m selftaught.cli embedded | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


MODULES = ("selftaught", "selftaught.cli")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "moments"),
    [
        (MODULES[0], (0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2, 1.8, 2.5, 3.5, 5.0)),
        (MODULES[1], (0.06, 0.15, 0.3, 0.8)),
    ],
)
def test_ctrl_c_is_quiet_at_any_moment(module: str, moments: tuple[float, ...], tmp_path: Path):
    """From the moment at which the interpreter has started, which it signals by importing a module."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'started')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for after in moments:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "sample", "--task_options.train", "4000", "--out",
             str(tmp_path / "r.jsonl")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.read(7) == b"started"
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, message_text = process.communicate(timeout=60)
        assert process.returncode == 130, (after, message_text)
        assert message_text.startswith(b"Interrupted.") and message_text.count(b"\n") == 1, (
            after,
            message_text,
        )
