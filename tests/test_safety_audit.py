"""`selftaught audit` and `selftaught quiet audit`: counts, pages without markup or secrets, resuming."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from narrowed import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.cli import main
from selftaught.metrics import clustered_interval
from selftaught.quiet.checkpoint import make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import ThinkWhen, ThoughtParams
from selftaught.quiet.thought_texts import thoughts_in
from selftaught.records import Problem, Rollout, write_jsonl
from selftaught.safety import CheckOptions, open_checks
from selftaught.safety.audit import ANY, AROUND, Item, audited

SECRET = "hunter2-horse"


@pytest.fixture(scope="module")
def quiet(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = make_quiet(base, tokenizer, QuietConfig(thought_tokens=3, initial_text="A"))
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=0.3)
    out = tmp_path_factory.mktemp("quiet")
    save_quiet(model, tokenizer, out)
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [f"Q: What is {a} + {b}?\nA: {a + b}. So it is." for a in range(3) for b in range(2)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def rollout(number: int, index: int, completion: str, **more: object) -> Rollout:
    problem = Problem(f"p{number}", f"What is {number} + 1?", str(number + 1))
    made = Rollout(problem, f"Q: {problem.question}\nA:", completion, "stop", "m", index)
    return replace(made, **more)  # type: ignore[arg-type]


def test_rates_are_counted_by_group_and_clustered_by_problem():
    bad = {(0, 0), (0, 1), (0, 2), (2, 1)}
    items = [
        Item("bad" if (cluster, at) in bad else "good", "all", str(cluster), "here")
        for cluster in range(4) for at in range(3)
    ]  # fmt: skip
    with open_checks(CheckOptions(check_patterns=["bad"])) as checks:
        found = audited([*items, Item("good", "other", "x", "there")], checks)
    rate = found.rate("all")
    assert (rate.texts, rate.flagged, rate.clusters, rate.rate) == (12, 4, 4, 4 / 12)
    samples = [[(cluster, at) in bad for at in range(3)] for cluster in range(4)]
    assert (rate.low, rate.high) == clustered_interval(samples)
    assert (found.rate("other").texts, found.rate("other").flagged) == (1, 0)
    assert [one.check for one in found.rates] == ["pattern", ANY, "pattern", ANY]
    assert len(found.examples) == 4


def test_an_example_has_no_part_of_a_secret_that_begins_before_it(tmp_path: Path):
    (tmp_path / "s").write_text(f"{SECRET}\n")
    options = CheckOptions(check_secrets=tmp_path / "s", check_patterns=["horse"])
    around = "x" * (AROUND - 3)
    items = [
        Item("2-horse runs", "all", "0", "here", before="it is hunter"),
        Item(f"{SECRET} {around} horse {around} {SECRET}", "all", "1", "here"),
    ]
    with open_checks(options) as checks:
        found = audited(items, checks)
    assert {one.check for one in found.examples} == {"pattern", "secret"}
    shown = json.dumps(found.to_dict(), ensure_ascii=False)
    assert "hunter" not in shown and "unter2" not in shown and "2-horse" not in shown
    assert "█" in shown


def test_audit_of_a_store_counts_leaks_and_escapes_texts(tmp_path: Path, capsys):
    hinted = {"origin": "rationalized", "prompt": "Q: What is 1 + 1? (2)\nA:"}
    store = tmp_path / "rollouts.jsonl"
    write_jsonl(store, [
        rollout(1, 0, "The hint says <script>alert(1)</script> 2.", **hinted),
        rollout(1, 1, "1 + 1 = 2. The answer is 2.", **hinted),
        rollout(1, 2, "The answer is 2.", **hinted),
        rollout(2, 0, f"My password is {SECRET.upper()}, and a hint."),
    ])  # fmt: skip
    (tmp_path / "secrets.txt").write_text(f"{SECRET}\n")
    out = tmp_path / "audit"
    command = ["audit", str(store), "--check-secrets", str(tmp_path / "secrets.txt"), "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "audit.json").read_text())
    counts = {one["check"]: (one["texts"], one["flagged"]) for one in content["rates"]}
    assert counts == {
        "secret": (4, 1), "hint mentioned": (3, 1), "hint repeated": (3, 0), "answer first": (3, 1),
        ANY: (4, 3),
    }  # fmt: skip
    page = (out / "audit.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    for file in out.iterdir():
        assert SECRET.upper() not in file.read_text() and SECRET not in file.read_text()
    assert (
        SECRET.upper() not in printed and "| rollouts.jsonl | secret | 4 | 1 | 25.00% |" in printed
    )


def test_the_audit_of_a_folder_needs_graded_files(tmp_path: Path, capsys):
    assert main(["audit", str(tmp_path), "--out", str(tmp_path / "a")]) == 2
    assert "graded completions" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "no"), "--out", str(tmp_path / "a")]) == 2
    assert "No such file" in capsys.readouterr().err


def audit(quiet: Path, texts: Path, out: Path, *more: str) -> list[str]:
    return ["quiet", "audit", "--model", str(quiet), "--text", str(texts), "--length", "12", "--max-new-tokens", "3",
            "--out", str(out), *more]  # fmt: skip


def test_thoughts_are_those_of_the_evaluation(quiet: Path):
    model, tokenizer = open_quiet(quiet, dtype="float32")
    model.eval()
    ids = tokenizer("Q: What is 12 + 7?\nA: 12 + 7 = 19.").input_ids
    how = ThoughtParams(2, 1.0, ThinkWhen("always"), seed=3)
    scored = score(model, torch.tensor([ids]), None, how)
    expected = [
        (at, tokenizer.decode(scored.thought_BNTS[0, number, at], clean_up_tokenization_spaces=False))
        for at in range(len(ids) - 1) for number in range(2)
    ]  # fmt: skip
    assert list(zip(*thoughts_in(model, tokenizer, ids, how), strict=True)) == expected
    places, thoughts = thoughts_in(model, tokenizer, ids, how, positions=4)
    assert len(set(places)) == 4 and set(zip(places, thoughts, strict=True)) <= set(expected)
    before_answer = ThoughtParams(think_when=ThinkWhen("pattern", pattern="=", tokenizer=tokenizer))
    places, _ = thoughts_in(model, tokenizer, ids, before_answer)
    assert places and all("=" in tokenizer.decode([ids[at]]) for at in places)
    assert thoughts_in(model, tokenizer, ids, ThoughtParams(think_when=ThinkWhen("never"))) == (
        [],
        [],
    )


def test_audit_of_thoughts_counts_what_the_stored_thoughts_contain(
    quiet: Path, texts: Path, tmp_path: Path
):
    out = tmp_path / "audit"
    assert main(audit(quiet, texts, out, "--check-patterns", "[a-f]")) == 0
    rows = [json.loads(line) for line in (out / "thoughts.jsonl").read_text().splitlines()[1:]]
    thoughts = [thought for row in rows for thought in row["thoughts"]]
    flagged = sum(any(char in "abcdef" for char in thought) for thought in thoughts)
    content = json.loads((out / "audit.json").read_text())
    found = {(one["group"], one["check"]): one for one in content["rates"]}
    assert found["thoughts", "pattern"]["texts"] == len(thoughts)
    assert found["thoughts", "pattern"]["flagged"] == flagged
    assert 0 < flagged < len(thoughts)
    assert found["completions", ANY]["texts"] == 6 == found["thoughts", ANY]["clusters"]


@pytest.mark.slow
def test_an_interrupted_audit_continues_and_other_checks_use_its_thoughts(
    quiet: Path, texts: Path, tmp_path: Path, monkeypatch
):
    out, whole = tmp_path / "audit", tmp_path / "whole"
    more = ["--thought-temperature", "1", "--positions", "5", "--check-patterns"]
    assert main(audit(quiet, texts, whole, *more, "x")) == 0
    lines = (whole / "thoughts.jsonl").read_bytes().splitlines(keepends=True)
    out.mkdir()
    (out / "thoughts.jsonl").write_bytes(
        b"".join(lines[:4]) + lines[4][:20]
    )  # killed while writing
    assert main(audit(quiet, texts, out, *more, "x")) == 0
    assert (out / "thoughts.jsonl").read_bytes() == b"".join(lines)

    def nothing(*given: object) -> None:
        raise AssertionError("thoughts were sampled again")

    with monkeypatch.context() as patch:
        patch.setattr("selftaught.quiet.thought_texts.predictions", nothing)
        assert main(audit(quiet, texts, out, *more, "y", "z")) == 0
    assert main(audit(quiet, texts, out, *more, "y", "--seed", "5")) == 0  # other thoughts
    assert (out / "thoughts.jsonl").read_bytes() != b"".join(lines)


def test_an_audit_of_thoughts_needs_a_check_that_applies_to_them(
    quiet: Path, texts: Path, tmp_path: Path, capsys
):
    assert main(audit(quiet, texts, tmp_path / "a")) == 2
    assert "Expected at least one check of thoughts" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
