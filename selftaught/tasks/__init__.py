"""Kinds of question; `open_task` opens one by name."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selftaught.tasks.base import Task
from selftaught.thought_marks import checked_marks

__all__ = ["TASKS", "Task", "open_task"]

TASKS = ("arithmetic", "gsm8k", "commonsense_qa", "competition_math", "gym", "question_file")


def open_task(name: str, /, **options: object) -> Task:
    """The named task; `options` are the keyword arguments of the function of that name.

    Every task also has the option `thought_marks`: the two texts that open and end a thought.

    Raises:
        ValueError: no task has this name, or it has no such option.
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
            f"The task {name!r} needs the option {', '.join(map(repr, missing))}; "
            f"for example --task_options.{missing[0]} VALUE."
        )
    hints = get_type_hints(opened)
    task = opened(**{key: _typed(name, key, value, hints[key]) for key, value in options.items()})
    return replace(task, options=json.dumps(options, sort_keys=True, default=str))


def _typed(task: str, key: str, value: object, hint: Any) -> object:
    """The value as its type hint has it: a number given for a text is the text of the number.

    Raises:
        ValueError: the value is of another type; names both.
    """
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
    raise ValueError(f"The option {key!r} of the task {task!r} wants {wanted}; got {value!r}.")


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
        case _:
            raise ValueError(f"No task is called {name!r}; there are: {', '.join(TASKS)}.")
