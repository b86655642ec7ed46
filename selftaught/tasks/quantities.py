r"""Reading a whole phrase as one exact number with its unit.

`quantity` reads "12", "1,234", "1 234", "$18 per day", "3\frac12", "6 \times 10^3", "28%",
"\text{12 apples}", "x = 19" or "minus five". It returns None for every phrase that is not one value: a
second number, an open operator, a range, a bound, a negation, a scale word, an ordinal, a clock time.
docs/grading.md has the policy with examples.

Every pattern reads untrusted text in time linear in its length, and nothing raises.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


class Quantity(NamedTuple):
    """An exact number and its unit, "" where it has none."""

    value: Fraction
    unit: str
    known: bool = True
    """Whether the unit is in the table of units; False for another noun, such as "apple"."""
    letter: bool = False
    """Whether the unit was written as a single letter, which may also be a variable."""


MOST_DIGITS = 1000
"""A number of more digits, written out or through its exponent, is not read."""
LONGEST = 2 * MOST_DIGITS + 500
"""Characters of the longest phrase that is read."""

# --- characters ----------------------------------------------------------------------------------

INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u2060-\u2064\u2066-\u2069\u202a-\u202c\ufeff]")
"""Characters without width and marks of writing direction, except the overrides."""
_OVERRIDES = re.compile("[\u202d\u202e]")
_SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2013\ufe63\u2010\u2011", "-")
    | dict.fromkeys("\u00a0\u202f\u2009\u2007\u2008\u200a\u2002\u2003\u2004\u2005\u2006\u205f\u3000", " ")
    | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | {"\u2044": "/", "\u3002": ".", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\uffe5": "\u00a5"}
)  # fmt: skip
"""The minus signs, spaces and full-width characters of Unicode, as ASCII."""
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]++")
VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅐": "1/7",
    "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_VULGAR = re.compile("[" + "".join(VULGAR) + "]")


def ascii_signs(text: str) -> str:
    """Return the text with ASCII signs, spaces and digits for their Unicode variants."""
    return INVISIBLE.sub("", text.translate(_SIGNS)).strip(" \t\r\n\x00")


_COMMANDS = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:boxed|fbox)(?![A-Za-z]) ?(?=\{)"), ""),
    (re.compile(r"\\(?:quad|qquad)(?![A-Za-z])|\\[,;: ]"), " "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])~(?=[0-9A-Za-z\\])"), " "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·⋅]"), " × "),
    (re.compile(r" ?\^ ?\{ ?\\circ ?\}| ?\^ ?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|textrm|mathit|mathsf|texttt|textsf|boldsymbol|pmb|mbox|hbox|operatorname|emph|bf|rm|bm)(?![A-Za-z]) ?(?=\{)"), " \\\\word"),
    (re.compile(r"(?<=[0-9)])\*\*(?=[0-9({-])"), "^"),
    (re.compile(r"\*\*|__|`++"), " "),
    (re.compile(r"\bleft over\b"), "left"),
]  # fmt: skip
_WORD_BLOCK = re.compile(r"\\word\{([^{}\\]*+)\}")
_QUOTES = (
    ('"', '"'),
    ("'", "'"),
    ("*", "*"),
    ("_", "_"),
    ("{", "}"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
)


def plain_phrase(text: str) -> str | None:
    """Return the phrase without LaTeX and Markdown wrappers; None where its signs are ambiguous."""
    if len(text) > LONGEST or _OVERRIDES.search(text):
        return None
    text = _RAISED.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPT), text)
    text = _VULGAR.sub(lambda found: " " + VULGAR[found[0]] + " ", text)
    text = ascii_signs(text)
    for pattern, meant in _COMMANDS:
        text = pattern.sub(meant, text)
    for _ in range(3):  # \textbf{\text{5}}
        text = _WORD_BLOCK.sub(r" \1 ", text)
    money = _with_money(text.replace("\\%", "%").replace("\\$", "\x01"))
    if money is None:
        return None
    text = " ".join(money.replace("$", " ").replace("\x01", "$").split())
    for _ in range(8):  # deeper wrapping than this is no answer of anybody's
        before = text
        text = without_stop(text.strip(" \t\x00")).rstrip()
        text = without_wrapper(text, _QUOTES)
        if text.startswith("{") and text.endswith("}") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            break
    return text


def without_stop(text: str) -> str:
    """Return the text without one full stop at its end.

    An ellipsis stays, because it leaves a number open.
    """
    return text[:-1] if text.endswith(".") and not text.endswith("..") else text


def without_wrapper(text: str, marks: Iterable[tuple[str, str]]) -> str:
    """Return the text without the pairs of marks that enclose the whole of it, such as $ and $."""
    for opened, closed in marks:
        inner = text[len(opened) : len(text) - len(closed)]
        whole = text.startswith(opened) and text.endswith(closed)
        if whole and inner and opened not in inner and closed not in inner:
            text = inner.strip()
    return text


def _with_money(text: str) -> str | None:
    """The text with another sign for the dollars that are money; None where that cannot be determined."""
    dollars = text.count("$")
    if dollars % 2 == 0:
        return text
    money = len(re.findall(r"\$ ?[0-9]", text))
    return text.replace("$", "\x01") if dollars in (1, money) else None


def _closes_at_end(text: str) -> bool:
    """Return whether the brace that opens a text is closed by its last character."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place == len(text) - 1
    return False


