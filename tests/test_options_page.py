"""docs/options.md has the options that the code checks."""

import runpy
from pathlib import Path

from selftaught.samplers import SAMPLERS
from selftaught.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_those_of_the_code():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for name in (*TASKS, *SAMPLERS):
        assert f"\n### {name}\n" in page
    filled = runpy.run_path(str(ROOT / "scripts" / "options_page.py"))["filled"]
    assert page == filled(page), "run: python scripts/options_page.py"
