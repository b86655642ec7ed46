"""Engine arguments read from a source tree of vLLM's form, without vLLM."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from selftaught.options import Option
from selftaught.samplers import vllm_arguments
from selftaught.samplers.vllm_arguments import check_engine, engine_arguments

CONFIG = '''
Kind = Literal["auto", "half"]
More = Literal["none", Kind]

class Sizes:
    size: int = Field(default=1, ge=1)
    """Number of devices. More text
    follows."""
    limit: int = Field(default=None, ge=1)
    """Most tokens."""
    kind: Kind = "auto"
    """Data type."""
'''
ENGINE = """
class EngineArgs:
    model: str = Sizes.model
    size: int = Sizes.size
    limit: int = get_field(Sizes, "limit")
    dtype: Kind = Sizes.kind
    more: More | None = None
    share: float = 0.9
    config: SomeConfig = get_field(Other, "config")

class AsyncEngineArgs(EngineArgs):
    quiet: bool = False
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> None:
    for name, text in {"config/sizes.py": CONFIG, "engine/arg_utils.py": ENGINE}.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # another test may have imported it
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("tree")
def test_types_defaults_and_texts_are_read_from_the_source():
    assert engine_arguments() == [
        Option("size", int, "1", "Number of devices."),
        Option("limit", int | None, "none", "Most tokens."),
        Option("dtype", Literal["auto", "half"], "auto", "Data type."),
        Option("more", Literal["none", "auto", "half"] | None, "none", ""),
        Option("share", float, "0.9", ""),
        Option("config", Any, "set by vLLM", ""),
        Option("quiet", bool, "False", ""),
    ]


@pytest.mark.usefixtures("tree")
def test_names_and_types_are_checked():
    check_engine({"size": 2, "limit": None, "dtype": "half", "config": {"a": 1}, "share": 1})
    for name, value, kind in (
        ("size", "two", "int"), ("size", True, "int"), ("dtype", "float3", "'auto' or 'half'"),
        ("quiet", 1, "bool"), ("more", "x", "'none' or 'auto' or 'half' or null"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}' of the sampler 'vllm' must be {kind}; got"):
            check_engine({name: value})
    with pytest.raises(
        ValueError, match=r"'shar'; .* Did you mean 'share'\? See: selftaught samplers vllm"
    ):
        check_engine({"shar": 1})
    with pytest.raises(ValueError, match="no option 'model'"):
        check_engine({"model": "x"})


def test_without_vllm_the_list_says_what_to_install(monkeypatch, capsys):
    from selftaught.cli import main

    find = importlib.util.find_spec
    monkeypatch.setattr(
        vllm_arguments.importlib.util,
        "find_spec",
        lambda name: None if name == "vllm" else find(name),
    )
    assert main(["samplers", "vllm"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--sampler-options.dtype" in shown
    assert 'pip install "selftaught[vllm]"' in shown
    with pytest.raises(ImportError, match="vLLM is not installed"):
        check_engine({})
    check_engine({"anything": 1}, here=False)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_arguments_are_those_of_the_installed_vllm():
    code = (
        "from dataclasses import fields; from vllm.engine.arg_utils import AsyncEngineArgs as A; "
        "print('\\n'.join(f'{one.name}={one.default}' for one in fields(A)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    ours = {one.name: one.default for one in engine_arguments()}
    assert set(ours) == set(theirs) - {"model"}
    assert len(ours) > 100
    for name in ("tensor_parallel_size", "gpu_memory_utilization", "seed", "load_format"):
        assert ours[name] == theirs[name]
