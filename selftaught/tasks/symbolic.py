"""Algebraic equivalence of LaTeX expressions, with math-verify."""

import importlib.util
import logging
import re
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from selftaught.tasks.latex import (
    connective,
    last_side,
    normalised,
    same_units,
    split_unit,
    without_name,
)

if TYPE_CHECKING:
    from sympy import Basic, Expr


def symbolically_equal(gold: str, answer: str) -> bool:
    """Algebraic equivalence of two LaTeX answers. Slow, and may hang: call it by `grade`.

    Raises:
        ValueError: the gold answer cannot be parsed, so nothing can be said.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # says that we keep the time: we do
    left, right = without_name(normalised(gold), last_side(normalised(answer), gold))
    (left, unit), (right, other_unit) = split_unit(left), split_unit(right)
    if not same_units(unit, other_unit):
        return False
    if set(re.findall("[A-Z]", _COMMAND.sub("", left))) != set(
        re.findall("[A-Z]", _COMMAND.sub("", right))
    ):
        return False  # the parser reads every letter as a small one
    left, right = _as_intervals(left, right, joined=connective(gold) or connective(answer))
    parts = _parts(left)
    unreadable = [text for text in _leaves(parts) if not _parsed(text)]
    if unreadable:
        raise ValueError(f"the gold answer cannot be parsed: {unreadable[0][:60]!r}")
    return _same_parts(parts, _parts(right))


def has_math_verify() -> bool:
    if importlib.util.find_spec("math_verify") is not None:
        return True
    warnings.warn(
        "math-verify is not installed: LaTeX answers are right only when they are written like the "
        "gold answer or are the same number. Install it with pip install 'selftaught[math]'.",
        stacklevel=2,
    )
    return False


_RELATION = r"(?:<|>|\\(?:le|ge|lt|gt)(?![A-Za-z]))"


_BOUND = re.compile(rf"([A-Za-z]) ?({_RELATION}) ?([^<>=]+)|([^<>=]+?) ?({_RELATION}) ?([A-Za-z])")


_BOUNDS = re.compile(rf"([^<>=]+?) ?({_RELATION}) ?([A-Za-z]) ?({_RELATION}) ?([^<>=]+)")


_ELEMENT = re.compile(r"([A-Za-z]) ?\\in(?![A-Za-z]) ?")


def _as_intervals(left: str, right: str, joined: str = "") -> tuple[str, str]:
    """Both as intervals where one is an interval and the other an inequality: x > 3 is (3, \\infty)."""
    names = [found[1] for text in (left, right) if (found := _ELEMENT.match(text))]
    left, right = (_ELEMENT.sub("", text, count=1) for text in (left, right))
    kinds = [_parts(text).kind for text in (left, right)]
    intervals = [kind == "union" or kind.startswith("tuple") for kind in kinds]
    if intervals == [True, False]:
        right = _union(right, names, joined) or right
    elif intervals == [False, True]:
        left = _union(left, names, joined) or left
    return left, right


def _union(text: str, names: list[str], joined: str) -> str | None:
    """Inequalities with "or" between them as a union of intervals."""
    pieces = _split(text, ",") if joined == "or" else [text]
    found = [_interval(piece.strip(), names) for piece in pieces]
    used = {
        name
        for piece in pieces
        for name in re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", piece)
    }
    if len(pieces) > 1 and len(used) > 1:
        return None
    return None if None in found else "\\cup ".join(map(str, found))


def _interval(text: str, names: list[str]) -> str | None:
    """An inequality in one variable as an interval; None where it is anything else."""
    if found := _BOUNDS.fullmatch(text):
        low, first, name, second, high = found.groups()
        if (names and name != names[0]) or _direction(first) != _direction(second):
            return None
        if _direction(first) == ">":
            low, first, second, high = high, second, first, low
        return f"{_bracket(first, '([')}{low},{high}{_bracket(second, ')]')}"
    if not (found := _BOUND.fullmatch(text)):
        return None
    name, relation, value, other, turned, other_name = found.groups()
    direction = _direction(relation or turned)
    if name is None:
        name, value, direction = other_name, other, "<" if direction == ">" else ">"
    if names and name != names[0]:
        return None
    closed = relation or turned
    if direction == "<":
        return f"(-\\infty,{value}{_bracket(closed, ')]')}"
    return f"{_bracket(closed, '([')}{value},\\infty)"


def _direction(relation: str) -> str:
    return "<" if relation in ("<", "\\le", "\\lt") else ">"


def _bracket(relation: str, brackets: str) -> str:
    return brackets[relation in ("\\le", "\\ge")]


class Parts(NamedTuple):
    """An answer taken apart: "tuple" with its brackets, "set" and "union" without order."""

    kind: str
    parts: "tuple[Parts, ...]"
    text: str = ""


_COMMAND = re.compile(r"\\[A-Za-z]++")


_TOKEN = re.compile(r"\\[A-Za-z]++|\\.|[^\\]", re.DOTALL)


def _parts(text: str) -> Parts:
    text = text.strip()
    if len(pieces := _split(text, "\\cup")) > 1:
        return Parts("union", tuple(map(_parts, pieces)))
    if len(pieces := _split(text, ",")) > 1:
        return Parts("set", tuple(map(_parts, pieces)))
    if text.startswith("\\{") and text.endswith("\\}"):
        pieces = _split(text[2:-2], ",")
        return Parts("set", tuple(map(_parts, pieces)))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        pieces = _split(text[1:-1], ",")
        if len(pieces) > 1:
            return Parts(f"tuple {text[0]}{text[-1]}", tuple(map(_parts, pieces)))
    return Parts("leaf", (), text)


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand in no bracket."""
    depth, pieces, start = 0, [], 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if token[0] == separator and depth == 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    return [*pieces, text[start:]]


