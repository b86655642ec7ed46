"""Tasks: questions with gold answers, and rules for grading. `open_task` opens one by name."""

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from selftaught.tasks.base import Task
from selftaught.thought_marks import checked_marks

__all__ = ["TASKS", "Task", "open_task", "task_help"]

TASKS = {
    "arithmetic": "sums of two numbers, for the small model in this package",
    "gsm8k": "grade-school word problems (GSM8K)",
    "commonsense_qa": "five-way multiple choice (CommonsenseQA)",
    "competition_math": "competition problems with LaTeX answers (MATH)",
    "gym": "any task of reasoning-gym, by its name",
    "question_file": "your own questions and answers: JSONL, CSV, Parquet, or a Hub data set",
}
"""Names of the tasks, with a one-line description."""


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
    known = inspect.signature(opened).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"The task {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(known)}, thought_marks."
        )
    required = [key for key, value in known.items() if value.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in options]:
        raise ValueError(
            f"The task {name!r} requires the option {', '.join(map(repr, missing))}; "
            f"for example --task-options.{missing[0]} VALUE."
        )
    hints = get_type_hints(opened)
    task = opened(**{key: _typed(name, key, value, hints[key]) for key, value in options.items()})
    return replace(task, options=json.dumps(options, sort_keys=True, default=str))


def _typed(task: str, key: str, value: object, hint: Any) -> object:
    """Return an option's value after a type check; a number given for text is converted to text.

    Raises:
        ValueError: the value has the wrong type.
    """
    if isinstance(value, dict):
        value = _numbers(value)
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for one in allowed:
        if get_origin(one) is Literal:
            if value in get_args(one):
                return value
        elif isinstance(value, get_origin(one) or one) and (one is not int or value is not True):
            return value
    if str in allowed and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    wanted = " or ".join(one.__name__ if isinstance(one, type) else str(one) for one in allowed)
    raise ValueError(f"The option {key!r} of the task {task!r} must be {wanted}; got {value!r}.")


def _numbers(values: dict[Any, Any]) -> dict[Any, Any]:
    """Nested values with numbers and true or false for their texts, as YAML reads them."""
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
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"Expected FILE.py:FUNCTION as the task, got {name!r}; the file {file!r} does not "
            "exist."
        )
    module_name = f"selftaught_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected FILE.py:FUNCTION as the task, got {name!r}; not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(
            f"Expected a function {function!r} in {file} that returns a Task; there is none."
        )

    def checked(**options: Any) -> Task:
        task = made(**options)
        if not isinstance(task, Task):
            raise ValueError(f"{name} must return a Task, got {type(task).__name__}.")
        return task

    checked.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
    checked.__annotations__ = getattr(made, "__annotations__", {})
    checked.__doc__ = made.__doc__
    return checked


def task_help(name: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the description of a task, and its options as (name, help text) pairs.

    Raises:
        ValueError: the name is unknown.
    """
    opened = _opener(name)
    about, _, arguments = inspect.cleandoc(opened.__doc__ or "").partition("Args:")
    meanings = _meanings(arguments.partition("Raises:")[0])
    options = []
    for key, one in inspect.signature(opened).parameters.items():
        text = meanings.get(key, "").rstrip(".")
        text = text[:1].upper() + text[1:] + "." if text else ""
        if one.default is inspect.Parameter.empty:
            default = "Required."
        else:
            default = f"Default: {'none' if one.default is None else one.default}."
        options.append((key, text if "Default:" in text else f"{text} {default}".strip()))
    marks = "The two texts that open and close a thought. Default: <think> </think>."
    return " ".join(about.split()), [*options, ("thought_marks", marks)]


def _meanings(arguments: str) -> dict[str, str]:
    """Return the help text of every argument in the `Args` section of a docstring."""
    found: dict[str, str] = {}
    for part in re.split(r"\n(?= {4}\S)", arguments):
        names, _, text = part.strip().partition(":")
        words = " ".join(text.split())
        found |= dict.fromkeys((one.strip() for one in names.split(",")), words)
    return found
