"""Stores graded and chosen from in blocks, over processes: as all at once, in little memory."""

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from selftaught.prompts import PromptStyle
from selftaught.records import Problem, Rollout, read_rollouts, write_jsonl
from selftaught.rollouts import streaming as bulk
from selftaught.rollouts.grading import grade
from selftaught.rollouts.selection import (
    NothingToLearn,
    keep_at_most,
    keep_correct,
    keep_distinct,
    keep_sound,
    make_examples,
)
from selftaught.rollouts.streaming import choose, grade_stores
from selftaught.tasks import open_task

STYLE = PromptStyle("bare")
TEXTS = (
    "1 + 1 = 2 apples #2", "1 + 1 = 2 pears #2", "1 + 1 = 3 #2", "2 - 0 = 2 #2", "so it is #3", "#2",
    "\ud800 \u2028 2 * 1 = 2 #2", "1+1 =2 plums and more #2", "4 / 2 = 2 #2", "no idea",
)  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BLOCK", 700)  # two or three rollouts


def rollouts(count: int, seed: int = 0) -> list[Rollout]:
    """Of five problems, in no order."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        problem = Problem(f"p{draw.randrange(5)}", "How many?\nSay.", "2")
        reason = "length" if draw.random() < 0.1 else "stop"
        ids = tuple(draw.choices(range(10**6), k=3))
        made.append(Rollout(problem, "Q", draw.choice(TEXTS), reason, "m", index, token_ids=ids))
    return made


def stores(folder: Path, made: list[Rollout]) -> list[Path]:
    """The rollouts in three stores: with a header, with a blank line, and plain."""
    third = -(-len(made) // 3)
    paths = []
    for number, before in enumerate((b'{"format": "x", "problem": 1}\n', b"\n", b"")):
        path = folder / f"store {number}.jsonl"
        write_jsonl(path, made[number * third : (number + 1) * third])
        path.write_bytes(before + path.read_bytes())
        paths.append(path)
    return paths


def orders() -> list[tuple[str, ...]]:
    """Every order of the three filters and of some of them, and one that says one twice."""
    names = ("correct", "sound", "distinct")
    some = [order for n in range(4) for order in itertools.permutations(names, n)]
    return [*some, ("distinct", "correct", "distinct")]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 2])
def test_stores_are_graded_as_all_at_once(tmp_path: Path, workers: int):
    made = rollouts(60)
    message_text = grade_stores(
        stores(tmp_path, made), tmp_path / "g" / "g.jsonl", "arithmetic", {}, workers=workers
    )
    graded = grade(made, open_task("arithmetic"))
    write_jsonl(tmp_path / "naive.jsonl", graded)
    assert (tmp_path / "g" / "g.jsonl").read_bytes() == (tmp_path / "naive.jsonl").read_bytes()
    assert read_rollouts(tmp_path / "g" / "g.jsonl") == graded
    assert message_text == {
        name: [one.outcome for one in graded].count(name) for name in message_text
    }
    assert sum(message_text.values()) == 60
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["g.jsonl"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("by", ["text", "equations", "numbers", "edits"])
def test_stores_are_chosen_from_as_all_at_once(tmp_path: Path, by):
    """Problems come and go in and between the stores."""
    for seed in range(3):
        graded = grade(rollouts(80, seed), open_task("arithmetic"))
        paths = stores(tmp_path, graded)
        for keep, at_most in itertools.product(orders(), (None, 2)):
            naive = graded
            for name in keep:
                match name:
                    case "correct":
                        naive = keep_correct(naive)
                    case "sound":
                        naive = keep_sound(naive)
                    case "distinct":
                        naive = keep_distinct(naive, by)
            if at_most is not None:
                naive = keep_at_most(naive, at_most)
            write_jsonl(tmp_path / "naive.jsonl", make_examples(naive, STYLE))
            out = tmp_path / "e.jsonl"
            found = choose(paths, out, keep, STYLE, distinct_by=by, at_most=at_most)  # type: ignore[arg-type]
            assert found == (len(naive), 80)
            assert out.read_bytes() == (tmp_path / "naive.jsonl").read_bytes(), (keep, at_most)


@pytest.mark.usefixtures("small_blocks")
def test_processes_choose_as_this_one_does(tmp_path: Path):
    paths = stores(tmp_path, grade(rollouts(80), open_task("arithmetic")))
    for name, workers in (("a", 1), ("b", 2)):
        keep = ("correct", "sound", "distinct")
        choose(paths, tmp_path / name, keep, STYLE, distinct_by="equations", workers=workers)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_grading_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch):
    paths, out = stores(tmp_path, rollouts(40)), tmp_path / "g.jsonl"
    grade_stores(paths, out, "arithmetic", {})
    whole = out.read_bytes()
    out.unlink()
    done, work = [], bulk._done

    def stopping(errand, blocks, workers):
        for block in work(errand, blocks, workers):
            if len(done) == 7:
                raise KeyboardInterrupt
            done.append(block.lines.count(b"\n"))
            yield block

    monkeypatch.setattr(bulk, "_done", stopping)
    with pytest.raises(KeyboardInterrupt):
        grade_stores(paths, out, "arithmetic", {})
    assert not out.exists()
    (partial,) = tmp_path.glob("g.jsonl.*.partial")
    left = partial.read_bytes()
    assert left and whole.startswith(left)
    for cut in (0, 1, len(left) // 2, left[:-1].rindex(b"\n") + 1, len(left)):
        for torn in (b"", b"\0\0\n", b'{"problem": 1}\n{}'):  # what a machine that fell leaves
            partial.write_bytes(left[:cut] + torn)
            done[:] = [0] * 8
            grade_stores(paths, out, "arithmetic", {})
            assert out.read_bytes() == whole
            assert sum(done) == 40 - left[:cut].count(b"\n")
            out.rename(partial)


@pytest.mark.usefixtures("small_blocks")
def test_what_another_task_or_store_left_is_not_gone_on_with(tmp_path: Path):
    paths, out = stores(tmp_path, rollouts(12)), tmp_path / "g.jsonl"
    grade_stores(paths, out, "arithmetic", {})
    whole = out.read_bytes()
    other = tmp_path / "g.jsonl.0123456789abcdef.partial"
    other.write_bytes(whole.replace(b'"right"', b'"wrong"'))
    mine = tmp_path / "g.jsonl.mine"
    mine.write_text("not ours")
    grade_stores(paths, out, "arithmetic", {})
    assert out.read_bytes() == whole
    assert not other.exists() and mine.exists()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_line_that_is_no_rollout_is_named_and_nothing_half_is_left(tmp_path: Path, workers: int):
    paths, out = stores(tmp_path, rollouts(30)), tmp_path / "out.jsonl"
    out.write_text("as it was")
    lines = paths[1].read_bytes().splitlines(keepends=True)
    for bad, message_text in (
        (b"garbage\n", "expected one JSON object"),
        (b"{}\n", "expected a rollout"),
    ):
        paths[1].write_bytes(b"".join([*lines[:6], bad, *lines[6:]]))
        with pytest.raises(ValueError, match=f"store 1.jsonl, line 7: {message_text}"):
            grade_stores(paths, out, "arithmetic", {}, workers=workers)
        with pytest.raises(ValueError, match=f"store 1.jsonl, line 7: {message_text}"):
            choose(paths, out, ["sound"], STYLE, workers=workers)
    with pytest.raises(ValueError, match="Expected graded rollouts"):
        choose(paths, out, ["correct"], STYLE, workers=workers)
    assert out.read_text() == "as it was"
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_nothing_to_grade_or_to_learn_from_raises_an_error(tmp_path: Path):
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out.jsonl"
    empty.write_text('{"format": "x"}\n')
    out.write_text("as it was")
    with pytest.raises(ValueError, match=r"Expected rollouts in .*empty\.jsonl; got none"):
        grade_stores([empty], out, "arithmetic", {})
    wrong = replace(rollouts(1)[0], completion="#3", finish_reason="stop")
    write_jsonl(empty, grade([wrong] * 3, open_task("arithmetic")))
    with pytest.raises(NothingToLearn, match="passed the filters: sound, correct"):
        choose([empty], out, ["sound", "correct"], STYLE)
    with pytest.raises(ValueError, match="Unknown task 'nonsense'"):
        grade_stores([empty], out, "nonsense", {})
    assert out.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "out.jsonl"]


def test_a_process_that_ends_raises_an_error(tmp_path: Path, capfd):
    (path, *_) = stores(tmp_path, rollouts(9))
    with pytest.raises(ChildProcessError, match=r"reading .*store 0\.jsonl ended with exit code 1"):
        list(bulk._done({"grade": "nonsense", "options": {}}, bulk._blocks([path]), 2))
    assert "Unknown task 'nonsense'" in capfd.readouterr().err


@pytest.mark.parametrize("answer", ["x", "2"])
def test_proofs_are_made_in_processes_of_the_processes(tmp_path: Path, answer: str):
    pytest.importorskip("math_verify")
    problem = Problem("p", "?", "\\frac{x+1}{2}")
    text = "\\boxed{\\frac{1+x}{2}}" if answer == "x" else "\\boxed{x+x+7}"
    made = [Rollout(problem, "Q", text, "stop", "m", index) for index in range(4)]
    write_jsonl(tmp_path / "r.jsonl", made)
    message_text = grade_stores(
        [tmp_path / "r.jsonl"], tmp_path / "g", "competition_math", {}, workers=2
    )
    assert message_text == {"right" if answer == "x" else "wrong": 4}
    assert {one.decided_by for one in read_rollouts(tmp_path / "g")} == {"symbolically_equal"}


LARGE = """
import json, resource, sys
from pathlib import Path
from selftaught.rollouts.streaming import choose, grade_stores
from selftaught.prompts import PromptStyle
from selftaught.records import Completion, Problem
from selftaught.rollouts.store import fill
from selftaught.samplers import SamplingParams
from selftaught.samplers.scripted import ScriptedSampler

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
style = PromptStyle("few-shot", shots=lambda problem: [Problem("s", "s" * 2000, "", "shown")])
problems = [Problem(str(at), f"{at}?", "2") for at in range(rows // 8)]
ids = tuple(range(1000, 1100))
texts = ["1 + %d = %d " % (at, at + 1) + "because " * 40 + "#%d" % (at % 3) for at in range(99)]
sampler = ScriptedSampler(lambda prompt, index: Completion(texts[(len(prompt) * 7 + index * 31) % 99], "stop", ids))
params = SamplingParams(n=8, temperature=1.0)
sampler.asked = type("Forgetful", (list,), {"append": lambda self, prompt: None})()
assert fill(sampler, problems, style, params, store=folder / "r.jsonl") == rows
assert fill(sampler, problems, style, params, store=folder / "r.jsonl") == rows
graded = grade_stores([folder / "r.jsonl"], folder / "g.jsonl", "arithmetic", {}, workers=2)
assert sum(graded.values()) == rows
kept, seen = choose([folder / "g.jsonl"], folder / "e.jsonl", ["correct", "sound", "distinct"],
                    PromptStyle("bare"), workers=2)
assert seen == rows and kept
# Its own peak is read off /proc: getrusage counts what the process that started it took before that.
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([own / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is reported in other units")
def test_fifty_thousand_rollouts_take_the_memory_of_a_few(tmp_path: Path):
    """Read at once they took 7 kB each, 350 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path), "50000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own, worker = json.loads(done.stdout)
    assert (tmp_path / "r.jsonl").stat().st_size > 120 * 2**20
    assert own < 130 and worker < 100