def _leaves(parts: Parts) -> list[str]:
    if parts.kind == "leaf":
        return [parts.text]
    return [text for part in parts.parts for text in _leaves(part)]


def _same_parts(gold: Parts, answer: Parts) -> bool:
    if gold.kind == answer.kind == "leaf":
        return _matched(_parsed(gold.text), _parsed(answer.text), _same)
    if gold.kind.startswith("tuple"):
        return (
            gold.kind == answer.kind
            and len(gold.parts) == len(answer.parts)
            and all(map(_same_parts, gold.parts, answer.parts))
        )
    if "union" in (gold.kind, answer.kind):
        return gold.kind == answer.kind and _matched(gold.parts, answer.parts, _same_parts)
    if answer.kind.startswith("tuple"):
        return False
    return _matched(_elements(gold), _elements(answer), _same_element)


def _elements(parts: Parts) -> "list[Parts | Basic]":
    """Return the elements of a set or a single answer; a plus-minus counts as two."""
    elements: list[Parts | Basic] = []
    for part in parts.parts if parts.kind == "set" else (parts,):
        parsed = _parsed(part.text) if part.kind == "leaf" else []
        elements += parsed or [part]
    return elements


def _same_element(gold: "Parts | Basic", answer: "Parts | Basic") -> bool:
    if isinstance(gold, Parts) or isinstance(answer, Parts):
        if not (isinstance(gold, Parts) and isinstance(answer, Parts)):
            return False
        return "leaf" not in (gold.kind, answer.kind) and _same_parts(gold, answer)
    return _same(gold, answer)


def _matched(gold: Any, answer: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Return whether the elements of two collections can be paired so that each pair is equal."""
    rest = list(answer)
    for one in gold:
        found = next((index for index, other in enumerate(rest) if same(one, other)), None)
        if found is None:
            return False
        del rest[found]
    return bool(gold) and not rest


_REPEATING = re.compile(r"([0-9]++)\.([0-9]*+)\\overline ?\{([0-9]++)\}")


_DECIMAL = re.compile(r"([0-9]*+)\.([0-9]++)")


_UNREADABLE = re.compile(
    r"\\(?:approx|sim|simeq|equiv|cong|propto)(?![A-Za-z])|[≈≡~']|\\[lc]?dots|\.\.\.|…|[0-9] [0-9]|[0-9]\}?_|\\text|[%$!?#&@]{2}"
)


_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")


def _as_fraction(decimal: re.Match[str]) -> str:
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _repeating_as_fraction(decimal: re.Match[str]) -> str:
    whole, once, again = decimal.groups()
    top = int(whole + once + again) - int(whole + once)
    return rf"\frac{{{top}}}{{{'9' * len(again)}{'0' * len(once)}}}"


@cache
def _parsed(text: str) -> "tuple[Basic, ...]":
    """The whole of a text as what math-verify makes of it; empty where it cannot be read whole."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import FiniteSet

    if not text or "$" in text or _UNREADABLE.search(text):
        return ()
    if len(_PLUS_MINUS.findall(text)) == 1 and not _PLUS_MINUS.match(text):
        return tuple(part for sign in "+-" for part in _parsed(_PLUS_MINUS.sub(f" {sign} ", text)))
    exact = _DECIMAL.sub(_as_fraction, _REPEATING.sub(_repeating_as_fraction, text))
    plain = NormalizationConfig(
        basic_latex=True,
        units=False,
        malformed_operators=True,
        nits=False,
        boxed="none",
        equations=False,
    )
    found = parse(
        f"${exact}$",
        [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=plain)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]: documented as allowed
        raise_on_error=True,
    )
    return tuple(
        part for one in found for part in (one.args if isinstance(one, FiniteSet) else [one])
    )


