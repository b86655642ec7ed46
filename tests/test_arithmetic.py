"""The generated sums: their splits, their scratchpads, and how an answer is read."""

import re
from collections import Counter

import pytest
from narrowed import verdict

from selftaught.prompts import bare, hinted
from selftaught.tasks import open_task
from selftaught.tasks.arithmetic import arithmetic, columns, extract, scratchpad, split_of, sums

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("a", "b", "worked"),
    [  # by hand
        (7, 2, "a7+2+0=09;#9"),
        (9, 9, "a9+9+0=18;#18"),
        (29, 57, "b9+7+0=16;a2+5+1=08;#86"),
        (95, 15, "b5+5+0=10;a9+1+1=11;#110"),
        (903, 108, "c3+8+0=11;b0+0+1=01;a9+1+0=10;#1011"),
        (99999, 10001, "e9+1+0=10;d9+0+1=10;c9+0+1=10;b9+0+1=10;a9+1+1=11;#110000"),
    ],
)
def test_a_scratchpad_works_the_columns_from_the_right(a, b, worked):
    assert scratchpad(a, b) == worked


def test_every_scratchpad_is_school_addition_and_ends_in_the_sum():
    """Read the scratchpad back: operands from its columns, carries from the column before."""
    for n in range(1, 6):
        for a, b in sums(n, "train", 50, seed=1):
            *lines, answer = scratchpad(a, b).split(";")
            parts = [re.fullmatch(r"([a-z])(\d)\+(\d)\+(\d)=(\d)(\d)", line) for line in lines]
            whole = [part.groups() for part in parts if part is not None]
            assert len(whole) == len(parts) and answer == f"#{a + b}"
            name, top, bottom, carry, tens, unit = zip(*whole, strict=True)
            assert "".join(name) == "edcba"[5 - n :]
            assert int("".join(reversed(top))) == a and int("".join(reversed(bottom))) == b
            assert carry == ("0", *tens[:-1])
            assert int(tens[-1] + "".join(reversed(unit))) == a + b


def test_columns_name_the_digits_without_working_them():
    assert columns(29, 57) == "b9+7;a2+5;"
    assert columns(123, 456) == "c3+6;b2+5;a1+4;"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("b9+7+0=16;a2+5+1=08;#86", "86"),
        ("#086", "086"),
        ("b9+7+0=16;a2+5+1=08;86", None),  # without the mark the rationale did not end
        ("b9+7+0=16;a2+5+1=08;#", None),
        ("#8 6", None),
        ("#86;", None),
        ("#-86", None),
        ("#²", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_mark(completion, answer):
    assert extract(completion) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "equal"), [("86", "86", True), ("86", "086", True), ("86", "68", False)]
)
def test_answers_are_compared_as_integers(gold, answer, equal):
    assert verdict(arithmetic(), gold, answer).equal is equal


def test_a_direct_answer_can_be_read():
    task = arithmetic()
    assert task.extract(task.direct.format(answer=86)) == "86"


def test_problems_have_the_digits_asked_for_and_no_rationale():
    task = arithmetic("2-4", train=30, validation=10, test=20)
    for split, count in zip(SPLITS, (30, 10, 20), strict=True):
        problems = task.problems(split)
        assert len(problems) == 3 * count
        for problem in problems:
            a, b = problem.question.split("+")
            assert len(a) == len(b) in (2, 3, 4)
            assert int(a) + int(b) == int(problem.gold)
            assert problem.rationale is None
            assert task.group and task.group(problem) == f"{len(a)} digits"


def test_splits_never_share_a_sum_not_even_across_seeds():
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed in range(3):
        task = arithmetic(train=300, seed=seed)
        for split in SPLITS:
            ids = [problem.id for problem in task.problems(split)]
            assert len(ids) == len(set(ids))
            seen[split] |= set(ids)
    train, validation, test = seen.values()
    assert not train & validation and not train & test and not validation & test


def test_the_hundred_sums_of_one_digit_are_shared_out_and_no_more_are_promised():
    task = arithmetic("1", train=1000, validation=1000, test=1000)
    counts = [len(task.problems(split)) for split in SPLITS]
    assert sum(counts) == 100
    assert all(count >= 8 for count in counts)
    assert task.group and task.group(task.problems("test")[0]) == "1 digit"


def test_the_same_seed_gives_the_same_problems_in_the_same_order():
    def made(seed):
        return [problem.id for problem in arithmetic(seed=seed).problems("train")]

    assert made(0) == made(0)
    assert made(0) != made(1)


def test_the_share_of_every_split_is_near_seven_one_two():
    count: Counter[str] = Counter()
    for a in range(10, 100):
        for b in range(10, 100):
            count[split_of(a, b)] += 1
    assert [round(count[split] / 8100, 1) for split in SPLITS] == [0.7, 0.1, 0.2]


def test_the_prompt_is_bare_and_the_hint_shows_the_answer_only():
    task = arithmetic()
    problem = next(p for p in task.problems("train") if task.group and task.group(p) == "3 digits")
    assert task.prompt(problem) == f"{problem.question}="
    assert hinted(task.prompt, task.hint)(problem) == f"{problem.question} ({problem.gold})="


def test_worked_examples_come_ten_per_length_and_from_training_sums():
    task = arithmetic("1-3", shots=10)
    problem = task.problems("test")[0]
    prompt = task.prompt(problem)
    assert isinstance(prompt, str)
    *shots, asked = prompt.split("\n")
    assert asked == f"{problem.question}=" == bare(task.prompt)(problem)
    assert [len(shot.partition("+")[0]) for shot in shots] == [1] * 10 + [2] * 10 + [3] * 10
    for shot in shots:
        question, worked = shot.split("=", 1)
        a, b = map(int, question.split("+"))
        assert split_of(a, b) == "train"
        assert extract(worked) == str(a + b)


def test_the_longest_scratchpad_fits_the_token_limit_of_the_task():
    assert len(scratchpad(99999, 99999)) < arithmetic().max_tokens


@pytest.mark.parametrize("digits", ["", "0", "3-1", "a-b", "1-27", "-2"])
def test_digits_that_are_no_range_are_refused(digits):
    with pytest.raises(ValueError, match='such as "3" or "1-5"'):
        arithmetic(digits)


@pytest.mark.parametrize(("option", "value"), [("train", 0), ("test", -1), ("shots", -1)])
def test_counts_that_are_none_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least"):
        open_task("arithmetic", **{option: value})
