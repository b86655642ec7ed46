"""Options that every method shares."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from selftaught.runs.folder import Row
from selftaught.training.launch import launch_of


@dataclass(frozen=True)
class MethodConfig:
    """Options of every method here that begins with a model fine-tuned on rationales."""

    model: str = "embedded"
    """Base model: a Hugging Face name or folder, or "embedded", the one in this package."""
    task: str = "arithmetic"
    """Which questions: arithmetic, gsm8k, commonsense_qa, competition_math, gym, question_file."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options, such as --task_options.path questions.jsonl."""
    out: Path = Path("runs/method")
    """Folder of the run; repeating the command continues it."""

    prompt: Literal["few_shot", "bare", "chat"] = "few_shot"
    """How the base model is asked where the task has no rationales of its own; fine-tuned models are
    asked without worked examples, by the chat template with "chat"."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    seed_samples: int = 1
    """Where the task has no rationales: completions of the base model per problem, the right ones of
    which stand in for them; 1 is greedy."""
    temperature: float = 0.7
    """Of all samples that are drawn."""
    top_p: float = 1.0
    """Nucleus."""
    max_tokens: int | None = None
    """Room for a rationale; none: the task's own."""
    check_equations: bool = True
    """Drop right completions with an inline equation that does not hold."""
    train_problems: int | None = None
    """Training problems, drawn by the seed; none: all."""
    test_problems: int | None = None
    """Problems of the measurements; none: all of the test split."""

    num_train_epochs: float = 3.0
    """Passes over the examples of a fine-tuning."""
    max_steps: int = -1
    """Optimizer steps of a fine-tuning; -1: num_train_epochs decides."""
    learning_rate: float = 2e-5
    """Peak learning rate of a fine-tuning; smaller models want more."""
    lr_scheduler_type: str = "cosine"
    """How the rate falls."""
    warmup_steps: float = 0.03
    """Linear warm-up; below 1, the share of all steps."""
    per_device_train_batch_size: int = 8
    """Examples in a batch."""
    gradient_accumulation_steps: int = 16
    """Batches in an optimizer step."""
    max_length: int = 1024
    """Longest example in tokens; longer ones are dropped and counted, never cut."""
    bf16: bool = False
    """Train in bfloat16 over float32 weights."""
    use_peft: bool = False
    """Train LoRA adapters and merge them, instead of all weights."""
    lora_r: int = 16
    """Rank of an adapter (TRL's default)."""
    lora_alpha: int = 32
    """Scale of an adapter (TRL's default)."""
    lora_target_modules: str = "all-linear"
    """Layers with an adapter: "all-linear", or names with commas between."""
    save_steps: int = 100
    """Steps between checkpoints: what a killed training repeats at most."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's config of a fine-tuning, such as --training.weight_decay 0.1."""
    launcher: Literal["inline", "torchrun", "accelerate", "ray"] = "inline"
    """Where fine-tunings run: in this process, in several of this machine, or on a Ray cluster
    (docs/launch.md)."""
    num_processes: int = 1
    """How many share an optimizer step; its examples are as many, whatever their number."""
    accelerate_config: Path | None = None
    """A file of `accelerate config` for the launcher accelerate, such as those in configs/."""

    sampler: str = "transformers"
    """Where the model lives while it is sampled: transformers, vllm, ray (docs/engines.md)."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own options, such as --sampler_options.batch_size 64."""
    seed: int = 0
    """Of sampling, drawing problems and training."""

    def __post_init__(self) -> None:
        self.refuse(
            ("seed_samples", self.seed_samples >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
                for name in ("train_problems", "test_problems")
            ),
        )
        launch_of(self)

    def refuse(self, *checks: tuple[str, bool, str]) -> None:
        """Raise a ValueError for the first field that does not hold: (name, holds, what is wanted)."""
        for name, holds, want in checks:
            if not holds:
                raise ValueError(f"{name} must be {want}; got {getattr(self, name)!r}.")

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """The settings of models of less than a million parameters, found by measurement (LOG.md)."""
        found: dict[str, Any] = {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "sampler_options": {"batch_size": 512},
        }
        return cls(**(found | changes))

    def plain(self) -> Row:
        """The config as plain values for YAML."""
        return without_unused({name: plain_value(value) for name, value in asdict(self).items()})


def without_unused(config: Row) -> Row:
    """Return a config without options that came later than the first runs and are not used.

    So that runs that were begun before can be continued.
    """
    unused = {name for name in ("system_prompt", "chat_template_kwargs") if not config[name]}
    return {name: value for name, value in config.items() if name not in unused}


def plain_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain_value(one) for one in value]
    return str(value) if isinstance(value, Path) else value
