"""Uploads to a stub of the Hub on 127.0.0.1: what arrives, what is refused, and what a kill costs.

Every command runs in a process of its own, as a user's does.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stub import Hub, Repository, hub_server
from safetensors.torch import load_file, save_file

from selftaught.hub import without_tokens
from selftaught.models.embedded import embedded_model
from selftaught.runs.hub_upload import refuse_tokens, repository_name

TOKEN = "secret-of-ada"
OTHER = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3f"
"""A text with the form of an access token."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip


def selftaught(
    hub: Hub, home: Path, *arguments: str | Path, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "selftaught.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment(hub, home, **more),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with the model of this package, a verifier and completions."""
    out = tmp_path / "my run"
    for name in ("model", "verifier"):
        shutil.copytree(embedded_model(), out / name)
        (out / name / "README.md").write_text("---\nlicense: mit\n---\n\n# A card\n")
    weights = load_file(out / "verifier" / "model.safetensors")
    save_file({name: one + 1 for name, one in weights.items()}, out / "verifier" / "model.safetensors", {"format": "pt"})  # fmt: skip
    (out / "config.yaml").write_text("method: vstar\ntask: arithmetic\nmodel: embedded\n")
    folder = out / "iteration-1"
    folder.mkdir()
    row = {
        "problem": {"id": "1+2", "question": "1+2", "gold": "3", "rationale": None},
        "prompt": "1+2=", "completion": "#3", "finish_reason": "stop", "model": str(out / "sft" / "model"),
        "index": 0, "origin": "sampled", "token_ids": [1, 2], "answer": "3", "outcome": "right", "decided_by": "number",
    }  # fmt: skip
    head = {"format": "selftaught graded rollouts 2", "grading": "0"}
    (folder / "rollouts.graded.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(row)}\n")
    (folder / "test.graded.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(row)}\n")
    (folder / "examples.jsonl").write_text('{"prompt": "1+2=", "completion": "#3"}\n')
    return out


def test_a_run_arrives_as_private_repositories_with_every_file_unchanged(
    hub: Hub, run: Path, tmp_path: Path
):
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/ada/my-run  (from" in done.stdout
    assert sorted(hub.repositories) == ["ada/my-run", "ada/my-run-verifier"]
    for name, folder in (("ada/my-run", "model"), ("ada/my-run-verifier", "verifier")):
        there = hub.repositories[name]
        assert there.private
        assert there.large == {"model.safetensors"}
        assert there.files == {path.name: path.read_bytes() for path in (run / folder).iterdir()}


@pytest.mark.slow
def test_what_was_uploaded_opens_with_transformers(hub: Hub, run: Path, tmp_path: Path):
    assert (
        selftaught(hub, tmp_path / "home", "push", run, "--hub-model-id", "ada/sums").returncode
        == 0
    )
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('ada/sums')\n"
        "tokenizer = AutoTokenizer.from_pretrained('ada/sums')\n"
        "out = model.generate(**tokenizer('48+17=', return_tensors='pt', return_token_type_ids=False), max_new_tokens=40, do_sample=False)\n"
        "print(repr(tokenizer.decode(out[0])))\n"
    )  # fmt: skip
    elsewhere = environment(hub, tmp_path / "another home")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=elsewhere, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#65" in done.stdout
    assert hub.asked("GET", "/ada/sums/resolve/main/model.safetensors") or hub.asked("GET", "model.safetensors")  # fmt: skip


@pytest.mark.slow
def test_a_repeated_upload_sends_no_weights_and_a_changed_one_replaces_them(
    hub: Hub, run: Path, tmp_path: Path
):
    home = tmp_path / "home"
    (run / "model" / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier model")
    assert selftaught(hub, home, "push", run).returncode == 0
    (run / "model" / "model-00002-of-00002.safetensors").unlink()
    sent = len(hub.asked("PUT", "/lfs/"))
    assert selftaught(hub, home, "push", run).returncode == 0
    assert len(hub.asked("PUT", "/lfs/")) == sent == 3
    files = hub.repositories["ada/my-run"].files
    assert files == {path.name: path.read_bytes() for path in (run / "model").iterdir()}


@pytest.mark.slow
def test_an_upload_that_is_killed_continues_with_what_is_missing(
    hub: Hub, run: Path, tmp_path: Path
):
    """Two weight files: the process is killed while the second is on its way."""
    (run / "model" / "model-2.safetensors").write_bytes(bytes(range(256)) * 4000)
    hub.slow_put = threading.Event()
    command = [sys.executable, "-m", "selftaught.cli", "push", str(run), "--repo-type", "model"]
    child = subprocess.Popen(command, env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 120
    while len(hub.asked("PUT", "/lfs/")) < 2 or not hub.objects:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    first = set(hub.objects)
    assert len(first) == 1 and hub.repositories["ada/my-run"].files == {}
    requests = len(hub.requests)
    hub.slow_put.set()
    time.sleep(0.5)  # the request of the dead process ends
    hub.objects = {oid: body for oid, body in hub.objects.items() if oid in first}
    done = selftaught(hub, tmp_path / "home", "push", run, "--repo-type", "model")
    assert done.returncode == 0, done.stderr
    puts = [path for verb, path in hub.requests[requests:] if verb == "PUT"]
    sent_again = [path for path in puts if path.rpartition("/")[2] in first]
    assert not sent_again
    files = hub.repositories["ada/my-run"].files
    assert files == {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def test_the_completions_arrive_as_a_data_set_without_local_paths_or_test_problems(hub: Hub, run: Path, tmp_path: Path):  # fmt: skip
    done = selftaught(hub, tmp_path / "home", "push", run, "--rollouts")
    assert done.returncode == 0, done.stderr
    there = hub.repositories["datasets/ada/my-run-rollouts"]
    assert there.private
    assert sorted(there.files) == ["README.md", "data/examples/iteration-1-examples.jsonl",
                                   "data/rollouts/iteration-1-rollouts.jsonl"]  # fmt: skip
    [row] = map(json.loads, there.files["data/rollouts/iteration-1-rollouts.jsonl"].splitlines())
    assert (row["model"], row["completion"], row["outcome"]) == ("sft/model", "#3", "right")
    assert str(tmp_path).encode() not in b"".join([*there.files.values(), *hub.bodies])
    assert not (run / ".hub").exists()


def test_the_data_set_opens_with_datasets_where_a_column_is_null_in_one_file(
    run: Path, tmp_path: Path
):
    """The first file has no answer in any row, so without the card its column would have no type."""
    from datasets import load_dataset

    from selftaught.reports.data_card import write_data_set

    graded = (run / "iteration-1" / "rollouts.graded.jsonl").read_text()
    (run / "iteration-0").mkdir()
    (run / "iteration-0" / "rollouts.graded.jsonl").write_text(graded.replace('"answer": "3"', '"answer": null'))  # fmt: skip
    assert write_data_set(run, tmp_path / "data") == {"rollouts": 2, "examples": 1}
    rows = load_dataset(str(tmp_path / "data"), "rollouts", split="train", cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert sorted(map(str, rows["answer"])) == ["3", "None"]
    examples = load_dataset(str(tmp_path / "data"), "examples", split="train", cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert examples["completion"] == ["#3"]


def test_the_same_run_gives_the_same_data_set(run: Path, tmp_path: Path):
    from selftaught.reports.data_card import write_data_set

    for name in ("one", "two"):
        write_data_set(run, tmp_path / name)
    one, two = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
                for n in ("one", "two"))  # fmt: skip
    assert list(one.values()) == list(two.values())


def test_with_xet_installed_small_files_arrive_too(hub: Hub, run: Path, tmp_path: Path):
    """Without HF_HUB_DISABLE_XET, huggingface_hub uploads in another way (several commits)."""
    done = selftaught(hub, tmp_path / "home", "push", run, "--repo-type", "dataset", HF_HUB_DISABLE_XET="0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "README.md" in hub.repositories["datasets/ada/my-run-rollouts"].files


# ---------------------------------------------------------------- privacy


@pytest.mark.slow
def test_an_existing_public_repository_is_refused_before_any_file_is_sent(
    hub: Hub, run: Path, tmp_path: Path
):
    hub.repositories["ada/my-run"] = Repository(private=False)
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 2
    assert (
        "ada/my-run exists and is public" in done.stderr
        and "--hub-private-repo false" in done.stderr
    )
    assert not hub.objects and hub.repositories["ada/my-run"].files == {}
    assert (
        selftaught(hub, tmp_path / "home", "push", run, "--hub-private-repo", "false").returncode
        == 0
    )
    assert not hub.repositories["ada/my-run-verifier"].private


def test_a_file_with_the_token_is_not_uploaded(hub: Hub, run: Path, tmp_path: Path):
    (run / "model" / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}\n")
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 2
    assert "notes.txt contains an access token" in done.stderr and TOKEN not in done.stderr
    assert not hub.repositories and not hub.objects


def test_a_token_across_two_pieces_of_a_large_file_is_found(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("selftaught.runs.hub_upload._PIECE", 1000)
    (tmp_path / "clean.bin").write_bytes(b"x" * 5000)
    refuse_tokens(tmp_path)
    for text in (TOKEN, OTHER):
        for start in range(985, 1001):
            (tmp_path / "weights.bin").write_bytes(b"\0" * start + text.encode() + b"\0" * 700)
            with pytest.raises(ValueError, match=r"weights\.bin contains an access token"):
                refuse_tokens(tmp_path)


def test_no_output_file_or_request_body_has_the_token(hub: Hub, run: Path, tmp_path: Path):
    done = selftaught(hub, tmp_path / "home", "push", run, "--rollouts")
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in body for body in hub.bodies)
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert without_tokens(f"a {OTHER} b") == "a [token removed] b"


# ---------------------------------------------------------------- failures

REFUSED = {
    401: r"did not accept the access token \(HTTP status 401\).*hf auth login",
    403: r"does not allow writing to my-run \(HTTP status 403\)",
    429: r"too many requests",
    418: r"refused the upload to my-run \(HTTP status 418\): .*refused by the stub",
}


@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal_is_one_clear_message(status: int, hub: Hub, run: Path, tmp_path: Path):
    hub.refused["/api/repos/create"] = status
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 2
    assert re.search(REFUSED[status], done.stderr)
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr


@pytest.mark.slow
def test_a_wrong_token_another_namespace_and_a_dead_hub_have_their_messages(
    hub: Hub, run: Path, tmp_path: Path
):
    home = tmp_path / "home"
    wrong = selftaught(hub, home, "push", run, HF_TOKEN="hf_wrong")
    assert "HTTP status 401" in wrong.stderr and "hf_wrong" not in wrong.stderr
    none = selftaught(hub, home, "push", run, HF_TOKEN="")
    assert "needs an access token" in none.stderr and "hf auth login" in none.stderr
    other = selftaught(hub, home, "push", run, "--hub-model-id", "bob/sums")
    assert "does not allow writing to bob/sums (HTTP status 403)" in other.stderr
    offline = selftaught(hub, home, "push", run, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline.stderr
    dead = selftaught(hub, home, "push", run, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not respond" in dead.stderr
    for done in (wrong, none, other, offline, dead):
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not hub.objects


def test_a_card_that_the_hub_refuses_is_named(hub: Hub, run: Path, tmp_path: Path):
    (run / "model" / "README.md").write_text("---\nbase_model: /home/ada/model\n---\n")
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 2
    assert "base_model" in done.stderr and "is not valid" in done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: shutil.rmtree(run / "model"), "contains no model"),
        (lambda run: (shutil.rmtree(run / "model"), (run / "summary.json").write_text("{}")), "no model of its own"),
        (lambda run: shutil.rmtree(run), "There is no run folder"),
    ],
)  # fmt: skip
def test_a_folder_without_a_model_says_why(make, message: str, hub: Hub, run: Path, tmp_path: Path):
    make(run)
    done = selftaught(hub, tmp_path / "home", "push", run)
    assert done.returncode == 2 and message in done.stderr


def test_names_of_repositories(tmp_path: Path):
    assert repository_name(None, tmp_path / "Löwe: 3--1..x ") == "L-we-3-1-x"
    assert repository_name(None, tmp_path / "...") == "selftaught-model"
    assert repository_name("ada/sums", tmp_path) == "ada/sums"
    for wrong in ("a b", "a/b/c", "-a", "a--b", "", "x" * 200):
        with pytest.raises(ValueError, match="Expected a repository name for --hub-model-id"):
            repository_name(wrong, tmp_path)


# ---------------------------------------------------------------- after a training

SUMS = ["--task-options.digits", "3", "--task-options.train", "24", "--task-options.validation", "8",
        "--task-options.test", "20", "--iterations", "1", "--start-steps", "8"]  # fmt: skip


@pytest.mark.slow
def test_a_training_uploads_its_model_and_survives_a_failed_upload(hub: Hub, tmp_path: Path):
    home, out = tmp_path / "home", tmp_path / "star"
    command = ["star", *SUMS, "--out", out, "--push-to-hub"]
    hub.refused["/api/repos/create"] = 500
    done = selftaught(hub, home, *command)
    assert done.returncode == 0, done.stderr
    assert "the training is complete" in done.stderr and f"selftaught push {out}" in done.stderr
    assert (out / "summary.json").is_file() and not hub.repositories
    hub.refused.clear()
    done = selftaught(hub, home, *command)
    assert done.returncode == 0 and f"{hub.url}/ada/star" in done.stdout
    there = hub.repositories["ada/star"]
    assert there.private and "model.safetensors" in there.files
    assert "hub" not in (out / "config.yaml").read_text()
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in there.files["README.md"]


@pytest.mark.slow
def test_a_training_without_a_token_or_with_a_bad_name_does_not_start(hub: Hub, tmp_path: Path):
    command = ["star", *SUMS, "--out", tmp_path / "star", "--push-to-hub"]
    for more, message in (
        ({"HF_TOKEN": ""}, "needs an access token"), ({"HF_TOKEN": "hf_wrong"}, "HTTP status 401"),
    ):  # fmt: skip
        done = selftaught(hub, tmp_path / "home", *command, **more)
        assert done.returncode == 2 and message in done.stderr
    done = selftaught(hub, tmp_path / "home", *command, "--hub-model-id", "a b")
    assert done.returncode == 2 and "Expected a repository name" in done.stderr
    assert not (tmp_path / "star" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_token_among_the_training_options_is_refused_and_not_repeated(hub: Hub, tmp_path: Path):
    done = selftaught(hub, tmp_path / "home", "star", *SUMS, "--out", tmp_path / "star",
                      "--training.hub_token", OTHER)  # fmt: skip
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and OTHER not in done.stderr
    assert not any(OTHER.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
