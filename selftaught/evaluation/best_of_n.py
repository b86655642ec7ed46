"""Best-of-n as a thing to use: a generator's candidates, a verifier's scores, one answer."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from selftaught.evaluation.candidates import vote
from selftaught.models.embedded import embedded_model
from selftaught.records import Completion, Problem, parse_json_line, read_jsonl
from selftaught.samplers import Closing, SamplingParams, open_sampler
from selftaught.tasks import open_task
from selftaught.tasks.rows import Row, checked

SHOWN = 4
"""Candidates that are drawn, and told of, at a time."""


@dataclass(frozen=True)
class Solution:
    """An answer, and the candidates it was chosen from."""

    question: str
    answer: str | None
    """None where no candidate has one."""
    completion: str
    """The candidate that was chosen."""
    support: int
    """How many candidates give this answer."""
    completions: list[str]
    scores: list[float] | None
    """The verifier's, one per candidate; None where the majority decided."""


class Solver(Closing):
    """Answers questions by best-of-n; use it in a `with`, which frees the models' memory.

    Args:
        model: the generator: a folder, a Hugging Face name, or "embedded".
        verifier: a model folder; without one, the commonest answer is taken.
        n: candidates per question.
        by: "best": the candidate with the highest score; "weighted": the answer whose candidates have
            the most weight together, the exponential of their scores.
        score, reference: see `Verifier`.
        sampler, sampler_options: where the generator lives; see `open_sampler`.
        task, task_options, prompt: how the question is put and its answer read.
        system_prompt, chat_template_kwargs: with the prompt chat, the system message and variables of
            the model's chat template.

    Raises:
        ValueError: n is below 1, or an option that the sampler, the task or the verifier refuses.
    """

    def __init__(
        self,
        model: str,
        verifier: str | None = None,
        *,
        n: int = 16,
        by: Literal["best", "weighted"] = "best",
        score: Literal["sum", "mean", "reward"] = "sum",
        reference: str | None = None,
        task: str = "arithmetic",
        task_options: dict[str, Any] | None = None,
        prompt: str = "bare",
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        seed: int = 0,
        sampler: str = "transformers",
        sampler_options: dict[str, Any] | None = None,
    ) -> None:
        from selftaught.evaluation.verifier import Verifier

        self._task = open_task(task, **(task_options or {}))
        self._style = self._task.styled(
            prompt,
            system_prompt=system_prompt or "",
            chat_template_kwargs=chat_template_kwargs,
        )
        self._by, self._score = by, score
        self._task_options = {name: str(value) for name, value in (task_options or {}).items()}
        self.n = n
        self.params = SamplingParams(
            n=n, temperature=temperature if n > 1 else 0.0, top_p=top_p, seed=seed,
            max_tokens=max_tokens or self._task.max_tokens, thought_marks=self._task.thought_marks,
        ).for_prompt(self._style.stop, self._style.chat_template_kwargs)  # fmt: skip
        named = str(embedded_model()) if model == "embedded" else model
        self._sampler = open_sampler(sampler, named, **(sampler_options or {}))
        known = ("dtype", "device")
        where = {name: value for name, value in (sampler_options or {}).items() if name in known}
        self._verifier = (
            Verifier(verifier, score=score, reference=reference, **where) if verifier else None
        )

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides the answers: the weights and how candidates are drawn and chosen."""
        options = self._style.chat_template_kwargs
        return {
            **({"chat_template_kwargs": dict(options)} if options else {}),
            "generator": self._sampler.fingerprint,
            "verifier": self._verifier.fingerprint if self._verifier else None,
            "score": self._score if self._verifier else None,
            "task": self._task.name,
            "task options": self._task_options,
            "prompt": self._style.digest([Problem("", "?", "")]),
            "by": self._by,
            "n": self.n,
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "max_tokens": self.params.max_tokens,
            "seed": self.params.seed,
        }

    def solve(
        self, question: str, *, seen: Callable[[int, Completion], Any] | None = None
    ) -> Solution:
        """The answer to a question.

        Args:
            seen: called with every candidate as it is finished, and its number from 0.
        """
        problem = Problem(question, question, "")
        completions: list[Completion] = []
        for first in range(0, self.n, SHOWN if seen else self.n):
            count = min(SHOWN if seen else self.n, self.n - first)
            params = replace(self.params, n=count, first=first)
            drawn = self._sampler.sample([self._style(problem)], params, keys=[question])[0]
            for one in drawn:
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
        at = best_candidate(votes, scores, weighted=self._by == "weighted")
        return Solution(
            problem.question, answers[at], completions[at].text,
            sum(one is not None and one == votes[at] for one in votes),
            [one.text for one in completions], scores,
        )  # fmt: skip

    def close(self) -> None:
        """Give the models' memory back."""
        self._sampler.close()
        if self._verifier is not None:
            self._verifier.close()