# --- words ---------------------------------------------------------------------------------------

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
         "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
         "ninety": 90}  # fmt: skip
_NUMBER_WORDS = {
    **{word: number for number, word in enumerate(_ONES)},
    **_TENS,
    **{f"{ten}-{one}": tens + number for ten, tens in _TENS.items() for number, one in enumerate(_ONES[1:10], 1)},
    "one hundred": 100, "a hundred": 100,
}  # fmt: skip
_IN_WORDS = re.compile(
    "(" + "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True)).replace("-", "[- ]")
    + r")(?![A-Za-z'0-9-])", re.IGNORECASE,
)  # fmt: skip

_OTHER_VALUE = frozenset(
    # more digits than the number itself has, or another number beside it
    "hundred hundreds thousand thousands million millions billion billions trillion trillions quadrillion "
    "lakh crore mln mrd bil thou pair couple century centuries decade ago morning afternoon evening night sigma "
    "loss lost debt deficit owe owes owed dozen dozens score scores gross grand k m bn mn mil mio tens ones "
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths "
    "eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths "
    "first second-place twice thrice double triple "
    # operators and functions
    "plus minus times-as over divided multiplied squared cubed factorial power root sqrt log ln exp sin cos tan "
    "mod modulo choose pi tau phi base binary octal hex hexadecimal remainder inverse reciprocal percentage "
    "recurring repeating prime conjugate "
    # negation, doubt, bounds, alternatives
    "not no nor neither never none cannot isn't wrong incorrect false invalid impossible excluded except unless "
    "or and but if otherwise either both versus vs to than through thru until tops about around approximately approx "
    "roughly nearly almost circa maybe perhaps possibly probably likely ish odd even something guess estimate "
    "estimated rounded rounding least most maximum minimum max up down upward upwards upto under above below "
    "as less fewer negative positive short behind ahead past before off too missing "
    "is are was were be would could should might may can has have equals equal means "
    # clock times and eras
    "am pm a.m p.m o'clock oclock noon midnight bc ad bce ce".split()
)
"""Words that make another value, or no single value, of the number before them."""
_MODIFIERS = frozenset(
    "old tall long wide high deep away left remaining total altogether overall each apiece today more "
    "extra additional now there here only exactly whole full different".split()
)
_PREPOSITIONS = frozenset(
    "in on at for from by with after during of within every this that".split()
)

