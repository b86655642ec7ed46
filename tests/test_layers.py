"""The stairs: imports go down only, every foreign library has its door, every module imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "selftaught"

BELOW_EVALUATION = {
    "grading", "tasks", "rollouts", "selection", "training", "embedded", "metrics", "samplers",
    "prompts", "answers", "equations", "records", "rendering", "run_folder", "status",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "records": set(),
    "quantities": set(),
    "answers": {"quantities"},
    "latex": {"answers", "quantities"},
    "thought_marks": set(),
    "equations": set(),
    "metrics": set(),
    "hub": set(),
    "option_forms": set(),
    "option_types": set(),
    "__main__": {"cli"},
    "plots": set(),
    "printable": set(),
    "quiet": {"hub", "option_types", "samplers"},
    "wheel_models": set(),
    "prompts": {"records"},
    "rendering": {"records", "thought_marks"},
    "samplers": {"hub", "cluster", "option_types", "records", "rendering", "thought_marks"},
    "run_folder": {"answers", "records"},
    "status": {"run_folder"},
    "tasks": {"hub", "answers", "latex", "prompts", "quantities", "records", "thought_marks"},
    "rollouts": {"prompts", "samplers", "records"},
    "selection": {"equations", "prompts", "records"},
    "training": {"hub", "option_types", "records", "rendering", "samplers", "thought_marks"},
    "cluster": set(),
    "launch": {"cluster", "records", "training"},
    "embedded": {"tasks", "prompts", "records"},
    "grading": {"tasks", "answers", "records"},
    "evaluation": {"tasks", "rollouts", "grading", "metrics", "samplers", "prompts", "records"},
    "bulk": {"grading", "prompts", "records", "selection", "tasks"},
    "preflight": {"launch", "option_types", "prompts", "records", "samplers", "training"},
    "report": BELOW_EVALUATION | {"evaluation", "plots", "printable"},
    "steps": {"metrics", "records"},
    "verifier": {"hub", "prompts", "records", "rendering", "samplers", "training"},
    "candidates": {"latex", "metrics", "quantities", "records"},
    "method_pages": {"evaluation", "plots", "printable", "records", "report", "run_folder"},
    "step_pages": {"metrics", "records", "report", "steps"},
    "methods": BELOW_EVALUATION
    | {"candidates", "evaluation", "launch", "method_pages", "preflight", "report", "step_pages"}
    | {"steps", "verifier"},
    "solving": {"candidates", "embedded", "prompts", "records", "samplers", "tasks", "verifier"},
    "comparison": BELOW_EVALUATION
    | {"candidates", "evaluation", "launch", "method_pages", "methods", "preflight", "steps"},
    "method_commands": {
        "comparison",
        "methods",
        "printable",
        "report",
        "run_folder",
        "solving",
        "status",
    },
    "pause": {"hub", "prompts", "records", "samplers"},
    "quiet_pages": {"plots", "printable", "report", "records"},
    "quiet_explore": {"quiet", "quiet_pages"},
    "quiet_commands": {
        "hub",
        "quiet",
        "quiet_pages",
        "quiet_explore",
        "embedded",
        "printable",
        "option_types",
        "records",
        "run_folder",
        "samplers",
        "status",
    },
    "pause_commands": BELOW_EVALUATION
    | {"option_types", "pause", "quiet", "quiet_commands", "evaluation", "report"},
    "cli": BELOW_EVALUATION
    | {"evaluation", "report", "methods", "wheel_models", "quiet_commands", "pause_commands"}
    | {"launch", "method_commands", "bulk", "option_forms", "option_types", "printable"}
    | {"__main__"},
    "__init__": BELOW_EVALUATION | {"evaluation"},
}
DOORS: dict[str, set[str]] = {
    "trl": {"training"},
    "peft": {"training", "quiet"},
    "datasets": {"tasks", "training", "quiet"},
    "torch": {
        "samplers",
        "training",
        "embedded",
        "wheel_models",
        "quiet",
        "quiet_explore",
        "quiet_commands",
        "verifier",
        "launch",
    },
    "transformers": {
        "verifier",
        "samplers",
        "training",
        "embedded",
        "wheel_models",
        "quiet",
        "quiet_explore",
        "quiet_commands",
        "pause",
    },
    "math_verify": {"tasks.competition_math"},
    "jsonargparse": {"cli", "method_commands", "quiet_commands", "pause_commands"},
    "matplotlib": {"plots"},
    "jinja2": {"report"},
    "reasoning_gym": {"tasks.gym"},
    "rapidfuzz": {"selection"},
    "tokenizers": {"embedded"},
    "vllm": {"samplers.vllm_engine"},
    "ray": {"cluster", "samplers.ray_pool"},
    "openai": {"samplers.server_line"},
    "accelerate": {"launch", "training"},
}
NO_TORCH = ["selftaught", "selftaught.methods.rft", "selftaught.methods.vstar",
            "selftaught.methods.step_dpo", "selftaught.evaluation.candidates", "selftaught.evaluation.best_of_n",
            "selftaught.training.launch", "selftaught.processes.ray_cluster", "selftaught.rollouts.steps", "selftaught.evaluation.verifier", "selftaught.cli", "selftaught.methods.star", "selftaught.reports.star_page",
            "selftaught.rollouts.grading", "selftaught.rollouts.streaming", "selftaught.rollouts.selection", "selftaught.evaluation.evaluator",
            "selftaught.samplers.openai_server"]  # fmt: skip


def modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts))
    return names


def source(module: str) -> Path:
    path = PACKAGE / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str) -> set[str]:
    """Every module named in an import statement, wherever it stands in the file."""
    names = set()
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            base = node.module or ""
            names.add(base)
            if base == "selftaught":
                names |= {f"selftaught.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_from_lower_stairs(module: str):
    room = module.split(".")[0]
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("selftaught.")}
    assert ours - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_has_its_doors_and_no_others(library: str):
    users = {m for m in modules() if any(name.split(".")[0] == library for name in imported(m))}
    outside = {
        m for m in users if m not in DOORS[library] and m.split(".")[0] not in DOORS[library]
    }
    assert not outside


def test_no_module_is_named_like_one_of_the_standard_library():
    named = {module.split(".")[-1] for module in modules()}
    assert not named & set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__"])
def test_every_module_imports(module: str):
    importlib.import_module(f"selftaught.{module}")


def test_rooms_without_tensors_do_not_import_torch():
    code = f"import sys\nfor name in {NO_TORCH}: __import__(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
