"""Options that several commands and methods share, in the groups that `--help` shows them in.

A configuration is a dataclass that inherits the groups it needs, adds options of its own, and may change
a default. The string under a field is its help text.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

Prompt = Literal["few_shot", "bare", "chat"]
Launcher = Literal["inline", "torchrun", "accelerate", "ray"]
TrackerName = Literal["tensorboard", "trackio", "wandb", "none"]
Auto = Literal["auto"]
"""The value of an option that is chosen for the model; the plan of a run shows the choice."""


def as_number(value: float | Auto) -> float:
    """Return a number that has been chosen.

    Raises:
        ValueError: the value is still "auto".
    """
    if value == "auto":
        raise ValueError('Expected a number, got "auto", which is chosen when a run is opened.')
    return value


@dataclass(frozen=True)
class TrackerOptions:
    """Where the results of a run are reported."""

    heading: ClassVar[str] = "run"

    report_to: list[TrackerName] = field(default_factory=list)
    """Experiment trackers that show the results while the run goes on: one or several of
    "tensorboard", "trackio" and "wandb". May change when a run is continued. See docs/concepts.md."""


@dataclass(frozen=True)
class TaskOptions:
    """The questions, and how their answers are graded."""

    heading: ClassVar[str] = "model and task"

    task: str = "arithmetic"
    """Name of the task. `selftaught tasks` lists the tasks and the options of each."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, such as `--task-options.path questions.jsonl`."""


@dataclass(frozen=True)
class ModelOptions(TaskOptions):
    """The model and the questions."""

    heading: ClassVar[str] = "model and task"

    model: str = "embedded"
    """Hugging Face model name or model folder, or "embedded" for the small model in this package."""


@dataclass(frozen=True)
class PromptOptions:
    """The prompt around a question."""

    heading: ClassVar[str] = "prompt"

    prompt: Prompt = "few_shot"
    """Prompt style: "few_shot" (the task's worked examples before the question), "bare" (the question
    alone) or "chat" (the model's chat template, with the task's instruction on how to state the
    answer)."""
    system_prompt: str | None = None
    """System message. Requires `--prompt chat`."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `--chat-template-kwargs.enable_thinking false`. Requires
    `--prompt chat`."""


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled."""

    heading: ClassVar[str] = "sampling"

    temperature: float = 0.7
    """Sampling temperature. 0 means greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling threshold. 1.0 disables it."""
    max_tokens: int | None = None
    """Maximum number of new tokens per completion. Default: set by the task."""
    sampler: str = "transformers"
    """Sampling engine: "transformers" (in this process), "vllm", or "ray" (several engines on a Ray
    cluster). `selftaught samplers` lists the engines and the options of each."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """Options of the sampling engine, such as `--sampler-options.batch-size 64`. `selftaught samplers NAME`
    lists them."""


@dataclass(frozen=True)
class SolverOptions(SamplingOptions, PromptOptions, ModelOptions):
    """Options of best-of-n: with a verifier, or by majority voting without one."""

    heading: ClassVar[str] = "choice"

    model: str = "embedded"
    """The generator: Hugging Face model name or model folder, or "embedded"."""
    task: str = "arithmetic"
    """Task whose prompt and grading rules are used."""
    prompt: Prompt = "bare"
    """Prompt style: "few_shot" (the task's worked examples before the question), "bare" (the question
    alone) or "chat" (the model's chat template)."""
    n: int = 16
    """Number of candidates per question."""
    verifier: str | None = None
    """Model folder of a verifier, such as runs/vstar/verifier. Default: none; the answer of the
    majority is chosen."""
    by: Literal["best", "weighted"] = "best"
    """With a verifier: choose the candidate with the highest score ("best"), or the answer with the
    largest total weight, where a candidate's weight is the exponential of its score
    ("weighted")."""
    score: Literal["sum", "mean", "reward"] = "sum"
    """Score of a candidate: the "sum" of its tokens' log-probabilities (as in the paper), their "mean",
    or the implicit "reward" with respect to `--reference`."""
    reference: str | None = None
    """Model that the verifier was trained from, such as runs/vstar/sft/model. Required by `--score
    reward`."""
    seed: int = 0
    """Random seed for sampling."""
    sampler: str = "transformers"
    """Sampling engine: "transformers" (in this process), "vllm", "ray", or "openai" (a server; requires
    `--base-url URL`)."""


@dataclass(frozen=True)
class TrainingOptions:
    """Fine-tuning; the names are those of transformers and TRL."""

    heading: ClassVar[str] = "training"

    num_train_epochs: float = 3.0
    """Number of passes over the training examples."""
    learning_rate: float | Auto = "auto"
    """Peak learning rate. "auto": by the size of the model, such as 2e-4 for 135 million and 2e-5 for
    7 billion parameters; ten times as much with LoRA (docs/training.md)."""
    train_batch_size: int | Auto = "auto"
    """Global batch size: number of examples per optimizer step, over all devices and accumulated
    batches. "auto": by the number of training problems (docs/training.md)."""
    per_device_train_batch_size: int | Auto = "auto"
    """Number of examples per device and forward pass; with the global batch size it decides the
    gradient accumulation. "auto": by the size of the model."""
    gradient_accumulation_steps: int | None = None
    """Number of batches per optimizer step and device. Given, the global batch size is
    per_device_train_batch_size * gradient_accumulation_steps * num_processes, as in TRL. Default:
    what the global batch size requires."""
    max_length: int = 1024
    """Maximum length of a training example in tokens. Longer examples are dropped and counted, never
    truncated."""
    use_peft: bool = False
    """Train a LoRA adapter and merge it into the model, instead of training all weights."""
    lora_r: int = 16
    """Rank of the LoRA adapter."""
    lora_alpha: int = 32
    """Scaling factor of the LoRA adapter."""
    lora_target_modules: str = "all-linear"
    """Layers that get an adapter: "all-linear", or layer names separated by commas."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's `SFTConfig`, such as `--training.weight_decay 0.1`."""


@dataclass(frozen=True)
class LaunchOptions:
    """In how many processes a fine-tuning runs, and where."""

    heading: ClassVar[str] = "launching"

    launcher: Launcher = "inline"
    """Where fine-tuning runs: "inline" (in this process), "torchrun" or "accelerate" (in several
    processes of this machine), or "ray" (on a Ray cluster). See docs/launch.md."""
    num_processes: int = 1
    """Number of training processes. The global batch size does not depend on it."""
    accelerate_config: Path | None = None
    """Configuration file written by `accelerate config`, such as those in configs/. Requires
    `--launcher accelerate`."""


def refuse_repeated(options: Any) -> None:
    """Refuse fields of `training` that are options of their own.

    Args:
        options: a dataclass with a field `training`.

    Raises:
        ValueError: a field is repeated; says which option to give.
    """
    # transformers' report_to is for each fine-tuning by itself
    own = {one.name for one in fields(options)} - {"report_to"}
    if repeated := sorted(own & set(options.training)):
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in repeated)
        raise ValueError(
            f"--training.{repeated[0]} would override an option of its own. Give {shown} instead."
        )
