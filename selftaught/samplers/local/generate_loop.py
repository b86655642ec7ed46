"""Fallback decoding with `generate()`, for models that the shared-prefix loop does not support.

Batches contain prompts of equal length, so that there is no padding, which would change the state
of recurrent layers.
"""

from collections.abc import Callable, Sequence
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
from selftaught.samplers.local.token_choice import choose
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

    def complete(
        self,
        rows: Sequence[tuple[int, ...]],
        uniform_BN: Tensor,
        params: SamplingParams,
        ending: Ending,
        finished: Callable[[int, list[int]], None],
        *,
        prefix_tokens: Sequence[int],
        batch_size: int,
    ) -> None:
        """Complete every row of tokens.

        Args:
            rows: Token ids of prompts, each followed by the prefix tokens of its completion.
            uniform_BN: Uniform random numbers, one per row and token of the completion.
            params: Sampling parameters.
            ending: Decides when a completion ends.
            finished: Called with a row's index and the token ids of its whole completion.
            prefix_tokens: Number of prefix tokens of each row.
            batch_size: Maximum number of rows at a time.
        """
        saved = self._described.generation_config
        # `generate` applies the model's own generation config, such as a repetition penalty.
        self._described.generation_config = GenerationConfig()
        try:
            self._complete(rows, prefix_tokens, uniform_BN, params, ending, finished, batch_size)
        finally:
            self._described.generation_config = saved

    def _complete(
        self,
        rows: Sequence[tuple[int, ...]],
        prefix_tokens: Sequence[int],
        uniform_BN: Tensor,
        params: SamplingParams,
        ending: Ending,
        finished: Callable[[int, list[int]], None],
        batch_size: int,
    ) -> None:
        def lengths(number: int) -> tuple[int, int]:
            return len(rows[number]), prefix_tokens[number]

        for (length, own), same in groupby(sorted(range(len(rows)), key=lengths), key=lengths):
            numbers = list(same)
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                token_BT = torch.tensor([rows[number] for number in batch])
                drawn = _generate(
                    self._model, token_BT, length - own, uniform_BN[batch], params, ending
                )
                for number, tokens in zip(batch, drawn, strict=True):
                    finished(number, tokens)


def _generate(
    model: nn.Module,
    token_BT: Tensor,
    prompt_length: int,
    uniform_BN: Tensor,
    params: SamplingParams,
    ending: Ending,
) -> list[list[int]]:
    """Return the whole completions of rows of equal length: prompts followed by prefix tokens."""
    token_BT = token_BT.to(uniform_BN.device)
    ends = _Ends(ending, prompt_length, len(token_BT))
    eos = ending.eos or None
    out_BT = model.generate(  # type: ignore[operator]
        token_BT,
        attention_mask=torch.ones_like(token_BT),
        generation_config=GenerationConfig(
            max_new_tokens=prompt_length + params.max_tokens - token_BT.shape[1],
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
        ),
        logits_processor=LogitsProcessorList([_Draw(params, prompt_length, uniform_BN)]),
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
