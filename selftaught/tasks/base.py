"""What a task is: four verbs and a few words, as data."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selftaught.prompts import PromptStyle, styled
from selftaught.records import Problem
from selftaught.tasks.answers import GRADING_VERSION, Verdict
from selftaught.thought_marks import THINK, ThoughtMarks, after_thought

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""The customary instruction of mathematical models."""
STATED = 'Please reason step by step, and end with "The answer is" and your final answer.'
LETTERED = (
    'Please reason step by step, and end with "The answer is (X).", where X is the letter of your '
    "choice."
)


def _function_key(function: Any, *, by_name: bool) -> object:
    """What tells a function from another: its name, and where that may not suffice its code and values.

    Args:
        by_name: the name suffices, because the options of the task tell its functions apart.
    """
    if function is None:
        return None
    name = [getattr(function, "__module__", ""), getattr(function, "__qualname__", "")]
    code = getattr(function, "__code__", None)
    if by_name:
        return name
    if code is None:
        return [*name, repr(function)]
    held = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    constants = [repr(one) for one in code.co_consts]
    return [*name, code.co_code.hex(), constants, list(code.co_names), held,
            repr(function.__defaults__)]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A kind of problem: where it comes from, how it is asked, read and compared."""

    name: str
    problems: Callable[[str], Sequence[Problem]]
    """All problems of a split ("train", "validation", "test"), always the same, in the same order.

    Splits do not overlap. An unknown split is a ValueError that names those there are.
    """
    prompt: PromptStyle
    """The task's few-shot style, worked examples included where the task has them."""
    extract: Callable[[str], str | None]
    """The answer in a completion, or None; never raises, in time linear in the text."""
    equal: Callable[[str, str], Verdict]
    """`equal(gold, answer)`: cheap and safe; `Verdict(None, ...)` where it cannot decide."""
    hint: Callable[[Problem], Problem]
    """`add_hint`: the problem with its gold answer (never its rationale) shown in the question."""
    prove: Callable[[str, str], bool] | None = None
    """`prove(gold, answer)`: symbolic comparison, slow; a module-level function, because `grade`
    runs it in worker processes under a time limit when `equal` cannot decide."""
    direct: str = "The answer is {answer}."
    """How a completion states an answer without a rationale; `extract` must read it."""
    group: Callable[[Problem], str] | None = None
    """What a table breaks accuracy down by, such as the number of digits."""
    max_tokens: int = 256
    """Room for one rationale."""
    facts: str = ""
    """One line: source, licence, paper."""
    thought_marks: ThoughtMarks = THINK
    """The texts that open and end a thought; no answer is read inside one."""
    instruction: str = ""
    """How a chat model is told to state its answer, in the form that `extract` reads."""

    def styled(
        self,
        name: str,
        *,
        system_prompt: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptStyle:
        """Return the task's prompt in a style: few_shot, bare, or chat with the instruction.

        Args:
            system_prompt, chat_template_kwargs: for chat only; see `PromptStyle`.

        Raises:
            ValueError: see `selftaught.prompts.styled`.
        """
        return styled(
            self.prompt,
            name,
            instruction=self.instruction,
            system=system_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )

    options: str = ""
    """The options that the task was opened with, as JSON."""

    @property
    def grading_key(self) -> str:
        """A hash of all that a grade depends on besides the rollout.

        It changes with the task, its options, the thought marks and the version of the grading rules;
        stored grades with another key are computed again.
        """
        functions = [
            _function_key(one, by_name=bool(self.options))
            for one in (self.extract, self.equal, self.prove)
        ]
        rules = [GRADING_VERSION, self.name, self.options, self.thought_marks, functions]
        return hashlib.sha256(json.dumps(rules).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def answer(self, completion: str, *, thought_open: bool = False) -> str | None:
        """Return the answer stated after the last thought, or None if there is none.

        Args:
            completion: the text a model wrote.
            thought_open: the prompt ended inside a thought, which the completion continues.
        """
        text = after_thought(completion, self.thought_marks, opened=thought_open)
        return None if text is None else self.extract(text)


def answer_in_brackets(problem: Problem) -> Problem:
    """The problem with its answer in brackets after the question."""
    return replace(problem, question=f"{problem.question} ({problem.gold})", rationale=None)


def split_named(
    splits: Callable[[], dict[str, list[Problem]]], split: str, task: str
) -> list[Problem]:
    """The problems of a split; an unknown name is an error that names those there are."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"{task} has the splits train, validation and test; got {split!r}.")
    return splits()[split]
