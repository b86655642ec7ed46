r"""LaTeX answers: extraction, one spelling for many, and the comparisons that need no computer algebra.

What `same_expression` leaves undecided goes to math-verify and sympy, in
`selftaught.tasks.competition_math`.
"""

import re

from selftaught.tasks.answers import Kind, Verdict, closing_brace, sentence, stated
from selftaught.tasks.quantities import (
    ascii_signs,
    false_equation,
    holds,
    quantity,
    same_quantity,
    unit_named,
    without_stop,
    without_wrapper,
)
from selftaught.tasks.retractions import Reading, numbers_in

# --- extraction ----------------------------------------------------------------------------------

_COMMAND_OR_TEXT = re.compile(r"\text ?\{[^{}]*+\}|\\[A-Za-z]++")


def stated_latex(completion: str) -> str | None:
    r"""Return the formula that a completion states as its answer, or None if it states none.

    It stands in the last `\boxed{}` (neighbouring boxes are one list), after "the answer is", or is the
    whole completion where that is nothing but a formula.
    """
    phrase = stated(completion, LATEX, _formula_alone)
    formula = None if phrase is None else _formula(phrase)
    return formula if formula and not false_equation(formula.replace("$", " ")) else None


def _formula(phrase: str) -> str:
    """A stated phrase as one formula: its first sentence, without the marks around inline formulas."""
    phrase = sentence(phrase)
    inline = phrase.count("$") - phrase.count("\\$")
    if inline >= 4 and inline % 2 == 0 and "$$" not in phrase:
        phrase = re.sub(r"(?<!\\)\$", " ", phrase)
    return without_stop(phrase.strip()).strip()


def _formula_alone(text: str) -> str | None:
    text = text.strip()
    if "\n" in text or len(text) > 300:
        return None
    words = re.findall(r"[A-Za-z]{2,}", _COMMAND_OR_TEXT.sub(" ", text))
    formula = bool(re.search(r"[0-9=^\\$]", text)) or len(text.strip("(). ")) == 1
    plain = all(word in _NOT_WORDS or (formula and len(word) == 2) for word in words)
    return text if formula and plain else None


def _other_formula(phrase: str, answer: str, bare: bool) -> bool:
    """Return whether a phrase is another formula than the answer; a sentence by itself, another number."""
    left, right = normalised(_formula(phrase)), normalised(_formula(answer))
    value, stated_value = quantity(left, strict=True), quantity(right, strict=True)
    if value is not None and stated_value is not None:
        return not same_quantity(stated_value, value)
    if value is None and (
        bare or _formula_alone(phrase) is None or not re.search("[0-9A-Za-z]", left)
    ):
        return False
    left, right = without_name(left, right)
    return not _RELATION.search(left) and "approx" not in left and _literal(left) != _literal(right)


LATEX = Kind(
    lambda phrase: _literal(normalised(_formula(phrase))) or None,
    lambda left, right: left == right,
    Reading(numbers_in, _other_formula),
)

# --- cheap comparisons ---------------------------------------------------------------------------


def same_expression(gold: str, answer: str) -> Verdict:
    """Compare by choice letter, spelling, number and text; undecided where only algebra can tell."""
    left, right = without_name(normalised(gold), last_side(normalised(answer), gold))
    if not left:
        return Verdict(None, "empty gold")
    letter, other = _letter(gold), _letter(answer)
    if letter is not None and other is not None:
        bracketed = "(" in gold
        same = letter.upper() == other.upper() if bracketed else letter == other
        return Verdict(same, "choice")
    if differ := _differ(left, right):
        return Verdict(False, differ)
    if {connective(gold), connective(answer)} == {"and", "or"}:
        return Verdict(False, "and, or")
    if _literal(left) == _literal(right):
        return Verdict(True, "literal")
    number, other = quantity(left, strict=True), quantity(right, strict=True)
    variable = re.search("[0-9][a-z]$", left)  # 3m is a product
    if number is not None and other is not None and not variable:
        return Verdict(same_quantity(number, other), "number")
    if _no_solution(left) and _no_solution(right):
        return Verdict(True, "empty set")
    if _is_text(left) or _is_text(right):
        return Verdict(_words(_no_text(left)) == _words(_no_text(right)), "text")
    if _SUBSCRIPTED.search(left) or _SUBSCRIPTED.search(right):
        return Verdict(False, "another base")
    return Verdict(None, "form")


_COMMANDS = re.compile(r"\\[A-Za-z]++")
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?![0-9])")
_MODULO = re.compile(r"\\[pb]?mod(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")
_DEGREES = re.compile(r"\^ ?\\circ|\\text ?\{ ?deg(?:ree)?s? ?\}")


def _differ(gold: str, answer: str) -> str:
    """Return what distinguishes two formulas that algebra would treat as equal; "" if nothing does.

    A clock time is no quotient, a ratio no number, capital letters side by side are the name of a
    thing, and a sine of degrees is none of radians.
    """
    if _TIME.search(gold) and not _TIME.search(answer):
        return "clock time"
    if ":" in answer and ":" not in gold:
        return "ratio"
    if bool(_MODULO.search(gold)) != bool(_MODULO.search(answer)):
        return "modulo"
    names, others = (
        sorted(re.findall("[A-Z]{2,}", _COMMANDS.sub(" ", text))) for text in (gold, answer)
    )
    if names != others and sorted("".join(names)) == sorted("".join(others)):
        return "names"
    if any(map(_TRIGONOMETRIC.search, (gold, answer))):
        degrees = [len(_DEGREES.findall(text)) for text in (gold, answer)]
        angles = [len(_TRIGONOMETRIC.findall(text)) for text in (gold, answer)]
        if angles[0] == angles[1] and degrees[0] != degrees[1]:
            return "degrees"
    return ""


