"""Stored completions for reading: which ones, and how they look as text."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from selftaught.records import Rollout, Text, iter_rollouts


def matching(
    store: Path, *, outcome: str | None = None, problem: str | None = None
) -> Iterator[Rollout]:
    """Yield the stored completions with an outcome, or of a problem.

    Args:
        store: a file of stored or graded completions, or a run folder, whose graded files are all read.
        outcome, problem: an outcome and the id of a problem; None: any.

    Raises:
        ValueError: completions of a store that was not graded are asked for by outcome; or there are no
            completions in a folder.
        OSError: there is no such file.
    """
    for one in chain.from_iterable(map(iter_rollouts, _files(store))):
        if outcome is not None and one.outcome is None:
            raise ValueError(
                f"{store} holds completions without grades. Grade them first: selftaught grade {store}"
            )
        if outcome in (None, one.outcome) and problem in (None, one.problem.id):
            yield one


def _files(store: Path) -> list[Path]:
    """The files that are read: graded ones, where there are any."""
    graded = store.with_name(f"{store.stem}.graded.jsonl")
    if store.is_file():
        return [graded if graded.is_file() else store]
    if not store.is_dir():
        raise FileNotFoundError(2, "No such file or folder", str(store))
    found = sorted(store.rglob("*.graded.jsonl"))
    if not found:
        raise ValueError(f"{store} holds no graded completions (*.graded.jsonl).")
    return found


def shown(rollout: Rollout) -> str:
    """Return a completion as a block of text: id, outcome, answers, question and completion."""
    sample = f"sample {rollout.index}, {rollout.origin}, {rollout.finish_reason}"
    head = f"{rollout.problem.id} · {rollout.outcome or 'not graded'} · {sample}"
    answers = f"gold: {rollout.problem.gold}   answer: {rollout.answer if rollout.answer is not None else 'none'}"  # fmt: skip
    return "\n".join([
        "=" * 72, head, answers, "-- prompt", _end_of(rollout.prompt), "-- completion",
        rollout.completion, "",
    ])  # fmt: skip


def _end_of(prompt: Text) -> str:
    """The last question of a prompt, without the worked examples before it."""
    if not isinstance(prompt, str):
        return "\n".join(f"[{message['role']}] {message['content']}" for message in prompt)
    return prompt.rstrip("\n").rpartition("\n\n")[2]