def best_candidate(
    votes: Sequence[str | None], scores: Sequence[float] | None, *, weighted: bool
) -> int:
    """Which candidate to take: one with an answer, if any has one; the first of equals.

    By score, or the best-scored of the answer with the most votes or, with `weighted`, most weight.
    """
    import math

    able = [at for at, one in enumerate(votes) if one is not None] or list(range(len(votes)))
    if scores is not None and not weighted:
        return max(able, key=lambda at: (scores[at], -at))
    top = max(scores[at] for at in able) if scores is not None else 0.0
    weight: dict[str | None, float] = {}
    for at in able:
        own = 1.0 if scores is None else math.exp(scores[at] - top)
        weight[votes[at]] = weight.get(votes[at], 0.0) + own
    most = max(weight.values())
    leaders = [at for at in able if weight[votes[at]] == most]
    return max(leaders, key=lambda at: (scores[at] if scores is not None else 0.0, -at))


def solve(question: str, model: str, verifier: str | None = None, **options: Any) -> Solution:
    """The answer to one question by best-of-n; for several, keep a `Solver`."""
    with Solver(model, verifier, **options) as solver:
        return solver.solve(question)


def read_questions(path: Path) -> list[str]:
    """The questions of a file: JSONL with a column question, or text with one on each line.

    Raises:
        ValueError: there are none, or a row has no question.
    """
    if path.suffix == ".jsonl":
        questions = []
        for number, row in enumerate(read_jsonl(path), 1):
            checked(Row(f"{path}, row {number}", row))
            if not isinstance(row.get("question"), str):
                raise ValueError(
                    f"{path}, row {number}: expected a text in the column question, got the columns "
                    f"{', '.join(row)}."
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
        raise ValueError(f"{path} holds no question.")
    return questions


def solve_file(
    solver: Solver,
    questions: Sequence[str],
    out: Path,
    *,
    told: Callable[[Solution], Any] | None = None,
) -> int:
    """Solve every question, appending each solution to `out` as JSONL; what is there is kept.

    Returns:
        How many solutions the file now has.

    Raises:
        ValueError: the file holds solutions of other models, other options or other questions.
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
            if told:
                told(solution)
    return len(questions)


def _solved(out: Path, header: str, questions: Sequence[str]) -> int | None:
    """How many questions a file already answers; None where there is no file. A torn line is cut off."""
    if not out.exists() or not out.stat().st_size:
        return None
    lines = out.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole or whole[0] != header.encode():
        raise ValueError(
            f"{out} holds something else, or solutions by other models or options; give another file."
        )
    rows = [parse_json_line(line, f"{out}, line {at}") for at, line in enumerate(whole[1:], 2)]
    if [row.get("question") for row in rows] != list(questions[: len(rows)]):
        raise ValueError(f"{out} answers other questions; give another file.")
    os.truncate(out, sum(map(len, whole)))
    return len(rows)