_UNITS: dict[str, str] = {}
for _name, _spellings in {
    "millimeter": "mm millimeter millimeters millimetre millimetres",
    "centimeter": "cm centimeter centimeters centimetre centimetres",
    "decimeter": "dm decimeter decimeters",
    "meter": "m meter meters metre metres",
    "kilometer": "km kms kilometer kilometers kilometre kilometres",
    "inch": "in inch inches", "foot": "ft foot feet", "yard": "yd yds yard yards",
    "mile": "mi mile miles",
    "milligram": "mg milligram milligrams", "gram": "g gram grams gramme grammes",
    "kilogram": "kg kgs kilogram kilograms kilo kilos", "tonne": "tonne tonnes", "ton": "ton tons",
    "lb": "lb lbs", "pound": "pound pounds", "ounce": "oz ounce ounces",
    "milliliter": "ml milliliter milliliters millilitre millilitres",
    "liter": "l liter liters litre litres", "gallon": "gal gallon gallons",
    "quart": "qt quart quarts", "pint": "pt pint pints", "cup": "cup cups",
    "tablespoon": "tbsp tablespoon tablespoons", "teaspoon": "tsp teaspoon teaspoons",
    "millisecond": "ms millisecond milliseconds", "second": "s sec secs second seconds",
    "minute": "min mins minute minutes", "hour": "h hr hrs hour hours", "day": "day days",
    "week": "week weeks wk wks", "month": "month months", "year": "year years yr yrs",
    "mile per hour": "mph", "kilometer per hour": "kph kmh kmph",
    "degree": "° deg degs degree degrees", "radian": "rad rads radian radians",
    "dollar": "$ usd dollar dollars buck bucks", "cent": "¢ cent cents", "euro": "€ eur euro euros",
    "gbp": "£ gbp", "penny": "penny pence", "yen": "¥ jpy yen", "rupee": "₹ inr rs rupee rupees",
    "byte": "byte bytes", "kilobyte": "kb kilobyte kilobytes", "megabyte": "mb megabyte megabytes",
    "gigabyte": "gb gigabyte gigabytes", "hertz": "hz hertz", "kilohertz": "khz",
    "watt": "w watt watts", "kilowatt": "kw kilowatt kilowatts", "joule": "j joule joules",
    "newton": "n newton newtons", "volt": "v volt volts", "ampere": "amp amps ampere amperes",
    "pascal": "pa pascal pascals", "mole": "mol mole moles", "calorie": "cal calorie calories",
    "kilocalorie": "kcal", "acre": "acre acres", "hectare": "hectare hectares",
    "unit": "unit units",
}.items():  # fmt: skip
    _UNITS |= dict.fromkeys(_spellings.split(), _name)
_CAPITALS = frozenset(
    "kW Hz kHz KHz MB GB KB kB Pa mL USD EUR GBP JPY INR Rs Kg KG Km KM Cm CM Ft FT In Lbs LBS Oz MPH mph Day Cup".split()
)
"""Spellings of short units that have capitals."""
_CURRENCIES = {"US$": "dollar", "C$": "canadian dollar", "A$": "australian dollar"}
_MONEY = frozenset({"dollar", "cent", "euro", "gbp", "penny", "yen", "rupee", "pound"})
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_SAME_UNITS = (frozenset({"pound", "lb"}), frozenset({"pound", "gbp"}))
_UNIT_TOKEN = re.compile(
    r" ?([A-Za-z]+(?:['-][A-Za-z]+)*+(?:(?<=s)')?|[%°/$€£¥₹¢])(?: ?\^ ?\{?([0-9])\}?)?"
)
_MOST_WORDS = 10


def _unit_name(word: str) -> str | None:
    """The name of a unit by its spelling; capitals count where a single letter is meant."""
    if len(word) == 1 and word.isalpha():
        return _UNITS.get(word) if word.islower() else {"L": "liter", "N": "newton", "J": "joule", "W": "watt",
                                                        "V": "volt"}.get(word)  # fmt: skip
    if len(word) <= 3 and word.isalpha() and not word.islower() and word not in _CAPITALS:
        return None  # MW is no mW, and Mb no MB
    return _UNITS.get(word.lower())


class _Unit(NamedTuple):
    name: str
    known: bool
    letter: bool


