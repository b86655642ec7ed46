"""Options that every method shares."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from selftaught.option_groups import (
    Auto,
    LaunchOptions,
    ModelOptions,
    Prompt,
    PromptOptions,
    SamplingOptions,
    TrackerName,
    TrackerOptions,
    TrainingOptions,
    as_number,
    refuse_repeated,
)
from selftaught.rollouts.selection import DistinctBy
from selftaught.runs.folder import Row
from selftaught.safety.options import ExcludeOptions, only_used
from selftaught.tasks import Task
from selftaught.training.auto import (
    TINY,
    auto_batch,
    auto_batches,
    auto_learning_rate,
    given_batches,
)
from selftaught.training.launch import launch_of


@dataclass(frozen=True)
class Facts:
    """What the settings that are "auto" depend on."""

    parameters: int
    """Number of parameters of the base model."""
    problems: int
    """Number of training problems."""
    task: Task

    @property
    def tiny(self) -> bool:
        """Whether the model has less than a million parameters."""
        return self.parameters < TINY


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
    TrackerOptions,
    RunOptions,
    LaunchOptions,
    TrainingOptions,
    SelectionOptions,
    ExcludeOptions,
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
    bf16: bool = False
    """Train in bfloat16; the weights are kept in float32."""
    save_steps: int = 100
    """Number of optimizer steps between checkpoints."""

    max_train_batch_size: ClassVar[int] = 128
    """Largest global batch size of "auto"."""
    tiny_train_batch_size: ClassVar[int] = 64
    """Global batch size of "auto" for models of less than a million parameters (LOG.md)."""
    tiny_learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            ("learning_rate", at_least(self.learning_rate, above=0), 'above 0, or "auto"'),
            *(
                (name, at_least(getattr(self, name), 1), 'at least 1, or "auto"')
                for name in ("train_batch_size", "per_device_train_batch_size")
            ),
            (
                "gradient_accumulation_steps",
                at_least(self.gradient_accumulation_steps, 1),
                "at least 1",
            ),
            (
                "report_to",
                not isinstance(self.report_to, str)
                and {*self.report_to} <= {*get_args(TrackerName)},
                'a list of "tensorboard", "trackio", "wandb" or "none"',
            ),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
                for name in ("train_problems", "test_problems")
            ),
        )
        refuse_repeated(self)
        self._given_batches()
        launch_of(self)

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """Return the settings for a short run of the small model in this package."""
        return cls(**changes)

    def resolved(self, facts: Facts) -> Self:
        """Return the options with a value for each that is "auto".

        Args:
            facts: what the values depend on.

        Raises:
            ValueError: the batch sizes contradict each other; the message says how.
        """
        whole, device = auto_batches(
            *self._given_batches(), facts.parameters,
            self.tiny_train_batch_size if facts.tiny
            else auto_batch(facts.problems, self.max_train_batch_size),
        )  # fmt: skip
        changes: dict[str, Any] = {
            "train_batch_size": whole,
            "per_device_train_batch_size": device,
            "gradient_accumulation_steps": None,
        }
        if self.learning_rate == "auto":
            rate = auto_learning_rate(facts.parameters, lora=self.use_peft)
            changes["learning_rate"] = (
                self.tiny_learning_rate if facts.tiny and not self.use_peft else rate
            )
        return replace(self, **changes)

    def preference_rate(self, rate: float | Auto, facts: Facts) -> float:
        """Return the learning rate of DPO: the given one, or that for the size of the model."""
        if rate != "auto":
            return rate
        return auto_learning_rate(facts.parameters, lora=self.use_peft, preferences=True)

    def _given_batches(self) -> tuple[int | Auto, int | Auto]:
        """Return the batch sizes, global and per device; gradient accumulation counted in."""
        return given_batches(
            self.train_batch_size, self.per_device_train_batch_size,
            self.gradient_accumulation_steps, self.num_processes,
        )  # fmt: skip

    @property
    def accumulation(self) -> int:
        """Number of batches per optimizer step with one process."""
        return int(as_number(self.train_batch_size) // as_number(self.per_device_train_batch_size))

    @staticmethod
    def updated(stored: Mapping[str, Any]) -> Row:
        """Return the options of a `config.yaml` under their present names, to be compared."""
        row = dict(stored)
        steps = row.get("gradient_accumulation_steps")
        if "train_batch_size" not in row and steps and "per_device_train_batch_size" in row:
            row["train_batch_size"] = row["per_device_train_batch_size"] * steps
            row["gradient_accumulation_steps"] = None
        if row.get("model") == "embedded":  # values of earlier versions that mean the same
            if row.get("sampler_options") == {"batch_size": 512}:
                row["sampler_options"] = {}
            if row.get("validation_problems", 0) is None:
                row["validation_problems"] = 500
        return row

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
        whole, device = self._given_batches()
        values |= {"train_batch_size": whole, "per_device_train_batch_size": device,
                   "gradient_accumulation_steps": None}  # fmt: skip
        values = only_used(self, values)
        later = ("system_prompt", "chat_template_kwargs", "report_to")
        unused = {name for name in later if not values[name]}
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


def at_least(value: float | Auto | None, least: float = 0, *, above: float | None = None) -> bool:
    """Return whether a number is large enough; None and "auto" are."""
    if value is None or value == "auto":
        return True
    return value > above if above is not None else value >= least


def distinct_by_of(task: Task, given: DistinctBy | Auto) -> DistinctBy:
    """Return the criterion of duplicates: the given one, or that for the task's rationales."""
    if given != "auto":
        return given
    return "equations" if task.has_equations else "text"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
