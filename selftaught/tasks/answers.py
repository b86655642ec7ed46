r"""Answer extraction and answer equivalence.

A completion states its answer in a place that is marked: after "####", in `\boxed{}`, after "the answer
is", or by being nothing else. The answer is the whole stated phrase. A phrase that is not one value of
the kind asked for is no answer; docs/grading.md has the policy with examples.

Every pattern here reads untrusted text in time linear in its length, and nothing raises.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from selftaught.tasks.quantities import (
    ascii_signs,
    plain_phrase,
    quantity,
    same_quantity,
    stated_value,
    units_agree,
    value_part,
)
from selftaught.tasks.retractions import Mention, Reading, numbers_in, taken_back

GRADING_VERSION = 3
"""Raised with every change of the rules by which answers are read or compared; stored grades of another
version are computed again."""


class Verdict(NamedTuple):
    """Answer equivalence and the stage that decided it. None means that it is not decided here."""

    equal: bool | None
    decided_by: str


class Kind(NamedTuple):
    """How the phrases of one kind of answer are read and compared.

    `read` returns a comparable value, or None for a phrase that is not one value of the kind.
    """

    read: Callable[[str], Any]
    same: Callable[[Any, Any], bool]
    after: Reading
    """How values are found in the text after an answer, which may take it back."""
    core: Callable[[str], str] = lambda phrase: phrase
    """The part of a phrase that is the value."""


class Place(NamedTuple):
    """A marked place of a completion and the phrase that stands there."""

    kind: str
    """marker, box or prose."""
    start: int
    end: int
    phrase: str


MOST_PLACES = 100
"""Marked places that are looked at; a completion with more lines after "####" has no answer."""

# --- marked places -------------------------------------------------------------------------------

_MARKER = re.compile(r"(?<!#)#{4}(?!#)([^\n]*+)")
_HEADING = re.compile(
    r" *+(?:(?:step|part|case|solution|method|explanation|analysis|approach|problem)\b|[0-9]{1,2}\. +[A-Z][a-z]+[A-Za-z ]*$)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*+")
_BARE_BOX = re.compile(r"-?[0-9][0-9.,]*+(?<![.,])|[A-Za-z](?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINED = re.compile(
    r"[ \t$]*+(?:,|;|&|(?:, ?)?(?:and|or)|\\quad|\\text ?\{ ?(?:and|or) ?\})?[ \t$]*+(?:[A-Za-z] ?= ?)?\$?"
    r"|(?!.*\b(?:rather|no|not|actually|wait|so|then|thus|hence|therefore|gives?|is|now)\b)"
    r"[^.\n]{0,30}\b(?:and|or)\b[^.\n]{0,30}"
)
_MARKUP_BEFORE = re.compile(r"(?:\\\$|\\[(\[]|[ \t$*]|\\displaystyle|\\[,;:! ])++$")
_BEFORE = re.compile(
    r"(?:^|\n|[.,:;!?=)\]\"'“”’>→⇒—–]|\\(?:implies|Rightarrow|rightarrow|Longrightarrow|to|therefore|q?quad|item|\\)"
    r"|\\(?:text|math)[a-z]*\{|[A-Za-z]{2,}|\bI|\ba|(?:^|\n)[ \t]*+[-+*#>]++|[^\x00-\x7f])$"
)
"""What may stand directly before a box: a sign, a word, or a list bullet; else it is part of a formula."""
_NOT_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|or|about|approximately|roughly|around|over|under|than|least|most|between"
    r"|nearly|almost|exceeds?|below|above|without|except|plus|minus|negative|times|by)"
    r"|n't|(?<!\\)\\(?:neq?|leq?|geq?|lt|gt|approx|sim|pm|times|cdot|sqrt|sin|cos|tan|log|ln|in|equiv)|[≈≠±√≥≤~<>])$"
)
_PERCENT_AFTER = re.compile(r"[ \t$*]*+(?:\\\)|\\\])?[ \t$*]*+(?:\\?%|per ?cent\b)")
_MARKUP_AFTER = re.compile(r"(?:[ \t]*+(?:[$*]|</?answer>|\\\)|\\\]|\\[,;: ]))*+")
_CLAUSE = re.compile(r"[^\n.,;:!?(—–]*+")
_GOES_ON = re.compile(
    r"(?:as|because|since|so|which|for|when|where|that|from|thus|hence|therefore)\b"
    r"|and (?!.*[0-9\\])|is (?:the|our|my|your) (?!wrong|incorrect|lower|upper|opposite)|is (?:correct|right)\b",
    re.IGNORECASE,
)
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\u2010\u2011", "-"))
_BARE_LINE = re.compile(r"(?:^|\n)[\s$*]*$")
_ROUGHLY_AFTER = re.compile(
    r"[ \t$*]*+\([^()\n]{0,40}?\b(?:approx\w*|about|roughly|around|rounded|estimate\w*|not|or|maybe|perhaps|possibly"
    r"|probably|guess\w*|wrong|incorrect)\b|[ \t$]++(?:[0-9/^+×÷±|<>≤≥]|-[ ]?[0-9\\(]|\\(?:times|cdot|div|pm|approx|d?frac|sqrt|leq?|geq?|neq?|[lg]t)(?![A-Za-z]))",
    re.IGNORECASE,
)
_OTHER_AFTER = re.compile(
    r"[ \t$*]*+(?:[.,;:] ?)?(?:(?:or|and) (?:maybe |perhaps |possibly )?[-$\\]{0,2}[0-9]|[.,:][0-9]|\{,\}[0-9]|! ?[-=+*/^0-9]|!\$)"
)


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Return whether a box is the whole of what is stated, and no part of a formula or a longer phrase."""
    before = text[max(0, start - 60) : start].translate(_MINUS)
    before = _TAG_END.sub("", before)
    bare = _MARKUP_BEFORE.sub("", before)
    spaced = bare != before
    if re.search(r"[0-9)\]}][ $]*-\Z" if spaced else r"[-+]\Z|[0-9][.,]\Z", bare):
        return False  # 5 - \boxed{9}, -\boxed{9}, 1,\boxed{9}
    dash = bare.endswith("-") and (
        not before.endswith(("-", "-$")) and not bare.endswith(("=-", "= -", "(-"))
    )
    if _NOT_BEFORE.search(bare):
        return False
    if bare and not dash:
        if bare.endswith("(") and re.match(r"[ $]*\)", text[end : end + 10]):
            return True
        if not _BEFORE.search(bare) or (
            not spaced
            and re.search(r"[A-Za-z]$", bare)
            and len(re.findall(r"[A-Za-z]+$", bare)[0]) == 1
        ):
            return False
    markup = _MARKUP_AFTER.match(text, end)
    after = markup.end() if markup else end
    following = text[after : after + 1]
    if following.isalnum() or following in set("^_{'\"²³|/+×÷±\\") - (
        {"\\"}
        if text.startswith(
            (
                "\\text",
                "\\mathrm",
                "\\%",
                "\\\\",
                "\\qquad",
                "\\quad",
                "\\tag",
                "\\end",
                "\\blacksquare",
                "\\square",
            ),
            after,
        )
        else set()
    ):
        return False
    if _OTHER_AFTER.match(text, end) or _ROUGHLY_AFTER.match(text, end):
        return False
    if following == "!" and _BARE_LINE.search(before):
        return False  # a factorial, or a cry
    clause = _CLAUSE.match(text, after)
    tail = clause[0][:200].replace("$", " ").strip(" *\t)]") if clause else ""
    tail = re.sub(r"\\(?:q?quad|tag.*|end.*|blacksquare|square|\\)$", "", tail).strip()
    tail = tail.rstrip("}") if "{" not in tail else tail
    if not re.search(r"[A-Za-z0-9]", tail) or _GOES_ON.match(tail):
        return True
    return quantity(f"5 {tail}") is not None


