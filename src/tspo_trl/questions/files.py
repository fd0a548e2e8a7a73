"""Files of questions: their formats, and the place of an error in a file."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The ending of a file and the loader of `datasets` that reads it.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


def file_format(file: str | Path) -> str | None:
    """
    The loader of `datasets` for a file, by its ending.

    Args:
        file (`str` or `Path`):
            A path or a URL, with or without the ending of compression `.gz`.

    Returns:
        `str` or `None`: `"json"`, `"csv"`, `"parquet"`, or `None` for anything else.
    """
    return FORMATS.get(Path(str(file).removesuffix(".gz")).suffix.lower())


def row_of_file(file: str, index: int) -> str:
    """
    The name of a row of a file in error messages.

    Args:
        file (`str`):
            Path of the file.
        index (`int`):
            Number of the row, from 0. A negative number stands for the whole file.

    Returns:
        `str`: The file with the line from 1 (JSONL), or with the row from 0.
    """
    if index < 0:
        return file
    if file.removesuffix(".gz").endswith(".jsonl") and Path(file).is_file():
        filled = (number for number, line in _lines(file) if line.strip())
        return f"{file}, line {next(number for i, number in enumerate(filled) if i == index)}"
    return f"{file}, row {index} (from 0)"


def explain_file(file: str, kind: str, error: BaseException) -> str:
    """
    Explain why a file could not be read.

    Args:
        file (`str`):
            Path of the file.
        kind (`str`):
            Its format, see [`file_format`].
        error (`BaseException`):
            Exception raised by `datasets`.

    Returns:
        `str`: A message that names the file and, where it can be found, the line or row.
    """
    if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
        return f"{file} has no rows."
    reason: BaseException = error
    while reason.__cause__ is not None or reason.__context__ is not None:
        reason = reason.__cause__ or reason.__context__  # type: ignore[assignment]
    found = _json_fault(file) if kind == "json" and Path(file).is_file() else None
    return found or f"{file} cannot be read as {kind}: {str(reason).strip() or repr(reason)}"


def _lines(file: str) -> Iterator[tuple[int, str]]:
    with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
        yield from enumerate(lines, start=1)


def _json_fault(file: str) -> str | None:
    """The first row of a JSON file that is not an object, or in which the type of a column changes."""
    expected = 'expected an object such as {"question": "...", "golden_answers": ["..."]}'
    try:
        rows: Iterator[tuple[str, Any]]
        if next((line.strip() for _, line in _lines(file) if line.strip()), "").startswith("["):
            whole = json.loads("".join(line for _, line in _lines(file)))
            rows = ((f"row {index} (from 0)", row) for index, row in enumerate(whole))
        else:
            rows = ((f"line {number}", _parse(line, number)) for number, line in _lines(file) if line.strip())
        seen: dict[str, tuple[str, str]] = {}
        for where, row in rows:
            if not isinstance(row, dict):
                return f"{file}, {where}: {expected}, found {row!r:.200}."
            for column, kind in _kinds(row):
                before, first = seen.setdefault(column, (kind, where))
                if kind != before:
                    return f"{file}, {where}, column {column!r}: found {kind}, but {before} in {first}."
    except json.JSONDecodeError as error:
        return f"{file}, line {error.lineno}: not valid JSON ({error.msg}, character {error.colno})."
    except UnicodeDecodeError as error:
        return f"{file}: not UTF-8 text ({error.reason} at byte {error.start})."
    return None


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        error.lineno = number
        raise


def _kinds(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The paths of the values in a row, and their types."""
    if path and value is not None:
        yield path, _KINDS[type(value)]
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{path}[]")
