"""Selection of stored completions, and their display as text, for `selftaught show`."""

from collections.abc import Iterator
from pathlib import Path

from selftaught.records import Rollout, Text, iter_rollouts
from selftaught.rollouts.selection import keep_sound


def matching(
    store: Path,
    *,
    outcome: str | None = None,
    problem: str | None = None,
    iteration: int | None = None,
    wrong_equation: bool = False,
) -> Iterator[tuple[Path, Rollout]]:
    """Yield the stored completions with a given outcome, or of a given problem.

    Args:
        store: file of stored or graded completions, or a run folder; all graded files in it are
            read.
        outcome: outcome of the completions. None means any.
        problem: id of a problem. None means any.
        iteration: number of an iteration, for a run folder with folders `iteration-N`. None means
            all files.
        wrong_equation: only correct completions that contain a wrong equation.

    Raises:
        ValueError: an outcome is given, but the completions are not graded; or the folder has no
            graded completions, or none of the iteration.
        OSError: the file does not exist.
    """
    graded = outcome is not None or wrong_equation
    for file in _files(store, iteration):
        for one in iter_rollouts(file):
            if graded and one.outcome is None:
                raise ValueError(
                    f"Expected graded completions in {store}, got completions without grades. Grade "
                    f"them first: selftaught grade {store}"
                )
            if outcome not in (None, one.outcome) or problem not in (None, one.problem.id):
                continue
            if not wrong_equation or (one.correct and not keep_sound([one])):
                yield file, one


def _files(store: Path, iteration: int | None) -> list[Path]:
    """Return the files to read; graded files, if there are any."""
    graded = store.with_name(f"{store.stem}.graded.jsonl")
    if store.is_file() and iteration is not None:
        raise ValueError(f"Expected a run folder with --iteration, got the file {store}.")
    if store.is_file():
        return [graded if graded.is_file() else store]
    if not store.is_dir():
        raise FileNotFoundError(2, "No such file or folder", str(store))
    if iteration is not None:
        store = store / f"iteration-{iteration}"
    found = sorted(store.rglob("*.graded.jsonl"))
    if not found:
        raise ValueError(
            f"Expected a folder with graded completions (*.graded.jsonl), got none in {store}."
        )
    return found


def shown(rollout: Rollout, path: Path) -> str:
    """Return a completion as a block of text: id, outcome, answers, question and completion."""
    sample = f"sample {rollout.index}, {rollout.origin}, {rollout.finish_reason}"
    head = f"{rollout.problem.id} · {rollout.outcome or 'not graded'} · {sample}"
    if rollout.problem.tests:  # the answer is the program in the completion
        answers = f"decided by: {rollout.decided_by or 'nothing yet'}"
    else:
        answer = rollout.answer if rollout.answer is not None else "none"
        answers = f"gold: {rollout.problem.gold}   answer: {answer}"
    return "\n".join([
        "=" * 72, str(path), head, answers, "-- prompt", _end_of(rollout.prompt), "-- completion",
        rollout.completion, "",
    ])  # fmt: skip


def _end_of(prompt: Text) -> str:
    """Return the last question of a prompt, without the worked examples before it."""
    if not isinstance(prompt, str):
        return "\n".join(f"[{message['role']}] {message['content']}" for message in prompt)
    return prompt.rstrip("\n").rpartition("\n\n")[2]