def _same(gold: "Basic", answer: "Basic") -> bool:
    """Exact equality of two parsed answers."""
    from sympy import And, Eq, Expr, MatrixBase
    from sympy.core.relational import Relational

    if isinstance(gold, Eq) and gold.lhs.is_Symbol and not isinstance(answer, Relational | And):
        return _same(gold.rhs, answer)  # x = 5 and 5
    if isinstance(answer, Eq) and answer.lhs.is_Symbol and not isinstance(gold, Relational | And):
        return _same(gold, answer.rhs)
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if isinstance(gold, And) and isinstance(answer, And):
        return _matched(gold.args, answer.args, _same)
    if isinstance(gold, Relational | And) and isinstance(answer, Relational | And):
        return _same_solutions(gold, answer)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(_same, gold.flat(), answer.flat()))
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return _same_value(_plain(gold), _plain(answer))
    return gold == answer


def _plain(parsed: "Expr") -> "Expr":
    """With i as the imaginary unit, symbols distinguished by name only, and f(x) as a name."""
    from sympy import Expr, I, Symbol
    from sympy.concrete.expr_with_limits import ExprWithLimits
    from sympy.core.function import AppliedUndef

    named = {symbol: Symbol(str(symbol)) for symbol in parsed.atoms(Symbol, AppliedUndef)}
    # the i of a sum is no imaginary unit
    bound = {limit.args[0] for one in parsed.atoms(ExprWithLimits) for limit in one.limits}
    unit = {one: I for one in named if str(one) == "i" and one not in bound}
    plain = parsed.xreplace(named | unit).doit()
    assert isinstance(plain, Expr)
    return plain


def _same_value(gold: "Expr", answer: "Expr") -> bool:
    from sympy import nan, zoo

    if gold.has(nan, zoo):
        raise ValueError(f"the gold answer is undefined: {str(gold)[:60]}")
    if gold == answer:
        return True
    names = _names(gold) | _names(answer)
    return all(_vanishes(_at(gold, point), _at(answer, point)) for point in _points(names))


def _same_solutions(gold: Any, answer: Any) -> bool:
    """Return whether inequalities in one variable have the same real solutions: |x| < 3 and -3 < x < 3."""
    if len(gold.free_symbols) != 1 or gold.free_symbols != answer.free_symbols:
        return False
    try:
        return bool(gold.as_set() == answer.as_set())
    except NotImplementedError:
        return False


def _same_relation(gold: "Basic", answer: "Basic") -> bool:
    """Return whether one relation is the other times a number (a positive one, for inequalities)."""
    kind, left = _one_sided(gold)
    other_kind, right = _one_sided(answer)
    if kind != other_kind or left is None or right is None or _names(left) != _names(right):
        return gold == answer
    points = _points(_names(left))
    values = [(_at(left, point), _at(right, point)) for point in points]
    (first, second), *others = values
    if _vanishes(first, first * 0) or _vanishes(second, second * 0):
        return gold == answer
    if kind in ("<", "<=") and not (first * second).is_positive:
        return False
    return all(_vanishes(first * other, second * one) for one, other in others)


def _one_sided(relation: Any) -> "tuple[str, Expr | None]":
    """The relation as "this = 0", "this < 0" and so on."""
    from sympy import Expr

    left, right = relation.lhs, relation.rhs
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return relation.rel_op, None
    left, right = _plain(left), _plain(right)
    if relation.rel_op in (">", ">="):
        return relation.rel_op.replace(">", "<"), right - left
    return relation.rel_op, left - right


def _names(expression: "Expr") -> set[str]:
    return {str(symbol) for symbol in expression.free_symbols}


def _points(names: set[str]) -> list[dict[str, Any]]:
    """A few places of both signs; formulas that agree in all of them are the same."""
    from sympy import Rational

    signs = (1, 1, -1, 1, -1) if names else (1,)
    return [
        {
            name: Rational(
                (sign if place < 3 else -sign) * (zlib.crc32(f"{name}{place}".encode()) % 997 + 3),
                331,
            )
            for name in names
        }
        for place, sign in enumerate(signs)
    ]


def _at(expression: "Expr", point: dict[str, Any]) -> "Expr":
    from sympy import Expr

    chosen = [(symbol, point[str(symbol)]) for symbol in expression.free_symbols]
    value = expression.subs(chosen).doit()
    assert isinstance(value, Expr)
    return value


_SPARE_DIGITS = 200


def _vanishes(left: "Expr", right: "Expr") -> bool:
    """Return whether left - right is 0: exactly for rationals, else to 150 digits below both and 1."""
    from sympy import log, sympify

    if left == right:
        return True
    difference = left - right
    if difference.is_Rational or left.is_finite is False or right.is_finite is False:
        return bool(difference == 0)
    scale = abs(left.evalf(15, maxn=_SPARE_DIGITS))
    if not scale.is_number or not scale.is_finite:
        return False
    # 2^1000 + sqrt(2) and 2^1000 + sqrt(3) part after 300 digits: the larger, the more digits.
    digits = _SPARE_DIGITS + max(0, int(log(scale, 10).evalf(15)) if scale > 1 else 0)
    value = difference.evalf(15, maxn=digits)
    if not value.is_number or value.is_finite is False:
        return False
    return bool(abs(value) <= scale * sympify(10) ** (50 - digits))


_OPENING, _CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
