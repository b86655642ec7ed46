"""The command `selftaught solve`: answer questions by best-of-n or by majority."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import Positional, add_options
from selftaught.cli.output import progress_bar
from selftaught.option_groups import SolverOptions
from selftaught.printable import printable
from selftaught.runs.folder import ProgressReporter, read_rows

if TYPE_CHECKING:
    from selftaught.evaluation.best_of_n import Solution, Solver
    from selftaught.records import Completion

DONE, NO_ANSWER = 0, 3


@dataclass(frozen=True)
class SolveOptions(SolverOptions):
    """Options of best-of-n: with a verifier, or by majority voting without one."""

    heading: ClassVar[str] = "choice"

    file: Path | None = None
    """File of questions: JSONL with a column `question`, or text with one question per line."""
    out: Path | None = None
    """Output file (JSONL) for the answers to the questions of `--file`. Repeating the same command
    continues it. Default: runs/solved.jsonl."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of the command and return the dataclass of its options."""
    del command, given
    positional: list[Positional] = [
        ("question", "a question; required unless --file is given", "?")
    ]
    return add_options(parser, SolveOptions, positional=positional)


def run(command: str, options: Namespace) -> int:
    """Run the command and return the exit code."""
    del command
    return solve({name: options[name] for name in vars(options)}, progress_bar)


def solve(values: dict[str, Any], bar: Callable[..., Any]) -> int:
    """Answer a question, or the questions of a file, and return the exit code.

    Args:
        values: the options by name.
        bar: progress bar; see `progress_bar`.

    Raises:
        ValueError: an option, or the combination of options, is invalid.
    """
    from selftaught.evaluation.best_of_n import Solver, read_questions

    question: str | None = values.pop("question")
    ask = SolveOptions(**values)
    if (question is None) == (ask.file is None):
        raise ValueError("Expected either a question or --file, got both or neither.")
    if question is not None and question.encode("utf-8", "replace").decode() != question:
        raise ValueError(f"Expected a question in UTF-8 text, got {question[:100]!r}.")
    if ask.verifier is None and (ask.by, ask.score, ask.reference) != ("best", "sum", None):
        raise ValueError(
            "--by, --score and --reference require a verifier; give its folder with --verifier."
        )
    with Solver(**{one.name: getattr(ask, one.name) for one in fields(ask)
                   if one.name not in ("file", "out")}) as solver:  # fmt: skip
        if ask.file is not None:
            return _solve_file(solver, read_questions(ask.file), ask, bar)
        solution = solver.solve(question or "", seen=lambda index, one: print(_candidate(index, one), flush=True))  # fmt: skip
    if solution.scores is not None:
        print("scores  " + " ".join(f"{score:.2f}" for score in solution.scores))
    if solution.answer is None:
        print(
            _no_answer(ask, f"any of the {len(solution.completions)} candidates"), file=sys.stderr
        )
        return NO_ANSWER
    print(f"answer  {printable(str(solution.answer))}  ({solution.support} of {len(solution.completions)} candidates)")  # fmt: skip
    print(printable(solution.completion))
    return DONE


def _candidate(index: int, completion: "Completion") -> str:
    return f"[{index + 1}] {printable(' '.join(completion.text.split())[:160])}"


def _solve_file(
    solver: "Solver", questions: Sequence[str], ask: SolveOptions, bar: Callable[..., Any]
) -> int:
    from selftaught.evaluation.best_of_n import solve_file
    from selftaught.runs.folder import lock_folder, remember
    from selftaught.runs.status import status_file, tracked_status

    out = ask.out or Path("runs/solved.jsonl")
    with (
        lock_folder(out.parent, f"{out.name}.lock"),
        tracked_status(status_file(out), "solve", ProgressReporter(progress=bar)) as reporter,
        reporter.progress("solving", len(questions)) as advance,
    ):

        def solved(one: "Solution") -> None:
            print(printable(f"{one.question[:60]}  ->  {one.answer}  ({one.support} of {len(one.completions)})"), flush=True)  # fmt: skip
            if advance is not None:
                advance(1)

        count = solve_file(solver, questions, out, on_solution=solved)
    remember(ask, out)
    answered = sum(row.get("answer") is not None for row in read_rows(out)[1:])
    print(f"{answered} of {count} questions answered: {out}")
    if not answered:
        print(_no_answer(ask, f"any candidate of the {count} questions"), file=sys.stderr)
        return NO_ANSWER
    return DONE


def _no_answer(ask: SolveOptions, where: str) -> str:
    """Return the message for the case that no candidate has an answer."""
    small = ask.model == "embedded" and ask.sampler == "transformers"
    known = "The model in this package only adds numbers, written as 48+17; give another with --model. " if small else ""  # fmt: skip
    return (
        f"selftaught: no answer could be read from {where}. {known}Check that the task "
        f"{ask.task!r} fits the question and the form in which the model states an answer (--task, "
        "--prompt). A completion that was cut at --max-tokens has no answer."
    )