_PROSE = re.compile(
    r"\b(?:answers?|(?:correct|right|best)[ ](?:option|choice))(?:\*\*)?(?:[ ](?:to|for)[ ][^.\n:=]{1,80}?)?"
    r"(?:(?P<not>[ ]?(?:isn't|aren't|is[ ]not|are[ ]not|cannot[ ]be|can't[ ]be|wasn't|was[ ]not))\b"
    r"|[ ](?:is|are|would[ ]be|will[ ]be|should[ ]be|must[ ]be|comes[ ]to|equals)\b|[ ]?[:=])[:=,\s]{0,3}+"
    r"|答案(?:是|为|：|:)[：:\s]{0,3}+",
    re.IGNORECASE,
)
_NOT_OURS = re.compile(
    r"\b(?:wrong|incorrect|false|naive|tempting|possible|initial|first|previous|earlier|old|other|another|bad"
    r"|intermediate|partial|approximate|expected|suggested|least|common|worst|trap|decoy|lazy|obvious|intuitive|popular|typical|poorest|weakest|second|third|next[- ]best"
    r"|second[- ]best|runner-up|opposite|his|her|their|least [a-z]{1,20}|(?<!my )second [a-z]{1,20}"
    r"|(?-i:[A-Z][a-z]+)'s|(?:student|teacher|friend|book|textbook|brother|sister|classmate|pupil|model)'?s)[ ]$"
    r"|\bnumber of $|\b(?:of|on|twice|half|double|than|minus|plus) (?:the|my|our|all|both) (?:[a-z]{1,20} )?$"
    r"|(?:错误|错|不正确|可能|他|她)的?$"
    r"|\b(?:if|suppose|supposing|assume|assuming|unless|whether|imagine|say|says|said|claims?|claimed"
    r"|believes?|thought|guess|guessed|pretend|hypothesis)(?:,? that)?[,:]? (?:the |my |our |her |his |their )?$"
    r"|\b(?:don't|do not|doesn't|does not|not true|untrue|false|doubt|no way|mistakes?|people|might|can't|cannot"
    r"|first glance|first sight|wrong|unlikely|hardly|deny|denies|isn't|is not|not equal|never|some say|impossible"
    r"|not (?:\w+ )?(?:sure|certain|clear|convinced|obvious)|unsure|uncertain|unclear|perhaps|maybe|possibly|nobody|no one)\b"
    r"[^.!?\n,;]{0,60}$",
    re.IGNORECASE,
)
"""What makes the answer that follows one of somebody else, or of an assumption."""
_SAYS_SOMETHING = re.compile(r"\w|[$\\({\[½⅓¼¾]")
_SPACE = re.compile(r"\s*+")
_LABEL = re.compile(
    r"^[^\w\n]*+(?:the )?(?:final )?answers?[^\w\n]*+$", re.IGNORECASE | re.MULTILINE
)
_OPENING_A = re.compile(r"\s*+A:[ \t]*+(?=\S)")
_NEXT_QUESTION = re.compile(
    r"^[ \t#*]*+(?:Q|Question|Problem|Exercise|Example|Human|User|Instruction)(?: [0-9]{1,4})?[ *]*+:"
    r"|<\|im_start\|>user|^### ?(?:Question|Problem|Instruction)",
    re.MULTILINE,
)
_CORRECTED = re.compile(
    r"\b(?:wait|hold on|oops|sorry|correction|scratch that|no[,.:!]|nope|wrong|incorrect|mistake\w*|actually|rather|instead"
    r"|correct(?:ed|ing)?|re-?(?:check|calculat|count|consider|do)\w*|never ?mind|not quite|i mean|i forgot|misread)\b"
    r"|\bno[,.:!]",
    re.IGNORECASE,
)
"""Words between two places that make the later one a correction of the earlier."""
_LAST_NUMBER = re.compile(r"[0-9]++(?:[.,][0-9]++)*+")
_NEXT_LINE = re.compile(r"\s*+(?:or\b|[-$]?[0-9][0-9.,]*+[ \t]*+(?:\n|$))", re.IGNORECASE)


