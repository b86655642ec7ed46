"""Rollouts that the checks of texts flag: their exclusion from training, and their audit."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from selftaught.records import Rollout
from selftaught.rollouts.reading import matching
from selftaught.safety.audit import AT_ONCE, Item
from selftaught.safety.checks import Checks
from selftaught.safety.findings import CHECKS, Finding
from selftaught.safety.leaks import source_of


def findings_in(rollouts: Sequence[Rollout], checks: Checks) -> list[list[Finding]]:
    """Return the findings of the checks in every completion."""
    sources = [source_of(one) for one in rollouts]
    return checks.find([one.completion for one in rollouts], sources)


def reason_of(findings: Sequence[Finding]) -> str:
    """Return why a rollout is dropped, such as "flagged: pattern": the first check that flags it."""
    check = min((one.check for one in findings), key=CHECKS.index)
    return f"flagged: {check}"


class FlagFilter:
    """A filter that keeps rollouts without findings, and counts the others.

    Attributes:
        dropped: numbers of dropped rollouts by reason; see `reason_of`.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self.dropped: Counter[str] = Counter()

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
