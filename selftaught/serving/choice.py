"""The next token of rows with different sampling parameters.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.token_choice import choose
from selftaught.serving.jobs import LogProb, Row

SMALLEST = 1e-5
"""A temperature below this number is greedy decoding, and so is a top_p. In float32, the division by
a much smaller one gives no probabilities."""


def choose_tokens(logits_BV: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[LogProb | None]]:
    """Return the next token of every row, and its log-probability if its job asked for it.

    Log-probabilities are those of the model, before temperature and top_p.

    Args:
        logits_BV: logits, one line per row.
        rows: the rows, each with its own temperature, top_p and random number.
    """
    alike: dict[tuple[float, float], list[int]] = {}
    for at, row in enumerate(rows):
        temperature = row.job.temperature if row.job.temperature >= SMALLEST else 0.0
        alike.setdefault((temperature, max(row.job.top_p, SMALLEST)), []).append(at)
    token_B = torch.empty(len(rows), dtype=torch.long, device=logits_BV.device)
    for (temperature, top_p), numbers in alike.items():
        uniform = torch.tensor([rows[at].uniform for at in numbers], device=logits_BV.device)
        params = SamplingParams(temperature=temperature, top_p=top_p)
        token_B[numbers] = choose(logits_BV[numbers], uniform, params)
    tokens = token_B.tolist()
    return tokens, [
        log_prob(logits_BV[at], token, row.job.log_probs) if row.job.log_probs is not None else None
        for at, (row, token) in enumerate(zip(rows, tokens, strict=True))
    ]


def log_prob(logits_V: Tensor, token: int, top: int) -> LogProb:
    """Return the log-probability of a token and the `top` most likely tokens."""
    log_prob_V = logits_V.float().log_softmax(-1)
    if not top:
        return LogProb(token, float(log_prob_V[token]))
    values, ids = log_prob_V.topk(min(top, len(log_prob_V)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return LogProb(token, float(log_prob_V[token]), tuple(pairs))
