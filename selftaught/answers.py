"""From a completion to its answer; whether two answers are the same.

Every pattern here reads model text: each runs in time linear in the text, and nothing raises.

Policy, in one place:
- A number is an exact rational. 0.75 is 3/4; 0.333 is not 1/3; nothing is rounded.
- A unit or currency counts when both sides have one (5 cm is not 5 m) and is passed over when one
  side has none (5 cm is 5).
- Percent is never passed over: 50% is 50%, and neither 50 nor 0.5.
- A number of more than 1,000 digits, written out or through its exponent, is not read.
"""

import re
from fractions import Fraction
from typing import NamedTuple


class Verdict(NamedTuple):
    """Whether two answers are the same, and the stage that decided it; None: not decided here."""

    equal: bool | None
    decided_by: str


class Quantity(NamedTuple):
    """An exact number and its unit, "" where it has none."""

    value: Fraction
    unit: str


MOST_DIGITS = 1000

_DECIMAL = r"(?:[0-9]{1,3}+(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++"
_EXPONENT = r"(?:[eE][+-]?+[0-9]++(?![A-Za-z0-9]))?+"
_IN_TEXT = re.compile(
    r"(?:(?<![A-Za-z0-9.)\]}])[-+](?=[$€£¥.0-9])[$€£¥]?+)?+"
    rf"(?:[0-9]++ [0-9]++/[0-9]++|(?:{_DECIMAL}){_EXPONENT}(?: ?/ ?-?[0-9]++(?![.0-9]))?+)"
)
_SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2013\ufe63\uff0d\u2010\u2011", "-")
    | dict.fromkeys("\u00a0\u202f\u2009", " ")
    | {"\uff0b": "+", "\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff04": "$"}
)
"""The minus signs, spaces and full-width signs of unicode, as ASCII."""
_ANSWER_IS = re.compile(r"\b(?:final )?answers?(?: is| are|:|=)[: ]?+", re.IGNORECASE)


# --- reading a completion ------------------------------------------------------------------------


def first_line(text: str) -> str | None:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def after_marker(text: str, marker: str) -> str | None:
    """The rest of the line after the first `marker`; None where there is no marker or no rest.

    The first, because what follows a finished answer is the model running on.
    """
    _, found, rest = text.partition(marker)
    return (rest.splitlines() or [""])[0].strip() or None if found else None


