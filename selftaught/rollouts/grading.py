"""Grading: comparing the answers of completions with gold answers, with a time limit.

`task.equal` compares in this process. Pairs that it cannot decide go to `task.prove` in worker
processes, where a slow comparison can be killed. A worker is a subprocess that imports only the
function it runs, so a caller's main script needs no `__main__` guard, and grading works in any
thread.
"""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from queue import SimpleQueue

from selftaught.processes.child import Child, conversation
from selftaught.records import Outcome, Problem, Rollout
from selftaught.sandbox import Sandbox
from selftaught.tasks.answers import Verdict
from selftaught.tasks.base import Execution, Task

Pair = tuple[str, str]
"""A gold answer, or the tests of a program, and the answer that is compared with it."""

SOLUTIONS = 32
"""Maximum number of reference solutions that are run before a run starts."""
MOST_MEMORY = 4 * 2**30
"""Limit of a worker's address space in bytes (Linux). Beyond it, `prove` raises a MemoryError."""

_NAMES: dict[bool | None, Outcome] = {True: "right", False: "wrong", None: "ungradable"}


def grade(
    rollouts: Sequence[Rollout], task: Task, *, seconds: float = 5.0, workers: int | None = None
) -> list[Rollout]:
    """Grade rollouts: return them with `answer`, `outcome` and `decided_by`, in the same order.

    A completion cut by the token limit is never correct, even if it contains the answer, because
    models are trained on what is kept and would not learn to stop. A comparison that exceeds the
    time limit, raises an exception or crashes its process has the outcome "ungradable", with the
    reason in `decided_by`.

    Args:
        rollouts: the rollouts.
        task: the task whose rules are used.
        seconds: time limit of one comparison by `task.prove`. A worker first calls `prove("1",
            "1")`, so that the time for imports does not count.
        workers: number of processes for `task.prove`. Default: chosen from the number of undecided
            answers.
    """
    with closing(Grader(task, seconds=seconds, workers=workers)) as grader:
        return grader.grade(rollouts)


