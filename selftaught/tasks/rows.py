"""Rows of tables, for the tasks: from JSONL, JSON, CSV, TSV and Parquet files, and from the Hub."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from itertools import chain
from pathlib import Path
from typing import IO, Any, AnyStr, NamedTuple

from selftaught.hub import check_data_set
from selftaught.records import parse_json_line

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".tsv")
LONGEST_LINE = 64 * 2**20
"""Bytes of a line, or characters of a CSV value, beyond which a file is refused."""
MOST_BYTES = 2 * 2**30
"""Bytes of a JSON file, and of the values in a Parquet file, beyond which it is refused."""
MOST_ROWS = 20_000_000
MOST_DIGITS = 4000
"""Digits beyond which a whole number is kept as a `Decimal`; Python's `int` refuses 4,300."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One row of a table, and where it stands, for messages."""

    where: str
    values: dict[str, Any]


def is_file(path: str) -> bool:
    """Whether a path names a file of ours rather than something on the Hub."""
    return Path(path).suffix.lower() in ENDINGS or Path(path).exists()


def file_rows(path: Path) -> list[Row]:
    """The rows of a file, by its ending. Numbers of JSON that are not whole are `Decimal`.

    Text is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending or its content is not that of a table, it is empty, or it holds more
            than the limits of this module; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    match path.suffix.lower():
        case ".jsonl":
            rows = _jsonl_rows(path)
        case ".json":
            rows = _json_rows(path)
        case ".csv":
            rows = _csv_rows(path, ",")
        case ".tsv":
            rows = _csv_rows(path, "\t")
        case ".parquet":
            rows = _parquet_rows(path)
        case _:
            raise ValueError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}.")
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row.")
    return rows


# ---------------------------------------------------------------- JSON


def _jsonl_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(checked(Row(where, parse_json_line(line, where, parse=_DECODER.decode))))
    return rows


def _json_rows(path: Path) -> list[Row]:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path}: expected at most {MOST_BYTES / 2**30:g} GiB of JSON; convert it to .jsonl, one "
            "object per line, which is read line by line."
        )
    text = "".join(_text_lines(path, MOST_BYTES))
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(
            f"{path}: expected a JSON list of objects, got {text[at : at + 20]!r}; for one object per "
            "line name the file .jsonl."
        )
    rows: list[Row] = []
    after = _after_space(text, at + 1)
    ended = text[after : after + 1] == "]"
    while not ended:
        where = f"{path}, row {len(rows) + 1}"
        with _json_errors(where, text):
            value, at = _DECODER.raw_decode(text, _after_space(text, at + 1))
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}.")
        rows.append(checked(Row(where, value)))
        at = after = _after_space(text, at)
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{where}: expected a comma or ] after the object, at line {line}.")
    if rest := text[after + 1 :].strip():
        raise ValueError(f"{path}: expected nothing after the JSON list, got {rest[:20]!r}.")
    return rows


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


@contextmanager
def _json_errors(where: str, text: str) -> Iterator[None]:
    """Turn what a JSON decoder raises into errors that name the row."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected a JSON list of objects, got {error.msg} at line {error.lineno}, column "
            f"{error.colno}."
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply to read.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads would keep the last of two equal keys and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object; keep one.')
    return values


def _whole(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MOST_DIGITS else Decimal(digits)


def _fraction(written: str) -> Decimal:
    try:
        return Decimal(written)
    except InvalidOperation:
        raise ValueError(f"the exponent of the number {written[:40]} is too large.") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction)
"""Numbers as they are written: a float would round 0.1234567890123456789 and 1e23."""


# ---------------------------------------------------------------- CSV and TSV


def _csv_rows(path: Path, delimiter: str) -> list[Row]:
    """The rows of a table; a .csv whose header has no comma may be separated by semicolons or tabs."""
    lines = _text_lines(path)
    first = next(lines, "")
    if delimiter == "," and "," not in first:
        delimiter = next((one for one in ";\t" if one in first), ",")
    rows: list[Row] = []
    header: list[str] = []
    begun = 1
    with _field_limit():
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        try:
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if not header:
                    header = values
                    _check_header(where, header)
                elif values and len(values) != len(header):
                    raise ValueError(
                        f"{where}: expected {len(header)} values, as in the first line, got "
                        f"{len(values)}; put values that hold {SEPARATORS[delimiter]} in double quotes."
                    )
                elif values:
                    rows.append(checked(Row(where, dict(zip(header, values, strict=True)))))
                begun = reader.line_num + 1
        except csv.Error as error:
            since = f" in the row that begins at line {begun}" if begun < reader.line_num else ""
            raise ValueError(
                f"{path}, line {reader.line_num}: expected CSV, got {error}{since}; is a double quote "
                "missing?"
            ) from None
    return rows


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _check_header(where: str, header: list[str]) -> None:
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: a column name stands twice: {', '.join(header)}.")
    found = [name for one, name in SEPARATORS.items() if len(header) == 1 and one in header[0]]
    if found:
        raise ValueError(
            f"{where}: expected column names, got one that holds {' and '.join(found)}: "
            f"{header[0][:60]!r}. Values of a .csv file are separated by commas, semicolons or tabs, "
            "those of a .tsv file by tabs; rename or convert the file."
        )


