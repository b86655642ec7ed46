"""The tutorial notebook: its code cells run in order, and it shows no path of the machine that made it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


def cells(kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_every_code_cell_has_outputs_without_errors_or_paths():
    for cell in cells("code"):
        assert cell["outputs"], "".join(cell["source"])
        assert all(output["output_type"] == "stream" for output in cell["outputs"])
    assert "/tmp/" not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_cells_run_in_order(tmp_path: Path):
    script = tmp_path / "tutorial.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells("code")))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    accuracies = [line for line in done.stdout.splitlines() if line.startswith("3 digits")]
    before, after = (float(line.split()[2].rstrip("%")) for line in accuracies)
    assert before < 30 < 80 < after
