"""Fallback decoding with `generate()`, for models that the shared-prefix loop does not support.

Batches contain prompts of equal length, so that there is no padding, which would change the state
of recurrent layers.
"""

from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.token_choice import Decoding, choose
from selftaught.samplers.stopping import Ending


class PlainLoop:
    """Decoding with `generate()`, for any model that has this method.

    Args:
        model: The model.
        described: The transformers model with the configuration: the model itself or its base.
    """

    def __init__(self, model: nn.Module, described: PreTrainedModel) -> None:
        self._model = model
        self._described = described

    def complete(self, asked: Decoding, batch_size: int) -> None:
        """Complete every row, at most `batch_size` rows at a time."""

        def lengths(number: int) -> tuple[int, int]:
            return len(asked.rows[number]), asked.prefix_tokens[number]

        saved = self._described.generation_config
        # `generate` applies the model's own generation config, such as a repetition penalty.
        self._described.generation_config = GenerationConfig()
        try:
            order = sorted(range(len(asked.rows)), key=lengths)
            for (length, own), same in groupby(order, key=lengths):
                numbers = list(same)
                for start in range(0, len(numbers), batch_size):
                    batch = numbers[start : start + batch_size]
                    drawn = _generate(self._model, asked, batch, length - own)
                    for number, tokens in zip(batch, drawn, strict=True):
                        asked.finished(number, tokens)
        finally:
            self._described.generation_config = saved


def _generate(
    model: nn.Module, asked: Decoding, batch: list[int], prompt_length: int
) -> list[list[int]]:
    """Return the whole completions of the rows of a batch, whose prompts have equal lengths."""
    uniform_BN = asked.uniform_BN[batch]
    token_BT = torch.tensor([asked.rows[number] for number in batch], device=uniform_BN.device)
    ends = _Ends(asked.ending, prompt_length, len(token_BT))
    eos = asked.ending.eos or None
    out_BT = model.generate(  # type: ignore[operator]
        token_BT,
        attention_mask=torch.ones_like(token_BT),
        generation_config=GenerationConfig(
            max_new_tokens=prompt_length + asked.params.max_tokens - token_BT.shape[1],
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
        ),
        logits_processor=LogitsProcessorList([_Draw(asked.params, prompt_length, uniform_BN)]),
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    drawn = out_BT[:, prompt_length:].tolist()
    return [tokens[:length] for tokens, length in zip(drawn, ends.length_B.tolist(), strict=True)]


class _Draw(LogitsProcessor):
    """Sets the logits of all tokens except the one from `choose` to minus infinity."""

    def __init__(self, params: SamplingParams, prompt_length: int, uniform_BN: Tensor) -> None:
        self._params, self._start, self._uniform_BN = params, prompt_length, uniform_BN

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self._uniform_BN[:, input_ids.shape[1] - self._start]
        token_B = choose(scores, uniform_B, self._params)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Stops rows at a stop string or an end token, and records their lengths."""

    def __init__(self, ending: Ending, prompt_length: int, rows: int) -> None:
        self._ending, self._start = ending, prompt_length
        self._done = [False] * rows
        self.length_B = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        drawn_BT = input_ids[:, self._start :]
        suspects = self._ending.suspects(drawn_BT[:, -1]).tolist()
        for row, (token, suspect) in enumerate(
            zip(drawn_BT[:, -1].tolist(), suspects, strict=True)
        ):
            if not self._done[row]:
                self.length_B[row] = drawn_BT.shape[1]
                stopped = suspect and self._ending.cut(drawn_BT[row].tolist()) is not None
                self._done[row] = stopped or token in self._ending.eos
        return torch.tensor(self._done, device=input_ids.device)
