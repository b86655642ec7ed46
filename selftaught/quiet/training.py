"""Quiet-STaR training on plain text with transformers' `Trainer`.

Checkpoints are those of the Trainer. `out/model` is written only after training has finished. The
same call resumes from the last complete checkpoint and gives the same weights, because spans,
thoughts and the optimizer state depend only on the seed and the step.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from selftaught.quiet.checkpoint import fingerprint, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.moving_average import AverageUpdates, MovingAverage
from selftaught.quiet.reference import Reference
from selftaught.quiet.spans import Spans
from selftaught.quiet.thought_filter import ThoughtFilter
from selftaught.quiet.trainer import QuietTrainer, SpanEpochs, collated, filler_of, last_checkpoint
from selftaught.quiet.where import check_matches, training_matcher
from selftaught.records import write_atomically
from selftaught.training.options import checked_config
from selftaught.training.trainer import keep_tensorboard

if TYPE_CHECKING:
    from peft import PeftModel

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
DECIDING_SINCE = ("train_sampling_strategy", "neftune_noise_alpha", "optim_target_modules", "use_liger_kernel")  # fmt: skip
"""Further ones that earlier versions did not compare. They count only if they differ from the default."""
ADDED_LATER = (
    "drop_zero_losses", "thought_may_end", "ema_decay", "advantages", "clip_low", "clip_high",
    "positions_pattern", "thought_kl_weight",
)  # fmt: skip
"""Options of Quiet-STaR that earlier versions did not have. At their defaults, they do not change
the hash of a run."""


def quiet_arguments(output_dir: Path, /, **options: Any) -> TrainingArguments:
    """Return transformers' `TrainingArguments` with defaults for Quiet-STaR.

    The defaults are those of the paper (`PAPER`) and logging of every step.

    Args:
        output_dir: folder for checkpoints.
        options: fields of `TrainingArguments`. They take precedence over the defaults.

    Raises:
        ValueError: an option is unknown, out of bounds or set by selftaught, needs evaluation data,
            or is fp16, whose range is too small for REINFORCE at the published weight.
        ImportError: a package that an option needs is not installed.
    """
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
    page = "Its fields are listed at https://huggingface.co/docs/transformers/main_classes/trainer."
    ours = defaults | {"output_dir": str(output_dir)}
    name = "transformers' TrainingArguments"
    arguments = checked_config(name, TrainingArguments, page, ours, options)
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
    peft_model: "PeftModel | None" = None,
    progress: Callable[[int], object] | None = None,
    thought_filter: ThoughtFilter | None = None,
) -> list[dict[str, float]]:
    """Train a Quiet-STaR model and save it in `out/model`.

    Args:
        model: the model to train, changed in place. If `model.reference` is set, the perplexity of
            the thoughts under it is logged; with `thought_kl_weight`, it is set here if it is not.
        tokenizer: its tokenizer.
        spans: the training data.
        arguments: training arguments; see `quiet_arguments`.
        out: run folder. If it contains an interrupted training with the same settings, training
            resumes; if it contains the finished model, only the log is read.
        peft_model: LoRA adapter around the base model, as `with_lora` returns it. It is merged into
            the model at the end. None: train all weights.
        progress: called with the number of new optimizer steps.
        thought_filter: checks of thoughts; flagged ones get no positive advantage.

    Returns:
        The logged metrics, one dictionary per logging step.

    Raises:
        ValueError: `out` belongs to another training, a loss is not finite, the settings make all
            advantages of REINFORCE 0, no text matches the pattern of `positions`, or the memory is
            too small for the moving average of `baseline="ema"` or for the reference.
    """
    if why := model.quiet_config.without_reinforcement:
        raise ValueError(why)
    log, made_from = out / "log.json", run_hash(model, spans, arguments, peft_model, thought_filter)
    if check_run(out, made_from):
        return json.loads(log.read_text(encoding="utf-8"))
    start_run(out, made_from, arguments)
    matcher = training_matcher(model.quiet_config, tokenizer)
    if matcher is not None:
        check_matches(matcher, tokenizer, spans.texts)
    set_seed(arguments.seed)
    trainer = QuietTrainer(
        model=model,
        args=arguments,
        train_dataset=spans,
        data_collator=lambda rows: collated(rows, filler_of(tokenizer), matcher),
        callbacks=[SpanEpochs(spans, progress)],
    )
    _add_average(trainer, model)
    model.thought_filter = thought_filter
    _add_reference(trainer, model)
    fit(trainer, out)
    model.average = model.reference = model.thought_filter = None
    history = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    if trainer.is_world_process_zero():
        if peft_model is not None:
            peft_model.merge_and_unload()
        model.base.config.use_cache = True  # the Trainer has disabled it
        with written_model(out, history) as partial:
            save_quiet(model, tokenizer, partial)
    trainer.accelerator.wait_for_everyone()
    return history


def _add_average(trainer: QuietTrainer, model: QuietLM) -> None:
    """Give the model a moving average of its weights, if its rewards are measured against one."""
    config = model.quiet_config
    if config.baseline == "ema" and config.ema_decay > 0:
        model.average = MovingAverage(model.base, config.ema_decay)
        trainer.add_callback(AverageUpdates(model.average))


def _add_reference(trainer: QuietTrainer, model: QuietLM) -> None:
    """Give the trainer the model to which thoughts are compared, if there is one."""
    if model.reference is None and model.quiet_config.thought_kl_weight > 0:
        model.reference = Reference.frozen(model)
    if model.reference is not None:  # the Trainer may have moved the model to another device
        trainer.reference = model.reference.within(model)


def start_run(out: Path, made_from: str, arguments: TrainingArguments) -> None:
    """Write the hash of a training into its run folder."""
    if arguments.process_index == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "made_from.json", json.dumps({"made_from": made_from}) + "\n")


def fit(trainer: Trainer, out: Path) -> None:
    """Train from the last complete checkpoint in the run folder, or from the start."""
    trainer.remove_callback(PrinterCallback)
    keep_tensorboard(trainer, out / "tensorboard")
    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint is not None and 0 < trainer.args.max_steps <= _steps(checkpoint):
        # Training had finished, but the process stopped before it saved the model.
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = trainer.state.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)


@contextmanager
def written_model(out: Path, history: list[dict[str, float]]) -> Iterator[Path]:
    """Write the log, and yield a folder for the model, which then becomes `out/model`.

    So `out/model` is never incomplete. Checkpoints are removed.
    """
    write_atomically(out / "log.json", json.dumps(history) + "\n")
    partial = out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(out / "model")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def with_lora(model: QuietLM, *, r: int, alpha: int, target_modules: str) -> "PeftModel":
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


def run_hash(
    model: QuietLM,
    spans: Spans,
    arguments: TrainingArguments,
    peft_model: "PeftModel | None" = None,
    thought_filter: ThoughtFilter | None = None,
) -> str:
    """Return a hash of everything that determines the resulting weights.

    The arguments are those of `train_quiet`.
    """
    settings = asdict(model.quiet_config)
    for name in ("positions_per_chunk", "chunk_megabytes"):
        settings.pop(name)  # changes memory use, not results
    defaults = {one.name: one.default for one in fields(QuietConfig)}
    for name in ADDED_LATER:
        if settings[name] == defaults[name]:
            settings.pop(name)
    options = {name: getattr(arguments, name) for name in DECIDING}
    defaults = {one.name: one.default for one in fields(TrainingArguments)}
    changed = {name: getattr(arguments, name) for name in DECIDING_SINCE}
    options |= {name: value for name, value in changed.items() if value != defaults[name]}
    first = [fingerprint(model.base), model.moved.detach().cpu().tolist()]
    if trained := [
        head for head in (model.mixing, model.gate) if head is not None and _is_trained(head)
    ]:
        first.append([fingerprint(head) for head in trained])
    whole = [settings, options, [_adapter(peft_model)], first, spans.length, spans.seed]
    whole += [] if thought_filter is None else [thought_filter.key]
    digest = hashlib.sha256(json.dumps(whole, default=str, sort_keys=True).encode())
    for ids in spans.texts:
        digest.update(str(ids).encode())
    return digest.hexdigest()[:16]


def _is_trained(head: nn.Module) -> bool:
    """Return whether the last layer of a head is not 0, as it is at first."""
    layers = [weight for name, weight in head.named_parameters() if name.endswith("weight")]
    return bool(layers) and bool(layers[-1].any())


def check_run(out: Path, made_from: str) -> bool:
    """Return whether a run folder contains the finished model of this training.

    Args:
        out: the run folder.
        made_from: hash of this training; see `run_hash`.

    Raises:
        ValueError: the folder contains a model or checkpoints of another training.
    """
    path, model = out / "made_from.json", out / "model"
    found = json.loads(path.read_text(encoding="utf-8"))["made_from"] if path.exists() else None
    started = model.exists() or last_checkpoint(out / "checkpoints") is not None
    if started and found != made_from:
        raise ValueError(
            f"{out} was made from another model, other texts or other options. Choose another "
            "folder with --out, or delete this one to train again."
        )
    return model.exists()


def _adapter(peft_model: "PeftModel | None") -> object:
    """Return the settings of an adapter that determine the weights."""
    if peft_model is None:
        return None
    from peft import LoraConfig

    config = peft_model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return [config.r, config.lora_alpha, sorted(config.target_modules or ())]


def _steps(checkpoint: str) -> int:
    state = (Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8")
    return json.loads(state)["global_step"]
