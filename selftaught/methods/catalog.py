"""The methods by name: their options, the function that runs each, and its page.

Everything that lists methods reads `METHODS`. A new method is one module, one entry here and one page in
docs/methods/.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from selftaught.methods.config import MethodConfig
    from selftaught.methods.estimate import Cost
    from selftaught.methods.run import Run


@dataclass(frozen=True)
class Method:
    """A method, with the names of its modules and functions, which are imported on first use."""

    title: str
    summary: str
    """One line of `selftaught --help`."""
    module: str
    """Name of the module in `selftaught.methods`."""
    config_name: str
    function: str
    """Suffix of the functions `run_...` and `open_...`."""
    page: str
    """Module of `selftaught.reports` whose `report` writes the page."""
    own_option: str
    """An option that no other method has. It identifies runs whose `config.yaml` names no method."""

    def _found(self, name: str) -> Any:
        return getattr(import_module(f"selftaught.methods.{self.module}"), name)

    @property
    def config(self) -> "type[MethodConfig]":
        """The configuration class of the method."""
        return self._found(self.config_name)

    @property
    def run(self) -> Callable[..., dict[str, Any]]:
        """Runs the method, or continues a run; returns the summary."""
        return self._found(f"run_{self.function}")

    @property
    def open(self) -> "Callable[..., Run[Any]]":
        """Checks everything that a run needs, without sampling or training."""
        return self._found(f"open_{self.function}")

    @property
    def work(self) -> Callable[[Any], list[tuple[str, str]]]:
        """Returns what an opened run would do, as (name, value) pairs."""
        return self._found("work")

    @property
    def cost(self) -> "Callable[[Any], Cost]":
        """Returns the amounts of work of an opened run."""
        return self._found("cost")

    @property
    def changeable(self) -> tuple[str, ...]:
        """The options that may differ when a run is continued."""
        return self._found("CHANGEABLE")

    @property
    def report(self) -> Callable[[Path], Path]:
        """Writes `report.html` of a run folder and returns its path."""
        return import_module(f"selftaught.reports.{self.page}").report


METHODS = {
    "star": Method(
        "STaR", "sample rationales, keep the correct ones, rationalize the rest, fine-tune, repeat",
        "star", "StarConfig", "star", "star_page", "rationalization",
    ),
    "rft": Method(
        "RFT", "sample many completions per question, fine-tune on every distinct correct path",
        "rft", "RftConfig", "rft", "rft_page", "skip_gold_class",
    ),
    "vstar": Method(
        "V-STaR", "train a verifier on correct and wrong completions, choose among candidates with it",
        "vstar", "VstarConfig", "vstar", "vstar_page", "pairs_per_problem",
    ),
    "step-dpo": Method(
        "per-step DPO", "find the first bad step of wrong completions by sampling, learn preferences from it",
        "step_dpo", "StepDpoConfig", "step_dpo", "step_dpo_page", "wrong_per_problem",
    ),
    "compare": Method(
        "comparison", "several methods on one task with the same budget of sampled tokens",
        "comparison", "CompareConfig", "compare", "comparison_page", "budget",
    ),
}  # fmt: skip
"""By the name of the command."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the name of the method that a run's `config.yaml` belongs to; None if it is no method's.

    Run folders of earlier versions do not name their method and are identified by their options.
    """
    if (name := config.get("method")) in METHODS:
        return name
    return next((name for name, one in METHODS.items() if one.own_option in config), None)


def method_of_folder(folder: Path) -> str | None:
    """Return the name of the method that made a run folder; None if no method did.

    Raises:
        ValueError: `config.yaml` is not a mapping of options to values.
    """
    path = folder / "config.yaml"
    config = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected options and their values, got {type(config).__name__}.")
    return method_of(config)