_TAG_END = re.compile(r"(?:</?[A-Za-z_]{1,20}>\s*+)+$")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def places(text: str) -> list[Place]:
    """Return the marked places of a text in their order, without those that belong to a next question."""
    found = [*_markers(text), *_boxes(text)]
    found += _prose(text, [place.start for place in found if place.kind == "box"])
    found += _tags(text, [place.start for place in found])
    found.sort(key=lambda place: place.start)
    if found:
        # A model that runs on writes questions and answers of its own.
        following = _NEXT_QUESTION.search(text, found[0].end)
        if following:
            found = [place for place in found if place.start < following.start()]
    return found


def _markers(text: str) -> list[Place]:
    lines = [
        Place(
            "marker", match.start(), match.end(), _TAG.sub("", match[1]).strip().rstrip("#").strip()
        )
        for match in _MARKER.finditer(text)
    ]
    return [place for place in lines if place.phrase and not _HEADING.match(place.phrase)]


def _tags(text: str, marked: Sequence[int]) -> list[Place]:
    """What stands between <answer> and </answer> counts like a box, unless a marked place is in it."""
    found: list[Place] = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            phrase = text[opened.end() : tag.start()].strip()
            denied = _NOT_OURS.search(text, max(0, opened.start() - 80), opened.start())
            before = _TAG_END.sub("", text[max(0, opened.start() - 60) : opened.start()].rstrip())
            denied = denied or _NOT_BEFORE.search(before)
            inside = any(opened.start() < start < tag.start() for start in marked[:MOST_PLACES])
            if phrase and not inside:
                found.append(Place("box", opened.start(), tag.end(), "" if denied else phrase))
            opened = None
    return found


