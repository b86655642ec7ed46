"""Training texts: reading them from files or the Hugging Face Hub, and cutting them into spans."""

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
"""Suffixes of the files that are read from a folder. Other files are ignored."""


def read_texts(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> Iterator[str]:
    """Yield the texts of a file, a folder of files, or a dataset on the Hugging Face Hub.

    Args:
        source: path of a file or folder, or name of a Hub dataset. `.jsonl`, `.json` (JSON Lines)
            and `.parquet` files have one text per row; any other file is one text. A Hub dataset is
            streamed, not stored.
        column: column that contains the text.
        split: split of a Hub dataset.
        subset: configuration of a Hub dataset. None: its default one.
        limit: maximum number of texts. None means all.

    Raises:
        ValueError: the source does not exist, a file is not text, a row has no text in the column,
            or `limit` is below 1.
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
                f"Expected {', '.join(SUFFIXES)} files in the folder {path}, found none."
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
        raise ValueError(
            f"{path} could not be read as Parquet ({error}). Check or replace the file."
        ) from error


def _text_file(path: Path) -> str:
    """Return the text of a UTF-8 file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(path, f"byte {error.start:,} is not UTF-8")) from None
    if "\0" in text:
        raise ValueError(_not_text(path, f"character {text.index(chr(0)):,} is NUL"))
    return text


def _not_text(path: Path, why: str) -> str:
    return (
        f"Expected text in UTF-8 in {path}, got binary data or another encoding ({why}). Convert "
        "the file (iconv -t UTF-8) or remove it."
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
                    raise ValueError(
                        f"{path}, line {number}: not JSON ({error}). Expected one JSON "
                        "object per line."
                    ) from None
                yield row if isinstance(row, dict) else {}


def _hub(source: str, subset: str | None, split: str) -> Iterable[Any]:
    check_data_set(source)
    from datasets import load_dataset

    try:
        return load_dataset(source, subset, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds, none of its own
        raise ValueError(
            f"Expected a file, a folder or a dataset on the Hugging Face Hub, got {source!r}: "
            f"there is no such file, and no dataset of this name could be opened ({error})."
        ) from None


def _column(rows: Iterable[Any], column: str, source: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise ValueError(
                f"{source}, row {number}: expected a text in the column {column!r}, got "
                f"{type(text).__name__}. Columns of this row: "
                f"{', '.join(map(str, row)) or 'none'}. Choose another one with --column."
            )
        yield text


@dataclass
class Spans(Dataset):
    """Dataset of random spans of texts, with other spans in every epoch.

    A text of n tokens gives ceil(n / length) spans per epoch, each with a uniformly random start
    (Zelikman et al. 2024, arXiv:2403.09629, use one span of 256 tokens per text). A span depends
    only on the seed, the epoch and its index.
    """

    texts: Sequence[Sequence[int]]
    """Token ids of the texts."""
    length: int = 256
    """Length of a span in tokens."""
    seed: int = 0
    """Random seed for the starts of spans."""
    epoch: int = 0
    """Number of the current epoch. Changes the spans."""
    skipped: int = 0
    """Number of texts that were too short and are not in `texts`."""
    _part: list[int] = field(default_factory=list)
    """Number of the text of each span."""

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
    """Tokenize texts and return a dataset of their spans. Short texts are skipped and counted.

    Args:
        length: length of a span in tokens, at least 2.
        least: minimum number of tokens of a text. Shorter texts are skipped.
        seed: random seed for the starts of spans.

    Raises:
        ValueError: no text is long enough, or `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens; got {length}.")
    kept: list[list[int]] = []
    count = 0
    for text in texts:
        count += 1
        # A text may be longer than the model's context, because spans are cut from it;
        # `verbose=False` suppresses the tokenizer's warning.
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) >= least:
            kept.append(ids)
    if not kept:
        raise ValueError(
            f"Expected texts of at least {least} tokens (one position with its next token and "
            f"lookahead), got {count} texts, none of them as long. Use longer texts."
        )
    return Spans(kept, length, seed, skipped=count - len(kept))


def consecutive(spans: Spans) -> list[tuple[int, list[int]]]:
    """Cut every text completely into spans that do not overlap, for evaluation.

    Returns:
        Spans as (number of the text, token ids). Spans of one token are dropped.
    """
    cut = []
    for number, ids in enumerate(spans.texts):
        parts = [list(ids[at : at + spans.length]) for at in range(0, len(ids), spans.length)]
        cut += [(number, part) for part in parts if len(part) > 1]
    return cut


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Stack token ids into one tensor, padded on the right.

    Args:
        rows: token ids of each row.
        filler: id of the padding token.

    Returns:
        Token ids, and a mask with 1 for text and 0 for padding, both `[B, T]`.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
