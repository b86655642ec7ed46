"""Paired differences, against values worked out by hand and by brute force."""

import itertools
import math
import random
from pathlib import Path

import pytest

from selftaught.records import Outcome, Problem, Rollout, write_jsonl
from selftaught.reports.paired import mcnemar, outcomes, paired


def test_gained_and_lost_are_counted_on_shared_problems_only():
    first = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0, "only first": 1.0}
    second = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "only second": 0.0}
    found = paired(first, second)
    assert found is not None
    assert (found.n, found.gained, found.lost) == (4, 2, 1)
    # differences 0, 1, 1, -1 and half a problem in each cell: (3 + 1 - 1 / 6) / 36
    assert found.difference == 0.25
    assert found.high == pytest.approx(0.25 + 1.959964 * math.sqrt((4 - 1 / 6) / 36))
    assert paired({"a": 1.0}, {"b": 1.0}) is None


def test_equal_measurements_still_have_an_interval():
    found = paired(
        dict.fromkeys(map(str, range(100)), 1.0), dict.fromkeys(map(str, range(100)), 1.0)
    )
    assert found is not None
    assert found.low < 0 < found.high < 0.03


def test_with_groups_the_difference_is_the_mean_over_groups():
    first = dict.fromkeys("abcd", 0.0)
    second = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}
    found = paired(first, second, {"a": "x", "b": "x", "c": "x", "d": "y"})
    assert found is not None and found.difference == 0.5  # (1 + 0) / 2, not 3 / 4


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9), (12, 0)])
def test_the_exact_test_is_what_all_coin_tosses_give(gained: int, lost: int):
    n = gained + lost
    as_far = sum(
        abs(sum(tosses) - n / 2) >= abs(gained - n / 2)
        for tosses in itertools.product((0, 1), repeat=n)
    )
    assert mcnemar(gained, lost) == pytest.approx(as_far / 2**n)


def test_the_interval_covers_the_true_difference_about_95_times_in_100():
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        first, second = {}, {}
        for name in map(str, range(100)):
            hard = draw.random()
            first[name] = float(draw.random() < 0.5 * hard)
            second[name] = float(draw.random() < 0.5 * hard + 0.2)
        found = paired(first, second)
        assert found is not None
        covered += found.low <= 0.2 <= found.high
    assert 0.91 < covered / 400 < 0.99


def test_outcomes_are_read_from_graded_completions(tmp_path: Path):
    graded: list[tuple[str, int, Outcome]] = [
        ("a", 0, "right"), ("a", 1, "wrong"), ("b", 0, "no answer"),
    ]  # fmt: skip
    rows = [
        Rollout(Problem(name, "q", "7"), "q", "7", "stop", "m", index, outcome=outcome)
        for name, index, outcome in graded
    ]
    write_jsonl(tmp_path / "x.graded.jsonl", rows)
    assert outcomes(tmp_path / "x.graded.jsonl") == {
        "a\0q\x007": 0.5, "b\0q\x007": 0.0
    }  # fmt: skip
    other = [
        Rollout(Problem("a", "another question", "7"), "q", "7", "stop", "m", 0, outcome="right")
    ]
    write_jsonl(tmp_path / "y.graded.jsonl", other)
    first, second = (outcomes(tmp_path / f"{name}.graded.jsonl") for name in "xy")
    assert paired(first, second) is None
    assert outcomes(tmp_path / "absent.jsonl") == {}
