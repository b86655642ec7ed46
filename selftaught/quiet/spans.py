"""Texts to think about: where they come from, and the spans of them that a model is trained on."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from selftaught.hub import check_data_set

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
"""Files of a folder that are read; others are left alone."""


def read_texts(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> Iterator[str]:
    """The texts of a file, a folder of files, or a data set of the Hugging Face Hub, one by one.

    `.jsonl` and `.parquet` have a text per row, in `column`; any other file is one text. A data set
    of the Hub is streamed, not stored; `subset` is its configuration, where it has several.

    Raises:
        ValueError: nothing is there, a file is not text, a row has no such column or no text in it, or
            the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}.")
    found = _read(Path(source), source, column, split, subset)
    for number, text in enumerate(found):
        if limit is not None and number >= limit:
            return
        yield text


def _read(path: Path, source: str, column: str, split: str, subset: str | None) -> Iterator[str]:
    if path.is_dir() and any(path.glob("*.parquet")):
        path = path / "*.parquet"
    if path.suffix == ".parquet":
        yield from _column(_parquet(path), column, str(path))
    elif path.suffix in (".jsonl", ".json"):
        yield from _column(_json_lines(path), column, source)
    elif path.is_dir():
        found = [one for one in sorted(path.iterdir()) if one.suffix in SUFFIXES]
        if not found:
            raise ValueError(
                f"Expected files of the kinds {', '.join(SUFFIXES)} in the folder {path}, found none."
            )
        for one in found:
            yield from _read(one, str(one), column, split, subset)
    elif path.exists():
        yield _text_file(path)
    else:
        yield from _column(_hub(source, subset, split), column, source)


def _parquet(path: Path) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise ValueError(f"{path} could not be read as Parquet ({error}).") from error


def _text_file(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(path, f"byte {error.start:,} is not UTF-8")) from None
    if "\0" in text:
        raise ValueError(_not_text(path, f"character {text.index(chr(0)):,} is NUL"))
    return text


def _not_text(path: Path, why: str) -> str:
    return (
        f"Expected text in UTF-8 in {path}, got binary data or another encoding ({why}). Convert it "
        "first (iconv -t UTF-8), or take the file out."
    )


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                why = f"line {number}, byte {error.start:,} is not UTF-8"
                raise ValueError(_not_text(path, why)) from None
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
                yield row if isinstance(row, dict) else {}


def _hub(source: str, subset: str | None, split: str) -> Iterable[Any]:
    check_data_set(source)
    from datasets import load_dataset

    try:
        return load_dataset(source, subset, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds, none of its own
        raise ValueError(
            f"Expected a file, a folder or a data set of the Hub; {source!r} is no file, and "
            f"as a data set it could not be opened ({error})."
        ) from None


def _column(rows: Iterable[Any], column: str, source: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise ValueError(
                f"{source}, row {number}: expected a text in the column {column!r}, got "
                f"{type(text).__name__}; there are {', '.join(map(str, row)) or 'none'}. "
                "Name another with --column."
            )
        yield text


@dataclass
class Spans(Dataset):
    """Random spans of texts; a longer text gives more of them, other ones in every epoch.

    A text of n tokens gives ceil(n / length) spans an epoch, each beginning anywhere (Zelikman et al.
    2024, arXiv:2403.09629: one span of 256 per text). What a span is depends on the seed, the epoch
    and its number only.
    """

    texts: Sequence[Sequence[int]]
    length: int = 256
    seed: int = 0
    epoch: int = 0
    skipped: int = 0
    """Texts that were too short."""
    _part: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, ids in enumerate(self.texts):
            self._part += [number] * -(-len(ids) // self.length)

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.texts[self._part[index]]
        draw = random.Random(f"{self.seed} {self.epoch} {index}")
        first = draw.randint(0, max(0, len(ids) - self.length))
        return {"input_ids": list(ids[first : first + self.length]), "text": self._part[index]}


def spans(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    least: int,
    seed: int = 0,
) -> Spans:
    """The texts as tokens; those of fewer than `least` are skipped and counted.

    Raises:
        ValueError: no text, or none that is long enough.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens; got {length}.")
    kept: list[list[int]] = []
    count = 0
    for text in texts:
        count += 1
        # A whole file may be longer than any model takes; spans are cut from it.
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) >= least:
            kept.append(ids)
    if not kept:
        raise ValueError(
            f"Expected texts of at least {least} tokens (a position, what follows it and the "
            f"lookahead), got {count} texts, none of them as long."
        )
    return Spans(kept, length, seed, skipped=count - len(kept))


def consecutive(spans: Spans) -> list[tuple[int, list[int]]]:
    """All of every text in spans that do not overlap, each with its text's number: for measuring."""
    cut = []
    for number, ids in enumerate(spans.texts):
        parts = [list(ids[at : at + spans.length]) for at in range(0, len(ids), spans.length)]
        cut += [(number, part) for part in parts if len(part) > 1]
    return cut


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows as one tensor, padded on the right, and its mask: two `[B, T]`."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
