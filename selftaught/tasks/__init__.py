"""Tasks: questions with gold answers, and rules for grading. `open_task` opens one by name."""

import functools
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from selftaught.options import Option, hints_of, is_of_type, options_of, type_name, unknown_options
from selftaught.own_file import function_in_file
from selftaught.tasks.base import Task
from selftaught.thought_marks import checked_marks

__all__ = ["TASKS", "Task", "open_task", "task_help"]

TASKS = {
    "arithmetic": "sums of two numbers, for the small model in this package",
    "gsm8k": "grade-school word problems (GSM8K)",
    "commonsense_qa": "five-way multiple choice (CommonsenseQA)",
    "competition_math": "competition problems with LaTeX answers (MATH)",
    "gym": "any task of reasoning-gym, by its name",
    "mbpp": "short Python programs with tests (MBPP)",
    "humaneval": "Python functions from their docstrings (HumanEval); test only",
    "code_file": "your own programming problems with tests: JSONL, CSV, Parquet, or a Hub data set",
    "question_file": "your own questions and answers: JSONL, CSV, Parquet, or a Hub data set",
}
"""Names of the tasks, with a one-line description."""
THOUGHT_MARKS = Option(
    "thought_marks", list[str], "<think> </think>", "The two texts that open and close a thought."
)
"""An option of every task."""


def open_task(name: str, /, **options: object) -> Task:
    """Open a task.

    Args:
        name: name of a task in `TASKS`, or "FILE.py:FUNCTION" for a function that returns a `Task`.
        options: keyword arguments of the task's function. Every task also has the option
            `thought_marks`: the two texts that open and close a thought.

    Raises:
        ValueError: the name or an option is unknown, a required option is missing, or a value has
            the wrong type.
    """
    opened = _opener(name)
    if "thought_marks" in options:
        marks = checked_marks(options.pop("thought_marks"))
        return replace(
            open_task(name, **options), thought_marks=marks
        )  # part of `grading_key` itself
    known = {one.name: one for one in options_of(opened, positional=True)[1]}
    unknown = set(options) - set(known)
    if unknown and not _takes_any(opened):
        raise unknown_options(
            f"The task {name!r}", unknown, [*known, "thought_marks"], see=f"selftaught tasks {name}"
        )
    required = [key for key, one in known.items() if one.default is None]
    if missing := [key for key in required if key not in options]:
        raise ValueError(
            f"The task {name!r} requires the option {', '.join(map(repr, missing))}; "
            f"for example --task-options.{missing[0]} VALUE."
        )
    hints = hints_of(opened)
    typed = {key: _typed(name, key, value, hints.get(key, Any)) for key, value in options.items()}
    task = opened(**typed)
    return replace(task, options=json.dumps(options, sort_keys=True, default=str))


def _typed(task: str, key: str, value: object, hint: Any) -> object:
    """Return an option's value after a type check; a number given for text is converted to text.

    Raises:
        ValueError: the value has the wrong type.
    """
    if isinstance(value, dict):
        value = _numbers(value)
    if is_of_type(value, hint):
        return Path(value) if hint is Path and isinstance(value, str) else value
    if isinstance(value, int | float) and not isinstance(value, bool) and is_of_type("", hint):
        return str(value)
    raise ValueError(
        f"The option {key!r} of the task {task!r} must be {type_name(hint)}; got {value!r}. "
        f"See: selftaught tasks {task}"
    )


def _takes_any(opened: Callable[..., Task]) -> bool:
    """Return whether a task's function has `**kwargs`."""
    parameters = inspect.signature(opened).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def _numbers(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return nested values with texts such as "3" and "true" converted as YAML reads them."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _numbers(value)
        elif isinstance(value, str):
            with suppress(yaml.YAMLError):
                read = yaml.safe_load(value)
                value = read if isinstance(read, bool | int | float) else value
        found[key] = value
    return found


def _opener(name: str) -> Callable[..., Task]:
    match name:
        case "arithmetic":
            from selftaught.tasks.arithmetic import arithmetic

            return arithmetic
        case "gsm8k":
            from selftaught.tasks.gsm8k import gsm8k

            return gsm8k
        case "commonsense_qa":
            from selftaught.tasks.commonsense_qa import commonsense_qa

            return commonsense_qa
        case "competition_math":
            from selftaught.tasks.competition_math import competition_math

            return competition_math
        case "gym":
            from selftaught.tasks.gym import gym

            return gym
        case "mbpp":
            from selftaught.tasks.code_tasks import mbpp

            return mbpp
        case "humaneval":
            from selftaught.tasks.code_tasks import humaneval

            return humaneval
        case "code_file":
            from selftaught.tasks.code_tasks import code_file

            return code_file
        case "question_file":
            from selftaught.tasks.question_file import question_file

            return question_file
        case _ if ":" in name:
            return _in_file(name)
        case _:
            close = get_close_matches(name, TASKS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Unknown task {name!r}.{hint} The tasks are: {', '.join(TASKS)}. For your own "
                "task, give a file and a function, such as my_task.py:make."
            )


def _in_file(name: str) -> Callable[..., Task]:
    """Return the function that a name such as "my_task.py:make" refers to."""
    made = function_in_file(name, "task", "a Task")

    @functools.wraps(made)
    def checked(**options: Any) -> Task:
        task = made(**options)
        if not isinstance(task, Task):
            raise ValueError(f"{name} must return a Task, got {type(task).__name__}.")
        return task

    return checked


def task_help(name: str) -> tuple[str, list[Option]]:
    """Return the description of a task, and its options.

    Raises:
        ValueError: the name is unknown.
    """
    about, options = options_of(_opener(name), positional=True)
    return about, [*options, THOUGHT_MARKS]
