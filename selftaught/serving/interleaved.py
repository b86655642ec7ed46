"""Decoding of jobs one beside the other, for models that cannot share a batch.

These are Quiet-STaR models, and models whose layers the shared-prefix loop does not support, such
as recurrent ones. The completions of one job are one batch. All jobs advance by one token in turn.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from queue import Queue
from threading import Thread

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from selftaught.quiet.gating import ThoughtParams
from selftaught.quiet.next_token import SeenThoughts, ThinkingModel, next_logits
from selftaught.quiet.thought_ends import content_lengths
from selftaught.serving.choice import choose_tokens
from selftaught.serving.jobs import Delivery, Job, Row, Step, failed


@dataclass(frozen=True)
class Thought:
    """The hidden thoughts of a row before its next token."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each thought."""
    before_V: Tensor
    """Log-probabilities of the next token without a thought."""


Predictions = Generator[tuple[Tensor, dict[int, Thought]], Tensor, None]
"""Yields the logits of the next token, and the thoughts of the rows that have some; is sent the chosen
tokens, `[B]`."""


class InterleavedDecoder:
    """Decodes jobs one token each in turn, at most `max_rows` completions at once.

    Args:
        predict: starts a job: returns the predictions for its prompt.
        max_rows: maximum number of completions that are decoded at the same time.
    """

    def __init__(self, predict: Callable[[Job], Predictions], max_rows: int) -> None:
        self._predict, self._max_rows = predict, max_rows
        self._running: dict[Job, tuple[Predictions, list[Row], Tensor | None]] = {}

    @property
    def rows(self) -> int:
        """Number of rows in use."""
        return sum(len(rows) for _, rows, _ in self._running.values())

    def fits(self, job: Job) -> bool:
        """Return whether there are enough free rows for a job."""
        return self.rows + job.n <= self._max_rows

    def add(self, job: Job) -> None:
        """Start a job.

        Raises:
            ValueError: the job asks for the log-probabilities of the prompt.
        """
        if job.prompt_log_probs:
            raise ValueError(
                "echo with logprobs is supported for plain models only. Measure a Quiet-STaR model "
                "with `python -m selftaught.harness --model selftaught`."
            )
        rows = [Row(job, index) for index in range(job.n)]
        self._running[job] = (self._predict(job), rows, None)

    def step(self) -> Iterator[Delivery]:
        """Compute the next token of every completion. An error ends its job, and no others."""
        for job in list(self._running):
            try:
                delivery = job, self._advance(job)
            except Exception as error:
                self._remove(job)
                yield from failed([job], error)
            else:
                yield delivery

    def _advance(self, job: Job) -> list[Step]:
        """Compute the next token of every completion of a job."""
        predictions, rows, sent_B = self._running[job]
        logits_BV, thoughts = next(predictions) if sent_B is None else predictions.send(sent_B)
        active = [at for at, row in enumerate(rows) if not row.finished]
        some = [rows[at] for at in active]
        tokens, log_probs = choose_tokens(logits_BV[active], some)
        steps: list[Step] = []
        token_B = torch.zeros(len(rows), dtype=torch.long, device=logits_BV.device)
        for at, row, token, value in zip(active, some, tokens, log_probs, strict=True):
            step = row.accept(token, value)
            if (thought := thoughts.get(at)) is not None:
                gain = float(logits_BV[at, token] - thought.before_V[token])
                step = replace(step, thoughts=thought.ids, gain=gain)
            steps.append(step)
            token_B[at] = token
        if all(row.finished for row in rows):
            self._remove(job)
        else:
            self._running[job] = (predictions, rows, token_B)
        return steps

    def drop_cancelled(self) -> None:
        """Free the rows of jobs that were cancelled."""
        for job in [one for one in self._running if one.cancelled]:
            self._remove(job)

    def clear(self) -> list[Job]:
        """Drop everything after an error, and return the jobs that were in progress."""
        jobs = list(self._running)
        self._running.clear()
        return jobs

    def _remove(self, job: Job) -> None:
        predictions, _, _ = self._running.pop(job)
        predictions.close()


class _Ended(Exception):
    """Ends `generate` in its thread."""


class _Handover(LogitsProcessor):
    """Gives the logits of every step to another thread, and waits for the tokens that it chooses."""

    def __init__(self) -> None:
        self.logits: Queue[Tensor | BaseException] = Queue()
        self.tokens: Queue[Tensor | None] = Queue()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.logits.put(scores)
        token_B = self.tokens.get()
        if token_B is None:
            raise _Ended
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


def plain_predictions(model: PreTrainedModel, job: Job) -> Predictions:
    """Predict with transformers' `generate`, which knows the cache of every model.

    It runs in a thread of its own, which works only while this one waits for it.
    """
    ids_BT = torch.tensor([job.prompt] * job.n, device=model.device)
    handover = _Handover()
    config = GenerationConfig(max_new_tokens=job.max_tokens, do_sample=False, pad_token_id=0)

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(  # type: ignore[operator]
                    ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config,
                    logits_processor=LogitsProcessorList([handover]),
                )  # fmt: skip
        except _Ended:
            return
        except BaseException as error:
            handover.logits.put(error)

    thread = Thread(target=generate, name="generate", daemon=True)
    thread.start()
    try:
        while True:
            logits_BV = handover.logits.get()
            if isinstance(logits_BV, BaseException):
                raise logits_BV
            token_B = yield logits_BV, {}
            handover.tokens.put(token_B)
    finally:
        handover.tokens.put(None)
        thread.join()


def quiet_predictions(
    model: ThinkingModel, how: ThoughtParams, ends: list[int], job: Job
) -> Predictions:
    """Predict with a hidden thought before each token; must run inside `thoughtful(model.base)`.

    Args:
        model: a Quiet-STaR model.
        how: how it thinks. The seed of the thoughts is the job's.
        ends: ids of the tokens that end a text.
        job: the job.
    """
    ids_BT = torch.tensor([job.prompt] * job.n, device=model.base.device)
    seen = SeenThoughts()
    own = ThoughtParams(how.thoughts, how.temperature, how.think_when, job.seed + job.first)
    predictions = next_logits(model, ids_BT, torch.ones_like(ids_BT), own, ends=ends, seen=seen)
    logits_BV = next(predictions)
    while True:
        token_B = yield logits_BV, _written(seen, model.marks.end)
        logits_BV = predictions.send(token_B)


def _written(seen: SeenThoughts, end: int) -> dict[int, Thought]:
    """Return the thoughts of the rows, without the unused slots of thoughts that ended themselves."""
    found: dict[int, Thought] = {}
    for at, (row, thought_NS) in enumerate(zip(seen.rows, seen.thoughts, strict=True)):
        assert seen.before_XV is not None
        lengths = content_lengths(thought_NS, end).tolist()
        pairs = zip(thought_NS.tolist(), lengths, strict=True)
        ids = tuple(tuple(ids[:length]) for ids, length in pairs)
        found[row] = Thought(ids, seen.before_XV[at])
    return found