def after_answer_is(text: str) -> str | None:
    """The rest of the line after the last "the answer is" (or "Answer:"), without its full stop."""
    end = None
    for match in _ANSWER_IS.finditer(text):
        end = match.end()
    if end is None:
        return None
    line = (text[end:].splitlines() or [""])[0]
    return line.strip().rstrip(".").strip() or None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` (or `\fbox`, or `\boxed 5`), braces balanced."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        words = rest.split("$", 1)[0].split(maxsplit=1)
        return words[0].rstrip(".") or None if words else None
    end = closing_brace(rest, 0)
    return rest[1:end].strip() or None if end is not None else None


def closing_brace(text: str, opened: int) -> int | None:
    """Where the brace opened at `opened` closes; an escaped brace is no brace."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opened):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return None


def last_number(text: str) -> str | None:
    """The last number in a text: "1,234", "-3.5", "3/4", "1 1/2", "2e5"; no unit, no currency."""
    found = None
    for match in _IN_TEXT.finditer(text.translate(_SIGNS)):
        found = match[0]
    return found.translate({ord(sign): None for sign in "$€£¥"}) if found else None


def first_number(text: str) -> str | None:
    """The first number in a text, in the forms of `last_number`."""
    match = _IN_TEXT.search(text.translate(_SIGNS))
    return match[0].translate({ord(sign): None for sign in "$€£¥"}) if match else None


def final_number(text: str) -> str | None:
    """The number a completion ends in: after "####", in a box, after "answer is", else the last."""
    if "####" in text:
        return first_number(after_marker(text, "####") or "")
    for place in (last_boxed(text), after_answer_is(text)):
        if place and (number := first_number(place)):
            return number
    return last_number(text)


def choice_letter(text: str, letters: str = "ABCDE") -> str | None:
    """The letter chosen, in upper case: "(c)", "**C**", "Answer: C", "the answer is blotter (e)."."""
    bracketed = re.compile(rf"\(([{letters}])\)", re.IGNORECASE)
    places = [place for place in (last_boxed(text), after_answer_is(text)) if place]
    for place in places:
        if found := _alone(place, letters) or _last_group(bracketed, place):
            return found.upper()
    found = _last_group(bracketed, text) or _alone(text, letters)
    return found.upper() if found else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[1]
    return found


def _alone(text: str, letters: str) -> str | None:
    """A letter that is the whole text, or opens it as "C)", "C." or "C:"."""
    bare = re.compile(
        rf"(?:(?:option|choice)[ ~]++)?+\(?([{letters}])(?:\)|[.:](?= |$)|$)", re.IGNORECASE
    )
    found = bare.match(text.strip(" \t\r\n*$"))
    return found[1] if found else None


# --- comparing -----------------------------------------------------------------------------------


def same_number(gold: str, answer: str) -> Verdict:
    """Whether two texts are the same number, exactly; undecided where one is not a number."""
    left, right = quantity(gold), quantity(answer)
    if left is None or right is None:
        return Verdict(None, "not a number")
    return Verdict(left.value == right.value and units_agree(left.unit, right.unit), "number")


def same_choice(gold: str, answer: str) -> Verdict:
    """Whether two texts name the same choice letter; undecided where one names none."""
    left, right = _choice(gold), _choice(answer)
    if left is None or right is None:
        return Verdict(None, "not a choice")
    return Verdict(left == right, "choice")


def same_text(gold: str, answer: str) -> Verdict:
    """Whether two texts are the same words: case, spacing and a final full stop aside."""
    left, right = _words(gold), _words(answer)
    return Verdict(left == right, "text") if left else Verdict(None, "empty gold")


def same_expression(gold: str, answer: str) -> Verdict:
    """The cheap stages for LaTeX: choice letter, literal, text, number; else undecided."""
    left, right = without_name(normalised(gold), normalised(answer))
    if not left:
        return Verdict(None, "empty gold")
    if _bracketed_letter(gold) and (choice := same_choice(gold, answer)).equal is not None:
        return choice
    if _literal(left) == _literal(right):
        return Verdict(True, "literal")
    if (number := same_number(left, right)).equal is not None:
        return number
    if _is_text(left) or _is_text(right):
        return Verdict(_words(_no_text(left)) == _words(_no_text(right)), "text")
    if _SUBSCRIPTED.search(left) or _SUBSCRIPTED.search(right):
        return Verdict(False, "another base")
    return Verdict(None, "form")


def units_agree(left: str, right: str) -> bool:
    """Equal units, or one side without; percent must stand on both."""
    return left == right or ("" in (left, right) and "%" not in (left, right))


def _words(text: str) -> str:
    return " ".join(text.split()).strip(" \"'`*.").casefold()


def _choice(text: str) -> str | None:
    found = _alone(_no_text(normalised(text)), "A-Z")
    return found.upper() if found else None


def _bracketed_letter(text: str) -> bool:
    return bool(re.fullmatch(r"\([A-Za-z]\)|[A-Z]", _no_text(normalised(text))))


# --- one way of writing for many -----------------------------------------------------------------

_WRITTEN = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "\u00d7": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "\u222a": r"\cup ", "∈": r"\in ", "²": "^2",
    "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "±": r"\pm ",
    "√": r"\sqrt ", "°": r"^\circ ", "<=": r"\le ", ">=": r"\ge ", "{,}": ",",
    "~": " ", r"\displaystyle": "", r"\%": "%",
    r"\$": "$", r"\degree": r"^\circ ", r"^{\circ}": r"^\circ ", r"\lbrace": r"\{",
    r"\rbrace": r"\}", "**": "^", "\t": " ", "\n": " ", "\r": " ",
}  # fmt: skip
_REWRITTEN = [
    (re.compile(r"(?<!\\)\\! ?"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]"), " "),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\(?:mathrm|text|textrm) ?\{([ei])\}"), r"\1"),
    (re.compile(r"\\(?:mathrm|mathbf|textbf|textit|textrm|mbox|operatorname) ?\{"), r"\\text{"),
    (re.compile(r"\\text ?\{ ?,? ?(?:and|or) ?\}|(?<= )(?:and|or)(?= )"), ", "),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\\frac ?([0-9A-Za-z])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac ?\{[^{}]*+\}) ?([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt ?([0-9]|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"_([0-9])(?= )"), r"_{\1}"),
    (re.compile(r" ++"), " "),
    (re.compile(r", ?(?:, ?)++"), ", "),
]  # fmt: skip
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}+(?:,[0-9]{3})++(?![0-9])")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))


