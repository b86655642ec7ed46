"""Reading rows of JSONL, JSON, CSV, TSV and Parquet files, and of Hub data sets, for the tasks."""

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
"""Maximum number of bytes of a line, or of characters of a CSV value."""
MOST_BYTES = 2 * 2**30
"""Maximum number of bytes of a JSON file, and of the values in a Parquet file."""
MOST_ROWS = 20_000_000
"""Maximum number of rows of a Parquet file."""
MOST_DIGITS = 4000
"""Maximum number of digits of an `int`; longer integers are `Decimal`, because Python's `int`
rejects 4,300 digits."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """A row of a table."""

    where: str
    """File and line or row number, for error messages."""
    values: dict[str, Any]
    """Values by column."""


def is_file(path: str) -> bool:
    """Return whether a path refers to a local file, and not to a data set on the Hub."""
    return Path(path).suffix.lower() in ENDINGS or Path(path).exists()


def file_rows(path: Path) -> list[Row]:
    """Read the rows of a file, whose extension gives the format.

    Text is UTF-8, or UTF-16 with a byte order mark. JSON numbers with a fraction or exponent are
    `Decimal`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the extension is unknown, or the file is invalid, empty, or larger than the
            limits of this module; the message names the line.
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
            raise ValueError(
                f"{path}: expected a file with one of the extensions {', '.join(ENDINGS)}."
            )
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
            f"{path}: expected at most {MOST_BYTES / 2**30:g} GiB of JSON; convert it to .jsonl "
            "(one object per line), which is read line by line."
        )
    text = "".join(_text_lines(path, MOST_BYTES))
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(
            f"{path}: expected a JSON list of objects, got {text[at : at + 20]!r}. If the file has "
            "one object per line, rename it to .jsonl."
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
    """Convert exceptions of the JSON decoder to errors that name the row."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected a JSON list of objects, got {error.msg} at line {error.lineno}, column "
            f"{error.colno}."
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object with unique keys; `json.loads` would keep the last of equal keys."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'expected unique keys, but the key "{twice}" is repeated; keep one.')
    return values


def _whole(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MOST_DIGITS else Decimal(digits)


def _fraction(written: str) -> Decimal:
    try:
        return Decimal(written)
    except InvalidOperation:
        raise ValueError(f"the exponent of the number {written[:40]} is too large.") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction)
"""Decoder that keeps numbers exactly; a float would round 0.1234567890123456789 and 1e23."""


# ---------------------------------------------------------------- CSV and TSV


def _csv_rows(path: Path, delimiter: str) -> list[Row]:
    """Read a CSV or TSV file. A .csv file whose header has no comma may use semicolons or tabs."""
    lines = _text_lines(path)
    first = next(lines, "")
    if delimiter == "," and "," not in first:
        delimiter = next((one for one in ";\t" if one in first), ",")
    rows: list[Row] = []
    header: list[str] = []
    row_start = 1
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
                        f"{len(values)}; put values that contain {SEPARATORS[delimiter]} in double "
                        "quotes."
                    )
                elif values:
                    rows.append(checked(Row(where, dict(zip(header, values, strict=True)))))
                row_start = reader.line_num + 1
        except csv.Error as error:
            since = (
                f" in the row that starts at line {row_start}"
                if row_start < reader.line_num
                else ""
            )
            raise ValueError(
                f"{path}, line {reader.line_num}: expected CSV, got {error}{since}; is a double quote "
                "missing?"
            ) from None
    return rows


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _check_header(where: str, header: list[str]) -> None:
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: expected unique column names, got {', '.join(header)}.")
    found = [name for one, name in SEPARATORS.items() if len(header) == 1 and one in header[0]]
    if found:
        raise ValueError(
            f"{where}: expected column names, got one that contains {' and '.join(found)}: "
            f"{header[0][:60]!r}. The separators of a .csv file are commas, semicolons or tabs, "
            "those of a .tsv file are tabs; rename or convert the file."
        )


def _text_lines(path: Path, longest: int | None = None) -> Iterator[str]:
    """Yield the lines of a text file; a carriage return alone also ends a line. See `_lines`."""
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
    """Set the limit of a CSV value to that of a line; Python's default is 131,072 characters."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---------------------------------------------------------------- text files


def _lines(path: Path, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a text file as UTF-8, without a byte order mark.

    Raises:
        ValueError: a line is longer than `longest` bytes (default: `LONGEST_LINE`), or the file has
            a UTF-16 byte order mark but is not UTF-16.
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
            f"{path}, after line {number}: expected UTF-16, because of the file's byte order mark, "
            f"got {error}; convert the file to UTF-8."
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
    """Check that the text of a row can be tokenized and stored as UTF-8, and return the row.

    Raises:
        ValueError: a value contains NUL or a lone surrogate; the message names the row and the
            column.
    """
    for name, value in row.values.items():
        if found := _unfit(name) or _unfit(value):
            code = ord(found)
            what = (
                "a NUL character"
                if not code
                else f"an invalid character, the lone surrogate \\u{code:04x}"
            )
            raise ValueError(
                f"{row.where}: expected text in the column {name!r}, got {what}; correct or remove "
                "the row."
            )
    return row


def _unfit(value: Any) -> str | None:
    """Return the first NUL or lone surrogate in a value, or None."""
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
        return None  # a value nested this deeply is not a question, gold answer or rationale


# ---------------------------------------------------------------- Parquet


def _parquet_rows(path: Path) -> list[Row]:
    """Read a Parquet file, whose values may be much larger than the compressed file."""
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
        # Text columns are read as dictionaries, so that repeated texts are in memory only once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as opened:
            return list(_batches(path, opened))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got: {error}") from None


def _check_size(path: Path, metadata: Any) -> None:
    size = sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
    if size > MOST_BYTES or metadata.num_rows > MOST_ROWS:
        raise _too_large(path, f"{metadata.num_rows:,} rows of {size:,} bytes in total")


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
    """Return the texts of a dictionary column; rows with the same text share one string."""
    numbers = column.indices.to_pylist()
    used = sorted({number for number in numbers if number is not None})
    texts = dict(zip(used, column.dictionary.take(used).to_pylist(), strict=True))
    return [None if number is None else texts[number] for number in numbers]


def _too_large(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: expected at most {MOST_ROWS:,} rows of {MOST_BYTES / 2**30:g} GiB in total, got "
        f"{what}. Split the file, or keep only the columns that are needed."
    )


# ---------------------------------------------------------------- the Hub


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """Read a split of a Hub data set.

    Args:
        name: name of the data set.
        config: configuration of the data set. None means its default.
        split: split of the data set.

    Raises:
        FileNotFoundError: the Hub cannot be reached, or the data set does not exist.
        ValueError: the data set does not have the configuration or split.
    """
    from datasets import load_dataset

    check_data_set(name)
    try:
        rows = load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"The data set {name!r} is not a local file and could not be loaded from the Hub "
            f"({error}). Check the name and the connection, or give the path of a local copy."
        ) from error
    return [Row(f"{name}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