class Grader:
    """Grades several batches of rollouts with the same worker processes; see `grade`.

    `close` ends the worker processes.
    """

    def __init__(self, task: Task, *, seconds: float = 5.0, workers: int | None = None) -> None:
        self._task, self._seconds, self._most = task, seconds, workers
        self._workers: list[_Worker] = []
        self._sandbox: Sandbox | None = None
        self._opening = threading.Lock()

    def grade(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the graded rollouts; see `grade`."""
        answers = [
            self._task.answer(one.completion, thought_open=one.thought_open) for one in rollouts
        ]
        pairs = {
            (self._task.reference(rollout.problem), answer): Verdict(None, "")
            for rollout, answer in zip(rollouts, answers, strict=True)
            if answer is not None and rollout.finish_reason != "length"
        }
        verdicts = self.compare(list(pairs))
        return [
            _graded(rollout, answer, self._task.reference(rollout.problem), verdicts)
            for rollout, answer in zip(rollouts, answers, strict=True)
        ]

    def compare(self, pairs: Sequence[Pair]) -> dict[Pair, Verdict]:
        """Return a verdict for every pair; see `compare`."""
        if self._task.execution is not None:
            return self._executed(self._task.execution, pairs)
        verdicts = {pair: _verdict(self._task.equal(*pair)) for pair in pairs}
        undecided = [pair for pair, verdict in verdicts.items() if verdict.equal is None]
        if self._task.prove is None or not undecided:
            return verdicts
        # A worker needs one or two seconds for its imports; an easy comparison takes about 10 ms.
        wanted = self._most or min(os.cpu_count() or 1, 1 + len(undecided) // 100)
        return verdicts | self._proved(self._task.prove, undecided, min(wanted, len(undecided)))

    def _proved(
        self, prove: Callable[[str, str], bool], pairs: Sequence[Pair], count: int
    ) -> dict[Pair, Verdict]:
        while len(self._workers) < count:
            self._workers.append(_Worker(prove, self._seconds))
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers[:count]:
            free.put(worker)

        def decide(pair: Pair) -> Verdict:
            worker = free.get()
            try:
                return worker.verdict(pair)
            finally:
                free.put(worker)

        pool = ThreadPoolExecutor(count)
        try:
            return dict(zip(pairs, pool.map(decide, pairs), strict=True))
        except BaseException:
            for worker in self._workers:
                worker.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _executed(self, execution: Execution, pairs: Sequence[Pair]) -> dict[Pair, Verdict]:
        """Run programs with their tests. All failures are wrong answers, with the reason in
        `decided_by`; only what could not be run is ungradable."""
        with self._opening:
            if self._sandbox is None:
                self._sandbox = Sandbox(
                    limits=execution.limits, isolation=execution.isolation, workers=self._most
                )
        results = self._sandbox.run([execution.program(*pair) for pair in pairs])
        return {
            pair: Verdict(
                None if result.outcome == "refused" else result.outcome == "right",
                "tests"
                if result.outcome == "right"
                else f"{result.outcome}: {result.detail}".removesuffix(": "),
            )
            for pair, result in zip(pairs, results, strict=True)
        }

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


def _verdict(found: Verdict | bool) -> Verdict:
    return Verdict(found, "equal") if isinstance(found, bool) else found


def _graded(
    rollout: Rollout, answer: str | None, reference: str, verdicts: dict[Pair, Verdict]
) -> Rollout:
    if rollout.finish_reason == "length":
        return replace(rollout, answer=answer, outcome="cut by length", decided_by="finish reason")
    if answer is None:
        return replace(rollout, answer=None, outcome="no answer", decided_by="extraction")
    equal, decided_by = verdicts[reference, answer]
    return replace(rollout, answer=answer, outcome=_NAMES[equal], decided_by=decided_by)


def check_gold(problems: Sequence[Problem], task: Task, *, seconds: float = 5.0) -> None:
    """Check that every gold answer can be graded as correct, before a run spends time on it.

    A gold answer passes if a completion that states it directly (`Task.direct`) is graded as
    correct.

    Of tasks whose answers are programs, an empty program must pass the tests of no problem, and at
    most `SOLUTIONS` reference solutions are run. One may fail: it says nothing about other
    solutions. If more than half fail, the tests or the sandbox are at fault.

    Raises:
        ValueError: a gold answer does not pass, tests cannot be run or assert nothing, or more than
            half of the reference solutions fail; the message lists the first ten with the reasons.
    """
    if task.execution is not None:
        _check_programs(problems, task)
        return
    answers = {
        gold: task.answer(task.direct.format(answer=gold))
        for gold in {problem.gold: None for problem in problems}
    }
    verdicts = compare(
        [(gold, answer) for gold, answer in answers.items() if answer is not None],
        task, seconds=seconds,
    )  # fmt: skip

    def why(gold: str) -> str | None:
        answer = answers[gold]
        if answer is None:
            return "no answer is extracted from it"
        verdict = verdicts[gold, answer]
        return None if verdict.equal else f"extracted as {answer[:60]!r}: {verdict.decided_by}"

    bad = [(problem, reason) for problem in problems if (reason := why(problem.gold))]
    if not bad:
        return
    shown = [f"{problem.id!r}: {problem.gold[:60]!r} ({reason})" for problem, reason in bad[:10]]
    more = f", and {len(bad) - 10} more" if len(bad) > 10 else ""
    raise ValueError(
        f"{len(bad)} of {len(problems)} problems have a gold answer that the task {task.name!r} "
        f"cannot grade as correct, so no completion could be correct: {'; '.join(shown)}{more}. "
        "Correct or remove these problems, or choose a task or a kind of answer that fits them."
    )


def _check_programs(problems: Sequence[Problem], task: Task) -> None:
    """Run an empty program for every problem, and some reference solutions; see `check_gold`."""
    empty = {one.id: (one.tests, "") for one in problems}
    solved = [one for one in problems if one.gold]
    some = solved[:: -(-len(solved) // SOLUTIONS) or 1]
    pairs = {one.id: (one.tests, one.gold) for one in some}
    verdicts = compare(list(dict.fromkeys([*empty.values(), *pairs.values()])), task)
    untested = [f"{id!r}" for id, pair in empty.items() if verdicts[pair].equal]
    broken = [f"{id!r} ({verdicts[pair].decided_by})" for id, pair in empty.items() if verdicts[pair].equal is None]  # fmt: skip
    failed = [f"{id!r} ({verdicts[pair].decided_by})" for id, pair in pairs.items() if not verdicts[pair].equal]  # fmt: skip
    for found, what in (
        (untested, "have tests that an empty program passes, so every answer would be correct. Tests must "
         "assert something when they run, and call the program: if its function has the name of a builtin "
         "one, give entry_point"),
        (broken, "have tests that cannot be run"),
        (failed if len(failed) > len(pairs) / 2 else [], "have a reference solution that fails its own "
         "tests. Check the columns of tests, setup and solution, and the time limit"),
    ):  # fmt: skip
        if found:
            more = f", and {len(found) - 10} more" if len(found) > 10 else ""
            raise ValueError(
                f"{len(found)} problems of the task {task.name!r} {what}: {'; '.join(found[:10])}{more}."
            )


def compare(
    pairs: Sequence[Pair], task: Task, *, seconds: float = 5.0, workers: int | None = None
) -> dict[Pair, Verdict]:
    """Return a verdict for every pair of answers.

    Pairs that `task.equal` cannot decide are compared by `task.prove` in worker processes. Programs are
    run in a sandbox.

    Args:
        pairs: (gold answer, answer) pairs.
        task, seconds, workers: as in `grade`.
    """
    with closing(Grader(task, seconds=seconds, workers=workers)) as grader:
        return grader.compare(pairs)


class _Worker:
    """A process that runs `prove`; killed at the time limit and started again when needed."""

    START_SECONDS = 120.0

    def __init__(self, prove: Callable[[str, str], bool], seconds: float) -> None:
        module, name = prove.__module__, prove.__qualname__
        if module == "__main__" or not name.isidentifier():
            raise ValueError(
                "prove must be a function at the top level of a module that can be imported, "
                f"because it runs in worker processes; got {name!r} of {module!r}. "
                "Move it into a separate module."
            )
        self.function = {"module": module, "name": name, "seconds": seconds}
        self.seconds = seconds
        self.child: Child | None = None

    def verdict(self, pair: Pair) -> Verdict:
        """Return the verdict of `prove` on a pair, or the reason why there is none."""
        child = self.child or self._started()
        reply = child.ask(pair, seconds=self.seconds)
        if reply.message is not None and not reply.late:
            return Verdict(*reply.message)
        self.close()
        if reply.message is not None:
            return Verdict(*reply.message)  # the reply arrived just before the process was killed
        why = "time limit" if reply.late else f"error: worker {child.how_it_ended()}"
        return Verdict(None, why)

    def _started(self) -> Child:
        child = self.child = Child(__name__)
        reply = child.ask(self.function, seconds=self.START_SECONDS)
        if reply.message is not None and not reply.late:
            return child
        self.close()
        why = f"took over {self.START_SECONDS:.0f} s" if reply.late else child.how_it_ended()
        raise RuntimeError(
            f"The grading worker for {self.function['module']}.{self.function['name']} {why} before "
            "it was ready. Nothing was graded; the output of the worker is above."
        )

    def stop(self) -> None:
        """Kill the process immediately. May be called from any thread."""
        if self.child is not None:
            self.child.stop()

    def close(self) -> None:
        """End the process. May be called only when no thread is waiting for it."""
        child, self.child = self.child, None
        if child is not None:
            child.close()


def serve() -> None:
    """Main function of a worker process: receive a function, then compare one pair per message."""
    messages, answer = conversation()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    function, _ = next(messages)
    prove = vars(importlib.import_module(function["module"]))[function["name"]]
    prove("1", "1")  # imports of the first call do not count towards the time limit
    answer(True, b"")
    for pair, _ in messages:
        # If the parent has died, the kernel ends the worker, even during a computation (POSIX
        # only).
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, function["seconds"] + 5)
        verdict = _proved(prove, *pair)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        answer(verdict, b"")


def _proved(prove: Callable[[str, str], bool], gold: str, answer: str) -> Verdict:
    try:
        return Verdict(bool(prove(gold, answer)), prove.__name__)
    except Exception as error:  # every error is reported to the parent process
        return Verdict(None, f"error: {type(error).__name__}: {error}"[:200])
