"""Language models that teach themselves to reason; the public names that need no torch.

A name is imported when it is first used, so that `import selftaught` and the start of the command line
take milliseconds. Models that think are registered with transformers' auto classes; see `auto_classes`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from selftaught.auto_classes import register

if TYPE_CHECKING:
    from selftaught.evaluation.evaluator import Evaluation, evaluate
    from selftaught.models.embedded import embedded_model
    from selftaught.prompts import PromptStyle, bare, chat, hinted
    from selftaught.records import Completion, Example, Preference, Problem, Rollout
    from selftaught.rollouts.grading import grade
    from selftaught.rollouts.selection import (
        NothingToLearn,
        keep_at_most,
        keep_correct,
        keep_distinct,
        make_examples,
        unsolved,
    )
    from selftaught.rollouts.store import collect
    from selftaught.samplers import SamplingParams, open_sampler
    from selftaught.tasks import Task, open_task

__all__ = [
    "Completion",
    "Evaluation",
    "Example",
    "NothingToLearn",
    "Preference",
    "Problem",
    "PromptStyle",
    "Rollout",
    "SamplingParams",
    "Task",
    "bare",
    "chat",
    "collect",
    "embedded_model",
    "evaluate",
    "grade",
    "hinted",
    "keep_at_most",
    "keep_correct",
    "keep_distinct",
    "make_examples",
    "open_sampler",
    "open_task",
    "unsolved",
]

_MODULES = {
    "models.embedded": ("embedded_model",),
    "evaluation.evaluator": ("Evaluation", "evaluate"),
    "rollouts.grading": ("grade",),
    "prompts": ("PromptStyle", "bare", "chat", "hinted"),
    "records": ("Completion", "Example", "Preference", "Problem", "Rollout"),
    "rollouts.store": ("collect",),
    "samplers": ("SamplingParams", "open_sampler"),
    "rollouts.selection": (
        "NothingToLearn",
        "keep_at_most",
        "keep_correct",
        "keep_distinct",
        "make_examples",
        "unsolved",
    ),
    "tasks": ("Task", "open_task"),
}
"""The public names of each module."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


register()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
