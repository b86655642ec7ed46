"""Best-of-n: answer questions by choosing among a generator's candidates with a verifier."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selftaught.deprecation import renamed_parameter
from selftaught.evaluation.candidates import vote
from selftaught.models.embedded import embedded_model
from selftaught.option_groups import SolverOptions
from selftaught.records import Completion, Problem, parse_json_line, read_jsonl
from selftaught.samplers import Closing, SamplingParams, open_sampler
from selftaught.tasks import open_task
from selftaught.tasks.rows import Row, checked

SHOWN = 4
"""Number of candidates that are sampled and shown at a time."""


@dataclass(frozen=True)
class Solution:
    """An answer, with the candidates that it was chosen from."""

    question: str
    answer: str | None
    """The answer; None if no candidate has one."""
    completion: str
    """The candidate that was chosen."""
    support: int
    """Number of candidates with this answer."""
    completions: list[str]
    """All candidates."""
    scores: list[float] | None
    """Scores of the verifier, one per candidate; None without a verifier."""


class Solver(Closing):
    """Answers questions by best-of-n. As a context manager, it frees the models' memory at the end.

    Args:
        model: the generator: a model folder, a Hugging Face name, or "embedded".
        verifier: model folder of a verifier. None means that the most frequent answer is chosen.
        options: the other fields of `SolverOptions`, such as `n` and `temperature`. With n = 1 the
            candidate is decoded greedily.

    Raises:
        ValueError: n is below 1, or an option of the sampler, the task or the verifier is invalid.
    """

    def __init__(self, model: str, verifier: str | None = None, **options: Any) -> None:
        from selftaught.evaluation.verifier import Verifier

        self._options = given = SolverOptions(model=model, verifier=verifier, **options)
        task_options, engine_options = given.task_options or {}, given.sampler_options or {}
        self._task = open_task(given.task, **task_options)
        self._style = self._task.styled(
            given.prompt,
            system_prompt=given.system_prompt or "",
            chat_template_kwargs=given.chat_template_kwargs,
        )
        self._task_options = {name: str(value) for name, value in task_options.items()}
        self.n = given.n
        self.params = SamplingParams(
            n=given.n, temperature=given.temperature if given.n > 1 else 0.0, top_p=given.top_p,
            seed=given.seed, max_tokens=given.max_tokens or self._task.max_tokens,
            thought_marks=self._task.thought_marks,
        ).for_prompt(self._style.stop, self._style.chat_template_kwargs)  # fmt: skip
        named = str(embedded_model()) if model == "embedded" else model
        self._sampler = open_sampler(given.sampler, named, **engine_options)
        known = ("dtype", "device")
        where = {name: value for name, value in engine_options.items() if name in known}
        self._verifier = (
            Verifier(verifier, score=given.score, reference=given.reference, **where)
            if verifier
            else None
        )

    @property
    def made_of(self) -> dict[str, Any]:
        """Everything that the answers depend on: weights, options and the rule of choice."""
        options = self._style.chat_template_kwargs
        return {
            **({"chat_template_kwargs": dict(options)} if options else {}),
            "generator": self._sampler.fingerprint,
            "verifier": self._verifier.fingerprint if self._verifier else None,
            "score": self._options.score if self._verifier else None,
            "task": self._task.name,
            "task options": self._task_options,
            "prompt": self._style.digest([Problem("", "?", "")]),
            "by": self._options.by,
            "n": self.n,
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "max_tokens": self.params.max_tokens,
            "seed": self.params.seed,
        }

    def solve(
        self, question: str, *, seen: Callable[[int, Completion], None] | None = None
    ) -> Solution:
        """Return the answer to a question.

        Args:
            question: the question.
            seen: called with the index, from 0, and the completion of every candidate when it is
                finished.
        """
        problem = Problem(question, question, "")
        completions: list[Completion] = []
        for first in range(0, self.n, SHOWN if seen else self.n):
            count = min(SHOWN if seen else self.n, self.n - first)
            params = replace(self.params, n=count, first=first)
            sampled = self._sampler.sample([self._style(problem)], params, keys=[question])[0]
            for one in sampled:
                if seen:
                    seen(len(completions), one)
                completions.append(one)
        return self._chosen(problem, completions)

    def _chosen(self, problem: Problem, completions: Sequence[Completion]) -> Solution:
        from selftaught.evaluation.verifier import as_rollouts

        answers = [
            None
            if one.finish_reason == "length"
            else self._task.answer(one.text, thought_open=one.thought_open)
            for one in completions
        ]
        votes = [vote(answer) for answer in answers]
        scores = None
        if self._verifier is not None:
            rollouts = as_rollouts(problem, self._style(problem), completions, self._sampler.model)
            scores = self._verifier.score(rollouts, self._style)
        at = best_candidate(votes, scores, weighted=self._options.by == "weighted")
        return Solution(
            problem.question, answers[at], completions[at].text,
            sum(one is not None and one == votes[at] for one in votes),
            [one.text for one in completions], scores,
        )  # fmt: skip

    def close(self) -> None:
        """Free the models' memory."""
        self._sampler.close()
        if self._verifier is not None:
            self._verifier.close()


