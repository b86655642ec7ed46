"""The command `selftaught chat`: talk to a model in the terminal."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options
from selftaught.cli.output import DONE, say
from selftaught.cli.serve import ServedModel, ServeOptions, ThinkingOptions, checked, opened_server
from selftaught.printable import printable

if TYPE_CHECKING:
    from selftaught.serving.requests import Generation
    from selftaught.serving.server import ModelServer
    from selftaught.serving.text import CompletionText

HELP = "Commands: /thoughts shows the thoughts of the last answer, /new starts again, /quit ends."


@dataclass(frozen=True)
class ChatOptions(ThinkingOptions, ServedModel):
    """The conversation."""

    heading: ClassVar[str] = "sampling"

    temperature: float = 0.7
    """Sampling temperature. 0 means greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling threshold. 1.0 disables it."""
    max_tokens: int = 512
    """Maximum number of new tokens of an answer."""
    seed: int | None = None
    """Random seed for sampling. Default: another one for every answer."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of the command and return the dataclass of its options."""
    del command, given
    return add_options(parser, ChatOptions)


def run(command: str, options: Namespace) -> int:
    """Talk until the input ends, and return the exit code."""
    del command
    return chat(ChatOptions(**{name: options[name] for name in vars(options)}))


def chat(how: ChatOptions) -> int:
    """Answer the lines of standard input, one after another.

    Raises:
        ValueError: an option, or the combination of options, is invalid; or a package is missing.
    """
    own = {one.name for one in fields(ServeOptions)} & {one.name for one in fields(ChatOptions)}
    serving = ServeOptions(**{name: getattr(how, name) for name in own})
    checked(serving)
    with suppress(ImportError):
        import readline  # noqa: F401  # editing and history of input()
    with opened_server(serving) as server:
        kind = (
            "Write a message." if server.chats else "The model continues the text that you write."
        )
        say(f"{server.settings.name}: {kind} {HELP}")
        Talk(server, how).run()
    return DONE


class Talk:
    """A conversation with a model.

    Args:
        server: the model.
        how: the options.
    """

    def __init__(self, server: "ModelServer", how: ChatOptions) -> None:
        self._server, self._how = server, how
        self._messages: list[dict[str, str]] = []
        self._last: CompletionText | None = None

    def run(self) -> None:
        """Read lines until the input ends."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            match line.strip():
                case "":
                    continue
                case "/quit":
                    return
                case "/new":
                    self._messages, self._last = [], None
                    say("A new conversation.")
                case "/thoughts":
                    self._show_thoughts()
                case command if command.startswith("/") and " " not in command:
                    say(f"Unknown command {printable(command)}. {HELP}")
                case _:
                    self._answer(line)

    def _answer(self, line: str) -> None:
        from selftaught.serving.protocol import ApiError

        server = self._server
        try:
            if server.chats:
                before = [] if server.one_turn else self._messages
                prompt = server.chat_prompt([*before, {"role": "user", "content": line}], (), {})
            else:
                prompt = server.text_prompt(line, ())
            new = min(self._how.max_tokens, server.checked(prompt, None))
            text = asyncio.run(self._generated(prompt, new))
        except ApiError as error:
            say(f"error: {error}")
            return
        self._last = text
        self._messages += [
            {"role": "user", "content": line},
            {"role": "assistant", "content": text.content},
        ]
        notes = []
        if text.reasoning_tokens:
            notes.append(f"{text.reasoning_tokens} tokens of thoughts: /thoughts")
        if text.finish_reason == "length":
            notes.append("cut at --max-tokens")
        print(f"\n[{'; '.join(notes)}]" if notes else "", flush=True)

    async def _generated(self, prompt: object, new: int) -> "CompletionText":
        """Print the answer while it is written, and return it."""
        from selftaught.serving.requests import Wanted, request_seed

        how = self._how
        wanted = Wanted(1, new, how.temperature, how.top_p, request_seed(how.seed), None)
        generation: Generation = self._server.generation([prompt], wanted)  # type: ignore[list-item]
        async for _, piece in generation.pieces():
            if piece.content:
                print(printable(piece.content), end="", flush=True)
        return generation.texts[0]

    def _show_thoughts(self) -> None:
        text = self._last
        if text is None or not text.reasoning_tokens:
            say("The last answer has no thoughts.")
            return
        for one in text.hidden:
            thoughts = " | ".join(map(printable, one.thoughts))
            print(f"{one.gain:+.3f} nats  {printable(one.token)!r:14} after {thoughts}")
        if not text.hidden:
            print(printable(text.reasoning))
