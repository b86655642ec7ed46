"""Quiet-STaR training on plain text with transformers' `Trainer`.

Checkpoints are those of the Trainer. `out/model` is written only after training has finished. The
same call resumes from the last complete checkpoint and gives the same weights, because spans,
thoughts and the optimizer state depend only on the seed and the step.
"""

import hashlib
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from selftaught.options import check_types
from selftaught.quiet.checkpoint import fingerprint, save_quiet
from selftaught.quiet.evaluation import DECILES
from selftaught.quiet.model import QuietLM, QuietOutput
from selftaught.quiet.spans import Spans, padded

PAPER = {"learning_rate": 1e-6, "warmup_steps": 20, "weight_decay": 0.001,
         "per_device_train_batch_size": 8}  # fmt: skip
"""Training arguments of Appendix A of Zelikman et al. 2024 (arXiv:2403.09629)."""
DECIDING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "weight_decay",
    "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed",
    "lr_scheduler_kwargs", "dataloader_drop_last", "world_size", "label_smoothing_factor",
)  # fmt: skip
"""Training arguments that change the resulting weights."""


def quiet_arguments(output_dir: Path, /, **options: Any) -> TrainingArguments:
    """Return transformers' `TrainingArguments` with defaults for Quiet-STaR.

    The defaults are those of the paper (`PAPER`) and logging of every step.

    Args:
        output_dir: folder for checkpoints.
        options: fields of `TrainingArguments`. They take precedence over the defaults.

    Raises:
        ValueError: an unknown option, `output_dir` as an option, or fp16, whose range is too small
            for REINFORCE at the published weight.
    """
    if "output_dir" in options:
        raise ValueError(
            "output_dir cannot be set here: checkpoints are in the run folder. Choose that with "
            "--out."
        )
    check_types("TrainingArguments", TrainingArguments, options)
    if options.get("fp16"):
        raise ValueError(
            "The range of fp16 is too small for the gradients of REINFORCE at the published "
            "weight; use bf16."
        )
    defaults = PAPER | {
        "report_to": "none",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), **(defaults | options))
    except TypeError as error:
        raise ValueError(
            f"transformers' TrainingArguments refused the training options: {error}. Its fields "
            "are listed at https://huggingface.co/docs/transformers/main_classes/trainer."
        ) from None
    if arguments.n_gpu > 1:
        # DataParallel in one process is not supported. With torchrun, each device has its process.
        arguments._n_gpu = 1
    return arguments


