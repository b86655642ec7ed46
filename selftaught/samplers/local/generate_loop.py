"""Sampling by `generate`: for models whose layers the shared-prefix loop cannot serve.

Prompts of one length at a time, so that nothing is padded: recurrent layers would carry the
padding into the text.
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
    """The road for any model that has `generate`."""

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
        """Complete every row of tokens, the last `begun[row]` of which are of its completion.

        `finished` gets a row's number and the tokens of its whole completion.
        """
        saved = self._described.generation_config
        # `generate` fills in what the model's own settings say, a repetition penalty for one.
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
    """The whole completions of rows of one length, each a prompt and what is begun after it."""
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
    """Leaves only the token that `choose` chooses."""

    def __init__(self, params: SamplingParams, prompt_length: int, uniform_BN: Tensor) -> None:
        self._params, self._start, self._uniform_BN = params, prompt_length, uniform_BN

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self._uniform_BN[:, input_ids.shape[1] - self._start]
        token_B = choose(scores, uniform_B, self._params)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Ends rows at a stop string or an end token, and remembers how long they had become."""

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