def normalised(text: str) -> str:
    """The text without wrappers, spacing commands, unicode signs and thousands commas."""
    text = _unwrapped(text.translate(_SIGNS))
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    for pattern, meant in _REWRITTEN:
        text = pattern.sub(meant, text)
    if not re.search(r"[(\[{]", text):
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text.rstrip(" .").strip()


def _unwrapped(text: str) -> str:
    for _ in range(8):  # deeper wrapping than this is no answer of anybody's
        before = text
        text = text.strip().rstrip(".:").strip()
        for opened, closed in _WRAPPERS:
            inner = text[len(opened) : len(text) - len(closed)]
            whole = text.startswith(opened) and text.endswith(closed)
            if whole and inner and opened not in inner and closed not in inner:
                text = inner.strip()
        if text.startswith("\\boxed{") and closing_brace(text, 6) == len(text) - 1:
            text = text[7:-1]
        if text == before:
            break
    return text


_NAMED = re.compile(
    r"([A-Za-z](?:_[A-Za-z0-9]|_\{[A-Za-z0-9]{1,5}\})?'?(?:\([a-z]\))?) ?(?:=|\\in(?![A-Za-z])) ?"
)


_RELATION = re.compile(r"=|\\(?:le|ge|ne|in|lt|gt|equiv)(?![a-z])|[<>]")


def without_name(gold: str, answer: str) -> tuple[str, str]:
    """Both without "x =" in front, where only one has a name and the other is no relation."""
    left, right = _NAMED.match(gold), _NAMED.match(answer)
    if left and right and left[1] == right[1]:
        rest, other_rest = gold[left.end() :], answer[right.end() :]
        plain = not _RELATION.search(rest) and not _RELATION.search(other_rest)
        return (rest, other_rest) if plain else (gold, answer)
    if left and not _RELATION.search(answer) and not _RELATION.search(gold, left.end()):
        return gold[left.end() :], answer
    if right and not _RELATION.search(gold) and not _RELATION.search(answer, right.end()):
        return gold, answer[right.end() :]
    return gold, answer


_WORD = re.compile(r"[A-Za-z]{2,}")
_SUBSCRIPTED = re.compile(r"[0-9]\}?_")
_TEXT_BLOCK = re.compile(r"\\text ?\{([^{}]*+)\}")
_NOT_WORDS = frozenset(
    {"pi", "sqrt", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "exp", "mod", "and", "or",
     "arcsin", "arccos", "arctan", "frac"}
)  # fmt: skip


def _no_text(text: str) -> str:
    return _TEXT_BLOCK.sub(r"\1", text).strip()


def _is_word(word: str) -> bool:
    return (
        len(word) >= 3
        and word.lower() not in _NOT_WORDS
        and bool(re.search("[aeiou]", word.lower()))
    )


def _is_text(text: str) -> bool:
    """Words only: all in a text block, or a phrase that no formula would spell."""
    block = _TEXT_BLOCK.fullmatch(text)
    if block:
        return bool(re.search("[A-Za-z]", block[1]))
    words = text.replace("'", "").replace("-", " ").split()
    return bool(words) and all(word.isalpha() for word in words) and any(map(_is_word, words))


def _literal(text: str) -> str:
    """The text without the spaces and braces that change nothing."""
    text = re.sub(r"([\^_])\{([A-Za-z0-9])\}", r"\1\2", text)
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


# --- numbers -------------------------------------------------------------------------------------

_INTEGER = r"[0-9]++"
_FRACTION = rf"(?P<whole>{_INTEGER})? ?\\frac ?\{{ ?(?P<top>-?{_INTEGER}) ?\}} ?\{{ ?(?P<under>-?{_INTEGER}) ?\}}"
_SLASHED = rf"(?:(?P<whole2>{_INTEGER}) )?(?P<top2>{_INTEGER}) ?/ ?(?P<under2>-?{_INTEGER})"
_PLAIN = rf"(?P<decimal>{_DECIMAL})(?:(?:[eE]| ?(?:\\times|\\cdot|\*) ?10 ?\^ ?\{{?)(?P<exponent>[-+]?{_INTEGER})\}}?)?"
_UNIT = r" ?(?P<unit>%|\^ ?\\circ ?[CF]?|\\text ?\{[^{}]*+\}(?: ?\^ ?\{?[0-9]\}?)?| ?[A-Za-z][A-Za-z ]*+(?:\^ ?\{?[0-9]\}?)?|)"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<money>[$€£¥]) ?(?P<sign2>-?))?(?:{_FRACTION}|{_SLASHED}|{_PLAIN}){_UNIT} ?"
)
_UNIT_NAMES = {
    "percent": "%", "^\\circ": "degree", "deg": "degree", "feet": "foot", "ft": "foot",
    "inche": "inch", "in": "inch", "centimeter": "cm", "meter": "m", "metre": "m",
    "kilometer": "km", "millimeter": "mm", "hr": "hour", "min": "minute", "sec": "second",
    "usd": "dollar", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "gram": "g",
    "kilogram": "kg",
}  # fmt: skip
_SHORT_UNITS = frozenset(
    {"cm", "mm", "km", "ft", "in", "kg", "lb", "lbs", "oz", "mg", "ml", "mph", "kmh", "hr", "hrs"}
)