def _unit_of(rest: str, money: str, attached: bool) -> _Unit | None:
    """The unit in the words after a number; None where they make no single value of it."""
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(rest):
        match = _UNIT_TOKEN.match(rest, at)
        if match is None or len(tokens) > _MOST_WORDS:
            return None
        tokens.append((match[1], match[2] or ""))
        at = match.end()
    if any(_changes_value(word, place) for place, (word, _) in enumerate(tokens)):
        return None
    if attached and tokens and _unit_name(tokens[0][0]) is None and tokens[0][0] not in "%°":
        return None  # 3x, 7th, 0x1F
    name, used, letter = _known_unit(tokens)
    rest_words = [
        word if len(word) <= 3 and not word.islower() else word.lower() for word, _ in tokens[used:]
    ]
    if any(not word[0].isalpha() for word in rest_words) or any(
        power for _, power in tokens[used:]
    ):
        return None
    if name.count("per ") > 1 or (name and "per" in rest_words):
        return None
    if money:
        if name and name != money and not name.startswith(f"{money} per"):
            if not name.startswith("per "):
                return None
            name = f"{money} {name}"
        return _Unit(name or money, True, False)
    if name.startswith("per "):
        return _Unit(name, True, False)
    if name:
        return _Unit(name, True, letter)
    noun = _noun(rest_words)
    return None if noun is None else _Unit(noun, noun == "", False)


def _changes_value(word: str, place: int) -> bool:
    low = word.lower()
    if low in ("k", "m", "b", "t") and word != "m":
        return True  # 5k, 5M
    if low == "m":
        return False  # metres; as millions only after a currency, see _known_unit
    return (
        any(
            part in _OTHER_VALUE or part.removesuffix("s") in _OTHER_VALUE
            for part in low.split("-")
        )
        or low in _NUMBER_WORDS
        or (place > 0 and low == "times")
        or bool(re.fullmatch(r"[0-9]+(?:st|nd|rd|th)", low))
        or low in ("st", "nd", "rd", "th")
        or low.removesuffix("s") in _NUMBER_WORDS
        or low.endswith(("-ish", "n't"))
    )


def _known_unit(tokens: list[tuple[str, str]]) -> tuple[str, int, bool]:
    """The unit that the tokens begin with, how many of them it takes, and if it was one letter."""
    words = [word.lower() for word, _ in tokens]
    if not tokens:
        return "", 0, False
    if words[0] in ("%", "percent", "pct"):
        return "%", 1, False
    if words[:2] == ["per", "cent"]:
        return "%", 2, False
    if words[:2] in (["in", "total"], ["in", "all"], ["in", "the"]):
        return "", 0, False
    at, power = 0, ""
    while at < len(tokens) and words[at] in _POWERS:
        power = _POWERS[words[at]]
        at += 1
    name = ""
    letter = False
    if at < len(tokens) and (found := _unit_name(tokens[at][0])):
        power = tokens[at][1] or power
        letter = len(tokens[at][0]) == 1 and tokens[at][0].isalpha()
        name = found + (f"^{power}" if power else "")
        at += 1
        if (
            found == "degree"
            and at < len(tokens)
            and words[at] in ("c", "f", "celsius", "fahrenheit")
        ):
            name += " " + words[at][0]
            at += 1
    elif at:
        return "", 0, False
    while at + 1 < len(tokens) and words[at] in ("/", "per", "a", "an"):
        if not name and words[at] != "per":
            break
        under = _unit_name(tokens[at + 1][0]) or _singular(words[at + 1])
        name = f"{name} per {under}".strip() + (
            f"^{tokens[at + 1][1]}" if tokens[at + 1][1] else ""
        )
        at += 2
    return (name if name != "unit" else ""), at, letter and at == 1


def _noun(words: list[str]) -> str | None:
    """The noun that is counted: the words before the first preposition, without modifiers."""
    noun: list[str] = []
    for word in words:
        if word in _PREPOSITIONS:
            break
        if word not in _MODIFIERS and word not in ("a", "an", "the"):
            noun.append(word)
    if "per" in noun[1:-1] and noun.count("per") == 1:  # eggs per day
        at = noun.index("per")
        counted, under = _noun(noun[:at]), _noun(noun[at + 1 :])
        return f"{counted} per {under}" if counted and under else None
    if any(len(word) == 1 for word in noun) or len(noun) > 4 or "per" in noun:
        return None  # a variable, or a sentence
    return " ".join([*noun[:-1], _singular(noun[-1])]) if noun else ""


