"""Writes Quiet-STaR model folders as earlier versions did."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from selftaught.quiet.checkpoint import fingerprint
from selftaught.quiet.model import QuietLM


def old_save(model: QuietLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of earlier versions."""
    model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(model.heads(), folder / "mixing.safetensors")
    settings = {
        "config": asdict(model.quiet_config), "start": model.marks.start, "end": model.marks.end,
        "never": model.marks.never, "base": fingerprint(model.base),
    }  # fmt: skip
    (folder / "quiet.json").write_text(json.dumps(settings))
