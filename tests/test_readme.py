"""The Python and shell blocks of README and docs, run as a reader would run them.

Blocks marked `python` and `sh` run in a fresh folder, in order; those marked `text` are for reading:
what needs a network, a large model or minutes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KINDS = {"python", "sh", "text", "json", "yaml"}


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str):
    assert {kind for kind, _ in blocks(page)} <= KINDS


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if {"python", "sh"} & {k for k, _ in blocks(page)}]
)
def test_the_blocks_run(page: str, tmp_path: Path):
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for kind, code in blocks(page):
        command = {"python": [sys.executable, "-c", code], "sh": ["bash", "-euc", code]}.get(kind)
        if command:
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_method_s_page_names_every_option():
    from dataclasses import fields

    from selftaught.methods.star import StarConfig

    page = (ROOT / "docs/methods/star.md").read_text(encoding="utf-8")
    assert not [one.name for one in fields(StarConfig) if f"`{one.name}`" not in page]
