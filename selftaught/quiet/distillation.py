"""Fast Quiet-STaR: thinking moved into plain prediction (Huang et al. 2025, arXiv:2505.17746).

The last stage of Fast Quiet-STaR trains a model without thoughts (the student) to predict what a
Quiet-STaR model predicts with thoughts (the teacher). The student is an ordinary causal language
model and costs what the base model costs.

Shapes: B texts, T text tokens, J positions, V vocabulary.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from selftaught.quiet.evaluation import predictions, score
from selftaught.quiet.gating import GREEDY, ThoughtParams
from selftaught.quiet.intervals import ratio_interval
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import Spans, padded
from selftaught.quiet.trainer import SpanEpochs, collated, filler_of
from selftaught.quiet.training import check_run, fit, run_hash, start_run, written_model

Loss = Literal["kl", "reward"]
"""Loss of the student, see `distillation_loss`."""


def distillation_loss(
    student_BTV: Tensor,
    teacher: QuietLM,
    ids_BT: Tensor,
    mask_BT: Tensor,
    how: ThoughtParams = GREEDY,
    loss: Loss = "kl",
) -> Tensor:
    """Return the mean loss of a student over the predicted tokens of a batch, in nats.

    "kl" is the Kullback-Leibler divergence of the student's prediction from that of the teacher, which
    mixes the predictions with and without thoughts. It is exact: a sum over the vocabulary. The start
    and end tokens of thoughts have probability 0 in it.

    "reward" is the next-token loss of Fast Quiet-STaR, `-r log p_student(x)` for the true token x. The reward
    r, which has no gradient, is the difference of log p(x) between teacher and student, at least 0. It
    differs from the released code, which takes the log-probability of a token drawn at temperature
    3 in place of x, times 1e6.

    Args:
        student_BTV: logits of the student at every position.
        teacher: a Quiet-STaR model. It gets no gradient.
        ids_BT: token ids of the texts.
        mask_BT: 1 for text and 0 for padding.
        how: how the teacher thinks.
        loss: "kl" or "reward".
    """
    losses: list[Tensor] = []
    for position_1J, taught in predictions(teacher, ids_BT, mask_BT, how):
        position_J = position_1J[0]
        log_p_BJV = student_BTV[:, position_J].float().log_softmax(-1)
        # A plain model must not learn to write the tokens around a thought.
        around = torch.tensor([teacher.marks.start, teacher.marks.end], device=ids_BT.device)
        target_BJV = taught.mixed_BJV.index_fill(-1, around, -torch.inf).log_softmax(-1)
        if loss == "kl":
            p_BJV = target_BJV.exp()
            terms_BJV = torch.where(p_BJV > 0, p_BJV * (target_BJV - log_p_BJV), 0.0)
            losses.append(terms_BJV.sum(-1))
            continue
        true_BJ1 = ids_BT[:, position_J + 1, None]
        log_p_BJ1 = log_p_BJV.gather(-1, true_BJ1)
        reward_BJ1 = (target_BJV.gather(-1, true_BJ1) - log_p_BJ1.detach()).clamp(min=0)
        losses.append(-(reward_BJ1 * log_p_BJ1)[..., 0])
    known_BT = (mask_BT[:, 1:] * mask_BT[:, :-1]).bool()
    return torch.cat(losses, 1)[known_BT].mean()


class Distiller(Trainer):
    """transformers' Trainer with the loss of `distillation_loss`.

    Args:
        teacher: the Quiet-STaR model.
        how: how the teacher thinks. The seed of its thoughts changes with every step.
        loss: "kl" or "reward".
        options: arguments of transformers' Trainer.
    """

    def __init__(self, teacher: QuietLM, how: ThoughtParams, loss: Loss, **options: Any) -> None:
        super().__init__(**options)
        self.teacher, self.how = teacher, how
        self.kind: Loss = loss
        self._micro = (-1, 0)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch."""
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        out = model(input_ids=ids_BT, attention_mask=mask_BT)
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        seed = f"{self.how.seed} {step} {self._micro[1]} {self.args.process_index}"
        how = replace(self.how, seed=random.Random(seed).getrandbits(60))
        value = distillation_loss(out.logits, self.teacher, ids_BT, mask_BT, how, self.kind)
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"The loss is {value.item()} at step {step + 1}, in the batch of texts "
                f"{inputs['text'].tolist()}. Lower learning_rate (now {self.args.learning_rate:g})."
            )
        return (value, out) if return_outputs else value


