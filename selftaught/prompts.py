"""Ways to put a problem to a model: bare, few-shot, chat; and any of them with a hint.

A style carries its stop strings with it: a few-shot prompt without them runs on into questions of
its own, and the answer read from the end is then the wrong one.
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
    """The problem, unchanged: the hint of a style that gives none."""
    return problem


def no_shots(problem: Problem) -> Sequence[Problem]:
    """No worked examples."""
    return ()


@dataclass(frozen=True)
class PromptStyle:
    """How a problem becomes a prompt; call it with a problem.

    A worked example ("shot") is a `Problem` whose `rationale` is the whole text to imitate, its
    final answer included, in the form the task's `extract` reads.
    """

    name: str
    question: str = "Q: {question}\nA:"
    """Template of one question; the completion follows it directly."""
    answer: str = " {rationale}\n\n"
    """Template of a worked example's completion."""
    stop: tuple[str, ...] = ("\n\n",)
    shots: Shots = no_shots
    """The worked examples for a problem, in the order they are shown."""
    ask: Ask = as_it_is
    """What is done to every problem, worked examples too, before it is shown: a hint."""
    as_messages: bool = False
    """Messages for the model's chat template instead of text."""
    instruction: str = ""
    """How to state the answer; follows every question of messages, after a blank line."""
    system: str = ""
    """The system message before the first question of messages; empty: none."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the model's chat template, such as `enable_thinking`; for messages only."""

    def __call__(self, problem: Problem) -> Text:
        """The prompt for a problem."""
        shots = [(self._question(shot), shot.rationale or "") for shot in self.shots(problem)]
        if not self.as_messages:
            shown = [asked + self.answer.format(rationale=worked) for asked, worked in shots]
            return "".join(shown) + self._question(problem)
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for asked, worked in shots:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": worked})
        return [*messages, {"role": "user", "content": self._question(problem)}]

    def completion(self, rationale: str) -> str:
        """The completion that gives this rationale, as a model would write it: without the stop."""
        if self.as_messages:
            return rationale
        whole = self.answer.format(rationale=rationale)
        ends = [place for stop in self.stop if (place := whole.find(stop)) >= 0]
        return whole[: min(ends, default=len(whole))]

    def _question(self, problem: Problem) -> str:
        asked = self.question.format(question=self.ask(problem).question)
        return f"{asked}\n\n{self.instruction}" if self.instruction and self.as_messages else asked

    def digest(self, problems: Sequence[Problem]) -> str:
        """A hash of the prompts themselves: two styles that show the same text are the same."""
        digest = hashlib.sha256(b"[")  # of their list as JSON, which is not held as a whole
        for number, problem in enumerate(problems):
            shown = (", " if number else "") + json.dumps(self(problem), ensure_ascii=False)
            digest.update(shown.encode("utf-8", "surrogatepass"))
        digest.update(b"]")
        return digest.hexdigest()[:16]


def bare(style: PromptStyle) -> PromptStyle:
    """The style without its worked examples."""
    return replace(style, name="bare", shots=no_shots)


def chat(style: PromptStyle) -> PromptStyle:
    """The style as messages, for models with a chat template; no stop strings are needed."""
    return replace(style, name="chat", question="{question}", as_messages=True, stop=())


def hinted(style: PromptStyle, hint: Ask) -> PromptStyle:
    """The style with every question shown through `hint` (`add_hint` of Algorithm 1, STaR)."""
    return replace(style, name=f"{style.name} with hint", ask=hint)


def styled(
    style: PromptStyle,
    name: str,
    *,
    instruction: str = "",
    system: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptStyle:
    """Return a task's style as named on a command line: few_shot (as it is), bare or chat.

    Args:
        instruction: of chat, how to state the answer; follows every question.
        system: of chat, the system message.
        chat_template_kwargs: of chat, variables of the model's chat template.

    Raises:
        ValueError: no style has this name, or a system message or template variables are given for
            a style without messages.
    """
    if name != "chat" and (system or chat_template_kwargs):
        raise ValueError(
            "--system-prompt and --chat-template-kwargs are for messages; give --prompt chat with "
            f"them (got prompt {name!r}), or leave them out."
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
