"""Language models that teach themselves to reason; the public names that need no torch."""

from selftaught.embedded import embedded_model
from selftaught.evaluation import Evaluation, evaluate
from selftaught.grading import grade
from selftaught.prompts import PromptStyle, bare, chat, hinted
from selftaught.records import Completion, Example, Preference, Problem, Rollout
from selftaught.rollouts import collect
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.selection import (
    NothingToLearn,
    keep_at_most,
    keep_correct,
    keep_distinct,
    make_examples,
    unsolved,
)
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
