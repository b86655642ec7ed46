"""Tasks of the reasoning-gym library (Stojanovski et al. 2025, arXiv:2505.24760; extra `gym`).

The library generates problem i with `Random(seed + i)`, so nearby seeds give nearly the same
problems. Every split therefore has a seed far from the others, and repeated problems are removed.
"""

import contextlib
import difflib
import io
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import Verdict, same_number, same_text, stated_number, stated_text
from selftaught.tasks.base import STATED, Task, answer_in_brackets, split_named
from selftaught.tasks.question_file import Columns, read_shots

SPLITS = ("test", "validation", "train")
"""In the order in which they are drawn. A repeated question stays in the first split, so test and
validation problems keep the generator's distribution."""
MOST_DRAWS = 10
"""Maximum number of draws per problem, before the generator counts as exhausted."""

SCORED = {
    "countdown": "0123456789+-*/() ",
    "group_anagrams": None,
    "jugs": None,
    "n_queens": "_Q \n",
    "palindrome_generation": None,
    "shortest_path": None,
    "tower_of_hanoi": None,
    "word_ladder": None,
}
"""Tasks with several correct answers whose scorers give 1.0 to correct answers only. The value is
the set of allowed characters, if the scorer evaluates an answer as Python. Other scorers of the
library are not used, because several give 1.0 to wrong answers (game_of_life_halting to any answer,
puzzle24 to any four numbers that make 24, gsm_symbolic to -20 for 20)."""
LONGEST_SCORED = 1_000
"""Maximum number of characters of an answer that is passed to a scorer."""

HASH_ORDERED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Tasks whose problems depend on the iteration order of sets, which differs between Python
processes."""


class Generator(Protocol):
    """Interface of the return value of `reasoning_gym.create_dataset`."""

    def __getitem__(self, idx: int) -> dict[str, Any]: ...

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float: ...


def gym(
    name: str,
    *,
    train: int = 1000,
    validation: int = 200,
    test: int = 300,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    shots: str | None = None,
) -> Task:
    """Problems of one reasoning-gym task.

    Args:
        name: name of the task in reasoning-gym, such as "chain_sum".
        train, validation, test: number of different problems of the split.
        seed: random seed for drawing the problems.
        config: options of the reasoning-gym task, such as {"max_terms": 3}.
        shots: file of worked examples with the columns question, answer and rationale. Default:
            chain_sum and simple_equations have worked examples in this package; other tasks use two
            drawn problems with their answers only.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    own = _own_shots(name, shots)
    drawn = _draw(name, sizes, seed, config or {}, {shot.question for shot in own})
    splits = {
        split: [_problem(entry, split, at) for at, entry in enumerate(drawn[split])]
        for split in SPLITS
    }
    examples = own or [_answered(entry, at) for at, entry in enumerate(drawn["shots"])]

    extract = _extraction([problem.gold for part in splits.values() for problem in part])

    def shown(problem: Problem) -> Sequence[Problem]:
        return _like(problem, examples) if own is CHAIN_SUM else examples

    return Task(
        name=f"gym {name}",
        problems=lambda split: split_named(lambda: splits, split, f"gym {name}"),
        prompt=PromptStyle(name="few-shot", shots=shown),
        extract=extract,
        equal=_scored(name, config or {}, drawn)
        if name in SCORED
        else same_number
        if extract is stated_number
        else _same,
        hint=answer_in_brackets,
        instruction=STATED,
        license="apache-2.0",
        facts="reasoning-gym, Apache-2.0, Stojanovski et al. 2025 (arXiv:2505.24760)",
    )


# --- drawing problems ----------------------------------------------------------------------------


def _draw(
    name: str, sizes: dict[str, int], seed: int, config: dict[str, Any], seen: set[str]
) -> dict[str, list[dict[str, Any]]]:
    """Draw the entries of every split, and two for worked examples, without repeated questions.

    Args:
        seen: questions that are excluded. The drawn questions are added to it.
    """
    if taken := sorted({"seed", "size"} & set(config)):
        raise ValueError(
            f"config must not contain {' and '.join(taken)}; use the task's options seed, train, "
            "validation and test."
        )
    drawn: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        drawn[split] = _distinct(name, sizes[split], f"{seed} {split}", config, seen)
    drawn["shots"] = _distinct(name, 2, f"{seed} shots", config, seen)
    return drawn


