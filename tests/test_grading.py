import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftaught.prompts import PromptStyle
from selftaught.records import FinishReason, Problem, Rollout
from selftaught.rollouts.grading import check_gold, grade
from selftaught.tasks import competition_math
from selftaught.tasks.answers import Verdict, same_choice, same_number
from selftaught.tasks.base import Task

PAIRS = Path(__file__).parent / "golden" / "grading_pairs.jsonl"


def behave(gold: str, answer: str) -> bool:
    """A comparison that does what the answer says; it prints, as careless libraries do."""
    sys.stdout.write("noise on standard output\n")
    sys.stdout.flush()
    match answer:
        case "hang":
            return 7**7**7**7 == 1  # one C call: no Python signal handler would get to run
        case "loop":
            for _ in itertools.count():
                pass
        case "exit":
            os._exit(3)
        case "raise":
            raise KeyError("no such thing")
        case "memory":
            return len(bytearray(10**12)) == 0
    return gold == answer


def never_starts(gold: str, answer: str) -> bool:
    os._exit(9)


def undecided(gold: str, answer: str) -> Verdict:
    return Verdict(None, "form")


def make_task(
    equal: Callable[[str, str], Verdict], prove: Callable[[str, str], bool] | None = None
) -> Task:
    return Task(
        name="made for the test",
        problems=lambda split: [],
        prompt=PromptStyle(name="bare"),
        extract=lambda text: text or None,
        equal=equal,
        hint=lambda problem: problem,
        prove=prove,
        direct="{answer}",
    )


def rollout(gold: str, completion: str, reason: FinishReason = "stop") -> Rollout:
    problem = Problem("p", "?", gold)
    return Rollout(problem, "?", completion, reason, model="none", index=0)


def graded(task: Task, pairs: list[tuple[str, str]], **options: float) -> list[Rollout]:
    return grade([rollout(*pair) for pair in pairs], task, **options)  # pyright: ignore


def test_the_outcomes_are_counted_apart() -> None:
    rollouts = [
        rollout("5", "5"), rollout("5", "6"), rollout("5", ""), rollout("5", "5", "length"),
        rollout("5", "", "length"), rollout("5", "fives"),
    ]  # fmt: skip
    seen = grade(rollouts, make_task(same_number))
    assert [(one.outcome, one.decided_by, one.answer) for one in seen] == [
        ("right", "number", "5"),
        ("wrong", "number", "6"),
        ("no answer", "extraction", None),
        ("cut by length", "finish reason", "5"),
        ("cut by length", "finish reason", None),
        ("ungradable", "not a number", "fives"),
    ]
    assert [one.completion for one in seen] == [one.completion for one in rollouts]


def test_a_comparison_that_hangs_fails_or_dies_is_ungradable_and_the_others_are_not_lost() -> None:
    answers = ["a", "hang", "b", "loop", "exit", "a", "raise", "memory", "c", "", "a"]
    seen = graded(
        make_task(undecided, behave), [("a", answer) for answer in answers], seconds=0.7, workers=2
    )
    assert [one.answer for one in seen] == [answer or None for answer in answers]  # the order
    decided = [(one.outcome, one.decided_by) for one in seen]
    right, wrong = ("right", "behave"), ("wrong", "behave")
    late = ("ungradable", "time limit")
    assert decided[:4] == [right, late, wrong, late]
    assert decided[4] == ("ungradable", "error: worker ended with exit code 3")
    assert decided[5] == decided[10] == right
    assert decided[6] == ("ungradable", "error: KeyError: 'no such thing'")
    assert decided[7][0] == "ungradable" and "MemoryError" in str(decided[7][1])
    assert decided[8:10] == [wrong, ("no answer", "extraction")]


def test_an_idle_worker_outlives_the_time_limit_of_one_comparison() -> None:
    task = make_task(undecided, behave)
    assert [one.outcome for one in graded(task, [("a", "a")] * 3, seconds=0.3)] == ["right"] * 3


def test_equal_pairs_are_proved_once(capfd: pytest.CaptureFixture[str]) -> None:
    graded(make_task(undecided, behave), [("a", "b")] * 50 + [("a", "a")] * 50)
    # One line when the worker starts, one for each distinct pair.
    assert capfd.readouterr().err.count("noise") == 3


def test_no_worker_is_started_when_everything_is_decided() -> None:
    task = make_task(same_number, never_starts)
    assert [one.outcome for one in graded(task, [("5", "5"), ("5", "6")])] == ["right", "wrong"]


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer() -> None:
    with pytest.raises(
        RuntimeError, match=r"worker for test_grading\.never_starts ended with exit"
    ):
        graded(make_task(undecided, never_starts), [("a", "a")])


