"""Hashes of what small runs of every method leave behind, with fixed seeds.

A change that must not alter any result is checked by running this script before and after it:

    python scripts/fixed_seed_hashes.py --out before.json
    python scripts/fixed_seed_hashes.py --check before.json

The hashes cover every store of completions, every row of metrics and every weight file. Durations,
rates, dates, paths and the versions of grading rules are left out. They are equal on one machine with one set of packages; another
processor or another version of torch may round differently.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMALL = [
    "--task_options.digits", "3", "--task_options.train", "24", "--task_options.validation", "4",
    "--task_options.test", "16", "--per_device_train_batch_size", "16",
    "--gradient_accumulation_steps", "1",
]  # fmt: skip
SHARED = [*SMALL, "--seed_samples", "8", "--max_steps", "6", "--temperature", "1.0"]
RUNS = {
    "star": ["star", *SMALL, "--iterations", "2", "--start_steps", "6", "--baselines", "true"],
    "rft": ["rft", *SHARED, "--k", "[2,4]", "--baselines", "true"],
    "vstar": ["vstar", *SHARED, "--iterations", "2", "--k", "4", "--candidates", "5",
              "--pairs_per_problem", "6", "--verifier_max_steps", "3", "--baselines", "true"],
    "step_dpo": ["step-dpo", *SHARED, "--n", "6", "--wrong_per_problem", "3", "--best_of", "3",
                 "--repeats", "2", "--dpo_max_steps", "3", "--sizes", "[24]", "--sft_sizes", "[12]",
                 "--methods", '["rft","dpo","dpo_edit","step_dpo","advantage"]',
                 "--right_per_problem", "2"],
    "quiet": ["quiet", "train", "--text", "texts.txt", "--length", "32", "--held_out", "1",
              "--max_steps", "3", "--per_device_train_batch_size", "2", "--quiet.thought_tokens", "3"],
    "pause": ["pause", "train", "--variant", "StdPT_PauseFT", "--data", "rows.jsonl", "--pauses", "2", "--max_steps", "3",
              "--per_device_train_batch_size", "4"],
}  # fmt: skip
UNSTABLE = ("seconds", "second", "time", "rate", "path", "date", "started", "ended", "model", "out",
            "code", "versions", "commit", "device", "machine", "memory", "grading")  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every result file below a folder, by its relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl" and path.is_file():
            content = "\n".join(
                _stable_line(line) for line in path.read_text().splitlines()
            ).encode()
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
        else:
            continue
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _stable_line(line: str) -> str:
    return json.dumps(_stable(json.loads(line)), sort_keys=True)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _stable(one)
            for key, one in value.items()
            if not any(part in UNSTABLE for part in key.lower().split("_"))
        }
    return [_stable(one) for one in value] if isinstance(value, list) else value


def run(name: str, folder: Path) -> dict[str, str]:
    """Run one method in a folder and return the hashes of what it left."""
    (folder / "texts.txt").write_text(
        "\n".join(
            f"Question: What is {a} + {b}? Answer: {a + b}." for a in range(20) for b in range(9)
        )
    )
    rows = [{"prompt": f"Q: {a} + 5 = ", "completion": f"{a + 5}."} for a in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "selftaught.cli", *RUNS[name], "--out", f"runs/{name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return hashes(folder / "runs" / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the hashes to this file")
    parser.add_argument("--check", type=Path, help="compare with the hashes in this file")
    parser.add_argument("methods", nargs="*", help="default: all of " + ", ".join(RUNS))
    asked = parser.parse_args()
    found = {}
    for name in asked.methods or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(name, Path(folder))
        print(f"{name}: {len(found[name])} files", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if asked.check:
        expected = json.loads(asked.check.read_text())
        differing = [
            f"{name}/{file}"
            for name, files in found.items()
            for file in sorted({*files, *expected[name]})
            if files.get(file) != expected[name].get(file)
        ]
        print("\n".join(differing) or "all equal")
        return 1 if differing else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