def _singular(word: str) -> str:
    for ending, meant in (
        ("ies", "y"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("sses", "ss"),
        ("xes", "x"),
    ):
        if word.endswith(ending):
            return word.removesuffix(ending) + meant
    return word.removesuffix("s") if not word.endswith("ss") else word


# --- numbers -------------------------------------------------------------------------------------

_INT = r"[0-9]++"
_GROUPED = (
    r"(?P<grouped>[1-9][0-9]{0,2}+(?:,[0-9]{3})++(?:\.[0-9]++)?+|[1-9][0-9]{0,2}+(?: [0-9]{3})++(?:\.[0-9]++)?+"
    r"|[1-9][0-9]?+(?:,[0-9]{2}(?![0-9]))++,[0-9]{3}(?![0-9])|[1-9][0-9]{0,2}+(?:'[0-9]{3})++"
    r"|[1-9][0-9]{0,2}+(?:_[0-9]{3})++(?:\.[0-9]++)?+)"
)
_POINTS = r"(?P<points>[1-9][0-9]{0,2}+(?:(?:\.[0-9]{3}){2,}+(?:,[0-9]++)?+|\.[0-9]{3},[0-9]++))"
_COMMA = r"(?P<comma>[0-9]++,[0-9]{1,2}+|0,[0-9]++)"
_DECIMAL = r"(?P<decimal>[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
_REPEATING = rf"(?P<whole3>[0-9]*+)\.(?P<once>[0-9]*+) ?\\overline ?\{{ ?(?P<again>{_INT}) ?\}}"
_FRACTION = (
    rf"(?P<whole>{_INT})? ?\\frac ?(?:\{{ ?(?P<top>-?{_INT}) ?\}}|(?P<top3>[0-9])) ?"
    rf"(?:\{{ ?(?P<under>-?{_INT}) ?\}}|(?P<under3>[0-9]))"
)
_SLASHED = rf"(?:(?P<whole2>{_INT}) )?(?P<top2>{_INT}) ?/ ?(?P<under2>-?{_INT})(?! ?[/])"
_TEN_POWER = rf"(?: ?(?:×|x|\*) ?10 ?\^ ?(?:\{{ ?(?P<ten>[-+]?{_INT}) ?\}}|(?P<ten2>[-+]?{_INT}))|[eE](?P<e>[-+]?{_INT}))"
_POWER = rf"(?P<root>{_INT}) ?\^ ?(?:\{{ ?(?P<power>[-+]?{_INT}) ?\}}|(?P<power2>[-+]?{_INT}))"
_SIGN = r"(?P<sign>[-+]|(?:minus|negative)(?![A-Za-z-]))? ?"
_MONEY_SIGN = r"(?:(?P<money>(?:US|C|A)?\$|[€£¥₹]|(?:USD|EUR|GBP) ) ?(?P<sign2>-?) ?)?"
_NUMBER = re.compile(
    rf"{_SIGN}{_MONEY_SIGN}(?:{_REPEATING}|{_FRACTION}|{_SLASHED}|{_POWER}|"
    rf"(?:{_POINTS}|{_GROUPED}|{_COMMA}|{_DECIMAL})(?:{_TEN_POWER})?)"
    r"(?![0-9.,:/^_!\"'+*×(\[{]| [0-9/^+*×(\[{-]|-)"
)
_SIGN_ONLY = re.compile(_SIGN)
_EQUALS = re.compile(r"(?<![!<>=:~])=(?![=>~<])")
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|indeed|simply|just|exactly|precisely|equal to|equals|a total of"
    r"|in total|clearly|of course|it is|it's|actually|yes|as follows|given by|the number)\b[,:]? ++)++",
    re.IGNORECASE,
)
_SAID = re.compile(
    r"(?:(?:so|thus|therefore|hence)?,? ?(?:the|my|our)? ?(?:correct |final |right )?answers? ?"
    r"(?:is|would be|should be|must be|=|:)+[: ]*+)",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?:[A-Za-z]{2,}[ ])*+[A-Za-z](?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z0-9]\))?")
_ARITHMETIC = re.compile(r"[0-9A-Za-z_{}\\ .+*/×÷()^%$€£-]*+")


_NEGATIVE_IN_BRACKETS = re.compile(r"\( ?(-[^()]*+)\)")
_EXPLAINED = re.compile(r"(.*[^ (]) ?\(([^()]*+)\)")
_REMAINS = re.compile(
    r" (?:are|is|were|was|will be) (?:left|remaining|needed|required|sold|in total|altogether)$| remains?$",
    re.IGNORECASE,
)