def best_candidate(
    votes: Sequence[str | None], scores: Sequence[float] | None, *, weighted: bool
) -> int:
    """Return the index of the chosen candidate.

    Candidates without an answer are chosen only if no candidate has one. With scores, the candidate
    with the highest score is chosen. With `weighted`, or without scores, the answer with the
    largest weight or the most votes is chosen, and of its candidates the one with the highest
    score. On a tie, the first.

    Args:
        votes: normalized answers of the candidates. None means that a candidate has no answer.
        scores: scores of the candidates. None means a majority vote.
        weighted: weight votes by the exponential of the scores.
    """
    import math

    eligible = [at for at, one in enumerate(votes) if one is not None] or list(range(len(votes)))
    if scores is not None and not weighted:
        return max(eligible, key=lambda at: (scores[at], -at))
    top = max(scores[at] for at in eligible) if scores is not None else 0.0
    weight: dict[str | None, float] = {}
    for at in eligible:
        own = 1.0 if scores is None else math.exp(scores[at] - top)
        weight[votes[at]] = weight.get(votes[at], 0.0) + own
    most = max(weight.values())
    leaders = [at for at in eligible if weight[votes[at]] == most]
    return max(leaders, key=lambda at: (scores[at] if scores is not None else 0.0, -at))


def solve(question: str, model: str, verifier: str | None = None, **options: Any) -> Solution:
    """Answer one question by best-of-n. For several questions, use a `Solver`, which loads models
    once.

    Args:
        question: the question.
        model, verifier, options: see `Solver`.
    """
    with Solver(model, verifier, **options) as solver:
        return solver.solve(question)


def read_questions(path: Path) -> list[str]:
    """Read the questions of a file: JSONL with a column `question`, or text with one question per
    line.

    Raises:
        ValueError: there is no question, a row has no question, or the file is not UTF-8.
    """
    if path.suffix == ".jsonl":
        questions = []
        for number, row in enumerate(read_jsonl(path), 1):
            checked(Row(f"{path}, row {number}", row))
            if not isinstance(row.get("question"), str):
                found = repr(row["question"])[:60] if "question" in row else f"the columns {', '.join(row)}"  # fmt: skip
                raise ValueError(
                    f"{path}, row {number}: expected text in the column question, got {found}."
                )
            questions.append(row["question"])
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at byte "
                f"{error.start}; convert the file to UTF-8."
            ) from None
        questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{path}: expected at least one question, got none.")
    return questions


@renamed_parameter("told", "on_solution")
def solve_file(
    solver: Solver,
    questions: Sequence[str],
    out: Path,
    *,
    on_solution: Callable[[Solution], None] | None = None,
) -> int:
    """Solve every question and append each solution to a JSONL file; stored solutions are kept.

    Args:
        solver: the solver.
        questions: the questions.
        out: output file.
        on_solution: callback for each new solution.

    Returns:
        The number of solutions in the file.

    Raises:
        ValueError: the file contains solutions by other models or options, or of other questions.
    """
    header = json.dumps({"format": "selftaught solutions 1"} | solver.made_of) + "\n"
    done = _solved(out, header, questions)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8", newline="\n") as file:
        if done is None:
            file.write(header)
        for question in questions[done or 0 :]:
            solution = solver.solve(question)
            row = {"question": question, "answer": solution.answer, "support": solution.support,
                   "completion": solution.completion, "completions": solution.completions,
                   "scores": solution.scores}  # fmt: skip
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if on_solution:
                on_solution(solution)
    return len(questions)


def _solved(out: Path, header: str, questions: Sequence[str]) -> int | None:
    """Return the number of questions that a file already answers; None if there is no file.

    An incomplete last line is removed.
    """
    if not out.exists() or not out.stat().st_size:
        return None
    lines = out.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole or whole[0] != header.encode():
        raise ValueError(
            f"Expected {out} to contain solutions by the same models and options, got other "
            "content. Give another file."
        )
    rows = [parse_json_line(line, f"{out}, line {at}") for at, line in enumerate(whole[1:], 2)]
    if [row.get("question") for row in rows] != list(questions[: len(rows)]):
        raise ValueError(
            f"Expected {out} to contain answers to the same questions, got other questions. Give "
            "another file."
        )
    os.truncate(out, sum(map(len, whole)))
    return len(rows)