def last_side(answer: str, gold: str) -> str:
    """The value of an answer that is a computation, "2^3 = 8", where gold is no equation."""
    first, equals, last = answer.rpartition("=")
    if not equals or "=" in gold or not holds(answer) or _literal(first) == _literal(last):
        return answer
    return last.strip()


_NO_SOLUTION = re.compile(
    r"\\(?:emptyset|varnothing)|\\\{ ?\\\}|(?:there (?:is|are) )?no (?:real )?solutions?|no solutions? exists?",
    re.IGNORECASE,
)


def _no_solution(text: str) -> bool:
    return bool(_NO_SOLUTION.fullmatch(_no_text(text)))


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
    (re.compile(r"(?<=[0-9]) ?\\text ?\{ ?thousand ?\}"), r"\\times 10^{3}"),
    (re.compile(r"(?<=[0-9]) ?\\text ?\{ ?million ?\}"), r"\\times 10^{6}"),
    (re.compile(r"(?<=[0-9]) ?\\text ?\{ ?billion ?\}"), r"\\times 10^{9}"),
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
_THOUSANDS = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}+(?:,[0-9]{3})++(?![0-9])|(?<![0-9.,] )(?<![0-9.,])[1-9][0-9]{0,2}+(?: [0-9]{3})++(?! ?[0-9])"
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))


def _words(text: str) -> str:
    return " ".join(text.split()).strip(" \"'`*.").casefold()


def _letter(text: str) -> str | None:
    """The letter of an answer that is one letter and nothing else, in brackets or as text or not."""
    found = re.fullmatch(r"\(?([A-Za-z])\)?", _no_text(normalised(text)))
    return found[1] if found and ("(" in text or "text" in text or found[1].isupper()) else None


def connective(text: str) -> str:
    """Return the word between the relations of an answer, "and" or "or"; "" where there is none."""
    words = set(re.findall(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])", text))
    relations = re.findall(r"[<>=]|\\(?:le|ge|lt|gt|leq|geq|ne|neq)(?![A-Za-z])", text)
    return words.pop() if len(words) == 1 and len(relations) > 1 else ""


_ALL_REALS = re.compile(
    r"\\math(?:bb|bf) ?\{?R\}?|\\R(?![A-Za-z])|\\text ?\{ ?all real(?: number)?s ?\}|all real(?: number)?s"
)


def normalised(text: str) -> str:
    """Return the text without wrappers, spacing commands, Unicode signs and thousands separators."""
    text = _unwrapped(ascii_signs(text))
    text = _ALL_REALS.sub(r"(-\\infty,\\infty)", text)
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    for pattern, meant in _REWRITTEN:
        text = pattern.sub(meant, text)
    if not re.search(r"[(\[{]", text):
        text = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    return without_stop(text.strip()).strip()


def _unwrapped(text: str) -> str:
    for _ in range(8):  # deeper wrapping than this is no answer of anybody's
        before = text
        text = without_stop(text.strip().removesuffix(":")).strip()
        text = without_wrapper(text, _WRAPPERS)
        if text.startswith("\\boxed{") and closing_brace(text, 6) == len(text) - 1:
            text = text[7:-1]
        if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


_NAMED = re.compile(
    r"([A-Za-z](?:_[A-Za-z0-9]|_\{[A-Za-z0-9]{1,5}\})?'?(?:\^\{-1\})?(?:\((?:[a-z]|-?[0-9]{1,4})\))?"
    r"|(?:\\angle ?)?[A-Z]{1,3}|\\angle ?\{[A-Z]{1,3}\}|\\overline ?\{[A-Z]{2}\}|\|[A-Zz]\||\\text ?\{(?! ?not\b)[A-Za-z ]{1,40}\})"
    r" ?(?:=|\\in(?![A-Za-z])) ?"
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


# --- units ---------------------------------------------------------------------------------------

_TRAILING_UNIT = re.compile(
    r" ?(?:%|\^ ?\\circ ?[CF]?|\\text ?\{[^{}]*+\}(?: ?\^ ?(?:[0-9]|\{[0-9]\}))?) ?$"
)


def split_unit(text: str) -> tuple[str, str]:
    """Return a normalised formula and the name of the unit behind it ("" where there is none).

    Words that are not in the table of units stay with the formula.
    """
    if text.startswith("$"):
        return text[1:].strip(), "dollar"
    if _TRIGONOMETRIC.search(text):
        return text, ""  # the degree sign of an angle is no unit of the whole
    trailing = _TRAILING_UNIT.search(text)
    if trailing and trailing.start() > 0 and (unit := unit_named(trailing[0])):
        return text[: trailing.start()].strip(), unit
    body, _, word = text.rpartition(" ")
    unit = unit_named(word) if word.isalpha() and len(word) > 1 and body else None
    return (body.strip(), unit) if unit else (text, "")


def same_units(left: str, right: str) -> bool:
    """Return whether the units of two formulas agree: equal, or one left out; percent never is."""
    return left == right or ("" in (left, right) and "%" not in (left, right))