def quantity(text: str, *, strict: bool = False) -> Quantity | None:
    """Return the number that the whole text is, with its unit; None where it is anything else.

    Args:
        strict: for formulas: no name in front ("x = 19"), no word behind that is not in the table of
            units ("12 apples"), and a comma separates two values ("3,5").
    """
    phrase = plain_phrase(text)
    if not phrase:
        return None
    if bracketed := _NEGATIVE_IN_BRACKETS.fullmatch(phrase):
        phrase = bracketed[1]
    if strict:
        return None if re.search(r"(?<![0-9])[0-9]+,(?![0-9]{3})", phrase) else _read(phrase, False)
    phrase = value_part(phrase)
    return None if phrase is None else _read(phrase, True)


def unit_named(text: str) -> str | None:
    """Return the name of the unit that the whole text is, or None if it is none in the table."""
    phrase = plain_phrase(text)
    unit = _unit_of(phrase, "", False) if phrase else None
    return unit.name if unit and unit.known and unit.name else None


def stated_value(text: str) -> str | None:
    """Return the part of a phrase that states its number: "19" for "The answer is x = 19."

    None where the whole phrase does not state one number.
    """
    phrase = plain_phrase(text)
    if phrase and (bracketed := _NEGATIVE_IN_BRACKETS.fullmatch(phrase)):
        phrase = bracketed[1]
    part = value_part(phrase) if phrase else None
    return part if part is not None and _read(part, True) is not None else None


def _without_explanation(phrase: str) -> str:
    """The phrase without brackets at its end that hold the same number, or how it comes about.

    "12 (twelve)" and "18 (9 eggs at $2 each)": of the two numbers in the brackets a sum, difference,
    product or quotient must be the number before them.
    """
    if not phrase.endswith(")") or (found := _EXPLAINED.fullmatch(phrase)) is None:
        return phrase
    inside = found[2].removeprefix("=").strip()
    value, again = _read(found[1], True), _read(inside, True)
    if value is None or re.search(r"[=<>~]", inside):
        return phrase
    if again is not None:
        return found[1] if same_quantity(value, again) and not again.unit else phrase
    computed = _arithmetic(inside)[0]
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", inside)
    if (
        len(numbers) == 2
        and all(len(number) < 20 for number in numbers)
        and _SIDE_WORDS.search(inside)
    ):
        left, right = map(Fraction, numbers)
        computed = value.value
        if computed not in {
            left * right,
            left + right,
            left - right,
            right - left,
            right and left / right,
        }:
            return phrase
        if any(_changes_value(word, 1) for word in re.findall("[A-Za-z]+", inside)):
            return phrase
    return found[1] if computed == value.value else phrase


def value_part(phrase: str) -> str | None:
    """Return what stands after words of introduction and after the last equals sign.

    None where what stands before that sign is no single equation, as in "x = 3, y = 4".
    """
    phrase = _without_explanation(_REMAINS.sub("", phrase))
    if said := _SAID.match(phrase):
        phrase = phrase[said.end() :]
    if lead := _LEAD.match(phrase):
        phrase = phrase[lead.end() :]
    *before, last = _EQUALS.split(phrase)
    if before and false_equation(phrase):
        return None
    for side in before:
        side = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", side).strip()
        words = re.findall(r"[A-Za-z']+", side.replace("\\", " "))
        if not side or not _ARITHMETIC.fullmatch(side):
            return None
        if any(word.lower() in _OTHER_VALUE - {"m", "k", "pi"} for word in words):
            return None
        if not _NAME.fullmatch(side) and _has_variable(side):
            return None  # "2x = 38" is no value, nor is "x = 3 y = 4"
    return last.strip()


