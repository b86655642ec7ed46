"""A data set of a run's completions and training examples, in the form of the Hugging Face Hub.

Only what the run trained on is included, not the validation and test problems. Names of model
folders are shortened, because the stores of a run contain local paths.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from selftaught.hub import without_tokens
from selftaught.records import iter_rollouts, to_json
from selftaught.reports.model_card import (
    FILTERS,
    LICENSES,
    TrainingData,
    base_model,
    made_with,
    one_line,
    shown_value,
    task_data,
)
from selftaught.reports.pages import rendered_markdown
from selftaught.tasks import TASKS, open_task

STORES = re.compile(r"(?:rollouts|rationalized|seed-rollouts)\.graded\.jsonl")
"""Names of graded stores with completions of training problems."""
PARTS = {"examples": "examples.jsonl", "preferences": "preferences.jsonl"}
"""Names of the files with training data, by part of the data set."""
_TEXT = {"dtype": "string"}
_IDS = {"list": "int64"}
FEATURES: dict[str, list[dict[str, Any]]] = {
    "rollouts": [
        {"name": "problem", "struct": [
            {"name": name} | _TEXT for name in ("id", "question", "gold", "rationale")
        ]},
        *({"name": name} | _TEXT for name in ("prompt", "completion", "finish_reason", "model")),
        {"name": "index", "dtype": "int64"},
        {"name": "origin"} | _TEXT,
        {"name": "token_ids"} | _IDS,
        *({"name": name} | _TEXT for name in ("answer", "outcome", "decided_by")),
        {"name": "thought_open", "dtype": "bool"},
    ],
    "examples": [{"name": "prompt"} | _TEXT, {"name": "completion"} | _TEXT, {"name": "completion_ids"} | _IDS],
    "preferences": [
        *({"name": name} | _TEXT for name in ("prompt", "chosen", "rejected")),
        *({"name": name} | _IDS for name in ("begun", "chosen_ids", "rejected_ids")),
    ],
}  # fmt: skip
"""Columns of each part where prompts are texts. A column of nulls in one file can be texts in another."""


def write_data_set(run: Path, folder: Path) -> dict[str, int]:
    """Write the completions and training examples of a run, and a data set card, into a folder.

    The same run gives the same bytes, so that a repeated upload skips what the Hub already has.

    Args:
        run: run folder of a method.
        folder: the folder; replaced if it exists.

    Returns:
        The number of rows by part: "rollouts", "examples", "preferences".

    Raises:
        ValueError: the run contains none of them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    counts: dict[str, int] = {}
    messages: set[str] = set()
    for part, source in _sources(run):
        name = "-".join(source.relative_to(run).parts).replace(".graded.jsonl", ".jsonl")
        path = folder / "data" / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for line in _lines(part, source, run):
                file.write(line + "\n")
                counts[part] = counts.get(part, 0) + 1
                if '"prompt": [' in line:
                    messages.add(part)
    if not counts:
        raise ValueError(
            f"Expected a run folder with completions (rollouts.graded.jsonl) or training examples "
            f"(examples.jsonl), got none in {run}."
        )
    counts = {part: counts[part] for part in FEATURES if part in counts}
    card = folder / "README.md"
    card.write_text(_card(run, counts, messages), encoding="utf-8", newline="\n")
    return counts


def _sources(run: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(run.rglob("*.jsonl")):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if STORES.fullmatch(path.name):
            yield "rollouts", path
        for part, name in PARTS.items():
            if path.name == name:
                yield part, path


def _lines(part: str, source: Path, run: Path) -> Iterator[str]:
    """Yield the rows of a file as JSON, without local paths."""
    if part != "rollouts":
        with source.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
        return
    for rollout in iter_rollouts(source):
        yield to_json(replace(rollout, model=_model_name(rollout.model, run)))


def _model_name(model: str, run: Path) -> str:
    """Return the name of a model: its path inside the run, or its last part."""
    path = Path(model).absolute()
    if path.is_relative_to(run.absolute()):
        return path.relative_to(run.absolute()).as_posix()
    return shown_value(model)


def _card(run: Path, counts: Mapping[str, int], messages: set[str]) -> str:
    config = _config(run)
    data = _data_of(config)
    model = str(config.get("model", "unknown"))
    parts = [
        {"config_name": part, "data_files": f"data/{part}/*.jsonl"} | ({"default": True} if not at else {})
        for at, part in enumerate(counts)
    ]  # fmt: skip
    features = [
        {"config_name": part, "features": FEATURES[part]} for part in counts if part not in messages
    ]
    metadata: dict[str, Any] = {
        **({"license": data.license} if data.license in LICENSES else {}),
        "pretty_name": one_line(f"{run.resolve().name}: completions and training examples"),
        "task_categories": ["text-generation"],
        "tags": ["selftaught", "synthetic", "reasoning"],
        **({"source_datasets": list(data.data_sets)} if data.data_sets else {}),
        "configs": parts,
        **({"dataset_info": features} if features else {}),
    }
    body = rendered_markdown(
        "data_card.md.j2", FILTERS, title=run.resolve().name, counts=counts, data=data,
        method=str(config.get("method", "")), base=base_model(model), made_with=made_with(),
    )  # fmt: skip
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return without_tokens(f"---\n{head}---\n\n{body}")


def _config(run: Path) -> Mapping[str, Any]:
    path = run / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _data_of(config: Mapping[str, Any]) -> TrainingData:
    """Return the data of the task of a run; a task in a user's file is not opened."""
    name = str(config.get("task", ""))
    if name in TASKS:
        try:
            return task_data(open_task(name, **config.get("task_options", {})))
        except (ImportError, OSError, ValueError):  # such as a file that has been moved
            pass
    return TrainingData(shown_value(name) or "unknown")