def _distinct(
    name: str, wanted: int, seed: str, config: dict[str, Any], seen: set[str]
) -> list[dict[str, Any]]:
    """Draw `wanted` entries whose questions are not in `seen`, and add their questions to it."""
    if wanted < 1:
        raise ValueError(f"train, validation and test must be at least 1; got {wanted}.")
    entries: list[dict[str, Any]] = []
    for entry in _entries(name, wanted * MOST_DRAWS, random.Random(seed).getrandbits(31), config):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            entries.append(entry)
        if len(entries) == wanted:
            return entries
    raise ValueError(
        f"Expected {wanted} different problems of {name}, got {len(entries)} in "
        f"{wanted * MOST_DRAWS} draws. Use fewer problems, or a config with more variety."
    )


def _entries(name: str, size: int, seed: int, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    generator = _generator(name, {"size": size, "seed": seed, **config})
    for index in range(size):
        # some generators print to standard output
        with contextlib.redirect_stdout(io.StringIO()):
            entry = generator[index]
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise ValueError(
                f"Expected problems with a gold answer; {name} has problems that only a scorer can "
                "grade. Choose another task."
            )
        yield entry


def _generator(name: str, config: dict[str, Any]) -> Generator:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            "The task gym requires the package reasoning-gym. Run: pip install 'selftaught[gym]'"
        ) from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        raise ValueError(
            f"reasoning-gym has no task {name!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(DATASETS)}.")
        )
    if name in HASH_ORDERED and sys.flags.hash_randomization:
        raise ValueError(
            f"{name} gives different problems in every Python process. Set PYTHONHASHSEED=0 in the "
            "environment."
        )
    try:
        return reasoning_gym.create_dataset(name, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"Invalid config of the reasoning-gym task {name}: {error}") from error


def _problem(entry: dict[str, Any], split: str, at: int) -> Problem:
    return Problem(f"{split}-{at}", entry["question"].strip(), entry["answer"].strip())


# --- answer extraction ---------------------------------------------------------------------------


def _extraction(golds: Sequence[str]) -> Callable[[str], str | None]:
    """Return the function that extracts answers like these gold answers: as a number, as one line,
    or, if a gold answer has several lines (a grid, a list of moves), as all following lines."""
    extracted = (stated_number(f"The answer is {gold}.") or "" for gold in golds)
    if all(same_number(*pair).equal for pair in zip(golds, extracted, strict=True)):
        return stated_number
    return stated_lines if any("\n" in gold for gold in golds) else stated_text


def stated_lines(completion: str) -> str | None:
    """Return the text after the last "The answer is"; without it, the whole completion."""
    return completion.rpartition("The answer is")[2].strip().removeprefix(":").strip() or None


# --- comparison ----------------------------------------------------------------------------------


_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")


def _same(gold: str, answer: str) -> Verdict:
    """Compare two answers as text, line by line; or as numbers, if both are written plainly.

    A string such as "0110" or "5e3" is compared as text. The lines of a grid are kept apart.
    """
    if _PLAIN_NUMBER.fullmatch(gold) and _PLAIN_NUMBER.fullmatch(answer):
        return same_number(gold, answer)
    lines, others = gold.strip().splitlines(), answer.strip().splitlines()
    if len(lines) <= 1:
        return same_text(gold, answer)
    return Verdict(
        len(lines) == len(others)
        and all(
            bool(same_text(one.strip() or "-", other.strip() or "-").equal)
            for one, other in zip(lines, others, strict=True)
        ),
        "text",
    )


def _scored(
    name: str, config: dict[str, Any], drawn: dict[str, list[dict[str, Any]]]
) -> Callable[[str, str], Verdict]:
    """Return a comparison as text, and otherwise by the library's scorer.

    Several problems may have the same gold answer, and the comparison does not know which problem
    was asked. An answer is correct only if it is correct for all of them, so that no wrong answer
    is trained on.
    """
    generator = _generator(name, {"size": 1, "seed": 0, **config})
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in itertools.chain.from_iterable(drawn.values()):
        entries.setdefault(entry["answer"].strip(), []).append(entry)

    def equal(gold: str, answer: str) -> Verdict:
        if same_text(gold, answer).equal:
            return Verdict(True, "text")
        if gold not in entries:
            return Verdict(None, "gold of another draw")
        allowed = SCORED[name]
        if len(answer) > LONGEST_SCORED or (allowed and not set(answer) <= set(allowed)):
            return Verdict(False, "form")
        if "**" in answer:
            return Verdict(False, "form")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                right = all(generator.score_answer(answer, entry) == 1.0 for entry in entries[gold])
        except Exception as error:  # the library's code, on text it was not written for
            return Verdict(None, f"error: {type(error).__name__}")
        return Verdict(right, "scorer")

    return equal