def _boxes(text: str) -> list[Place]:
    r"""The boxes; neighbouring ones are one place with their contents in a list.

    The phrase of a box that never closes, or that is part of a larger expression such as "not
    \boxed{5}", is "".
    """
    matches = list(_BOX.finditer(text))
    if not matches:
        return []
    closes = _closing_braces(text)
    groups: list[tuple[int, int, list[str]]] = []
    for match in matches:
        at = match.end()
        if groups and at <= groups[-1][1]:
            continue  # a box in a box
        if at < len(text) and text[at] == "{":
            close = closes.get(at)
            if close is not None and not text[at + 1 : close].strip():
                continue  # \boxed{} says nothing
            content = "" if close is None else text[at + 1 : close].strip()
            end = len(text) if close is None else close + 1
        else:
            bare = _BARE_BOX.match(text, at)
            if bare is None:
                continue  # the word \boxed in an instruction
            content, end = bare[0], bare.end()
        joined = groups and _JOINED.fullmatch(text, groups[-1][1], match.start())
        if content and _PERCENT_AFTER.match(text, end):
            content += "%"
        elif content and not joined and not _joins_next(text, end):
            denied = _NOT_OURS.search(text, max(0, match.start() - 80), match.start())
            content = content if not denied and _stands_alone(text, match.start(), end) else ""
        if (
            groups
            and match.start() - groups[-1][1] <= 40
            and _JOINED.fullmatch(text, groups[-1][1], match.start())
        ):
            start, before, contents = groups.pop()
            named = "=" in text[before : match.start()]  # x = 5 and y = 5 are two answers
            again = content in contents and not named
            groups.append((start, end, contents if again else [*contents, content]))
        else:
            groups.append((match.start(), end, [content]))
    return [
        Place("box", start, end, ", ".join(contents) if all(contents) else "")
        for start, end, contents in groups
    ]


def _joins_next(text: str, end: int) -> bool:
    """Return whether another box follows directly, as in "\\boxed{5} and \\boxed{6}"."""
    following = _BOX.search(text, end, min(len(text), end + 60))
    return following is not None and bool(_JOINED.fullmatch(text, end, following.start()))