def _text_lines(path: Path, longest: int | None = None) -> Iterator[str]:
    """The lines of a text file, which may also end in a bare carriage return; see `_lines`."""
    for number, line in _lines(path, longest):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf_8(f"{path}, line {number}", line, error) from None
        if "\0" in text:
            raise ValueError(
                f"{path}, line {number}: expected text, got a NUL byte; is the file UTF-16 or not a "
                "text file? Convert it to UTF-8."
            )
        yield from io.StringIO(text, newline="")


@contextmanager
def _field_limit() -> Iterator[None]:
    """Let a CSV value be as long as a line may be; Python's own limit is 131,072 characters."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---------------------------------------------------------------- text files


def _lines(path: Path, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a text file as UTF-8, without a byte order mark.

    Raises:
        ValueError: a line is longer than `longest` bytes (default: `LONGEST_LINE`), or the file begins
            as UTF-16 and is not.
    """
    longest = LONGEST_LINE if longest is None else longest
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            yield from _utf_16_lines(path, longest)
            return
        file.seek(0)
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        yield from _limited(path, file, longest)


def _utf_16_lines(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with path.open(encoding="utf-16", newline="\n") as file:
            for number, line in _limited(path, file, longest):
                yield number, line.encode()
    except UnicodeError as error:
        raise ValueError(
            f"{path}, after line {number}: expected UTF-16, as the file's first two bytes say, got "
            f"{error}; convert the file to UTF-8."
        ) from None


def _limited(path: Path, file: IO[AnyStr], longest: int) -> Iterator[tuple[int, AnyStr]]:
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise ValueError(
                f"{path}, line {number}: expected a line of at most {longest:,} bytes, got a longer "
                "one; are its line breaks missing?"
            )
        yield number, line


def _not_utf_8(where: str, line: bytes, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{where}: expected UTF-8 text, got byte {line[error.start]:#04x}; convert the file to UTF-8."
    )


def checked(row: Row) -> Row:
    """Refuse text that no tokenizer or UTF-8 file can hold.

    Raises:
        ValueError: a value has a NUL or a lone surrogate; names the row and the column.
    """
    for name, value in row.values.items():
        if found := _unfit(name) or _unfit(value):
            code = ord(found)
            what = (
                "a NUL character"
                if not code
                else f"half a character, the lone surrogate \\u{code:04x}"
            )
            raise ValueError(
                f"{row.where}: expected text in the column {name!r}, got {what}; correct or remove "
                "the row."
            )
    return row


def _unfit(value: Any) -> str | None:
    """The first NUL or lone surrogate in a value."""
    if isinstance(value, str):
        found = _NO_TEXT.search(value)
        return found.group() if found else None
    inside: Any = ()
    if isinstance(value, Mapping):
        inside = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        inside = value
    try:
        return next((found for one in inside if (found := _unfit(one))), None)
    except RecursionError:
        return None  # as deep as this a value is no question, gold answer or rationale


# ---------------------------------------------------------------- Parquet


def _parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet file, whose few bytes may stand for very many."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as opened:
            kinds = pyarrow.types
            texts = [
                field.name
                for field in opened.schema_arrow
                if kinds.is_string(field.type) or kinds.is_large_string(field.type)
            ]
            _check_size(path, opened.metadata)
        # Equal texts are read once, as a dictionary, however often the file repeats them.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as opened:
            return list(_batches(path, opened))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got: {error}") from None


def _check_size(path: Path, metadata: Any) -> None:
    size = sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
    if size > MOST_BYTES or metadata.num_rows > MOST_ROWS:
        raise _too_large(path, f"{metadata.num_rows:,} rows of {size:,} bytes in all")


def _batches(path: Path, opened: Any) -> Iterator[Row]:
    size = number = 0
    for batch in opened.iter_batches(batch_size=1024):
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            texts = _shared_texts(column) if hasattr(column, "dictionary") else None
            size += column.nbytes if texts is None else sum(map(len, filter(None, texts)))
            if size > MOST_BYTES:
                raise _too_large(path, f"more than {size:,} bytes by row {number + len(batch):,}")
            columns[name] = column.to_pylist() if texts is None else texts
        for at in range(len(batch)):
            number += 1
            yield checked(
                Row(f"{path}, row {number}", {name: columns[name][at] for name in columns})
            )


def _shared_texts(column: Any) -> list[str | None]:
    """The texts of a dictionary column; rows with the same text share it."""
    numbers = column.indices.to_pylist()
    used = sorted({number for number in numbers if number is not None})
    texts = dict(zip(used, column.dictionary.take(used).to_pylist(), strict=True))
    return [None if number is None else texts[number] for number in numbers]


def _too_large(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: expected at most {MOST_ROWS:,} rows of {MOST_BYTES / 2**30:g} GiB in all, got {what}. "
        "Split the file, or keep only the columns that are needed."
    )


# ---------------------------------------------------------------- the Hub


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of one split of a Hub data set.

    Raises:
        FileNotFoundError: the Hub cannot be reached, or has no such data set.
        ValueError: the data set has no such config or split.
    """
    from datasets import load_dataset

    check_data_set(name)
    try:
        rows = load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"The data set {name!r} is neither a file here nor could it be loaded from the Hub "
            f"({error}); check the name and the connection, or give the path of a local copy."
        ) from error
    return [Row(f"{name}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
