r"""Whether the text after a stated answer takes it back.

An answer is taken back by words that retract it ("I take that back"), by a judgement ("That seems
wrong"), by a claim of another value ("So the correct value is 4", "Or C."), and by words of doubt
("Wait", "Let me recalculate") after which it is not confirmed. Words that go on in another way do
nothing: an explanation, a check by substitution, an offer of help.

Every pattern here reads untrusted text in time linear in its length, and nothing raises.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from selftaught.tasks.quantities import ascii_signs, unit_named


class Mention(NamedTuple):
    """A value that is named within a text."""

    start: int
    end: int
    value: Any


class Reading(NamedTuple):
    """How the values of one kind of answer are found in the text after an answer."""

    mentions: Callable[[str], list[Mention]]
    """The values named in a sentence, in their order."""
    other: Callable[[str, str, bool], bool]
    """Whether a phrase as a whole (the first text) is a value other than the answer (the second).

    The last argument says that the phrase is a sentence by itself, without words such as "it is".
    """


MOST_SENTENCES = 200
"""Sentences after an answer that are looked at, from their beginning and from their end."""

_FILLERS = r"(?:(?:but|hm+|oh|ah|so|well|and|yes|ok|okay|um+|er|now)[, .…]+)*"
_BEGINS = rf"(?:^|[,;:(—\u2013]\s*|\s-+\s|\bbut\s|\band\s){_FILLERS}"
_AGAIN = r"re-?(?:view|check|calc|comput|count|consider|read|exam|flect|eval|verif|think|vis|do\b|start|solve|try|work)"
_RETRACTED = re.compile(
    rf"{_BEGINS}(?:(?:please )?(?:strike|scratch|cancel|forget|ignore|disregard|delete|discard) (?:that|this|it|the|my)"
    r"|i (?:take (?:that|it|this) back|retract|withdraw|was (?:wrong|mistaken)|stand corrected)"
    r"|i(?:'ve| have)? changed? my mind)\b"
    r"|\b(?:change|switch|correct|update|revise) (?:it|that|this|my (?:answer|choice)|the answer) to\b",
    re.IGNORECASE,
)
_DOUBTED = re.compile(
    rf"{_BEGINS}(?:wait(?! (?:for|until|till)\b)|hold on|oops|whoops|uh[- ]?oh|correction|edit(?:ed)?(?=:)|update(?=:)"
    r"|never ?mind|actually|hm+|nope|nah|rather|or rather|instead|not (?:quite|so fast)|sorry(?! for\b)|apologies"
    r"|my (?:bad|mistake|apologies)|make (?:that|it)|on second thoughts?|(?:up)?on (?:closer|further|second|reflection)"
    rf"|(?:up)?on (?:double|inspection|{_AGAIN}\w*)|i (?:mean|meant|made an?|(?:have )?mis\w+|forgot|overlooked|apologi[sz]e)"
    rf"|i (?:should have|(?:need|have) to {_AGAIN}\w*|must (?:have|{_AGAIN}\w*))"
    rf"|(?:let me|let us|let's|i'll|i will) (?:{_AGAIN}\w*|try|start|correct|fix|think|look|go back|take another)"
    rf"|{_AGAIN}\w*|(?:try|start)(?:ing)? (?:again|over)"
    r"|(?:is|was|are) (?:this|that|it|the answer|my answer|we|i)(?: really)?(?: right| correct| true| possible| sure| so)?\?"
    r"|or(?= (?:maybe|perhaps|possibly|is it|could|should|rather|even|just)\b| [-$\\]{0,2}[0-9]| \(?(?-i:[A-E])\b)"
    r"|no(?=[,.:!;]|$| wait\b| it\b| it's\b| that\b| sorry\b| actually\b| [-$]?[0-9]| \(?(?-i:[A-E])\)?[.,!]))(?!\w)",
    re.IGNORECASE,
)
_CHECKED = re.compile(
    rf"{_BEGINS}(?:(?:let me |let us |let's |we can |i will |i'll )?(?:double[- ]?check|verify|cross-?check)|final result)\b"
    r"|^(?:(?:then|now|next|finally|but|we|you|still|also|and)\b,?\s*){1,3}[^.!?\n]{0,40}?\b(?:subtract|add|multipl|divid|minus|plus)"
    r"|\bthen (?:subtract|add|multipl|divid|minus|plus|times)\w*",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r"(?<!not )(?<!nothing )(?<!no )\b(?:wrong|incorrect|mistake|error)\b", re.IGNORECASE
)
_CONFIRMED = re.compile(
    r"\b(?:yes|correct|right|indeed|true|works|matches|checks out|confirm\w*|as required|as expected|holds|good)\b|[✓✔]",
    re.IGNORECASE,
)
_NOT_MEANT = re.compile(
    r"(?:\b(?:instead of|rather than|not|than|replac\w+|from|was|wrote|said|unlike)|n't) (?:just |only |simply |the )*[$(\\*]*$",
    re.IGNORECASE,
)
"""What stands before a value that is not confirmed by being named."""
_NOT = re.compile(
    r"(?:≠|\\neq?) ?[$(\\*]*$|(?:\bnot|n't|\bnever) (?:just |only |simply |the |equal to |option )*[$(\\*]*$",
    re.IGNORECASE,
)
_SUBJECT = (
    r"(?:\b(?:that|this|it|which|i|we|there|something)\b"
    r"|\b(?:the|my|our|this|that)(?: [a-z]{1,20}){0,3}? (?:answer|result|value|number|calculation|computation|reasoning"
    r"|solution|total|sum|count|math|arithmetic|choice|option|conclusion|approach|work|above)\b)"
)
_BAD = (
    r"(?:\b(?:wrong|incorrect|mistake|mistaken|erroneous|in error|an error|false|flawed|invalid|impossible|implausible"
    r"|unreasonable|unrealistic|unlikely|suspicious|absurd|nonsens\w{1,9}|contradicts?|contradiction"
    r"|off(?=(?: here| somewhere| by [^.]{1,20})?\W*$)|too (?:small|large|big|low|high|much|many|few|little|short|long)(?=\W*$))\b"
    r"|(?:\bnot|n't|\bcannot|\bnever) (?:[\w%]{1,12} ){0,2}?(?:(?:right|correct|possible|true|sense|valid|plausible|reasonable|sure"
    r"|certain|the answer|what|as asked)\b(?! (?:to|for)\b)|(?:be|work|match|check|fit|hold|add)(?: out| up)?\b(?=\W*$| (?:the|any|my|with|what)\b)))"
)
_JUDGED = re.compile(rf"{_SUBJECT}(?P<between>[^.!?\n;]{{0,40}}?){_BAD}", re.IGNORECASE)
_ERRED = re.compile(
    r"\b(?:i|we)(?:'ve| have)? (?:mis(?:read|count|calculat|comput|took|understood|interpret|add)\w*|forgot|overlooked"
    r"|(?:made|found|see|notice|spotted) (?:an?|the|my) (?:\w{1,15} ){0,2}?(?:mistake|error|slip))\b"
    r"|^(?:wrong|incorrect|false|not (?:right|correct|true))\W*$|(?:cannot|can't) be (?:excluded|ruled out)"
    r"|\bnone of the (?:options|choices|answers) (?:match|equal|is|are|fit)"
    r"|\b(?:torn|undecided|toss-?up|coin flip|mixed up|typo|guessing|guessed|a (?:wild |random )?guess)\b",
    re.IGNORECASE,
)
_OF_ANOTHER = re.compile(
    r"\b(?:because|why|since|others?|options?|choices?|rest|if|when|unless|than|nothing|no|any)\b|\bnot\b|n't|\([A-Za-z]\)|\b[A-E]\b"
)
_OWN_BAD = re.compile(
    rf"[)$*]*,? (?:is|was|seems|looks|appears|sounds|ca(?=n't)|wo(?=n't)|can|could|does|would)[^.!?\n;]{{0,20}}?{_BAD}",
    re.IGNORECASE,
)
_PREFERRED = re.compile(
    r"[)$*]*,? (?:is|are|was|seems?|looks?|sounds?|would be|could be|might be|may be|should be|must be|fits?|works?|makes?|also)\b[^.!?\n;]{0,30}?\b(?:better|closer|more(?! than)|best|correct|right|also|too(?=\W*$)|as well(?! as)|equally|just as|possible|plausible|likely"
    r"|the (?:answer|one|winner)|valid|true|acceptable|actual)\b|[)$*]*,? (?:also |(?:would|could|might) (?:also )?)?(?:fits?|works?|matches|suits?|answers?|makes? sense)(?: (?:with )?(?:the|this|that) [a-z]{1,20})?\W*$"
    r"|[)$*]* instead\b",
    re.IGNORECASE,
)
_BOTH = re.compile(r"(?:both|either)\b", re.IGNORECASE)
_NEGATED = re.compile(
    r"\b(?:not|less|least|neither|never|no|only if|if|unless|hardly|unlikely|wrong|incorrect)\b|n't",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|but|however|and|or|well|oh|ah|yes|no|maybe|perhaps|possibly|probably|alternatively"
    r"|otherwise|in fact|indeed|instead|rather|also|finally|more precisely|more likely|precisely|better|again|now|clearly"
    r"|still|though|yet|wait|actually|sorry|oops|edit|correction|hm+|technically|strictly(?: speaking)?|to be (?:exact|precise)|exactly|final|revised|i (?:now )?(?:think|believe|guess|suppose|mean|say)(?: that)?"
    r"|i'd say|i would say)\b[,:.…!]*+\s*+)++",
    re.IGNORECASE,
)
_IS = (
    r"(?:'s| is| are| was| equals?| ?=|(?: should| must| will| would| could| may| might)(?: [a-z]{1,12})? be| has to be"
    r"| should read| comes (?:out )?to| becomes)"
)
_CLAIM = re.compile(
    rf"(?:(?:(?:it|that|this|these|they|(?:the|my|our)(?: (?!wrong|incorrect|other|old|first)[\w-]{{1,20}}){{0,4}}? (?:answer|result|value|solution|choice|option|letter)"
    r"|the (?:correct|right|true|actual|real|final|proper|new|updated|revised|corrected)(?: [\w-]{1,20}){0,4}?)"
    rf"{_IS})|should read|(?:should|must|could|might|may|would)(?: [a-z]{{1,12}})? be"
    r"|(?:we|i|you|one)(?:'d| would| should)? (?:get|obtain|choose|pick|go with|find|say)|i(?: am|'m)(?: now)? leaning (?:towards?|to)|make (?:that|it)"
    r"|the (?:answer key|key|book|textbook|solutions?) (?:says|gives|has))\b"
    r"(?: (?:really|actually|also|instead|now|probably|just|only|simply|in fact|equal to|exactly|more likely|definitely"
    r"|certainly|clearly|indeed|rather|option|choice)\b)*+[:,]?\s*+",
    re.IGNORECASE,
)
_AFTER_VALUE = re.compile(
    r"(?:,? (?:instead|then|now|actually|too|as well|really|after all|though|rather than|not|because|since|in (?:total|all))\b[^\n]*)"
    r"|[\s.!?*]+$"
)
_SENTENCES = re.compile(r"(?<=[.!?…])[\s*]+")
_LIST_MARK = re.compile(r"[-*#(\s]*(?:[0-9]{1,2}|[A-Za-z])[.)]")


def taken_back(rest: str, answer: str, reading: Reading) -> bool:
    """Return whether the text after an answer takes it back.

    Args:
        rest: the text after the sentence that states the answer.
        answer: the phrase that states it.
    """
    if not rest or rest.isspace():
        return False
    own = reading.mentions(ascii_signs(answer))[-1:]
    sentences = list(_sentences(rest))
    if len(sentences) > 2 * MOST_SENTENCES:
        sentences = [*sentences[:MOST_SENTENCES], *sentences[-MOST_SENTENCES:]]
    doubted, checked = False, False
    since: list[str] = []
    for sentence in sentences:
        if (
            _RETRACTED.search(sentence)
            or _judged(sentence)
            or any(_against(sentence, mention, own) for mention in reading.mentions(sentence))
            or _claims_another(sentence, answer, reading)
        ):
            return True
        doubted = doubted or bool(_DOUBTED.search(sentence))
        checked = checked or bool(_CHECKED.search(sentence))
        if doubted or checked:
            since.append(sentence)
    return bool(since) and not _upheld(since, own, reading, checked=not doubted)


def _upheld(sentences: list[str], own: list[Mention], reading: Reading, *, checked: bool) -> bool:
    """Return whether an answer that was doubted, or only checked, is confirmed: its value is the last one named.

    A check may end in another number, if the answer stands in it and it is said to hold.
    """
    if any(_WRONG.search(sentence) for sentence in sentences):
        return False
    named = [
        _same(own[0], mention) if own else False
        for sentence in sentences
        for mention in reading.mentions(sentence)
        if not _NOT_MEANT.search(sentence[: mention.start][-40:])
    ]
    if named[-1:] == [True] or not checked:
        return named[-1:] == [True]
    return not named or (any(named) and any(map(_CONFIRMED.search, sentences)))


def _sentences(text: str) -> Iterator[str]:
    for line in text.splitlines():
        pieces = _SENTENCES.split(ascii_signs(line))
        if len(pieces) > 1 and _LIST_MARK.fullmatch(pieces[0]):
            pieces = pieces[1:]  # "1. First ..."
        for piece in pieces:
            if plain := piece.lstrip(" \t.…,;:*_>#").rstrip(" \t*_>#")[:500]:
                yield plain


def _same(left: Mention, right: Mention) -> bool:
    return left.value == right.value


def _judged(sentence: str) -> bool:
    return bool(_ERRED.search(sentence)) or any(
        not _OF_ANOTHER.search(match["between"]) for match in _JUDGED.finditer(sentence)
    )


def _against(sentence: str, mention: Mention, own: list[Mention]) -> bool:
    """Return whether a sentence rules the answer out where it names it, or prefers another value."""
    before, after = sentence[: mention.start][-40:], sentence[mention.end :][:80]
    if own and _same(own[0], mention):
        if _BOTH.match(sentence) and not _NEGATED.search(sentence):
            return True
        return bool(_NOT.search(before) or _OWN_BAD.match(after))
    return bool(_PREFERRED.match(after)) and not _NEGATED.search(sentence)


def _claims_another(sentence: str, answer: str, reading: Reading) -> bool:
    """Return whether a sentence says nothing but that the answer is another value: "So it is 4."."""
    clauses = (
        [sentence] if _ASSUMED.search(sentence) else [sentence, *_CLAUSES.split(sentence)[1:][:5]]
    )
    *before, last = clauses
    if (
        before
        and _ASIDE.fullmatch(sentence.removesuffix(last))
        and "=" not in last
        and not re.search("[a-z]{2}", last)
    ):
        return reading.other(_AFTER_VALUE.sub("", last), answer, False)
    if _CONTRASTED.search(sentence):
        ending = _AFTER_VALUE.sub("", _TO_THE_VALUE.sub("", sentence))
        if (
            ending != sentence
            and not re.search("[a-z]{2}|=", ending)
            and reading.other(ending, answer, False)
        ):
            return True
    return any(
        _is_another(clause, answer, reading, begins=number == 0)
        for number, clause in enumerate(clauses)
    )


_ASSUMED = re.compile(
    r"\b(?:if(?! anything\b)|unless|when|suppose|were|had)\b|\b(?:over|for|in|after|within|during) (?:a|one|the|each|every|[0-9]{1,6})"
    r" (?:\w{1,20} )?(?:minutes?|hours?|days?|weeks?|months?|years?)\b",
    re.IGNORECASE,
)
_THAT = re.compile(r"th(?:at|is|ese|ey)\b|we |i |you |one ", re.IGNORECASE)
_THEN = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|and|but|also|now|finally|again|clearly|in fact|yes)\b[,:]*\s*)+",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"(?!note|step|check|total|time|score|confidence|difficulty|page|source|units?\b)"
    r"(?:[A-Za-z']{1,15}(?: [A-Za-z']{1,15}){0,5},|[A-Za-z']{1,15}:|[A-Za-z']{1,15}(?: [A-Za-z']{1,15}){0,2} ?[\u2013—-])\s*",
    re.IGNORECASE,
)
"""A few words before a value that stands by itself: "Come to think of it, 4"."""
_CONTRASTED = re.compile(
    r"^(?:however|but|really|in reality|in truth|p\.? ?s|i (?:now|need to|must|have to|should))\b|\bi now see\b",
    re.IGNORECASE,
)
_TO_THE_VALUE = re.compile(
    r"^.*(?:\b(?:is|are|be|equals|becomes|to)\b|[:,])\s*", re.DOTALL | re.IGNORECASE
)
_SO = re.compile(
    r"(?:so|thus|therefore|hence|actually|no|sorry|rather|maybe|perhaps)\b", re.IGNORECASE
)
_CLAUSES = re.compile(r"(?:[,;:]|\s[-\u2013—]+)\s+|—")


def _is_another(clause: str, answer: str, reading: Reading, begins: bool) -> bool:
    rest = clause
    if lead := _LEAD.match(rest):
        rest = rest[lead.end() :]
    if claim := _CLAIM.match(rest):
        rest = rest[claim.end() :]
    rest = _AFTER_VALUE.sub("", rest)
    if not begins and not _SO.match(clause):
        if claim is None or claim[0].lower().startswith(("we ", "i ", "you ", "one ")):
            return False
    elif not begins and claim is None and re.search("[a-z]{2}", rest):
        return False  # "so 9 are left" in an explanation
    if (
        "=" in rest
        and (claim is None or _THAT.match(claim[0]))
        and (lead is None or _THEN.fullmatch(lead[0]))
    ):
        return False  # "So he pays 2*3 = $6", a step
    return bool(rest) and reading.other(rest, answer, lead is None and claim is None)


# --- values named in a text ----------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])-)?[$€£]?(?P<digits>[0-9]++(?:[.,][0-9]++)*+)(?: ?/ ?(?P<under>[0-9]++))?"
    r"(?:\\? ?(?P<unit>%|°|[A-Za-z]++))?"
)
_SCALES = frozenset(
    ("hundred", "thousand", "million", "billion", "trillion", "dozen", "k", "m", "bn")
)


class _Named(NamedTuple):
    """A number as it is written, and what tells it from the same digits elsewhere."""

    value: Fraction | str
    unit: str

    def __eq__(self, other: object) -> bool:
        """Equal also where one has no unit; a percent sign or a scale word is never left out."""
        if not isinstance(other, _Named) or self.value != other.value:
            return False
        units = {self.unit, other.unit}
        return len(units) == 1 or ("" in units and not units & (_SCALES | {"%"}))

    __hash__ = None  # pyright: ignore[reportAssignmentType]: equality is not transitive


def numbers_in(text: str) -> list[Mention]:
    """The numbers that are written with digits in a text."""
    return [
        Mention(match.start(), match.end("digits"), _named(match))
        for match in _NUMBER.finditer(text)
    ]


def _named(match: re.Match[str]) -> _Named:
    word = match["unit"] or ""
    unit = (
        word.lower() if word.lower() in _SCALES else (unit_named(word[:20]) or "" if word else "")
    )
    digits = re.sub(r",(?=[0-9]{3})", "", match["digits"])
    written = (match["sign"] or "") + digits + (f"/{match['under']}" if match["under"] else "")
    if len(written) > 40 or not re.fullmatch(
        r"-?[0-9]+(?:\.[0-9]+)?", (match["sign"] or "") + digits
    ):
        return _Named(written, unit)
    under = int(match["under"] or 1)
    return _Named(Fraction((match["sign"] or "") + digits) / under if under else written, unit)
