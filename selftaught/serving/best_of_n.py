"""Best-of-n in the server: the choice of one among several completions of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from selftaught.evaluation.best_of_n import best_candidate
from selftaught.evaluation.candidates import vote
from selftaught.evaluation.verifier import Verifier
from selftaught.records import Completion, Text
from selftaught.rendering import TemplateOptions
from selftaught.tasks.base import Task

Choose = Literal["verifier", "majority", "weighted"]
"""The rule of choice: highest score, most frequent answer, or answer with the largest weight."""


@dataclass(frozen=True)
class Choice:
    """The completion that was chosen."""

    at: int
    """Its index."""
    support: int | None
    """Number of candidates with the same answer; None if answers are not compared."""


class Chooser:
    """Chooses one of several completions.

    Args:
        rule: the rule of choice.
        verifier: scores the completions; None: by majority.
        task: extracts the answers; required by the rules "majority" and "weighted".

    Raises:
        ValueError: the rule needs a verifier or a task that is not given.
    """

    def __init__(self, rule: Choose, verifier: Verifier | None, task: Task | None) -> None:
        if rule != "majority" and verifier is None:
            raise ValueError(f"--choose {rule} needs a verifier. Set --verifier, or --choose majority.")  # fmt: skip
        if rule != "verifier" and task is None:
            raise ValueError(f"--choose {rule} compares answers and needs a task that extracts them. Set --task.")  # fmt: skip
        self._rule: Choose = rule
        self._verifier, self._task = verifier, task
        self._lock = Lock()

    def choose(
        self, prompt: Text, candidates: Sequence[Completion], options: TemplateOptions
    ) -> Choice:
        """Return the choice among the completions of a prompt.

        Args:
            prompt: text or messages, as the model read it.
            candidates: the completions.
            options: variables of the chat template.
        """
        votes: list[str | None] = [""] * len(candidates)
        if self._task is not None:
            answers = [
                None
                if one.finish_reason == "length"
                else self._task.answer(one.text, thought_open=one.thought_open)
                for one in candidates
            ]
            votes = [vote(answer) for answer in answers]
        scores = None
        if self._verifier is not None and self._rule != "majority":
            with self._lock:
                scores = self._verifier.score_completions(prompt, candidates, options)
        at = best_candidate(votes, scores, weighted=self._rule == "weighted")
        if self._task is None:
            return Choice(at, None)
        return Choice(at, sum(one is not None and one == votes[at] for one in votes))

    def close(self) -> None:
        """Free the memory of the verifier."""
        if self._verifier is not None:
            self._verifier.close()