def train_quiet(
    model: QuietLM,
    tokenizer: PreTrainedTokenizerBase,
    spans: Spans,
    arguments: TrainingArguments,
    *,
    out: Path,
    peft_model: Any = None,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:
    """Train a Quiet-STaR model and save it in `out/model`.

    Args:
        model: the model to train, changed in place.
        tokenizer: its tokenizer.
        spans: the training data.
        arguments: training arguments; see `quiet_arguments`.
        out: run folder. If it contains an interrupted training with the same settings, training
            resumes; if it contains the finished model, only the log is read.
        peft_model: LoRA adapter around the base model, as `with_lora` returns it. It is merged into
            the model at the end. None: train all weights.
        progress: called with the number of new optimizer steps.

    Returns:
        The logged metrics, one dictionary per logging step.

    Raises:
        ValueError: `out` belongs to another training, a loss is not finite, or the settings make
            all advantages of REINFORCE 0.
    """
    if why := model.quiet_config.without_reinforcement:
        raise ValueError(why)
    checkpoints, log = out / "checkpoints", out / "log.json"
    made_from = _made_from(model, spans, arguments, [_adapter(peft_model)])
    if check_run(out, made_from):
        return json.loads(log.read_text(encoding="utf-8"))
    if arguments.process_index == 0:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "made_from.json", {"made_from": made_from})
    set_seed(arguments.seed)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=spans,
        data_collator=lambda rows: _collated(rows, _filler(tokenizer)),
        callbacks=[_Epochs(spans, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    last = _last_whole(checkpoints)
    if last is not None and 0 < arguments.max_steps <= _steps(last):
        # Training had finished, but the process stopped before it saved the model.
        trainer._load_from_checkpoint(last)
        trainer.state = trainer.state.load_from_json(str(Path(last) / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=last)
    history = [entry for entry in trainer.state.log_history if "nll_with" in entry]
    if not trainer.is_world_process_zero():
        return history
    if peft_model is not None:
        peft_model.merge_and_unload()
    _write(log, history)
    model.base.config.use_cache = True  # the Trainer has disabled it
    partial = out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_quiet(model, tokenizer, partial)
    partial.rename(out / "model")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return history


def with_lora(model: QuietLM, *, r: int, alpha: int, target_modules: str) -> Any:
    """Add a LoRA adapter to the base model.

    Only the adapter, the offsets of the two new embeddings and the heads are then trained.

    Args:
        model: a Quiet-STaR model, changed in place.
        r: rank of the adapter.
        alpha: scaling factor of the adapter.
        target_modules: "all-linear", or layer names separated by commas.

    Returns:
        The PEFT model, for `train_quiet`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules if target_modules == "all-linear" else target_modules.split(","),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model.base, config)


class _Trainer(Trainer):
    """transformers' Trainer with a separate random seed for the thoughts of every batch, and
    metrics."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._gains: list[Tensor] = []
        self._micro = (-1, 0)
        self._tokens, self._since = 0, time.perf_counter()

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
        out: QuietOutput = model(**inputs, seed=random.Random(seed).getrandbits(60))
        assert out.loss is not None
        if not bool(torch.isfinite(out.loss)):
            kept = _last_whole(Path(str(self.args.output_dir)))
            checkpoint = f"The last checkpoint is {kept}" if kept else "There is no checkpoint yet"
            raise ValueError(
                f"The loss is {out.loss.item()} at step {step + 1}, in the batch of texts "
                f"{texts.tolist()}. {checkpoint}; "
                f"lower learning_rate (now {self.args.learning_rate:g}) or reinforce_weight."
            )
        self._note(out, inputs)
        return (out.loss, out) if return_outputs else out.loss

    def _note(self, out: QuietOutput, inputs: dict[str, Any]) -> None:
        assert out.nll_with_K is not None
        for name, value in (
            ("nll_without", out.nll_without), ("nll_with", out.nll_with_K[0]),
            ("nll_with_lookahead", out.nll_with_K.mean()), ("reward", out.reward),
            ("positive_advantages", out.positive), ("mixing_weight", out.weight),
            ("thought_entropy", out.entropy), ("reinforce", out.reinforce),
        ):  # fmt: skip
            if value is not None:
                self._sums[name].append(float(value))
        self._gains.append(_gains(out, inputs))
        self._tokens += int(inputs["attention_mask"].sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of thoughts since the last log entry, and log as the Trainer does."""
        if self._sums and "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            without, gain = torch.cat(self._gains, 1)
            for number, part in enumerate(
                gain[(-without).argsort(stable=True)].tensor_split(DECILES), 1
            ):
                logs[f"gain_decile_{number}"] = float(part.mean()) if len(part) else 0.0
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens / (now - self._since)
            logs["peak_memory_gb"] = peak_memory()
            self._sums.clear()
            self._gains.clear()
            self._tokens, self._since = 0, now
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the weights of a checkpoint, with tied weights once.

        The Trainer's own method refuses tied weights here.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})

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


class _Epochs(TrainerCallback):
    """Sets the epoch of the spans and reports progress."""

    def __init__(self, spans: Spans, progress: Callable[[int], object] | None) -> None:
        self.spans, self.progress = spans, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and state.global_step:
            self.progress(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spans.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress(1)


def _gains(out: QuietOutput, inputs: dict[str, Any]) -> Tensor:
    """Return log-probability and gain of every token before which the model thinks: `[2, X]`.

    Both are in nats. The log-probability is that without thoughts. The gain is the mean over
    thoughts.
    """
    assert out.log_prob_without_BT is not None and out.log_prob_with_BNJK is not None
    assert out.position_BJ is not None
    with_BJ = out.log_prob_with_BNJK[..., 0].mean(1)
    position_BJ = out.position_BJ.expand(len(with_BJ), -1)
    without_BJ = out.log_prob_without_BT.gather(1, position_BJ)
    known_BJ = inputs["attention_mask"].gather(1, position_BJ + 1).bool()
    return torch.stack([without_BJ[known_BJ], (with_BJ - without_BJ)[known_BJ]]).float().cpu()


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


def _collated(rows: list[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    ids, mask = padded([row["input_ids"] for row in rows], filler)
    return {"input_ids": ids, "attention_mask": mask, "text": torch.tensor([row["text"] for row in rows])}  # fmt: skip


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def _last_whole(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for newest in reversed(found):
        try:
            json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(newest)
    return None


def _made_from(model: QuietLM, spans: Spans, arguments: TrainingArguments, more: object) -> str:
    """Return a hash of everything that determines the resulting weights."""
    settings = asdict(model.quiet_config)
    for name in ("positions_per_chunk", "chunk_megabytes"):
        settings.pop(name)  # changes memory use, not results
    if not settings["drop_zero_losses"]:
        settings.pop("drop_zero_losses")  # the same hash as before this option existed
    options = {name: getattr(arguments, name) for name in DECIDING}
    first = [fingerprint(model.base), model.moved.detach().cpu().tolist()]
    whole = [settings, options, more, first, spans.length, spans.seed]
    digest = hashlib.sha256(json.dumps(whole, default=str, sort_keys=True).encode())
    for ids in spans.texts:
        digest.update(str(ids).encode())
    return digest.hexdigest()[:16]


def check_run(out: Path, made_from: str) -> bool:
    """Return whether a run folder contains the finished model of this training.

    Args:
        out: the run folder.
        made_from: hash of what determines the weights of this training.

    Raises:
        ValueError: the folder contains a model or checkpoints of another training.
    """
    path, model = out / "made_from.json", out / "model"
    found = json.loads(path.read_text(encoding="utf-8"))["made_from"] if path.exists() else None
    started = model.exists() or _last_whole(out / "checkpoints") is not None
    if started and found != made_from:
        raise ValueError(
            f"{out} was made from another model, other texts or other options. Choose another "
            "folder with --out, or delete this one to train again."
        )
    return model.exists()


def _adapter(peft_model: Any) -> object:
    """Return the settings of an adapter that determine the weights."""
    if peft_model is None:
        return None
    config = peft_model.peft_config["default"]
    return [config.r, config.lora_alpha, sorted(config.target_modules)]


def _steps(checkpoint: str) -> int:
    state = (Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8")
    return json.loads(state)["global_step"]


def _write(path: Path, what: object) -> None:
    """Write JSON to a temporary file and rename it, so that the file is never incomplete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(what) + "\n", encoding="utf-8")
    partial.rename(path)
