"""Equations in a rationale, and the check which of them are wrong.

A small parser reads numbers, + - * / and brackets; nothing is evaluated as code. An equation is
checked only if all of it can be parsed. Equations with a variable, a unit inside or a percent sign
are skipped.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

MOST_DIGITS, MOST_TOKENS = 30, 200

_NUMBER = r"[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++"
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})|(?P<sign>[-+*/()=])|(?P<word>[^\W\d_]++)|(?P<line>\n)|(?P<other>\S)"
)
_SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2013", "-")
    | dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
    | dict.fromkeys("$\u20ac\u00a3\u00a0\u202f", " ")
)
_ARITHMETIC = re.compile(r"[-+*/()=0-9.,\s]++")
_WORD = re.compile(r"[^\W\d_]++|\S")
_LAST_WORD = re.compile(r"(?:[^\W\d_]++|\S)$")
LONGEST_WORD = 20
"""Number of characters before an equation in which its preceding word is searched. The words that
matter (`_JOINED`) are shorter."""
SPAN = re.compile(r"<<([^<>\n]{1,200})>>")
_COMMAND = re.compile(r"\\(times|cdot|div)(?![A-Za-z])")
_CROSS = re.compile(r"([0-9)]) ?x ?(?=[0-9(])")
_JOINED = re.compile(
    r"times|minus|plus|modu?l?o?|negative|twice|thrice|double|triple|half|of|over|by|the|divided"
    r"|multiplied|root|square|squared|cubed|percent|."
)
"""Words before an equation that show that its left side starts earlier than its first number."""
_CHANGED = re.compile(
    r"percent|remainder|rem|carry|modu?l?o?|times|plus|minus|hundred|thousand|million|billion|dozen|half"
    r"|seconds?|minutes?|hours?|days?|weeks?|months?|years?|cents?|dollars?|mm|cm|km|inch|inches"
    r"|foot|feet|yards?|miles?|mg|kg|ml|."
)
"""Words after an equation that change the value of its last number."""


class Equation(NamedTuple):
    """An equation as it is written in a rationale."""

    left: str
    right: str
    holds: bool
    """Whether both sides have the same value."""


def equations(text: str) -> list[Equation]:
    """Return the equations of a text that can be parsed and have an operation on the left side, in
    order.

    `1 + 2 + 3 = 3 + 3 = 6` gives two equations. A right side with decimals may be truncated or
    rounded at its last decimal. If the text has calculator spans, `<<48/2=24>>`, only they are
    parsed, as in the authors' code.
    """
    return list(_read(text)) if "=" in text else []


@lru_cache(maxsize=2**17)
def _read(text: str) -> tuple[Equation, ...]:
    """Return the equations of a text; cached, because filters and paths need the same ones."""
    if spans := SPAN.findall(text):
        text = ";\n".join(spans)  # the separator keeps an incomplete span apart from the next one
    text = text.replace("$", " ") if text.isascii() else text.translate(_SIGNS)
    if "\\" in text:
        text = _COMMAND.sub(lambda found: "/" if found[1] == "div" else "*", text)
    text = _CROSS.sub(r"\1*", text)
    return tuple(chain.from_iterable(map(_equations_in, _pieces(text))))


@lru_cache(maxsize=2**16)
def _equations_in(piece: str) -> tuple[Equation, ...]:
    """Return the equations of a piece; cached, because completions of a problem share many."""
    found = []
    for sides in _chains(piece):
        for left, right in pairwise(sides):
            before, after = _value(left), _value(right)
            operation = any(sign in left[1:] for sign in "+-*/")
            if operation and before is not None and after is not None:
                holds = _same(before, after, right[-1])
                found.append(Equation(" ".join(left), " ".join(right), holds))
    return tuple(found)


def wrong_equations(text: str) -> list[Equation]:
    """Return the wrong equations of a text; the check of Yuan et al. 2023 (arXiv:2308.01825)."""
    return [equation for equation in equations(text) if not equation.holds]


def _pieces(text: str) -> Iterator[str]:
    """Yield the parts of a text that can contain an equation, each with the words before and after
    it.

    Words without a meaning for the equation are replaced by "word", so that more parts are equal
    and found in the cache.
    """
    for match in _ARITHMETIC.finditer(text):
        if "=" in match.group():
            first, last = match.span()
            before = _LAST_WORD.search(text, max(0, first - LONGEST_WORD), first)
            after = _WORD.match(text, last)
            left = _plain(before.group(), _JOINED) if before else ""
            right = _plain(after.group(), _CHANGED) if after else ""
            # One more character, because a full stop before a digit does not end a sentence.
            end = after.end() if after else last
            yield left + match.group() + right + text[end : end + 1]


def _plain(word: str, meaning: re.Pattern[str]) -> str:
    return word if meaning.fullmatch(word.lower()) else "word"


def _chains(text: str) -> list[list[list[str]]]:
    """Return the sides, as lists of tokens, of every run of tokens with an equals sign.

    A side that is not plain arithmetic is an empty list.
    """
    chains: list[list[list[str]]] = []
    run: list[str] = []
    start = ""
    previous = "line"

    def end(follows: str) -> None:
        if "=" in run:
            chains.append(_sides(run, start, follows))
        run.clear()

    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind in ("number", "sign"):
            if kind == previous == "number":  # 1 1/2 or 18 000, which are ambiguous
                end("half")
                start = "half"
            if not run and kind == "sign" and token in "+*/" and not start:
                start = token
            run.append(token)
        elif kind == "line":
            if not run or run[-1] == ")" or run[-1][-1].isdigit():
                end("")
                start = ""
        else:
            # A full stop or comma ends a sentence; any other sign belongs to the adjacent token.
            if not run and kind == "word":
                start, previous = token.lower(), kind
                continue
            glued = text[match.end() : match.end() + 1].isdigit()
            plain = token == ";" or (token in ".,:?" and not glued)
            end("" if plain else token.lower())
            start = "" if plain else token.lower()
        previous = kind
    end("")
    return chains


def _sides(run: list[str], start: str, follows: str) -> list[list[str]]:
    """Return the sides of a run of tokens between the words `start` and `follows`."""
    sides: list[list[str]] = [[]]
    for token in run:
        if token == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    if _JOINED.fullmatch(start) or (start and sides[0][:1] == ["-"]):
        sides[0] = []
    if _CHANGED.fullmatch(follows):
        sides[-1] = []
    return [_whole(side) for side in sides]


def _whole(side: list[str]) -> list[str]:
    """Return a side without a bracket whose counterpart is not in the side."""
    if side.count("(") == side.count(")") + 1 and side[0] == "(":
        return side[1:]
    if side.count(")") == side.count("(") + 1 and side[-1] == ")":
        return side[:-1]
    return side


def _same(left: Fraction | int, right: Fraction | int, written: str) -> bool:
    decimals = len(written.partition(".")[2])
    if not decimals:
        return left == right
    return abs(left - right) < Fraction(1, 10**decimals)


def _value(tokens: list[str]) -> Fraction | int | None:
    """Return the value of a side; None if it cannot be parsed."""
    if not 0 < len(tokens) <= MOST_TOKENS or any(len(token) > MOST_DIGITS for token in tokens):
        return None
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return None
    return None if rest else value


def _sum(tokens: list[str]) -> tuple[Fraction | int, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        term, tokens = _product(tokens[1:])
        value += sign * term
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction | int, list[str]]:
    value, tokens = _factor(tokens)
    while tokens and tokens[0] in "*/":
        operator = tokens[0]
        factor, tokens = _factor(tokens[1:])
        value = value * factor if operator == "*" else Fraction(value) / factor
    return value, tokens


def _factor(tokens: list[str]) -> tuple[Fraction | int, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "-":
        value, rest = _factor(rest)
        return -value, rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError(rest[0])
        return value, rest[1:]
    digits = first.replace(",", "")
    return (int(digits) if digits.isdecimal() else Fraction(digits)), rest
