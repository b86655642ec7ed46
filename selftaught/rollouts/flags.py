"""Rollouts that the checks of texts flag: their exclusion from training, and their audit."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from selftaught.records import Rollout
from selftaught.rollouts.reading import matching
from selftaught.safety.audit import AT_ONCE, Item
from selftaught.safety.checks import Checks
from selftaught.safety.findings import CHECKS, Finding, Source
from selftaught.safety.leaks import source_of


def findings_in(rollouts: Sequence[Rollout], checks: Checks) -> list[list[Finding]]:
    """Return the findings of the checks in every completion."""
    sources = [source_of(one) for one in rollouts]
    return checks.find([one.completion for one in rollouts], sources)


def reason_of(findings: Sequence[Finding]) -> str:
    """Return why a rollout is dropped, such as "flagged: pattern": the first check that flags it."""
    check = min((one.check for one in findings), key=CHECKS.index)
    return f"flagged: {check}"


class Flags:
    """Flags of the rollouts of a run, computed once for every completion.

    Args:
        checks: the checks. They are closed after every call, so that a classifier takes no memory
            while a model is trained.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._known: dict[tuple[Source, str], str | None] = {}

    def reasons(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """Return for every rollout why it is flagged, or None if it is not; see `reason_of`."""
        keys = [(source_of(one), one.completion) for one in rollouts]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._known]
        with self._checks as checks:
            for first in range(0, len(fresh), AT_ONCE):
                part = fresh[first : first + AT_ONCE]
                found = checks.find([text for _, text in part], [source for source, _ in part])
                for key, findings in zip(part, found, strict=True):
                    self._known[key] = reason_of(findings) if findings else None
        return [self._known[key] for key in keys]

    def unflagged(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts that no check flags."""
        reasons = self.reasons(rollouts)
        return [one for one, why in zip(rollouts, reasons, strict=True) if why is None]

    def counts(self, rollouts: Sequence[Rollout]) -> dict[str, int]:
        """Return the numbers of flagged rollouts by reason."""
        return dict(Counter(why for why in self.reasons(rollouts) if why is not None))


class FlagFilter:
    """A filter that keeps rollouts without findings, and counts the others.

    Attributes:
        dropped: numbers of dropped rollouts by reason; see `reason_of`.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self.dropped: Counter[str] = Counter()

    def __str__(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in sorted(self.dropped.items()))

    def __call__(self, rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
        """Yield the rollouts that no check flags, in the same order."""
        left = iter(rollouts)
        while part := list(islice(left, AT_ONCE)):
            for one, findings in zip(part, findings_in(part, self._checks), strict=True):
                if findings:
                    self.dropped[reason_of(findings)] += 1
                else:
                    yield one


def items_in(store: Path, outcome: str | None = None) -> Iterator[Item]:
    """Yield the stored completions of a file or a run folder, for an audit.

    Args:
        store: file of stored or graded completions, or a run folder; all graded files in it are
            read.
        outcome: outcome of the completions. None means any.

    Raises:
        ValueError: an outcome is given, but the completions are not graded; or the folder has no
            graded completions.
        OSError: the file does not exist.
    """
    for file, one in matching(store, outcome=outcome):
        name = str(file.relative_to(store)) if store.is_dir() else file.name
        yield Item(
            one.completion, name, one.problem.id, f"{one.problem.id}, sample {one.index}",
            source=source_of(one),
        )  # fmt: skip