# --- worked examples -----------------------------------------------------------------------------


def _own_shots(name: str, path: str | None) -> Sequence[Problem]:
    """Return the worked examples of a file, or those of this package, if there are any."""
    if path is not None:
        columns = Columns("question", "answer", None, "rationale", None)
        return read_shots(Path(path), columns, "text")
    match name:
        case "chain_sum":
            return CHAIN_SUM
        case "simple_equations":
            return SIMPLE_EQUATIONS
        case _:
            return ()


def _answered(entry: dict[str, Any], at: int) -> Problem:
    """Return a drawn problem as a worked example that only states its answer."""
    problem = _problem(entry, "shot", at)
    return replace(problem, rationale=f"The answer is {problem.gold}.")


def _sum(number: int, expression: str, steps: str, gold: str) -> Problem:
    return Problem(
        f"chain-sum-shot-{number}",
        f"State the final answer to the following arithmetic problem: {expression} =",
        gold,
        f"{steps}. The answer is {gold}.",
    )


CHAIN_SUM = (
    _sum(1, "5 - 8", "5 - 8 = -3", "-3"),
    _sum(2, "34 + 52", "34 + 52 = 86", "86"),
    _sum(3, "43 - 67", "43 - 67 = -24", "-24"),
    _sum(4, "3 + 4", "3 + 4 = 7", "7"),
    _sum(5, "80 - 46", "80 - 46 = 34", "34"),
    _sum(6, "55 + 38", "55 + 38 = 93", "93"),
    _sum(7, "9 - 2", "9 - 2 = 7", "7"),
    _sum(8, "27 + 64", "27 + 64 = 91", "91"),
    _sum(9, "12 + 7 - 3", "12 + 7 = 19. 19 - 3 = 16", "16"),
    _sum(10, "9 - 4 + 6", "9 - 4 = 5. 5 + 6 = 11", "11"),
    _sum(11, "71 - 25 - 30", "71 - 25 = 46. 46 - 30 = 16", "16"),
    _sum(12, "18 + 64 - 90", "18 + 64 = 82. 82 - 90 = -8", "-8"),
    _sum(13, "6 + 8 + 7", "6 + 8 = 14. 14 + 7 = 21", "21"),
    _sum(14, "2 - 9 - 1", "2 - 9 = -7. -7 - 1 = -8", "-8"),
    _sum(15, "55 + 38 + 21", "55 + 38 = 93. 93 + 21 = 114", "114"),
    _sum(16, "27 - 59 + 14", "27 - 59 = -32. -32 + 14 = -18", "-18"),
)


def _terms(question: str) -> int:
    return len(re.findall(r"\d+", question))


def _like(problem: Problem, shots: Sequence[Problem]) -> Sequence[Problem]:
    """Return the worked examples whose number of terms is closest to that of the problem.

    With examples of both lengths, a small model adds a step to short sums and omits one of long
    sums.
    """
    lengths = {_terms(shot.question) for shot in shots}
    nearest = min(lengths, key=lambda terms: abs(terms - _terms(problem.question)))
    return [shot for shot in shots if _terms(shot.question) == nearest]


def _equation(number: int, equation: str, steps: str, gold: str) -> Problem:
    return Problem(
        f"simple-equations-shot-{number}",
        f"Solve for {equation}",
        gold,
        f"{steps} The answer is {gold}.",
    )


SIMPLE_EQUATIONS = (
    _equation(1, "x: 3*x + 4 = 19", "3*x = 19 - 4 = 15, so x = 15 / 3 = 5.", "5"),
    _equation(2, "k: 7*k = 56", "k = 56 / 7 = 8.", "8"),
    _equation(3, "n: 5*n - 6 = 24", "5*n = 24 + 6 = 30, so n = 30 / 5 = 6.", "6"),
    _equation(4, "y: 20 - 2*y = 6", "2*y = 20 - 6 = 14, so y = 14 / 2 = 7.", "7"),
    _equation(5, "b: 11*b + 3 = 36", "11*b = 36 - 3 = 33, so b = 33 / 11 = 3.", "3"),
    _equation(6, "t: 4*t - 15 = 25", "4*t = 25 + 15 = 40, so t = 40 / 4 = 10.", "10"),
)
