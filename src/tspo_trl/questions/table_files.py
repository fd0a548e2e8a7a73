"""Reading CSV and TSV files of questions: every row has the columns of the first line, and a column has one type."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import fsspec
import pyarrow as pa
from datasets import Features, IterableDataset

from .json_files import FilesConfig, JsonFiles, file_errors
from .rows import READ_COLUMNS

_ROWS = 1000  # rows of a table, and rows from which the types of a stream are inferred
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_BOOLEANS = {"true": True, "false": False}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf|nan")
_TYPES: dict[pa.DataType, Callable[[str], Any]] = {
    pa.bool_(): lambda cell: _BOOLEANS[cell.lower()],
    pa.int64(): int,
    pa.float64(): float,
}


@dataclass
class _Config(FilesConfig):
    """The separator of the columns too."""

    separator: str = ","


class TableFiles(JsonFiles):
    """
    Builder of a data set from CSV or TSV files.

    Columns that may be read as questions are text. Another column has numbers or booleans if all of its cells are such,
    or blank; if not, it is text.
    """

    BUILDER_CONFIG_CLASS = _Config

    def _generate_tables(self, files: list[tuple[str, str]]) -> Iterator[tuple[Any, pa.Table]]:
        separator = self.config.separator
        types = _infer_types(read_tables(files, separator), self.config.columns or {}, files[0][1])
        for shard, pair in enumerate(files):
            rows = (row for _, row in read_tables([pair], separator))
            number = 0
            while batch := list(islice(rows, _ROWS)):
                columns = [
                    pa.array([_convert(row.get(name), kind) for row in batch], kind) for name, kind in types.items()
                ]
                yield (shard, number), pa.Table.from_arrays(columns, schema=pa.schema(list(types.items())))
                number += 1

    def stream(self, split: str) -> tuple[IterableDataset, Features]:
        files, labels = self.config.data_files[split], (self.config.labels or self.config.data_files)[split]
        pairs, separator = list(zip(files, labels, strict=True)), self.config.separator
        types = _infer_types(islice(read_tables(pairs, separator), _ROWS), self.config.columns or {}, pairs[0][1])
        rows = {"files": pairs, "separator": separator, "types": types}
        features = Features.from_arrow_schema(pa.schema(list(types.items())))
        return IterableDataset.from_generator(_stream_rows, gen_kwargs=rows), features


def read_tables(files: Sequence[tuple[str, str]], separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    """
    Read the rows of CSV or TSV files.

    Args:
        files (`list[tuple[str, str]]`):
            The paths or URLs of the files, which may be compressed, and their names in error messages.
        separator (`str`):
            The separator of the columns.

    Yields:
        `tuple`: The file and the place of a row in it, for instance `"a.csv, row 3 (from 0)"`, and the row.

    Raises:
        `ValueError`: If a row has more or fewer columns than the first line, or a quote is not closed. The message names
            the file and the row.
    """
    return chain.from_iterable(_read_table(path, label, separator) for path, label in files)


def _read_table(path: str, label: str, separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a text may be long
    names: list[str] = []
    count = 0
    with file_errors(label), fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            for cells in reader:
                where = f"{label}, row {count} (from 0)"
                if not "".join(cells).strip() and len(cells) < 2:
                    continue  # a blank line
                if not names:
                    _check_separator(cells, f"{label}, line {reader.line_num}", separator)
                    names = _names(cells)
                    continue
                if len(cells) != len(names):
                    hint = ' A cell that contains a comma must be in quotes ("…").' if separator == "," else ""
                    raise ValueError(
                        f"{where}: expected {len(names)} columns {names}, found {len(cells)}: {cells!r:.200}.{hint}"
                    )
                yield where, dict(zip(names, cells, strict=True))
                count += 1
        except csv.Error as error:
            place = f"row {count} (from 0)" if names else "line 1"
            raise ValueError(
                f"{label}, {place}: not a valid table ({error}). A cell that begins with a quote must end with one, and "
                "quotes in it must be doubled."
            ) from None


def _check_separator(cells: list[str], where: str, separator: str) -> None:
    line = separator.join(cells)
    for other, found in _SEPARATORS.items():
        # Names of columns have no tabs, but perhaps a comma or a semicolon
        if other != separator and line.count(other) > (0 if other == "\t" else line.count(separator)):
            raise ValueError(
                f"{where}: expected the names of columns, separated by {_SEPARATORS.get(separator, repr(separator))}, "
                f"found {found}: {line!r:.200}. The columns of a .csv file are separated by commas, those of a .tsv file "
                "by tabs."
            )


def _names(cells: list[str]) -> list[str]:
    """The names of columns, each once, in the way of pandas."""
    names: list[str] = []
    for i, cell in enumerate(cells):
        name = first = cell or f"Unnamed: {i}"
        repeats = 0
        while name in names:
            repeats += 1
            name = f"{first}.{repeats}"
        names.append(name)
    return names


def _infer_types(
    rows: Iterator[tuple[str, dict[str, str]]], columns: Mapping[str, str], label: str
) -> dict[str, pa.DataType]:
    """The Arrow type of each column."""
    ours = {path.split(".")[0] for path in (*READ_COLUMNS, *columns.values())} | set(columns.values())
    found: dict[str, set[pa.DataType]] = defaultdict(set)
    for _, row in rows:
        for name, cell in row.items():
            # A column of words stays one
            if pa.string() not in found[name] and cell.strip():
                found[name].add(pa.string() if name in ours else _infer_type(cell.strip()))
    if not found:
        raise ValueError(f"{label} has no rows.")
    types = {}
    for name, kinds in found.items():
        numbers = pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()
        types[name] = kinds.pop() if len(kinds) == 1 else numbers
    return types


def _infer_type(cell: str) -> pa.DataType:
    if cell.lower() in _BOOLEANS:
        return pa.bool_()
    if _INTEGER.fullmatch(cell):
        # Arrow's integers have 64 bits, and a float would lose digits
        return pa.int64() if len(cell) < 99 and -(2**63) <= int(cell) < 2**63 else pa.string()
    return pa.float64() if _NUMBER.fullmatch(cell) else pa.string()


def _convert(cell: str | None, kind: pa.DataType) -> Any:
    if cell is None or kind == pa.string():
        return cell
    return _TYPES[kind](cell.strip()) if cell.strip() else None


def _stream_rows(
    files: list[tuple[str, str]], separator: str, types: dict[str, pa.DataType]
) -> Iterator[dict[str, Any]]:
    for where, row in read_tables(files, separator):
        fitted = {}
        for name, kind in types.items():
            cell = (row.get(name) or "").strip()
            likes = {kind, pa.int64()} if kind == pa.float64() else {kind}
            if kind != pa.string() and cell and _infer_type(cell) not in likes:
                raise ValueError(
                    f"{where}, column {name!r}: found {cell!r:.200}, unlike the first {_ROWS} rows ({kind}). Without "
                    "streaming, such columns can be read."
                )
            fitted[name] = _convert(row.get(name), kind)
        yield fitted
