"""Prompt styles: bare, few-shot and chat, each with or without a hint.

A style includes its stop strings. Without them, a model continues a few-shot prompt with questions
of its own, and the answer extracted from the end of the completion is the wrong one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selftaught.records import Message, Problem, Text

Ask = Callable[[Problem], Problem]
Shots = Callable[[Problem], Sequence[Problem]]


def as_it_is(problem: Problem) -> Problem:
    """Return the problem unchanged: the `ask` of a style without a hint."""
    return problem


def no_shots(problem: Problem) -> Sequence[Problem]:
    """Return no worked examples."""
    return ()


@dataclass(frozen=True)
class PromptStyle:
    """A prompt style: a callable that turns a problem into a prompt.

    A worked example ("shot") is a `Problem` whose `rationale` is the complete text to imitate,
    including the final answer in the form that the task's `extract` parses.
    """

    name: str
    question: str = "Q: {question}\nA:"
    """Template of a question. The completion follows it directly."""
    answer: str = " {rationale}\n\n"
    """Template of a worked example's completion."""
    stop: tuple[str, ...] = ("\n\n",)
    """Stop strings for sampling with this style."""
    shots: Shots = no_shots
    """Function that returns the worked examples for a problem, in the order they are shown."""
    ask: Ask = as_it_is
    """Function applied to every problem and worked example before it is shown; adds a hint."""
    as_messages: bool = False
    """Whether the prompt is messages for the model's chat template instead of text."""
    instruction: str = ""
    """Instruction on how to state the answer, appended to every question after a blank line. Used
    only for messages."""
    system: str = ""
    """System message. Empty for none. Used only for messages."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the model's chat template, such as `enable_thinking`. Used only for messages."""

    def __call__(self, problem: Problem) -> Text:
        """Return the prompt for a problem."""
        shots = [(self._question(shot), shot.rationale or "") for shot in self.shots(problem)]
        if not self.as_messages:
            shown = [question + self.answer.format(rationale=text) for question, text in shots]
            return "".join(shown) + self._question(problem)
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for question, text in shots:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": text})
        return [*messages, {"role": "user", "content": self._question(problem)}]

    def completion(self, rationale: str) -> str:
        """Return the completion that contains a rationale, as a model would write it.

        The stop string is not included.
        """
        if self.as_messages:
            return rationale
        text = self.answer.format(rationale=rationale)
        ends = [index for stop in self.stop if (index := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _question(self, problem: Problem) -> str:
        text = self.question.format(question=self.ask(problem).question)
        return f"{text}\n\n{self.instruction}" if self.instruction and self.as_messages else text

    def digest(self, problems: Sequence[Problem]) -> str:
        """Return a hash of the prompts; styles that produce the same prompts have the same hash."""
        digest = hashlib.sha256(b"[")  # hashes a JSON list piece by piece, to save memory
        for number, problem in enumerate(problems):
            shown = (", " if number else "") + json.dumps(self(problem), ensure_ascii=False)
            digest.update(shown.encode("utf-8", "surrogatepass"))
        digest.update(b"]")
        return digest.hexdigest()[:16]


def bare(style: PromptStyle) -> PromptStyle:
    """Return the style without worked examples."""
    return replace(style, name="bare", shots=no_shots)


def chat(style: PromptStyle) -> PromptStyle:
    """Return the style as messages, for models with a chat template. It needs no stop strings."""
    return replace(style, name="chat", question="{question}", as_messages=True, stop=())


def hinted(style: PromptStyle, hint: Ask) -> PromptStyle:
    """Return the style with `hint` applied to every question (`add_hint` in STaR, Algorithm 1)."""
    return replace(style, name=f"{style.name} with hint", ask=hint)


def styled(
    style: PromptStyle,
    name: str,
    *,
    instruction: str = "",
    system: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptStyle:
    """Return a task's prompt style by its name on the command line.

    Args:
        style: The task's few-shot style.
        name: "few_shot" (the task's style unchanged), "bare" or "chat".
        instruction: Instruction on how to state the answer, after every question. Only for chat.
        system: System message. Only for chat.
        chat_template_kwargs: Variables of the model's chat template. Only for chat.

    Raises:
        ValueError: The name is unknown, or a system message or template variables are given for a
            style other than chat.
    """
    if name != "chat" and (system or chat_template_kwargs):
        raise ValueError(
            "--system-prompt and --chat-template-kwargs apply to messages only; give --prompt chat "
            f"(got {name!r}), or remove these options."
        )
    match name:
        case "few_shot":
            return style
        case "bare":
            return bare(style)
        case "chat":
            return replace(
                chat(style),
                instruction=instruction,
                system=system,
                chat_template_kwargs=dict(chat_template_kwargs or {}),
            )
        case _:
            raise ValueError(
                f"No prompt style is called {name!r}; there are: few_shot, bare, chat."
            )
