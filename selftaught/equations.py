"""The arithmetic in a rationale: its equations, and which of them are wrong.

Nothing is evaluated as code: numbers, + - * / and brackets are read by a small parser. An equation is
judged only where all of it was read, so one with a variable, a unit inside or a percent sign is not.
"""

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

MOST_DIGITS, MOST_TOKENS = 30, 200

_TOKEN = re.compile(r"[0-9]++(?:,[0-9]{3})*+(?:\.[0-9]++)?+|[-+*/()=]")
_SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u00a0": " "}
    | dict.fromkeys("$\u20ac\u00a3", " ")
)
_BEFORE = re.compile(r"(?:[A-Za-z)%^]|\bof ?)$")
_AFTER = re.compile(r"[A-Za-z%(^]")


class Equation(NamedTuple):
    """Two sides that a rationale says are equal, as they are written."""

    left: str
    right: str
    holds: bool


def equations(text: str) -> list[Equation]:
    """Every equation whose left side has an operation and that could be read, in order.

    `1 + 2 + 3 = 3 + 3 = 6` is two. A right side with decimals may be rounded in its last one.
    """
    found = []
    for run in _runs(text.translate(_SIGNS)):
        sides = [side.strip() for side in run.split("=")]
        for left, right in pairwise(sides):
            values = _value(left), _value(right)
            if re.search(r"[0-9)] *[-+*/]", left) and None not in values:
                found.append(Equation(left, right, _same(values[0], values[1], right)))
    return found


def wrong_equations(text: str) -> list[Equation]:
    """The equations that do not hold; the check of Yuan et al. 2023 (arXiv:2308.01825)."""
    return [equation for equation in equations(text) if not equation.holds]


def _runs(text: str) -> list[str]:
    """Stretches of numbers and signs with an equals sign; what a letter or percent touches is cut off."""
    runs = []
    for match in re.finditer(r"[-+*/()=0-9][-+*/()=0-9., ]*+", text):
        run, before = match.group().rstrip(" ,."), text[: match.start()].rstrip(" ")[-4:]
        for piece in re.split(r"[.,](?![0-9])|(?<![0-9])[.,]", run):
            if "=" not in piece:
                continue
            starts, ends = run.startswith(piece), run.endswith(piece)
            touched = text[match.start() - 1 : match.start()]
            unary = re.match(r"-[0-9(]", piece) is not None
            if starts and (
                re.match(r"[+*/]", piece)
                or (piece.startswith("-") and not unary)
                or _BEFORE.search(touched)
                or before.endswith("of")
            ):
                piece = "=" + piece.partition("=")[2]
            after = text[match.start() + len(run) :][:1]
            if ends and _AFTER.match(after):
                piece = piece.rpartition("=")[0] + "="
            runs.append(piece)
    return runs


def _same(left: Fraction | None, right: Fraction | None, written: str) -> bool:
    assert left is not None
    assert right is not None
    decimals = re.search(r"\.([0-9]+)$", written)
    if decimals is None:
        return left == right
    return abs(left - right) <= Fraction(1, 2 * 10 ** len(decimals.group(1)))


def _value(side: str) -> Fraction | None:
    """The value of one side; None where it is not arithmetic."""
    tokens = _TOKEN.findall(side)
    if "".join(tokens) != side.replace(" ", "") or not 0 < len(tokens) <= MOST_TOKENS:
        return None
    # Two numbers with only a space between are not one.
    if re.search(r"[0-9] +[0-9]", side) or any(len(token) > MOST_DIGITS for token in tokens):
        return None
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return None
    return None if rest else value


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        term, tokens = _product(tokens[1:])
        value += sign * term
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _factor(tokens)
    while tokens and tokens[0] in "*/":
        operator = tokens[0]
        factor, tokens = _factor(tokens[1:])
        value = value * factor if operator == "*" else value / factor
    return value, tokens


def _factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "-":
        value, rest = _factor(rest)
        return -value, rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError(rest[0])
        return value, rest[1:]
    return Fraction(first.replace(",", "")), rest
