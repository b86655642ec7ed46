"""Functions in Python files of the user, named as FILE.py:FUNCTION."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def function_in_file(name: str, purpose: str, returns: str) -> Callable[..., Any]:
    """Return the function that a name such as "my_task.py:make" refers to.

    Args:
        name: file and function.
        purpose: what the function is used as, such as "task", for messages and the module's name.
        returns: what it returns, for messages.

    Raises:
        ValueError: there is no such file or function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"Expected FILE.py:FUNCTION as the {purpose}, got {name!r}; the file {file!r} does not "
            "exist."
        )
    module_name = f"selftaught_{purpose}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(
            f"Expected FILE.py:FUNCTION as the {purpose}, got {name!r}; not a Python file."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(
            f"Expected a function {function!r} in {file} that returns {returns}; there is none."
        )
    return found
