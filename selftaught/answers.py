"""From a completion to its answer; whether two answers are the same. (being written)"""

from typing import NamedTuple


class Verdict(NamedTuple):
    """Whether two answers are the same, and the stage that decided it; None: not decided here."""

    equal: bool | None
    decided_by: str
