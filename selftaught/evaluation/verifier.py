"""Verifiers: models that score completions (V-STaR, Hosseini et al. 2024, arXiv:2402.06457).

A verifier is a language model trained with DPO to prefer correct completions. Its score of a
completion is the completion's log-probability. The baseline, an outcome reward model, is a
classifier.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from selftaught.hub import check_model_name
from selftaught.prompts import PromptStyle
from selftaught.records import Completion, Problem, Rollout, Text
from selftaught.rendering import TemplateOptions, prompt_ids
from selftaught.samplers import Closing, open_scorer
from selftaught.training import completion_ids, written_ids

logger = logging.getLogger(__name__)

Score = Literal["sum", "mean", "reward"]


class Verifier(Closing):
    """A model that scores completions. As a context manager, it frees its memory at the end.

    Args:
        model: model folder or Hugging Face name.
        score: "sum": the log-probability of the completion, log V(y|x), as in the paper. "mean":
            the same per token. "reward": log V(y|x) - log G(y|x), the implicit reward of DPO
            divided by beta.
        reference: the model G that the verifier was trained from; required by "reward" only.
        options: options of the scorer, such as `batch_size` and `device`.

    Raises:
        ValueError: "reward" without a reference, or a reference without "reward".
    """

    def __init__(
        self,
        model: str | Path,
        *,
        score: Score = "sum",
        reference: str | Path | None = None,
        **options: Any,
    ) -> None:
        if (score == "reward") != (reference is not None):
            raise ValueError(
                'Expected a reference model with the score "reward" and with no other score; got '
                f"score={score!r} and reference={str(reference)!r}."
            )
        self._score = score
        self._scorers = [open_scorer(str(one), **options) for one in (model, reference) if one]
        self.model = str(model)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of the verifier and, if there is one, of the reference model."""
        return " ".join(scorer.fingerprint for scorer in self._scorers)

    def score(
        self,
        rollouts: Sequence[Rollout],
        style: PromptStyle,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Return one score per rollout, in the same order; higher is better.

        The sampled token ids of a completion are scored if they are of this model's tokenizer.
        Otherwise its text is tokenized again, and a warning gives the number of such completions.

        Args:
            rollouts: the completions.
            style: prompt style.
            progress: called with the number of completions just scored.
        """
        grouped: dict[str, list[int]] = {}
        for at, rollout in enumerate(rollouts):
            grouped.setdefault(rollout.problem.id, []).append(at)
        groups = [(style(rollouts[at[0]].problem), at) for at in grouped.values()]
        return self._scores(rollouts, groups, style.chat_template_kwargs, progress)

    def score_completions(
        self, prompt: Text, completions: Sequence[Completion], options: TemplateOptions
    ) -> list[float]:
        """Return one score per completion of a prompt; higher is better.

        Args:
            prompt: text or messages.
            completions: the completions.
            options: variables of the chat template.
        """
        rollouts = as_rollouts(Problem("", "", ""), prompt, completions, self.model)
        return self._scores(rollouts, [(prompt, range(len(rollouts)))], options)

    def _scores(
        self,
        rollouts: Sequence[Rollout],
        groups: Sequence[tuple[Text, Sequence[int]]],
        options: TemplateOptions,
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Return one score per rollout; `groups` are prompts and the indices of their rollouts."""
        totals = [
            self._summed(scorer, rollouts, groups, options, progress if at == 0 else None)
            for at, scorer in enumerate(self._scorers)
        ]
        if self._score == "reward":
            return [own - other for own, other in zip(*totals, strict=True)]
        return totals[0]

    def _summed(
        self,
        scorer: Any,
        rollouts: Sequence[Rollout],
        groups: Sequence[tuple[Text, Sequence[int]]],
        options: TemplateOptions,
        progress: Callable[[int], None] | None,
    ) -> list[float]:
        tokenizer = scorer.tokenizer
        foreign = sum(written_ids(one, tokenizer) is None for one in rollouts if one.token_ids)
        if foreign:
            logger.warning(
                "%d of %d completions were tokenized again: the tokenizer of %s does not decode "
                "their "
                "token ids to their text.",
                foreign,
                len(rollouts),
                scorer.model,
            )
        ids = [completion_ids(rollout, tokenizer) for rollout in rollouts]
        found = scorer.log_probs(
            [prompt for prompt, _ in groups],
            [[ids[at] for at in group] for _, group in groups],
            options=options,
            progress=progress,
        )
        scores = [0.0] * len(rollouts)
        for (_, group), candidates in zip(groups, found, strict=True):
            for at, each in zip(group, candidates, strict=True):
                scores[at] = sum(each) / max(1, len(each) if self._score == "mean" else 1)
        return scores

    def close(self) -> None:
        """Free the memory."""
        for scorer in self._scorers:
            scorer.close()


class OutcomeModel:
    """An outcome reward model: a classifier's log-odds that a completion is right."""

    def __init__(self, model: str | Path, *, batch_size: int = 64, device: str = "auto") -> None:
        import torch
        from transformers import AutoTokenizer

        from selftaught.samplers.weights import check_weights, load_model

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = str(model)
        self._batch_size = batch_size
        check_weights(self.model)
        check_model_name(self.model)
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        loaded = load_model(self.model, "sequence_classification")
        self._model = loaded.to(device).eval()

    def score(self, rollouts: Sequence[Rollout], style: PromptStyle) -> list[float]:
        """Return one log-odds per rollout, in the same order; above 0 means correct."""
        import torch

        options = style.chat_template_kwargs
        texts = [
            [*prompt_ids(self._tokenizer, style(one.problem), options),
             *completion_ids(one, self._tokenizer)]
            for one in rollouts
        ]  # fmt: skip
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            batch = self._tokenizer.pad(
                {"input_ids": [texts[at] for at in part]}, return_tensors="pt"
            )
            with torch.inference_mode():
                logits_B1 = self._model(**batch.to(self._model.device)).logits
            for at, score in zip(part, logits_B1[:, 0].tolist(), strict=True):
                scores[at] = score
        return scores


def as_rollouts(
    problem: Problem, prompt: Any, completions: Sequence[Completion], model: str
) -> list[Rollout]:
    """Return the completions of a problem as rollouts that can be scored."""
    return [
        Rollout(problem, prompt, one.text, one.finish_reason, model, index,
                token_ids=one.token_ids, thought_open=one.thought_open)
        for index, one in enumerate(completions)
    ]  # fmt: skip
