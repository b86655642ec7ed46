"""Counts, rates and examples of what the checks find in many texts."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from selftaught.metrics import clustered_interval
from selftaught.safety.checks import Checks
from selftaught.safety.findings import CHECKS, NO_SOURCE, Finding, Source

AT_ONCE = 512
"""Number of texts that are checked together."""
EXAMPLES = 5
"""Number of examples per group and check."""
AROUND = 160
"""Number of characters that an example shows before and after the finding."""
LONGEST = 600
"""Maximum number of characters of a finding that are shown."""
ANY = "any check"
"""Name of the row that counts texts flagged by at least one check."""


class Item(NamedTuple):
    """A text to check."""

    text: str
    group: str
    """Texts of a group are counted together, such as "thoughts"."""
    cluster: str
    """Texts of a cluster are not independent, such as the completions of a problem."""
    where: str
    """Where the text is from, shown with an example."""
    before: str = ""
    """Text directly before it, shown with an example."""
    source: Source = NO_SOURCE


@dataclass(frozen=True)
class Rate:
    """How many texts of a group a check flags."""

    group: str
    check: str
    texts: int
    """Number of texts that went through the check."""
    flagged: int
    undecided: int
    """Number of flagged texts for which the check had no result, such as after its time limit."""
    clusters: int
    """Number of texts or problems that the texts belong to."""
    rate: float
    low: float
    """Lower end of the 95% interval, clustered. 1.0 as the upper end if there are no texts."""
    high: float


@dataclass(frozen=True)
class Example:
    """A flagged text around the finding, with secrets blacked out."""

    group: str
    check: str
    reason: str
    where: str
    before: str
    found: str
    after: str


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    rates: list[Rate]
    examples: list[Example]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)

    def rate(self, group: str, check: str = ANY) -> Rate:
        """Return the rate of a check in a group."""
        return next(one for one in self.rates if (one.group, one.check) == (group, check))


@dataclass
class _Count:
    """Counts of one check in one group, by cluster."""

    texts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flagged: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    undecided: int = 0

    def rate(self, group: str, check: str) -> Rate:
        samples = [
            [True] * self.flagged[name] + [False] * (count - self.flagged[name])
            for name, count in self.texts.items()
        ]
        texts, flagged = sum(self.texts.values()), sum(self.flagged.values())
        low, high = clustered_interval(samples)
        return Rate(group, check, texts, flagged, self.undecided, len(samples),
                    flagged / texts if texts else 0.0, low, high)  # fmt: skip


def audited(
    items: Iterable[Item], checks: Checks, progress: Callable[[int], object] | None = None
) -> Audit:
    """Check texts and return counts, rates with 95% intervals, and examples.

    Args:
        items: the texts.
        checks: the checks.
        progress: called with the number of new texts.
    """
    counts: dict[str, dict[str, _Count]] = {}
    examples: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for part in _parts(items):
        found = checks.find([one.text for one in part], [one.source for one in part])
        for item, findings in zip(part, found, strict=True):
            group = counts.setdefault(item.group, {})
            by_check = {one.check: one for one in reversed(findings)}
            for name in checks.apply_to(item.source):
                _add(group.setdefault(name, _Count()), item, by_check.get(name))
            _add(group.setdefault(ANY, _Count()), item, findings[0] if findings else None)
            for name, finding in by_check.items():
                if len(shown := examples[item.group, name]) < EXAMPLES:
                    shown.append(_example(item, finding, checks))
        if progress is not None:
            progress(len(part))
    rates = [
        counts[group][name].rate(group, name)
        for group in counts for name in (*CHECKS, ANY) if name in counts[group]
    ]  # fmt: skip
    ordered = [one for rate in rates for one in examples[rate.group, rate.check]]
    return Audit(rates, ordered)


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    left = iter(items)
    while part := list(islice(left, AT_ONCE)):
        yield part


def _add(count: _Count, item: Item, finding: Finding | None) -> None:
    count.texts[item.cluster] += 1
    if finding is not None:
        count.flagged[item.cluster] += 1
        count.undecided += finding.undecided


def _example(item: Item, finding: Finding, checks: Checks) -> Example:
    # The text before can end with the beginning of a secret that the text completes.
    whole = checks.redacted(item.before + item.text)
    at = len(item.before)
    start, end = finding.span or (0, len(item.text))
    start, end = at + start, at + min(end, start + LONGEST)
    return Example(
        item.group, finding.check, finding.reason, item.where,
        whole[max(0, start - AROUND) : start], whole[start:end], whole[end : end + AROUND],
    )  # fmt: skip