def _closing_braces(text: str) -> dict[int, int]:
    """For every opening brace that is closed the place of its closing brace; escaped ones are none."""
    opened: list[int] = []
    closes: dict[int, int] = {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closes[opened.pop()] = match.start()
    return closes


def _prose(text: str, boxes: Sequence[int]) -> list[Place]:
    """The phrases after "the answer is", without those that hold a box."""
    found = []
    heads = [
        (match.start(), match.end(), match["not"] or "")
        for match in _PROSE.finditer(text)
        if not _NOT_OURS.search(text, max(0, match.start() - 80), match.start())
        and not re.search(r"(?i)\bparts?\b|\([a-h]\)", match[0])
    ]
    heads += [(match.start(), match.end(), "") for match in _LABEL.finditer(text)]
    if opening := _OPENING_A.match(text):
        heads.append((opening.start(), opening.end(), ""))
    box = 0
    ordered = sorted(boxes)
    heads.sort()
    if len(heads) > MOST_PLACES:
        heads = [heads[0], *heads[-MOST_PLACES:]]
    for start, end, negated in heads:
        line_end = text.find("\n", end)
        line_end = len(text) if line_end < 0 else line_end
        phrase_start = end
        if not _SAYS_SOMETHING.search(text, end, line_end):
            rest = _SPACE.match(text, line_end)
            phrase_start = rest.end() if rest else line_end
            line_end = text.find("\n", phrase_start)
            line_end = len(text) if line_end < 0 else line_end
        while box < len(ordered) and ordered[box] < phrase_start:
            box += 1
        if box < len(ordered) and ordered[box] < line_end:
            continue
        if tag := _TAG.search(text, phrase_start, line_end):
            line_end = tag.start() if tag[1] else line_end
        phrase = text[phrase_start:line_end].strip()
        if phrase.endswith(("*", "_")) and phrase.count(phrase[-1]) == 1:
            phrase = phrase[:-1]  # *The answer is 5.*
        if phrase and not phrase.startswith("####"):
            found.append(Place("prose", start, line_end, f"not {phrase}" if negated else phrase))
    return found


_SENTENCE_END = re.compile(r"[.。](?=\s+(?:[\"'(*]*+[A-Z]|[✓✔(]))")
_REASON = re.compile(
    r"[,;]? \(?(?:because|since|as required|given that|where)\b"
    r"|, as (?!well|much|many|long|far|soon|(?-i:an? )|opposed|estimat|approx|rounded)(?=[^.\n]{0,80}(?:=| is | are | has | have | was | were | makes | gives ))"
    r"|, which is (?:correct|right|what|the )|;(?= [A-E(])",
    re.IGNORECASE,
)


def sentence(phrase: str) -> str:
    """Return the first sentence of a phrase without a clause that gives a reason."""
    if end := _SENTENCE_END.search(phrase):
        phrase = phrase[: end.start()]
    if reason := _REASON.search(phrase):
        phrase = phrase[: reason.start()]
    return phrase.strip()


def stated(text: str, kind: Kind, alone: Callable[[str], str | None]) -> str | None:
    r"""Return the phrase that states the answer of a completion, or None if there is no answer.

    Where several places are marked, a rule says which one counts: "####" before prose; the last box
    before earlier ones and before prose that precedes it; the last "the answer is". Places that
    disagree otherwise, and an answer that is taken back afterwards, are no answer.

    Args:
        text: a completion, without its thought.
        kind: how phrases are read and compared.
        alone: reads a completion without a marked place.
    """
    if end := _END_TOKEN.search(text):
        text = text[: end.start()]
    found = places(text)
    if not found:
        phrase = alone(text)
        if phrase is None:
            return None
        first = sentence(phrase)
        rest = _after_phrase(text, phrase)[len(first) :]
        return None if taken_back(rest, kind.core(first), kind.after) else phrase
    markers = [place for place in found if place.kind == "marker"]
    boxes = [place for place in found if place.kind == "box"]
    prose = [place for place in found if place.kind == "prose"]
    chosen = _of_markers(markers, text, kind) if markers else (boxes or prose)[-1]
    if chosen is None:
        return None
    value = kind.read(chosen.phrase)
    if value is None or (chosen.kind == "box" and not _last_counts(boxes, value, text, kind)):
        return None
    against = (
        [] if chosen.kind == "prose" else [place for place in prose if place.start > chosen.end]
    )
    if chosen.kind == "marker" and boxes:
        against.append(boxes[-1])
    if chosen.kind == "prose" and len(prose) > 1 and _same_sentence(prose[-2], chosen):
        against.append(prose[-2])
    if any(_disagrees(place, value, kind) for place in against):
        return None
    end = chosen.end
    if chosen.kind == "prose":  # the rest of its line is looked at too
        end += len(sentence(chosen.phrase)) - len(chosen.phrase)
    following = _NEXT_QUESTION.search(text, chosen.end)
    until = following.start() if following else len(text)
    below = _NEXT_LINE.match(text, chosen.end) if chosen.kind == "prose" else None
    stated_numbers = _LAST_NUMBER.findall(sentence(chosen.phrase))[-1:]
    if below is not None and _LAST_NUMBER.findall(below[0]) != stated_numbers:
        return None
    answer = kind.core(sentence(chosen.phrase))
    return None if taken_back(text[end:until], answer, kind.after) else chosen.phrase


def _after_phrase(text: str, phrase: str) -> str:
    """The text from a phrase on that stands at its beginning or at its end."""
    stripped = text.lstrip()
    return stripped if stripped.startswith(phrase) else text[max(0, text.rfind(phrase)) :]


def _of_markers(markers: Sequence[Place], text: str, kind: Kind) -> Place | None:
    """The marked line that counts: all must agree, but a later one corrects after "wait"."""
    if len(markers) > MOST_PLACES:
        return None
    chosen = markers[0]
    value = kind.read(chosen.phrase)
    for before, place in pairwise(markers):
        other = kind.read(place.phrase)
        if _CORRECTED.search(text, before.end, place.start):
            chosen, value = place, other
        elif place.phrase != chosen.phrase and (
            value is None or other is None or not kind.same(value, other)
        ):
            return None
    return chosen


_END_TOKEN = re.compile(
    r"(?<=[^\s>])\s*+(?:<\|(?:im_end|endoftext|eot_id|end|end_of_text|eom_id|END_OF_TURN_TOKEN)\|>|</s>|<eos>|<end_of_turn>"
    r"|<｜end▁of▁sentence｜>)"
)
"""The end of a turn, written out: what follows it is not of this answer."""
_CONCLUDED = re.compile(
    r"\b(?:so|answer|therefore|thus|hence|in total|the total|total of|altogether|in all|finally|overall|conclu\w+|gives?)\b"
    r"|\\(?:therefore|implies|Rightarrow)(?![A-Za-z])",
    re.IGNORECASE,
)
_FINAL = re.compile(r"\b(?:final|finally|conclu\w+|overall)\b", re.IGNORECASE)
_PART = re.compile(
    r"\bparts?\b|(?<![A-Za-z0-9])\([b-h2-9]\)|\n[ \t*]*(?:[b-h2-9][.)]|[-*]) ", re.IGNORECASE
)
_NAME_BEFORE = re.compile(
    r"(?:\b([A-Za-z](?:_[{}A-Za-z0-9]{1,5})?) ?(?:=|:|\bis\b)|\b([A-Za-z]{2,12}) ?[=:]"
    r"|\b([A-Z][a-z]{0,12}'s) [a-z ]{1,20} ?(?:=|:|\bis)|\b([A-Z][a-z]{1,12}) (?:has|had|gets|got|earns|pays|is|makes|needs))[\s$*\\(\[]*$"
)
"""The name of what a box holds: "y =", "Pears:", "Ben has"."""
_NOUN_BEFORE = re.compile(r"\b([A-Za-z]{2,15}) is[\s$*\\(\[]*$")


def _name_before(text: str, start: int, *, noun_too: bool) -> str | None:
    before = text[max(0, start - 40) : start]
    if name := _NAME_BEFORE.search(before):
        return next(filter(None, name.groups()))
    noun = _NOUN_BEFORE.search(before) if noun_too else None
    return noun[1] if noun else None


def _last_counts(boxes: Sequence[Place], value: Any, text: str, kind: Kind) -> bool:
    """Return whether the last box states the answer: the one before agrees, is corrected or led to it."""
    for before, after in reversed(list(pairwise(boxes[-MOST_PLACES:]))):
        other = kind.read(before.phrase)
        if other is not None and kind.same(value, other):
            continue
        between = text[before.end : after.start]
        if _CORRECTED.search(between) or _FINAL.search(between):
            return True
        within = not re.search(r"[.\n]", between)
        named = [_name_before(text, place.start, noun_too=within) for place in (before, after)]
        if None not in named and named[0] != named[1]:
            return False
        return bool(_CONCLUDED.search(between)) and not _PART.search(between)
    return True


def _same_sentence(before: Place, after: Place) -> bool:
    """Return whether a place begins within the first sentence of the phrase before it."""
    sentence_end = before.end - len(before.phrase) + len(sentence(before.phrase))
    return after.start < sentence_end


def _disagrees(place: Place, value: Any, kind: Kind) -> bool:
    """Return whether a place states another value; words without a number or a choice state none."""
    other = kind.read(place.phrase)
    if other is not None:
        return not kind.same(value, other)
    if place.kind != "prose":
        return True
    return bool(re.search(r"[0-9]|\b(?:not|wrong|incorrect)\b", sentence(place.phrase)))


# --- numbers -------------------------------------------------------------------------------------


def _agree(left: Any, right: Any) -> bool:
    return same_quantity(left, right) or same_quantity(right, left)


_OTHER_NUMBER = re.compile(
    r"(?<=\S),? (?:and |which is )?not (?:the )?[$€£]?-?[0-9][0-9.,]*+(?: [A-Za-z]+)?\W*+$"
)


_CRY = re.compile(r"(?<=[A-Za-z%*])!$")


def _number_phrase(phrase: str) -> str:
    """The first sentence of a phrase without a number that it rules out, as in "10, not 9".

    After a word an exclamation mark ends the sentence; after a number it may be a factorial.
    """
    return _CRY.sub("", _OTHER_NUMBER.sub("", sentence(phrase)).rstrip(" ;"))


def _other_number(phrase: str, answer: str, bare: bool) -> bool:
    """Return whether a phrase is another number than the answer, in the same unit or without one."""
    value, stated = quantity(phrase), quantity(answer)
    if value is None or stated is None or (bare and "=" in phrase) or _agree(value, stated):
        return False
    return value.value == stated.value or units_agree(stated, value) or units_agree(value, stated)


NUMBER = Kind(
    lambda phrase: quantity(_number_phrase(phrase)),
    _agree,
    Reading(numbers_in, _other_number),
    lambda phrase: stated_value(_number_phrase(phrase)) or phrase,
)
_NAMED = re.compile(r"[\s$*\\(]*+[A-Za-z](?:_[A-Za-z0-9])? ?=(?!.*=)")


def _number_alone(text: str) -> str | None:
    """A completion that is nothing but a number, as it is or as "x = 19"."""
    text = text.strip()
    if "\n" in text or len(text) > 200 or ("=" in text and not _NAMED.match(text)):
        return None
    plain = plain_phrase(text)
    if plain is None or ("=" not in plain and value_part(plain) != plain):
        return None  # "it is 7" may be a step
    return text if quantity(text) is not None else None


def stated_number(completion: str) -> str | None:
    """Return the number, with its unit, that a completion states as its answer; None if there is none."""
    phrase = stated(completion, NUMBER, _number_alone)
    return None if phrase is None else stated_value(_number_phrase(phrase))


def same_number(gold: str, answer: str) -> Verdict:
    """Compare two texts as exact numbers with units; undecided where one is not a number."""
    left, right = quantity(gold), quantity(answer)
    if left is None or right is None:
        return Verdict(None, "not a number")
    return Verdict(same_quantity(left, right), "number")


# --- choices -------------------------------------------------------------------------------------

_RULED_OUT = re.compile(
    r"(?<=\S)[,;]? ?\(?(?:and |but )?(?:not|rather than|instead of|unlike) (?:option |choice )?"
    r"\(?[A-Za-z]\)?(?: or \(?[A-Za-z]\)?)*+\)?$"
)
_CHOICE_LEAD = (
    r"(?:(?:so|thus|therefore|hence|then|clearly|definitely|certainly|it is|it's|it must be|this is|must be"
    r"|i choose|i pick|i would choose|i'd choose|i would go with|i'd go with|i'd say|indeed|actually|my choice is|the answer is"
    r"|answer is)\b[,:]? *+)*+"
    r"(?:(?:the )?(?:correct |right |best )?(?:option|choice|letter|answer)(?: is|:)?[ ~]++)?"
)
_ENDS_RIGHT = re.compile(
    r" ?(?:is|was) (?:the )?(?:correct|right|best|true|answer|most likely)(?: (?:answer|option|choice|one))?\W*+"
)
_DENIED = frozenset(
    "not neither nor or either both except wrong incorrect never maybe perhaps isn't aren't cannot can't "
    "could might may unless false and is was are would should "
    "does doesn't do did didn't has hasn't have fails fail".split()
)
"""Words that may not follow a letter directly: the phrase then chooses another letter, or none."""
_NO_CHOICE = _DENIED - {"and"} | frozenset(
    "but anything unlikely be out exclude excluded excluding eliminate eliminated besides instead than "
    "opposite doubt any all none worst least if unlike hardly longer unknown unclear uncertain undetermined".split()
)
_LEADS_AWAY = [
    [word]
    for word in "from before after to of than beyond like different in at on see under by with near per".split()
]
"""Words that may not stand before a letter in brackets."""


def _choice_reader(letters: str, *, tail_too: bool = True) -> Callable[[str], str | None]:
    """Return a function that reads the letter (in upper case) that a whole phrase chooses, or None.

    Args:
        tail_too: whether words may stand before a letter in brackets, as in "blotter (c)".
    """
    group = f"[{letters}]"
    head = re.compile(
        rf"{_CHOICE_LEAD}(?:\(({group})\)|({group})(?:\)|(?=[.:,]? *+$|[.:,] | ?- | is | was )))",
        re.IGNORECASE,
    )
    tail = re.compile(rf"([A-Za-z0-9' ,/-]{{1,80}}) \(({group})\)\W*+", re.IGNORECASE)
    other = re.compile(rf"\({group}\)", re.IGNORECASE)
    single = re.compile(
        rf"(?<![A-Za-z0-9'])(?:[{letters.upper()}](?![A-Za-z0-9'])|\b[{letters.lower()}]$)"
    )

    def read(phrase: str) -> str | None:
        if _REASON.match(phrase):
            return None
        plain = plain_phrase(sentence(phrase))
        if not plain:
            return None
        plain = _RULED_OUT.sub("", plain.rstrip("! -")).strip()
        if plain.startswith("[") and plain.endswith("]"):
            plain = plain[1:-1].strip()
        match = head.match(plain)
        if match is not None:
            rest = plain[match.end() :]
            letter = (match[1] or match[2]).upper()
            if not rest.strip(" .,:") or _ENDS_RIGHT.fullmatch(rest):
                return letter
            words = re.findall(r"[a-z']+", rest.lower())
            follows = other.search(rest) or [one for one in single.findall(rest) if one not in "AI"]
            wrong = {"wrong", "incorrect", "eliminated", "excluded"} & set(words) or bool(
                _DENIED & set(words[:1])
            )
            return None if follows or wrong or rest.lstrip()[:1] in "/&|" else letter
        match = tail.fullmatch(plain) if tail_too else None
        words = re.findall(r"[a-z']+", match[1].lower()) if match else []
        if match is None or _NO_CHOICE & set(words) or words[-1:] in _LEADS_AWAY:
            return None
        if re.fullmatch(r"(?:(?:option|choice|letter|answer) )?[A-Za-z]", match[1]):
            return None  # C (B)
        return match[2].upper()

    return read


def _letters_after(letters: str, read: Callable[[str], str | None]) -> Reading:
    """How letters are found in the text after a choice; the article "A" is none."""
    single = re.compile(
        rf"\(([{letters.upper()}{letters.lower()}])\)"
        rf"|(?<![A-Za-z0-9'])(?!A (?!is|was|seems|fits|would|because|instead))([{letters.upper()}])(?![A-Za-z0-9'])"
    )
    whole = re.compile(
        rf"(?:(?:option|choice|letter|answer) )?(?:\(([{letters}])\)|(?-i:([{letters.upper()}]))\)?)",
        re.IGNORECASE,
    )

    def mentions(text: str) -> list[Mention]:
        return [
            Mention(match.start(), match.end(), (match[1] or match[2]).upper())
            for match in single.finditer(text)
        ]

    def other(phrase: str, answer: str, bare: bool) -> bool:
        match = whole.fullmatch(phrase.strip(" *.$\"'"))
        return match is not None and (match[1] or match[2]).upper() != read(answer)

    return Reading(mentions, other)


def _choice_alone(
    text: str, read: Callable[[str], str | None], bracketed: re.Pattern[str]
) -> str | None:
    """A completion whose last sentence, or whose first line, is a choice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    last = re.split(r"(?<=[.!?])\s+(?=[A-Z(*\\])", lines[-1][-400:])[-1]
    letters = {found.upper() for found in bracketed.findall(last)}
    everywhere = {found.upper() for found in bracketed.findall(text)}
    led = re.match(
        r"(?:so|thus|therefore|hence|it is|it must be|i choose|i pick)\b", last, re.IGNORECASE
    )
    opening = read(sentence(lines[0]))
    if opening is not None and read(last) not in (None, opening):
        return None  # "B. C."
    if len(letters) <= 1 and read(last) is not None and (led or everywhere <= {read(last)}):
        return last
    first = read(lines[0]) if len(lines[0]) <= 20 else None
    named = {found.upper() for found in bracketed.findall(text)}
    return lines[0] if first is not None and named <= {first} else None


def choice_letter(text: str, letters: str = "ABCDE") -> str | None:
    """Return the letter (in upper case) that a completion chooses, or None if it chooses none or several.

    Read are "(c)", "**C**", "Answer: C", "Option C is right", "the answer is blotter (c)" and the like.
    """
    read = _choice_reader(letters)
    kind = Kind(read, lambda left, right: left == right, _letters_after(letters, read))
    bracketed = re.compile(rf"\(([{letters}])\)", re.IGNORECASE)
    plain = _choice_reader(letters, tail_too=False)
    phrase = stated(text, kind, lambda whole: _choice_alone(whole, plain, bracketed))
    return None if phrase is None else read(phrase)


def same_choice(gold: str, answer: str) -> Verdict:
    """Compare two texts as choice letters; undecided where one names none."""
    left, right = _any_choice(gold), _any_choice(answer)
    if left is None or right is None:
        return Verdict(None, "not a choice")
    return Verdict(left == right, "choice")


_any_choice = _choice_reader("A-Z")


# --- text ----------------------------------------------------------------------------------------


def _plain_text(phrase: str) -> str:
    phrase = unicodedata.normalize("NFC", ascii_signs(phrase))
    for _ in range(3):  # $\\text{\\textbf{yes}}$
        for sign in ("$", "**", "*", "`"):
            if len(phrase) > 2 * len(sign) and phrase.startswith(sign) and phrase.endswith(sign):
                phrase = phrase[len(sign) : -len(sign)].strip()
        if block := _TEXT_BLOCK.fullmatch(phrase):
            phrase = block[1]
    return " ".join(phrase.split()).strip(" \"'`*.!").casefold()


_TEXT_BLOCK = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*+(?:\{[^{}]*+\})?+)\}"
)


TEXT = Kind(
    lambda phrase: _plain_text(phrase) or None,
    lambda left, right: left == right,
    Reading(lambda text: [], lambda phrase, answer, bare: False),
)


def _text_alone(text: str) -> str | None:
    text = text.strip()
    return (text.removesuffix(".") or None) if "\n" not in text else None


def stated_text(completion: str) -> str | None:
    """Return the words that a completion states as its answer: in a box, after "the answer is", or all of it
    where it is a single line."""
    phrase = stated(completion, TEXT, _text_alone)
    return None if phrase is None else phrase.rstrip(".").strip() or None


def same_text(gold: str, answer: str) -> Verdict:
    """Compare two texts as words: case, spacing and a final full stop aside."""
    left, right = _plain_text(gold), _plain_text(answer)
    if not left:
        return Verdict(None, "empty gold")
    first = sentence(answer)
    rest = answer[len(first) :]
    if (
        rest.startswith((",", " ")) or len(re.findall(r"\w+", rest)) > 3
    ):  # "Paris. It lies on the Seine."
        return Verdict(left in (right, _plain_text(first)), "text")
    return Verdict(left == right, "text")


# --- single places -------------------------------------------------------------------------------


def after_marker(text: str, marker: str) -> str | None:
    """Return the rest of the line after the first `marker`; None where there is no marker or no rest."""
    _, found, rest = text.partition(marker)
    return (rest.splitlines() or [""])[0].strip() or None if found else None


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}` (or `\fbox`, or `\boxed 5`), braces balanced.

    None where there is no box, or where the last one is empty or never closes.
    """
    matches = list(_BOX.finditer(text))
    if not matches:
        return None
    at = matches[-1].end()
    if at < len(text) and text[at] == "{":
        close = _closing_braces(text).get(at)
        return None if close is None else text[at + 1 : close].strip() or None
    bare = _BARE_BOX.match(text, at)
    return bare[0] if bare else None


def closing_brace(text: str, opened: int) -> int | None:
    """Return where the brace opened at `opened` closes; an escaped brace is no brace."""
    depth = 0
    for match in _BRACE.finditer(text, opened):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return None
