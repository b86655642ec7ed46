"""Options for the texts of a command, shared by `quiet` and `pause`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class TextOptions:
    """The texts."""

    heading: ClassVar[str] = "text"

    text: str = ""
    """Text source: a .jsonl, .parquet or plain text file, a folder of such files, or a dataset on
    the Hugging Face Hub. Required."""
    column: str = "text"
    """Column that contains the text."""
    split: str = "train"
    """Split of a Hub dataset."""
    subset: str | None = None
    """Configuration (subset) of a Hub dataset."""
    limit: int | None = None
    """Number of texts, from the first. Default: all."""
    length: int = 256
    """Length of a span in tokens. Texts are cut into spans. 256 in the paper."""


def texts_of(how: TextOptions) -> Iterator[str]:
    """Yield the texts that the options of a command name.

    Raises:
        ValueError: `--text` is missing, or `--limit` is below 1.
    """
    from selftaught.options import check_count
    from selftaught.quiet.spans import read_texts

    check_count("limit", how.limit)
    if not how.text:
        raise ValueError(
            "--text is required: a file, a folder or a dataset on the Hugging Face Hub."
        )
    return read_texts(
        how.text, column=how.column, split=how.split, subset=how.subset, limit=how.limit
    )