@dataclass(frozen=True)
class GainKept:
    """How much of the teacher's gain the student has, in nats per token of the texts."""

    tokens: int
    """Number of predicted tokens."""
    nll_base: float
    """Loss of the base model inside the teacher, without thoughts."""
    nll_teacher: float
    """Loss of the teacher with thoughts."""
    nll_student: float
    """Loss of the student, which does not think."""
    kept: float
    """(`nll_base` - `nll_student`) / (`nll_base` - `nll_teacher`). NaN if the teacher has no gain."""
    kept_low: float
    """Lower end of the 95% confidence interval, over texts."""
    kept_high: float
    """Upper end of the interval."""


@torch.no_grad()
def gain_kept(
    student: PreTrainedModel,
    teacher: QuietLM,
    spans: Sequence[tuple[int, Sequence[int]]],
    how: ThoughtParams = GREEDY,
    *,
    batch_size: int = 8,
) -> GainKept:
    """Measure a student beside its teacher on spans of texts.

    Args:
        student: a plain model with the vocabulary of the teacher.
        teacher: a Quiet-STaR model.
        spans: spans as (number of the text, token ids).
        how: how the teacher thinks.
        batch_size: number of spans per forward pass.
    """
    student.eval()
    rows: list[Tensor] = []
    for first in range(0, len(spans), batch_size):
        batch = spans[first : first + batch_size]
        ids, mask = (one.to(teacher.base.device) for one in padded([ids for _, ids in batch], 0))
        scored = score(teacher, ids, mask, how)
        logits = student(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        text = torch.tensor([number for number, _ in batch], device=ids.device)
        columns = (text[:, None].expand_as(plain), scored.without_BT, scored.with_BT, plain)
        rows.append(torch.stack([one[mask[:, 1:].bool()].double() for one in columns]).cpu())
    text, base, taught, plain = torch.cat(rows, 1)
    gained, possible = plain - base, taught - base
    kept = low = high = float("nan")
    if float(possible.sum()) > 0:
        kept = float(gained.sum() / possible.sum())
        low, high = ratio_interval(text.long(), gained, possible)
    return GainKept(
        len(text), -float(base.mean()), -float(taught.mean()), -float(plain.mean()), kept, low, high
    )


def distill(
    teacher: QuietLM,
    tokenizer: PreTrainedTokenizerBase,
    spans: Spans,
    arguments: TrainingArguments,
    *,
    out: Path,
    how: ThoughtParams = GREEDY,
    loss: Loss = "kl",
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:
    """Train a plain model to predict what a Quiet-STaR model predicts, and save it in `out/model`.

    The student starts as a copy of the base model inside the teacher. The model in `out/model` is an
    ordinary folder of transformers. Interruptions are continued as by `train_quiet`.

    Args:
        teacher: a Quiet-STaR model.
        tokenizer: its tokenizer.
        spans: the training data.
        arguments: training arguments; see `training.quiet_arguments`.
        out: run folder.
        how: how the teacher thinks.
        loss: "kl" or "reward"; see `distillation_loss`.
        progress: called with the number of new optimizer steps.

    Returns:
        The logged metrics, one dictionary per logging step.

    Raises:
        ValueError: `out` belongs to another training, or a loss is not finite.
    """
    log = out / "log.json"
    when = how.think_when
    thinking = [how.thoughts, how.temperature, how.seed, when.rule, when.threshold, when.pattern]
    plain = json.dumps([run_hash(teacher, spans, arguments), thinking, loss, "distillation"])
    made_from = hashlib.sha256(plain.encode()).hexdigest()[:16]
    if check_run(out, made_from):
        return json.loads(log.read_text(encoding="utf-8"))
    start_run(out, made_from, arguments)
    set_seed(arguments.seed)
    teacher.to(arguments.device)
    # In float32, because small updates are lost in 16 bits.
    student: PreTrainedModel = deepcopy(teacher.base).float()
    trainer = Distiller(
        teacher, how, loss, model=student.train(), args=arguments, train_dataset=spans,
        data_collator=lambda rows: collated(rows, filler_of(tokenizer)),
        callbacks=[SpanEpochs(spans, progress)],
    )  # fmt: skip
    fit(trainer, out)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        with written_model(out, history) as partial:
            student.config.use_cache = True
            student.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    trainer.accelerator.wait_for_everyone()
    return history
