"""Rows of tables, for the tasks: from JSONL, JSON, CSV and Parquet files, and from the Hub."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from selftaught.records import parse_json_line

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


class Row(NamedTuple):
    """One row of a table, and where it stands, for messages."""

    where: str
    values: dict[str, Any]


def is_file(path: str) -> bool:
    """Whether a path names a file of ours rather than something on the Hub."""
    return Path(path).suffix.lower() in ENDINGS or Path(path).exists()


def file_rows(path: Path) -> list[Row]:
    """The rows of a file, by its ending.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending or its content is not that of a table, or it is empty; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    match path.suffix.lower():
        case ".jsonl":
            rows = _jsonl_rows(path)
        case ".json":
            rows = _json_rows(path)
        case ".csv":
            rows = _csv_rows(path)
        case ".parquet":
            rows = _parquet_rows(path)
        case _:
            raise ValueError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}.")
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row.")
    return rows


def _jsonl_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(Row(where, parse_json_line(line, where)))
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        listed = json.loads(_decoded(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list of objects, got {error}.") from None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise ValueError(
            f"{path}: expected a JSON list of objects, one per question; for one object per line "
            "name the file .jsonl."
        )
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(listed, 1)]


def _csv_rows(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if not header:
                header = values
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: a column name stands twice: {', '.join(header)}.")
            elif values and len(values) != len(header):
                raise ValueError(
                    f"{where}: expected {len(header)} values, as in the first line, got "
                    f"{len(values)}; put values that hold commas in double quotes."
                )
            elif values:
                rows.append(Row(where, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got {error}.") from None
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        listed = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a Parquet file, got: {error}") from None
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(listed, 1)]


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, got byte {raw[error.start]:#04x}; convert "
            "the file to UTF-8."
        ) from None


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of one split of a Hub data set.

    Raises:
        FileNotFoundError: the Hub cannot be reached, or has no such data set.
        ValueError: the data set has no such config or split.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"The data set {name!r} is neither a file here nor could it be loaded from the Hub "
            f"({error}); check the name and the connection, or give the path of a local copy."
        ) from error
    return [Row(f"{name}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
