"""Imports: only from lower layers, no circles, every third-party library in few places."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "selftaught"

LAYERS = (
    {"deprecation"},
    {"records", "metrics", "option_groups", "options", "printable", "thought_marks", "hub"},
    {"own_file"},
    {"prompts", "rendering"},
    {"processes"},
    {"sandbox"},
    {"samplers"},
    {"training"},
    {"quiet"},
    {"tasks"},
    {"safety"},
    {"rollouts"},
    {"models"},
    {"runs"},
    {"evaluation", "harness"},
    {"reports", "serving"},
    {"methods"},
    {"cli"},
    {"auto_classes"},
    {"__init__", "__main__"},
)
"""From the bottom to the top. A module imports from its own package and from lower layers only."""
USERS: dict[str, set[str]] = {
    "trl": {"training"},
    "peft": {"training", "quiet"},
    "datasets": {"tasks", "training", "quiet"},
    "torch": {
        "samplers", "training", "models", "quiet", "cli.quiet_model", "evaluation.verifier", "harness",
        "serving", "safety.classifier", "runs.trackers",
    },
    "transformers": {
        "samplers", "training", "models", "quiet", "cli.pause", "cli.quiet_model", "cli.quiet_think",
        "cli.quiet_train", "evaluation.verifier", "harness", "methods.pause", "serving",
        "safety.classifier",
    },
    "fastapi": {"serving.app"},
    "starlette": {"serving.app"},
    "pydantic": {"serving.protocol"},
    "uvicorn": {"cli.serve"},
    "math_verify": {"tasks.symbolic"},
    "jsonargparse": {"cli"},
    "matplotlib": {"reports.plots"},
    "jinja2": {"reports.pages"},
    "reasoning_gym": {"tasks.gym"},
    "rapidfuzz": {"rollouts.selection"},
    "tokenizers": {"models.embedded"},
    "vllm": {"samplers.vllm_engine"},
    "ray": {"processes.ray_cluster", "samplers.ray_pool"},
    "openai": {"samplers.openai_client"},
    "lm_eval": {"harness"},
    "accelerate": {"training"},
    "tensorboard": {"runs.trackers"},
    "trackio": {"runs.trackers"},
    "wandb": {"runs.trackers"},
}  # fmt: skip
"""The packages and modules that import a third-party library."""
NO_TORCH = [
    "selftaught", "selftaught.cli", "selftaught.evaluation.best_of_n", "selftaught.evaluation.candidates",
    "selftaught.evaluation.evaluator", "selftaught.evaluation.verifier", "selftaught.methods.comparison",
    "selftaught.methods.rft", "selftaught.methods.star", "selftaught.methods.step_dpo",
    "selftaught.methods.vstar", "selftaught.processes.child", "selftaught.processes.ray_cluster",
    "selftaught.reports.star_page", "selftaught.rollouts.grading", "selftaught.rollouts.selection",
    "selftaught.cli.serve", "selftaught.cli.chat", "selftaught.rollouts.steps", "selftaught.rollouts.streaming", "selftaught.safety", "selftaught.samplers.openai_server",
    "selftaught.training.launch",
]  # fmt: skip


@cache
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
            if base.startswith("selftaught"):  # a name may be a module of the package
                full = {f"{base}.{alias.name}" for alias in node.names}
                names |= {name for name in full if name.removeprefix("selftaught.") in modules()}
    return names


def layer(module: str) -> int:
    package = module.split(".")[0]
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_lower_layers(module: str):
    own = module.split(".")[0]
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("selftaught.")}
    assert {name for name in ours - {own} if layer(name) >= layer(module)} == set()


def test_no_modules_import_each_other_in_a_circle():
    known = set(modules())
    graph = {
        module: {name.removeprefix("selftaught.") for name in imported(module)} & known - {module}
        for module in known
    }
    while free := {module for module, needs in graph.items() if not needs & graph.keys()}:
        for module in free:
            del graph[module]
    assert not graph


@pytest.mark.parametrize("library", USERS)
def test_a_library_is_imported_in_few_places(library: str):
    users = {m for m in modules() if any(name.split(".")[0] == library for name in imported(m))}
    outside = {
        m for m in users if m not in USERS[library] and m.split(".")[0] not in USERS[library]
    }
    assert not outside


def test_no_module_is_named_like_one_of_the_standard_library():
    named = {module.split(".")[-1] for module in modules()}
    assert not named & set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__"])
def test_every_module_imports(module: str):
    if module.split(".")[0] == "harness":
        pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    importlib.import_module(f"selftaught.{module}")


def test_modules_without_tensors_do_not_import_torch():
    code = f"import sys\nfor name in {NO_TORCH}: __import__(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