def test_prove_must_be_importable() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        graded(make_task(undecided, lambda gold, answer: True), [("a", "a")])


def test_grading_works_in_a_thread() -> None:
    seen: list[Rollout] = []
    task = make_task(undecided, behave)
    thread = threading.Thread(target=lambda: seen.extend(graded(task, [("a", "a")])))
    thread.start()
    thread.join()
    assert [one.outcome for one in seen] == ["right"]


def test_a_script_without_a_main_guard_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "proofs.py").write_text("def prove(gold, answer):\n    return gold == answer\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import replace\n"
        "import proofs, test_grading\n"
        "print('once')\n"
        "task = test_grading.make_task(test_grading.undecided, proofs.prove)\n"
        "print(*[one.outcome for one in test_grading.graded(task, [('a', 'a'), ('a', 'b')])])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "once\nright wrong\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_a_worker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import test_grading as t\n"
        "t.graded(t.make_task(t.undecided, t.behave), [('a', 'hang')], seconds=1)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stderr is not None
    for _ in range(2):  # the noise of the first call, then that of the one that hangs
        assert parent.stderr.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    tasks = children.parent.parent.glob("*/children")
    workers = [int(pid) for task in tasks for pid in task.read_text().split()]
    parent.kill()
    parent.wait()
    parent.stderr.close()
    assert workers
    give_up = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in workers):
        assert time.monotonic() < give_up, "a worker outlived its parent"
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_gold_answer_that_cannot_be_read_is_named_before_a_run() -> None:
    problems = [
        Problem("good", "?", "5"),
        Problem("bad-7", "?", "fives"),
        Problem("bad-8", "?", ""),
    ]
    check_gold(problems[:1], make_task(same_number))
    with pytest.raises(ValueError, match=r"2 of 3 problems.*'bad-7': 'fives'.*'bad-8'.*Correct or"):
        check_gold(problems, make_task(same_number))


def _labelled() -> list[dict[str, str]]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def _graded_pairs() -> list[tuple[dict[str, str], Rollout]]:
    latex = make_task(competition_math.equal, competition_math.prove)
    tasks = {"number": make_task(same_number), "choice": make_task(same_choice), "latex": latex}
    rows = _labelled()
    result = []
    for kind, task in tasks.items():
        chosen = [row for row in rows if row["kind"] == kind]
        seen = grade([rollout(row["gold"], row["answer"]) for row in chosen], task, workers=2)
        result += zip(chosen, seen, strict=True)
    return result


@pytest.mark.slow
def test_labelled_pairs_have_no_false_positive_and_at_most_2_percent_false_negatives() -> None:
    seen = _graded_pairs()
    assert len(seen) >= 220
    false_positives = [
        (row, one.decided_by) for row, one in seen if one.correct and row["verdict"] == "wrong"
    ]
    missed = [
        (row, one.decided_by) for row, one in seen if not one.correct and row["verdict"] == "right"
    ]
    right = Counter(row["verdict"] for row, _ in seen)["right"]
    assert not false_positives
    assert len(missed) <= 0.02 * right, missed


MATHLIKE = st.text(alphabet="0123456789xyabe+-*/^_=<>()[]{},.!|\\ $%", min_size=1, max_size=14)


@pytest.mark.slow
@given(st.lists(MATHLIKE, min_size=20, max_size=20))
@settings(max_examples=3, deadline=None)
def test_any_text_is_graded_without_a_crash_and_within_the_limit(texts: list[str]) -> None:
    task = make_task(competition_math.equal, competition_math.prove)
    started = time.monotonic()
    pairs = list(zip(texts, reversed(texts), strict=True))
    assert all(one.outcome for one in graded(task, pairs, seconds=1.0, workers=2))
    assert time.monotonic() - started < 60


@given(MATHLIKE)
@settings(max_examples=200, deadline=None)
def test_a_gold_answer_is_equal_to_itself(gold: str) -> None:
    verdict = competition_math.equal(gold, gold)
    assert verdict.equal is True or verdict.decided_by == "empty gold"


def test_every_labelled_gold_is_equal_to_itself() -> None:
    task = make_task(competition_math.equal, competition_math.prove)
    golds = dict.fromkeys(row["gold"] for row in _labelled())
    check_gold([Problem(gold, "?", gold) for gold in golds], task)