def quantity(text: str) -> Quantity | None:
    """The number that the whole text is, with its unit; None where it is anything else."""
    text = normalised(text)
    if block := _TEXT_BLOCK.fullmatch(text):
        text = block[1]
    match = _QUANTITY.fullmatch(text.strip()) if len(text) <= 2 * MOST_DIGITS else None
    if match is None:
        return None
    unit = _unit_of(match["money"] or match["unit"])
    value = _value_of(match)
    if unit is None or value is None:
        return None
    negative = (match["sign"] == "-") != (match["sign2"] == "-")
    return Quantity(-value if negative else value, unit)


def _value_of(match: re.Match[str]) -> Fraction | None:
    if match["decimal"] is not None:
        exponent = match["exponent"] or "0"
        if (
            len(exponent) > 5
            or abs(int(exponent)) > MOST_DIGITS
            or len(match["decimal"]) > MOST_DIGITS
        ):
            return None
        return Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(exponent)
    whole, top, under = (match[name] or match[name + "2"] for name in ("whole", "top", "under"))
    if max(len(part or "") for part in (whole, top, under)) > MOST_DIGITS or int(under) == 0:
        return None
    return int(whole or 0) + Fraction(int(top), int(under))


def _unit_of(written: str) -> str | None:
    """One name for a unit; None where the words are none."""
    block = _TEXT_BLOCK.match(written)
    words = (
        (block[1] + written[block.end() :] if block else written).strip().lower().replace(".", "")
    )
    power = re.search(r" ?\^ ?\{?([0-9])\}?$", words)
    names = (words[: power.start()] if power else words).split()
    if not block and not all(
        _is_word(name) or name in _SHORT_UNITS or not name.isalpha() for name in names
    ):
        return None
    exponent = power[1] if power else ""
    kept = []
    for name in names:
        if name in ("square", "sq", "cubic", "cu"):
            exponent = "2" if name.startswith("s") else "3"
        elif name != "unit" and name != "units":
            kept.append(
                _UNIT_NAMES.get(name)
                or _UNIT_NAMES.get(name.removesuffix("s"), name.removesuffix("s"))
            )
    return " ".join(kept) + (f"^{exponent}" if exponent and kept else "")


_TRAILING_UNIT = re.compile(
    r" ?(?:%|\^ ?\\circ ?[CF]?|\\text ?\{[^{}]*+\}(?: ?\^ ?(?:[0-9]|\{[0-9]\}))?) ?$"
)


def split_unit(text: str) -> tuple[str, str]:
    """A normalised formula and the unit after it ("" where there is none)."""
    if text.startswith("$"):
        return text[1:].strip(), "dollar"
    trailing = _TRAILING_UNIT.search(text)
    if trailing and trailing.start() > 0:
        return text[: trailing.start()].strip(), _unit_of(trailing[0]) or ""
    body, _, word = text.rpartition(" ")
    unit = _unit_of(word) if word.isalpha() and body else None
    return (body.strip(), unit) if unit else (text, "")


def marked_number(completion: str) -> str | None:
    """The number a completion marks as its answer: after "####", in a box, or after "answer is".

    A completion that is nothing but a number is one too. Any other has no answer: taking its last
    number would let rationales into the training set that never came to an end, and would be right
    by accident more often.
    """
    alone = completion.strip().removesuffix(".")
    if first_number(alone) == alone:
        return alone
    if "####" in completion:
        return first_number(after_marker(completion, "####") or "")
    for place in (last_boxed(completion), after_answer_is(completion)):
        # "The answer is 12 + 7 = 19." states 19
        if place and (number := first_number(place.rpartition("=")[2])):
            return number
    return None


def stated(completion: str) -> str | None:
    """The text after "the answer is"; the whole completion where it is a single line without it."""
    text = completion.strip()
    alone = text.removesuffix(".") if "\n" not in text else ""
    return last_boxed(text) or after_answer_is(text) or alone or None
