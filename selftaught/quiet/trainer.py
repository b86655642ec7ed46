"""transformers' `Trainer` for Quiet-STaR: seeds of thoughts, learning rates of heads, and metrics."""

import json
import logging
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from selftaught.quiet.evaluation import DECILES
from selftaught.quiet.legibility import batch_signals, distinct_at_positions
from selftaught.quiet.model import QuietOutput
from selftaught.quiet.reference import Reference
from selftaught.quiet.spans import Spans, padded
from selftaught.quiet.where import Matcher

logger = logging.getLogger(__name__)

WARN_AFTER, LEAST_SPREAD = 50, 1e-3
"""A warning is logged from this step on if thoughts differ by fewer nats."""


class QuietTrainer(Trainer):
    """transformers' Trainer with a separate random seed for the thoughts of every batch, and
    metrics."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._gains: list[Tensor] = []
        self._micro = (-1, 0)
        self._warned = False
        self._tokens, self._since = 0, time.perf_counter()
        self.reference: Reference | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the heads in separate parameter groups with their learning
        rate."""
        optimizer = super().create_optimizer(model)
        quiet: Any = self.accelerator.unwrap_model(self.model)
        rate = quiet.quiet_config.head_rate
        parts = (quiet.mixing, quiet.gate)
        heads = {id(one) for part in parts if part is not None for one in part.parameters()}
        for group in list(optimizer.param_groups):
            own = [one for one in group["params"] if id(one) in heads]
            if own and rate != 1:
                group["params"] = [one for one in group["params"] if id(one) not in heads]
                optimizer.add_param_group({**group, "params": own, "lr": rate * group["lr"]})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch.

        The random seed of its thoughts depends on the seed of the run, the step, the number of the
        batch within the step, and the process.
        """
        texts = inputs.pop("text")
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        seed = f"{self.args.seed} {step} {self._micro[1]} {self.args.process_index}"
        quiet: Any = self.accelerator.unwrap_model(self.model)
        quiet.reference = self.reference if self._compares(step) else None
        out: QuietOutput = model(**inputs, seed=random.Random(seed).getrandbits(60))
        assert out.loss is not None
        if not bool(torch.isfinite(out.loss)):
            kept = last_checkpoint(Path(str(self.args.output_dir)))
            checkpoint = f"The last checkpoint is {kept}" if kept else "There is no checkpoint yet"
            raise ValueError(
                f"The loss is {out.loss.item()} at step {step + 1}, in the batch of texts "
                f"{texts.tolist()}. {checkpoint}; "
                f"lower learning_rate (now {self.args.learning_rate:g}) or reinforce_weight."
            )
        self._note(out, inputs)
        return (out.loss, out) if return_outputs else out.loss

    def _compares(self, step: int) -> bool:
        """Return whether the thoughts of a step, numbered from 0, are compared with the reference."""
        quiet: Any = self.accelerator.unwrap_model(self.model)
        if quiet.quiet_config.thought_kl_weight > 0:
            return True
        if self.reference is None:
            return False
        return step % self.reference.every == 0 or step + 1 == self.state.max_steps

    def _note(self, out: QuietOutput, inputs: dict[str, Any]) -> None:
        assert out.nll_with_K is not None
        gains = _gains(out, inputs)
        before = out.nll_without
        if "think_mask" in inputs and before is not None:
            self._sums["nll_without_text"].append(float(before))
            before = -gains[0].mean()  # where the model thinks, to compare with `nll_with`
        if gains.shape[1]:
            for name, value in (
                ("nll_without", before), ("nll_with", out.nll_with_K[0]),
                ("nll_with_lookahead", out.nll_with_K.mean()), ("reward", out.reward),
                ("positive_advantages", out.positive), ("mixing_weight", out.weight),
                ("thought_entropy", out.entropy), ("reinforce", out.reinforce),
                ("thought_length", out.length), ("withheld_advantages", out.withheld),
                ("thought_length", out.length), ("thought_kl", out.thought_kl),
                ("thought_base_nll", out.thought_base_nll),
            ):  # fmt: skip
                if value is not None:
                    self._sums[name].append(float(value))
            for name, value in (signals(out, inputs) | self._legibility(out, inputs)).items():
                self._sums[name].append(value)
        self._gains.append(gains)
        self._tokens += int(inputs["attention_mask"].sum())

    def _legibility(self, out: QuietOutput, inputs: dict[str, Any]) -> dict[str, float]:
        assert out.thought_BNJS is not None
        quiet: Any = self.accelerator.unwrap_model(self.model)
        used_BJ = _used(out, inputs, len(out.thought_BNJS))[1]
        return batch_signals(out.thought_BNJS, used_BJ, quiet.marks.end)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of thoughts since the last log entry, and log as the Trainer does."""
        if self._sums and "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            without, gain = torch.cat(self._gains, 1)
            hard = (-without).argsort(stable=True)
            for number, part in enumerate(gain[hard].tensor_split(DECILES) if len(gain) else (), 1):
                logs[f"gain_decile_{number}"] = float(part.mean()) if len(part) else 0.0
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens / (now - self._since)
            logs["peak_memory_gb"] = peak_memory()
            self._warn_without_signal(logs)
            self._sums.clear()
            self._gains.clear()
            self._tokens, self._since = 0, now
        super().log(logs, start_time)

    def _warn_without_signal(self, logs: dict[str, float]) -> None:
        """Warn once if REINFORCE has had nothing to learn from since the last log entry."""
        quiet: Any = self.accelerator.unwrap_model(self.model)
        spread = logs.get("reward_spread")
        if self._warned or not quiet.quiet_config.reinforce_weight or spread is None:
            return
        if self.state.global_step >= WARN_AFTER and spread < LEAST_SPREAD:
            self._warned = True
            logger.warning(
                "REINFORCE has no signal at step %d: the thoughts of a position change the "
                "log-probability of the next tokens by %.1e nats, so none is better than another. "
                "Mean mixing weight %.3f, share of distinct thoughts %.2f. Raise the learning rate or "
                "head_rate if the weight is near 0, and the temperature if thoughts are equal.",
                self.state.global_step, spread, logs.get("mixing_weight", 0.0),
                logs["distinct_thoughts"],
            )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the weights of a checkpoint, with tied weights once, and their moving average.

        The Trainer's own method refuses tied weights here.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        if model.average is not None:
            model.average.save(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the weights of a checkpoint, and the moving average if there is one."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        average = self.accelerator.unwrap_model(self.model).average
        if average is not None:
            average.load(Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Check the loaded weights. Only duplicates of tied weights may be missing in a
        checkpoint."""
        quiet: Any = self.accelerator.unwrap_model(self.model)
        weights, absent = quiet.state_dict(), set(load_result.missing_keys)
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in absent}
        missing = [name for name in absent if weights[name].data_ptr() not in loaded]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:3]}, unexpected "
                f"{load_result.unexpected_keys[:3]}. Delete the checkpoint, or train with the same "
                "options as before."
            )


class SpanEpochs(TrainerCallback):
    """Sets the epoch of the spans and reports progress."""

    def __init__(self, spans: Spans, progress: Callable[[int], object] | None) -> None:
        self.spans, self.progress = spans, progress

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.progress and state.global_step:
            self.progress(state.global_step)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.spans.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.progress:
            self.progress(1)


def signals(out: QuietOutput, inputs: dict[str, Any]) -> dict[str, float]:
    """Return how much the thoughts of a position differ; REINFORCE learns from these differences.

    At least one position must have a token after it.

    Returns:
        `reward_spread`, the standard deviation over the thoughts of a position of the
        log-probability of its lookahead tokens, in nats, and `distinct_thoughts`, the number of
        different thoughts divided by the number of thoughts; both are means over the positions of
        the text. Empty with one thought per position.
    """
    assert out.log_prob_with_BNJK is not None and out.thought_BNJS is not None
    thoughts = out.thought_BNJS.shape[1]
    if thoughts == 1 or out.thought_BNJS.shape[-1] == 0:
        return {}
    known_BJ = _used(out, inputs, len(out.thought_BNJS))[1]
    spread_BJ = out.log_prob_with_BNJK.detach().float().sum(-1).std(1, correction=0)
    distinct_BJ = distinct_at_positions(out.thought_BNJS)
    return {
        "reward_spread": float(spread_BJ[known_BJ].mean()),
        "distinct_thoughts": float(distinct_BJ[known_BJ].mean()),
    }


def _gains(out: QuietOutput, inputs: dict[str, Any]) -> Tensor:
    """Return log-probability and gain of every token before which the model thinks: `[2, X]`.

    Both are in nats. The log-probability is that without thoughts. The gain is the mean over
    thoughts.
    """
    assert out.log_prob_without_BT is not None and out.log_prob_with_BNJK is not None
    with_BJ = out.log_prob_with_BNJK[..., 0].mean(1)
    position_BJ, known_BJ = _used(out, inputs, len(with_BJ))
    without_BJ = out.log_prob_without_BT.gather(1, position_BJ)
    return torch.stack([without_BJ[known_BJ], (with_BJ - without_BJ)[known_BJ]]).float().cpu()


def _used(out: QuietOutput, inputs: dict[str, Any], texts: int) -> tuple[Tensor, Tensor]:
    """Return the positions that think, and which of them have a weight and a token after them.

    Both are `[B, J]`, without the last token of a text.
    """
    assert out.position_BJ is not None
    position_BJ = out.position_BJ.expand(texts, -1)
    known_BJ = inputs["attention_mask"].gather(1, position_BJ + 1).bool()
    return position_BJ, known_BJ if out.factor_BJ is None else known_BJ & (out.factor_BJ > 0)


def peak_memory() -> float:
    """Return the peak memory of this process in GB.

    With a GPU, it is the peak of allocated GPU memory. NaN if it is unknown.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # not a POSIX system
        return float("nan")
    bytes_per_count = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_count / 1e9


def collated(
    rows: list[dict[str, Any]], filler: int, matcher: Matcher | None = None
) -> dict[str, Tensor]:
    """Return a batch of spans, padded on the right.

    Args:
        rows: the spans.
        filler: id of the padding token.
        matcher: finds the positions that think, if the text decides. They are in `think_mask`.
    """
    ids, mask = padded([row["input_ids"] for row in rows], filler)
    batch = {"input_ids": ids, "attention_mask": mask}
    if matcher is not None:
        batch["think_mask"] = matcher.masks(ids, mask)
    return batch | {"text": torch.tensor([row["text"] for row in rows])}


def filler_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token for padding: that of the tokenizer, else its end token, else 0."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for newest in reversed(found):
        try:
            json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(newest)
    return None
