"""The model `selftaught` of lm-evaluation-harness.

It opens what the model `hf` opens, in the same way, and Quiet-STaR models, which think before every
token that is scored or generated.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selftaught.harness.cost import CostMeter
from selftaught.quiet.continuations import Continuation, Likelihood, score_continuations
from selftaught.quiet.gating import ThinkWhen, ThoughtParams
from selftaught.quiet.model import QuietLM
from selftaught.quiet.old_folder import is_old_folder
from selftaught.quiet.pretrained_config import MODEL_TYPE
from selftaught.quiet.thoughts import decoder
from selftaught.quiet.transformers_model import QuietForCausalLM

HFLM: Any = huggingface.HFLM
"""The class of the model `hf`. `Any`, because the decorator that registers it hides its type."""
logger = logging.getLogger("lm_eval.selftaught")
"""A child of the logger whose messages lm_eval shows."""
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request: its texts (None for a window of a longer text), and the token ids of its context and of
its continuation."""


class SelfTaughtLM(HFLM):
    """A model of lm-evaluation-harness: a Quiet-STaR model, or any other model that `hf` opens.

    Requests are tokenized, truncated and post-processed by `HFLM`, the class of `hf`. With a
    Quiet-STaR model, log-likelihoods are those of `quiet.evaluation.score`, and texts are generated
    by `QuietForCausalLM.generate`.

    Args:
        pretrained: a folder, a name on the Hugging Face Hub, or a loaded model (which needs
            `tokenizer`).
        thoughts: number of thoughts per token. Default: 1.
        thought_temperature: sampling temperature of thoughts. Default: 0, greedy decoding.
        think_when: where to think: "trained" (the default), "always", "pattern", "answer",
            "entropy", "gate" or "never"; see `ThinkWhen`.
        pattern: regular expression for "pattern", or of the marker for "answer". Default: that of
            the training.
        threshold: threshold for "entropy" and "gate", in nats. Default: 0.
        seed: random seed for thoughts. Default: 0. Scored texts have the same random numbers in
            every batch. Generated texts have others if `batch_size` changes.
        options: options of `HFLM`, such as `batch_size`, `dtype`, `device` and `max_length`. With a
            Quiet-STaR model, `max_length` includes the tokens of a thought.

    Raises:
        ValueError: an option that the model does not have, or a context too short for a thought.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | QuietLM,
        thoughts: int | None = None,
        thought_temperature: float | None = None,
        think_when: str | None = None,
        pattern: str | None = None,
        threshold: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        asked = {
            "thoughts": thoughts, "thought_temperature": thought_temperature,
            "think_when": think_when, "pattern": pattern, "threshold": threshold, "seed": seed,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None}
        if isinstance(pretrained, QuietLM):
            pretrained = QuietForCausalLM.from_quiet(pretrained)
        if isinstance(pretrained, str):
            _refuse_old(pretrained)
        if options.get("device") is None:
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, **options)
        loaded = self.model
        self._quiet = loaded.quiet if isinstance(loaded, QuietForCausalLM) else None
        self._how = _thinking(self.tokenizer, **given)
        if self._quiet is None:
            self._check_plain(given)
            self._meter = CostMeter(loaded)
        else:
            self._check_quiet(self._quiet)
            loaded.thinking = self._how
            self._meter = CostMeter(decoder(self._quiet.base), self._quiet.tokens_beside)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a text. With a Quiet-STaR model, a thought fits beside it."""
        if self._quiet is None:
            return super().max_length
        lengths = (self._max_length, self._quiet.context)
        known = [length for length in lengths if length is not None]
        return min(known, default=self._DEFAULT_MAX_LENGTH) - self._quiet.tokens_beside

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        with self._counted("loglikelihood", requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each text, in windows of the context length."""
        with self._counted("loglikelihood_rolling", requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return a completion of each context, up to a stop string."""
        with self._counted("generate_until", requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model: that of `HFLM`, how it thinks, and its cost."""
        how = self._how
        thinking = None if self._quiet is None else {
            "thought_tokens": self._quiet.quiet_config.thought_tokens,
            "thoughts": how.thoughts, "thought_temperature": how.temperature,
            "think_when": how.think_when.rule, "pattern": how.think_when.pattern,
            "threshold": how.think_when.threshold, "seed": how.seed,
        }  # fmt: skip
        ours = {"thinking": thinking, "processes": self.world_size, "cost": self._meter.to_dict()}
        return super().get_model_info() | {"selftaught": ours}

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score encoded requests; a Quiet-STaR model thinks before the continuations only."""
        if self._quiet is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        bar = tqdm(
            total=len(requests),
            desc="Running loglikelihood requests",
            disable=disable_tqdm or self.rank != 0,
        )

        def scored(index: int, likelihood: Likelihood) -> None:
            texts = requests[index][0]
            if texts is not None:
                answer = (likelihood.log_prob, likelihood.greedy)
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            bar.update()

        dtype = self.mixed_precision_dtype
        with bar, torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            found = score_continuations(
                self._quiet,
                [self._continuation(context, target) for _, context, target in requests],
                self._how,
                batch_size=override_bs or int(self.batch_size),
                on_scored=scored,
            )
        return [(one.log_prob, one.greedy) for one in found]

    def _continuation(self, context: list[int], target: list[int]) -> Continuation:
        """Return a request that fits into the context, truncated on the left.

        Raises:
            ValueError: the continuation alone is too long.
        """
        limit = self.max_length
        if len(target) > limit:
            raise ValueError(
                f"Expected a continuation of at most {limit} tokens, which leave space for a "
                f"thought in the model's context; got {len(target)}."
            )
        ids = context + target
        if (cut := len(ids) - limit - 1) > 0:  # the last token is not read
            logger.warning(
                "A context of %d tokens with a continuation of %d is longer than %d tokens, the "
                "longest text beside a thought. The first %d tokens are left out.",
                len(context), len(target), limit, cut,
            )  # fmt: skip
        return Continuation(tuple(ids[-limit - 1 :]), len(target))

    @contextmanager
    def _counted(self, request_type: str, requests: Sequence[object]) -> Iterator[None]:
        """Context manager: count forward passes for this type of request, and log them."""
        with self._meter.during(request_type, len(requests)) as cost:
            yield
        logger.info(
            "%s: %d requests so far, %d forward passes, %d tokens of text, %d thoughts of %d tokens",
            request_type, cost.requests, cost.passes, cost.text_tokens, cost.thoughts,
            cost.thought_tokens,
        )  # fmt: skip

    def _check_quiet(self, quiet: QuietLM) -> None:
        """Raise `ValueError` if an option does not go with a Quiet-STaR model."""
        if self.max_length < 1:
            raise ValueError(
                f"A thought with its start and end takes {quiet.tokens_beside} tokens, and the "
                f"context has {self.max_length + quiet.tokens_beside}. Set a larger max_length."
            )
        if not isinstance(self.batch_size, int):
            raise ValueError(
                f"A model that thinks needs batch_size as a whole number; got {self.batch_size!r}. "
                "Set --batch_size 8, for example."
            )
        wanted_gate = self._how.think_when.rule == "gate"
        if wanted_gate and quiet.gate is None:
            raise ValueError(
                "think_when=gate needs a model with a gate; this one was trained with "
                "gate_weight=0. Use think_when=entropy."
            )

    def _check_plain(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` if an option does not go with a model that does not think."""
        if getattr(self.config, "model_type", None) == MODEL_TYPE:
            raise ValueError(
                f"Expected a Quiet-STaR model, got one inside of a {type(self.model).__name__}. "
                "Merge the adapter into the model first, and leave out peft, autogptq and gptqmodel."
            )
        if given:
            raise ValueError(
                f"{', '.join(sorted(given))} is for Quiet-STaR models, which think before every "
                f"token; {type(self.model).__name__} does not think. Leave it out, or give the "
                "folder of a Quiet-STaR model."
            )


register_model("selftaught")(SelfTaughtLM)  # not a decorator, which would hide the type


def _thinking(
    tokenizer: PreTrainedTokenizerBase,
    *,
    thoughts: int = 1,
    thought_temperature: float = 0.0,
    think_when: Any = "trained",
    pattern: str | None = None,
    threshold: float = 0.0,
    seed: int = 0,
) -> ThoughtParams:
    """Return how a model thinks, from the options of the command line."""
    return ThoughtParams(
        int(thoughts),
        float(thought_temperature),
        ThinkWhen(think_when, float(threshold), pattern, tokenizer),
        int(seed),
    )


def _refuse_old(pretrained: str) -> None:
    """Raise `ValueError` for a folder of an earlier version, which transformers reads as its base."""
    if is_old_folder(Path(pretrained)):
        raise ValueError(
            f"{pretrained} is a Quiet-STaR model of an earlier version. Convert it in Python: "
            "QuietForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
