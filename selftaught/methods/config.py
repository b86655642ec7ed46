"""Options that every method shares."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from selftaught.option_groups import (
    LaunchOptions,
    ModelOptions,
    Prompt,
    PromptOptions,
    SamplingOptions,
    TrainingOptions,
    refuse_repeated,
)
from selftaught.runs.folder import Row
from selftaught.training.launch import launch_of


@dataclass(frozen=True)
class RunOptions:
    """The run folder and the random seed."""

    heading: ClassVar[str] = "run"

    out: Path = Path("runs/method")
    """Run folder. Repeating the same command continues the run."""
    seed: int = 0
    """Random seed for drawing problems, sampling and training."""


@dataclass(frozen=True)
class SelectionOptions:
    """Which problems and which completions are used."""

    heading: ClassVar[str] = "selection"

    check_equations: bool = True
    """Drop correct completions that contain a wrong equation."""
    train_problems: int | None = None
    """Number of training problems, drawn at random. Default: all."""
    test_problems: int | None = None
    """Number of test problems. Default: all."""


@dataclass(frozen=True)
class MethodConfig(
    RunOptions,
    LaunchOptions,
    TrainingOptions,
    SelectionOptions,
    SamplingOptions,
    PromptOptions,
    ModelOptions,
):
    """Options that every method has."""

    heading: ClassVar[str] = "training"
    method: ClassVar[str] = ""
    """Name of the method's command; written to `config.yaml`."""

    warmup_steps: float = 0.03
    """Length of the linear warm-up in optimizer steps. A value below 1 is a share of all steps."""
    gradient_accumulation_steps: int = 16
    """Number of batches per optimizer step."""
    bf16: bool = False
    """Train in bfloat16; the weights are kept in float32."""
    save_steps: int = 100
    """Number of optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        self.refuse(
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
                for name in ("train_problems", "test_problems")
            ),
        )
        refuse_repeated(self)
        launch_of(self)

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """Return the settings for models of less than a million parameters, found by measurement
        (LOG.md)."""
        return cls(**changes)

    def refuse(self, *checks: tuple[str, bool, str]) -> None:
        """Raise a `ValueError` for the first field with an invalid value.

        Args:
            checks: (name of the field, whether its value is valid, which values are expected).
        """
        for name, valid, expected in checks:
            if not valid:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}.")

    def plain(self) -> Row:
        """Return the options as plain values for YAML.

        Options that were added after the first runs are left out where they are not used, so that those
        runs can be continued.
        """
        values: Row = {"method": self.method} | {
            name: _plain(value) for name, value in asdict(self).items()
        }
        unused = {name for name in ("system_prompt", "chat_template_kwargs") if not values[name]}
        return {name: value for name, value in values.items() if name not in unused}


@dataclass(frozen=True)
class SeededConfig(MethodConfig):
    """Options of every method that starts from a model fine-tuned on rationales (the seed set)."""

    heading: ClassVar[str] = "training"

    prompt: Prompt = "few_shot"
    """Prompt style for the base model: "few_shot" (the task's worked examples before the question),
    "bare" (the question alone) or "chat" (the model's chat template, with the task's instruction on how
    to state the answer). Fine-tuned models are prompted without worked examples."""
    seed_samples: int = 1
    """Number of completions per problem sampled from the base model for the first training set. Used
    only where the task has no rationales. 1 means greedy decoding."""
    max_steps: int = -1
    """Number of optimizer steps. -1: `num_train_epochs` decides."""
    lr_scheduler_type: str = "cosine"
    """Learning rate schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            ("seed_samples", self.seed_samples >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
        )

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """Return the settings for models of less than a million parameters, found by measurement
        (LOG.md)."""
        found: dict[str, Any] = {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "sampler_options": {"batch_size": 512},
        }
        return cls(**(found | changes))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
