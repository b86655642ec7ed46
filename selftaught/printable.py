"""Escaping of control and invisible characters, so that text is safe on a terminal or a page."""

import re
import unicodedata

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls, except tab and newline
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "]"
)
"""Controls, lone surrogates, and the characters that Unicode calls default-ignorable: bidirectional
controls, zero-width characters, fillers, variation selectors, tags."""
_JOINERS = "\u200d\ufe0e\ufe0f"
"""Zero-width joiner and the two variation selectors that emoji use."""


def printable(text: str) -> str:
    r"""Return the text with control, bidirectional and other invisible characters escaped.

    Newlines and tabs are kept. A control character is written like `\x1b`, any other character like
    `[U+202E]`. The joiner and the variation selectors inside an emoji are kept.
    """
    return _HIDDEN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match.group()
    if character in _JOINERS and _is_emoji(match.string, match.start() - 1):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0xA0 else f"[U+{code:04X}]"


def _is_emoji(text: str, at: int) -> bool:
    """Return whether the character at an index is a symbol or a variation selector after one."""
    if at > 0 and text[at] == "\ufe0f":
        at -= 1
    return at >= 0 and unicodedata.category(text[at]) in ("So", "Sk")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 step" or "1,000 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
