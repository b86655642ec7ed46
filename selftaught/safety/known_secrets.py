"""Literal secrets, found in texts although case, accents, spaces and punctuation differ.

Texts and secrets are folded: every character is decomposed (Unicode's NFKD) and case-folded, and
what is neither a letter nor a digit is dropped. Searching takes linear time.
"""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from selftaught.safety.findings import Finding

LEAST_FOLDED = 6
"""A secret with fewer letters and digits is searched as it is written, because common words would
contain it."""
LEAST = 3
"""Minimum number of characters of a secret."""
BLACK = "\u2588"
"""What a character of a secret is replaced by."""


@lru_cache(maxsize=2**16)
def _folded_character(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character.casefold()).casefold()
    return "".join(one for one in parts if one.isalnum())


def folded(text: str) -> str:
    """Return the letters and digits of a text without case and accents."""
    return "".join(map(_folded_character, text))


class Secrets:
    """The secrets of a file. They are in memory only; findings name the line of the file.

    Args:
        path: the file, with one secret per line.

    Raises:
        ValueError: the file has no secret, or a secret is too short.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        given = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if not given:
            raise ValueError(f"Expected one secret per line in {path}; the file is empty.")
        for number, secret in given:
            if len(secret) < LEAST:
                raise ValueError(
                    f"{path}, line {number}: expected a secret of at least {LEAST} characters, got "
                    f"{len(secret)}, which almost every text contains. Remove the line."
                )
        self._exact = [(n, one) for n, one in given if len(folded(one)) < LEAST_FOLDED]
        self._folded = [(n, folded(one)) for n, one in given if len(folded(one)) >= LEAST_FOLDED]

    def __repr__(self) -> str:
        return f"Secrets({len(self._exact) + len(self._folded)})"

    def find(self, text: str) -> list[Finding]:
        """Return a finding for the first place of every secret in a text."""
        found: dict[int, Finding] = {}
        for number, start, end in self._places(text):
            found.setdefault(number, Finding("secret", f"line {number}", (start, end)))
        return list(found.values())

    def redacted(self, text: str) -> str:
        """Return the text, of the same length, with every secret blacked out."""
        parts: list[str] = []
        done = 0
        for _, start, end in sorted(self._places(text), key=lambda place: place[1:]):
            if end > done:
                start = max(start, done)
                parts += [text[done:start], BLACK * (end - start)]
                done = end
        return "".join([*parts, text[done:]])

    def _places(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield line, start and end of every secret in a text."""
        for number, secret in self._exact:
            for start in _all(text, secret):
                yield number, start, start + len(secret)
        plain = folded(text)
        hits = [(n, at, one) for n, one in self._folded if one in plain for at in _all(plain, one)]
        if hits:
            origin = _origins(text)
            for number, at, secret in hits:
                yield number, origin[at], origin[at + len(secret) - 1] + 1


def _all(text: str, part: str) -> Iterator[int]:
    """Yield every index at which a part begins in a text."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _origins(text: str) -> list[int]:
    """Return for every character of the folded text the index of the character it is from."""
    return [index for index, one in enumerate(text) for _ in _folded_character(one)]