_SIDE_COMMANDS = [
    (re.compile(r"\\[dtc]?frac ?\{([0-9. +*/()-]{1,40})\} ?\{([0-9. +*/()-]{1,40})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\[dtc]?frac ?([0-9]) ?([0-9])"), r"(\1/\2)"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∗]|\*\*(?![0-9(-])"), "*"),
    (re.compile(r"\^ ?\{ ?(-?[0-9]{1,3}) ?\}"), r"^\1"),
    (re.compile(r"\\?% ?of\b"), "/100*"),
    (re.compile(r"(?<=[0-9)]) of (?=[0-9($])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|[÷\u2044\u2215]"), "/"),
    (re.compile(r"(?<=[0-9)]) ?x ?(?=[0-9(])"), "*"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;: !()\[\]]|[$€£]"), " "),
    (re.compile(r"(?<=[0-9])\{?,\}?(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\text ?\{([^{}]*+)\}"), r" \1 "),
]  # fmt: skip
_SIDE_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
_SIDE_TOKEN = re.compile(r" *+([0-9]++(?:\.[0-9]++)?+|\.[0-9]++|[-+*/()^])")
_MOST_TOKENS = 100


def false_equation(phrase: str) -> bool:
    """Return True if an equation of plain arithmetic does not hold: "2 + 2 = 6".

    A right side with decimals may be cut or rounded in its last one. A side that holds anything but
    numbers and operations is not judged, nor are sides with different words, as in "1 hour = 60 minutes".
    """
    if len(phrase) > LONGEST:
        return False
    sides = _sides(phrase)
    for (left, words, _), (right, other, decimals) in pairwise(sides):
        if left is None or right is None or (words and other and words != other):
            continue
        if left != right and (not decimals or abs(left - right) >= Fraction(1, 10**decimals)):
            return True
    return False


def holds(phrase: str) -> bool:
    """Return whether all sides of an equation are arithmetic without words, and equal."""
    sides = _sides(phrase) if len(phrase) <= LONGEST else []
    plain = all(value is not None and not words for value, words, _ in sides)
    return len(sides) > 1 and plain and not false_equation(phrase)


def _sides(phrase: str) -> "list[tuple[Fraction | None, frozenset[str], int]]":
    return [_arithmetic(side) for side in _EQUALS.split(ascii_signs(phrase))]


def _arithmetic(side: str) -> tuple[Fraction | None, frozenset[str], int]:
    """The value of a side, its words, and the decimals of the last number; None for other than arithmetic."""
    for pattern, meant in _SIDE_COMMANDS:
        side = pattern.sub(meant, side)
    words = frozenset(_singular(word.lower()) for word in _SIDE_WORDS.findall(side))
    side = _SIDE_WORDS.sub(" ", side).strip(" .*_")
    tokens: list[str] = []
    at = 0
    while at < len(side):
        match = _SIDE_TOKEN.match(side, at)
        if match is None or len(tokens) > _MOST_TOKENS or len(match[1]) > 30:
            return None, words, 0
        tokens.append(match[1])
        at = match.end()
    decimals = len(tokens[-1].partition(".")[2]) if len(tokens) == 1 else 0
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return None, words, 0
    return (None if rest else value), words, decimals


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        term, rest = _product(tokens[1:])
        value, tokens = (value + term if tokens[0] == "+" else value - term), rest
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _signed(tokens)
    while tokens and (tokens[0] in "*/" or tokens[0] == "("):
        if tokens[0] == "(":  # 2(3)
            factor, rest = _signed(tokens)
            value, tokens = value * factor, rest
            continue
        factor, rest = _signed(tokens[1:])
        value, tokens = (value * factor if tokens[0] == "*" else value / factor), rest
    return value, tokens


def _signed(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if tokens[0] in "+-":
        value, rest = _signed(tokens[1:])
        return (-value if tokens[0] == "-" else value), rest
    value, rest = _atom(tokens)
    if rest[:1] == ["^"]:
        exponent, rest = _signed(rest[1:])
        if exponent.denominator != 1 or abs(exponent) > 60:
            raise ValueError(exponent)
        if max(abs(value.numerator), value.denominator) > 10**12:
            raise ValueError(value)
        value = value ** int(exponent)
    return value, rest


def _atom(tokens: list[str]) -> tuple[Fraction, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError(rest[0])
        return value, rest[1:]
    return Fraction(first), rest


def _has_variable(side: str) -> bool:
    """Return whether a side of an equation has a single letter other than a times sign and the words a and I."""
    side = re.sub(r"\\[A-Za-z]+", " ", side)
    side = re.sub(r"(?<=[0-9]) ?x ?(?=[0-9])", "*", side)
    return bool(re.search(r"(?<![A-Za-z])(?![aI](?= [a-z]))[A-Za-z](?![A-Za-z])", side))


def _read(phrase: str, nouns: bool) -> Quantity | None:
    match = _NUMBER.match(phrase)
    if match is not None:
        value, end = _value_of(match), match.end()
        written = match["money"] or ""
        money = _CURRENCIES.get(written.strip()) or _UNITS.get(written.strip().lower(), "")
        negative = (match["sign"] or "+").lower() in ("-", "minus", "negative")
        negative ^= match["sign2"] == "-"
        if match["sign"] and match["sign2"]:
            return None  # -$-5
    else:
        sign = _SIGN_ONLY.match(phrase)
        words = _IN_WORDS.match(phrase, sign.end()) if sign else None
        if sign is None or words is None:
            return None
        value = Fraction(_NUMBER_WORDS[_word_key(words[1])])
        end, money = words.end(), ""
        negative = (sign["sign"] or "+").lower() in ("-", "minus", "negative")
    if value is None:
        return None
    rest = phrase[end:]
    if match is None and rest.startswith(" of "):
        return None  # "one of them"
    attached = bool(rest) and rest[0].isalpha()
    unit = _unit_of(rest.strip(), money, attached)
    if unit is None or (not nouns and not unit.known):
        return None
    if attached and unit.letter and not money and rest.strip()[1:]:
        return None
    return Quantity(-value if negative else value, unit.name, unit.known, unit.letter)


def _word_key(words: str) -> str:
    low = words.lower()
    return low if low in _NUMBER_WORDS else low.replace(" ", "-")


def _value_of(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None where it has too many digits, or divides by zero."""
    group = match.groupdict()
    if max(len(part) for part in group.values() if part is not None) > MOST_DIGITS:
        return None
    if group["again"]:
        whole, once, again = group["whole3"], group["once"], group["again"]
        top = int(whole + once + again) - int(whole + once or "0")
        return Fraction(top, int("9" * len(again) + "0" * len(once)))
    if group["root"]:
        return _power(int(group["root"]), group["power"] or group["power2"])
    plain = _plain_decimal(group)
    if plain is not None:
        exponent = group["ten"] or group["ten2"] or group["e"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > MOST_DIGITS:
            return None
        return Fraction(plain) * Fraction(10) ** int(exponent)
    top = group["top"] or group["top2"] or group["top3"]
    under = group["under"] or group["under2"] or group["under3"]
    if int(under) == 0:
        return None
    return int(group["whole"] or group["whole2"] or 0) + Fraction(int(top), int(under))


def _plain_decimal(group: dict[str, str | None]) -> str | None:
    if written := group["grouped"]:
        return re.sub("[, _']", "", written)
    if written := group["points"]:
        return written.replace(".", "").replace(",", ".")
    if written := group["comma"]:
        return written.replace(",", ".")
    return group["decimal"]


def _power(root: int, power: str) -> Fraction | None:
    if len(power) > 5 or (root > 1 and abs(int(power)) * len(str(root)) > MOST_DIGITS):
        return None
    if root == 0 and int(power) <= 0:
        return None
    return Fraction(root) ** int(power)


# --- comparing -----------------------------------------------------------------------------------


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Equality of two quantities: the same number, with units that agree."""
    return gold.value == answer.value and units_agree(gold, answer)


def units_agree(gold: Quantity, answer: Quantity) -> bool:
    """Return whether the units agree: equal, or one of them left out.

    Percent must stand on both sides. Where gold has no unit, the answer may have any noun, but not a
    single letter, which may be a variable.
    """
    if "%" in (gold.unit, answer.unit):
        return gold.unit == answer.unit
    if gold.unit == answer.unit or answer.unit == "":
        return True
    if gold.unit == "":
        return not answer.letter
    if frozenset({gold.unit, answer.unit}) in _SAME_UNITS:
        return True
    # "$18" and "$18 per day"
    base, per, _ = gold.unit.partition(" per ")
    other, other_per, _ = answer.unit.partition(" per ")
    return base == other and base in _MONEY and bool(per) != bool(other_per)
