"""Options of the checks, shared by the commands that use them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class CheckOptions:
    """Which texts are flagged."""

    heading: ClassVar[str] = "checks"

    check_patterns: list[str] = field(default_factory=list)
    """Regular expressions, in the syntax of Python's `re`. A text that contains a match is flagged."""
    check_pattern_file: Path | None = None
    """File with one regular expression per line. Empty lines and lines that start with # are ignored."""
    check_secrets: Path | None = None
    """File with one secret per line. A text that contains one is flagged, also if letter case, accents, spaces
    or punctuation differ. Secrets are never printed or written to a page."""
    check_classifier: str | None = None
    """Text classification model: folder or Hugging Face name. Long texts are split into windows. Requires
    `--check-labels`."""
    check_labels: list[str] = field(default_factory=list)
    """Labels of the classifier for which a text is flagged."""
    check_threshold: float = 0.5
    """Minimum probability of a label for a text to be flagged."""
    check_function: str | None = None
    """Function of your own, as FILE.py:FUNCTION. It gets a text and returns a reason to flag it, True, or
    a false value. It runs in a worker process, with a time limit of 5 seconds per text."""
    check_leaks: bool = True
    """Flag rationales sampled with the answer as a hint that mention or repeat the hint or state the
    answer before any reasoning, and texts that repeat their system prompt."""
    check_system_prompt: Path | None = None
    """File with a system prompt that no text may repeat. Prompts of the model's chat template are checked
    without it."""
    check_overlap: float = 0.1
    """Share of the system prompt's sequences of 5 words that a text may contain before it is flagged."""

    def __post_init__(self) -> None:
        parents = getattr(super(), "__post_init__", None)
        if parents is not None:
            parents()
        for name in ("check_threshold", "check_overlap"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1; got {value}.")
        if (self.check_classifier is None) != (not self.check_labels):
            given, missing = "--check-labels", "--check-classifier"
            if self.check_classifier is not None:
                given, missing = missing, given
            raise ValueError(f"{given} requires {missing}.")


@dataclass(frozen=True)
class ExcludeOptions(CheckOptions):
    """Exclusion of flagged texts from training."""

    heading: ClassVar[str] = "checks"

    exclude_flagged: bool = False
    """Do not train on texts that a check flags. Without a check of your own, these are the leaks of
    `--check-leaks`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = changed_options(self)
        if changed and not self.exclude_flagged:
            raise ValueError(
                f"--{changed[0].replace('_', '-')} has an effect only with --exclude-flagged. Add "
                "--exclude-flagged, or leave it out."
            )


def changed_options(options: CheckOptions) -> list[str]:
    """Return the names of the options of `CheckOptions` that differ from their defaults."""
    default = CheckOptions()
    names = (one.name for one in fields(CheckOptions))
    return [name for name in names if getattr(options, name) != getattr(default, name)]


def only_used(options: ExcludeOptions, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an options dataclass without those of the checks, if they are not used.

    Files of earlier runs do not have them.
    """
    if options.exclude_flagged:
        return values
    own = {one.name for one in fields(ExcludeOptions)}
    return {name: value for name, value in values.items() if name not in own}
