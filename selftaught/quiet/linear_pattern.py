"""Regular expressions that are matched in linear time, one character after another.

Python's `re` can need exponential time, so a text could stop a run. Here, a pattern becomes a
nondeterministic automaton (Thompson 1968, doi:10.1145/363347.363387), whose sets of states are
followed through the text and stored (a deterministic automaton, built where it is needed). It
answers one question: does the text so far end with a match?

Without back references and lookaround, which need more than an automaton, the syntax is that of
`re`, and `re` itself decides which characters a class contains.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

MOST_STATES = 1000
"""Maximum number of states of the automaton, so that a character costs bounded time."""
MOST_STORED = 2000
"""Maximum number of stored sets of states. They are dropped when there are more."""
SUPPORTED = (
    "Supported are characters, classes, groups, |, the quantifiers * + ? {m,n}, ^, \\A, \\b, \\B and "
    "the flags (?i), (?s), (?m) and (?a) at the start."
)
_FLAGS = re.compile(r"\(\?([a-zA-Z]+)\)")
_ATOM = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-3][0-7]{2}|\D)"
    r"|[^\\\[]",
    re.DOTALL,
)
_REPEAT = re.compile(r"[*+?]|\{(?!\})([0-9]*)(,?)([0-9]*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_ANCHORS = {"^": "begin", "\\A": "begin", "\\b": "boundary", "\\B": "inside"}

CharTest = Callable[[str], object]
Build = Callable[[int], int]
"""Adds the states of a part of a pattern before a given state, and returns the first of them."""


@dataclass(frozen=True)
class _Before:
    """What the assertions of a pattern can ask about the character before a place."""

    begin: bool
    newline: bool
    word: bool


@dataclass(eq=False)
class State:
    """A place in a text, as far as a pattern is concerned."""

    threads: frozenset[int]
    before: _Before
    accepts: bool
    """Whether the text so far ends with a match."""
    next: dict[str, "State"] = field(default_factory=dict, repr=False)


class LinearPattern:
    """A regular expression that follows a text character by character.

    Args:
        pattern: the regular expression, in the syntax of `re`.
        then: a second expression that follows the first one directly.

    Attributes:
        start: the state before the first character.

    Raises:
        ValueError: the pattern is not valid, matches the empty text, is too large, or has parts
            that cannot be matched in linear time.
    """

    def __init__(self, pattern: str, then: str = "") -> None:
        self.pattern = pattern
        for part in (pattern, then):
            try:
                re.compile(part)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"The pattern {part!r} is not a regular expression: {error}.") from None  # fmt: skip
        self._free: list[list[tuple[str | None, int]]] = []
        self._char: list[tuple[CharTest, int] | None] = []
        found = _FLAGS.match(pattern)
        letters = found[1] if found else ""
        if wrong := sorted(set(letters) - set("aims")):
            self._refuse(f"has the flag {wrong[0]!r}")
        self._flags = re.RegexFlag(0)
        for letter in letters:
            self._flags |= getattr(re, letter.upper())
        self._word = re.compile(r"\w", self._flags)
        self._accept = self._new()
        last = self._parsed(then)(self._accept)
        self._first = self._parsed(pattern[found.end() :] if found else pattern)(last)
        if self._accept in self._closed({self._first}, None, None):
            raise ValueError(
                f"The pattern {pattern!r} matches the empty text, which is everywhere. Give one that "
                "needs at least one character."
            )
        self._stored: dict[tuple[frozenset[int], _Before], State] = {}
        self.start = State(frozenset(), _Before(True, False, False), accepts=False)

    def step(self, state: State, char: str) -> State:
        """Return the state after one more character."""
        if (known := state.next.get(char)) is not None:
            return known
        here = self._closed({*state.threads, self._first}, state.before, char)
        edges = (self._char[thread] for thread in here)
        threads = frozenset(to for edge in edges if edge for test, to in (edge,) if test(char))
        before = _Before(False, char == "\n", bool(self._word.match(char)))
        key = (threads, before)
        if key not in self._stored:
            if len(self._stored) >= MOST_STORED:
                for stored in (self.start, *self._stored.values()):
                    stored.next.clear()
                self._stored.clear()
            accepts = self._accept in self._closed(threads, before, "")
            self._stored[key] = State(threads, before, accepts)
        state.next[char] = self._stored[key]
        return state.next[char]

    def ends(self, text: str) -> list[bool]:
        """Return for every character whether the text up to it ends with a match."""
        state, found = self.start, []
        for char in text:
            state = self.step(state, char)
            found.append(state.accepts)
        return found

    def _closed(
        self, threads: "set[int] | frozenset[int]", before: _Before | None, char: str | None
    ) -> set[int]:
        """Return the threads and all that follow without a character.

        Args:
            threads: states of the automaton.
            before: the character before. None: all assertions hold.
            char: the next character, "" for the end of the text so far.
        """
        seen, left = set(threads), list(threads)
        while left:
            for condition, to in self._free[left.pop()]:
                if to not in seen and (condition is None or self._holds(condition, before, char)):
                    seen.add(to)
                    left.append(to)
        return seen

    def _holds(self, condition: str, before: _Before | None, char: str | None) -> bool:
        if before is None or char is None:
            return True
        if condition == "begin":
            return before.begin
        if condition == "line":
            return before.begin or before.newline
        boundary = before.word != bool(char and self._word.match(char))
        return boundary == (condition == "boundary")

    def _new(self) -> int:
        if len(self._free) == MOST_STATES:
            raise ValueError(
                f"The pattern {self.pattern!r} is too large: it needs more than {MOST_STATES} states. "
                "Use a shorter pattern or smaller numbers in {m,n}."
            )
        self._free.append([])
        self._char.append(None)
        return len(self._free) - 1

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"The pattern {self.pattern!r} {what}, which cannot be matched in linear time while a text is "
            f"being written. {SUPPORTED}"
        )

    def _parsed(self, text: str) -> Build:
        build, at = self._alternatives(text, 0)
        assert at == len(text), f"unparsed: {text[at:]!r}"  # `re` has checked the brackets
        return build

    def _alternatives(self, text: str, at: int) -> tuple[Build, int]:
        """Parse alternatives up to a closing bracket or the end."""
        found: list[list[Build]] = [[]]
        while at < len(text) and text[at] != ")":
            if text[at] == "|":
                found.append([])
                at += 1
                continue
            part, at = self._part(text, at)
            found[-1].append(part)

        def build(after: int) -> int:
            starts: list[int] = []
            for parts in found:
                first = after
                for part in reversed(parts):
                    first = part(first)
                starts.append(first)
            return starts[0] if len(starts) == 1 else self._branch(starts)

        return build, at

    def _branch(self, to: list[int]) -> int:
        state = self._new()
        self._free[state] += [(None, one) for one in to]
        return state

    def _part(self, text: str, at: int) -> tuple[Build, int]:
        """Parse a character, class, assertion or group, with its quantifier."""
        if text[at] == "(":
            group = _GROUP.match(text, at)
            if group is None:
                self._refuse(f"has the group {text[at : at + 4]!r}")
            part, at = self._alternatives(text, group.end())
            at += 1  # the closing bracket
        else:
            atom = _ATOM.match(text, at)
            if atom is None:
                self._refuse(f"has the back reference {text[at : at + 2]!r}")
            part, at = self._single(atom[0]), atom.end()
        repeat = _REPEAT.match(text, at)
        if repeat is None:
            return part, at
        at = repeat.end()
        if text[at : at + 1] == "+":
            self._refuse("has a possessive quantifier")
        at += text[at : at + 1] == "?"  # a lazy one: the same texts match
        low, comma, high = repeat[1], repeat[2], repeat[3]
        if low is None:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat[0]]
        else:
            least = int(low or 0)
            most = (int(high) if high else None) if comma else least
        return lambda after: self._repeated(part, least, most, after), at

    def _repeated(self, part: Build, least: int, most: int | None, after: int) -> int:
        """Add copies of a part before a state: at least `least`, at most `most` (None: any)."""
        if most is None:
            loop = self._new()
            self._free[loop] += [(None, part(loop)), (None, after)]
            after = loop
        else:
            end = after
            for _ in range(most - least):
                after = self._branch([part(after), end])
        for _ in range(least):
            after = self._branch([part(after)])
        return after

    def _single(self, atom: str) -> Build:
        """Return a part that takes one character, or an assertion."""
        if atom in ("$", "\\Z", "\\z"):
            self._refuse(f"has {atom}, the end of the text")
        state_of = self._new

        def assertion(after: int) -> int:
            state = state_of()
            line = atom == "^" and self._flags & re.MULTILINE
            self._free[state].append(("line" if line else _ANCHORS[atom], after))
            return state

        def character(after: int) -> int:
            state = state_of()
            self._char[state] = (test, after)
            return state

        if atom in _ANCHORS:
            return assertion
        test = re.compile(atom, self._flags).fullmatch
        return character
