"""Reading JSON files of questions, in which text stays text: `datasets` would turn "1952-03-04" into a date."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, IterableDataset, SplitGenerator

from .rows import Keys, choose_columns
from .values import SURROGATES

_ROWS = 1000  # rows of a table, and rows from which the types of a stream are inferred
_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
_JSON = pa.json_() if hasattr(datasets, "Json") else pa.string()


class _Number(float):
    """A number that keeps the text of the file."""

    text: str

    def __new__(cls, text: str) -> "_Number":
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass
class FilesConfig(BuilderConfig):
    """The mapping of columns, see `load_questions`, and the names of the files in error messages."""

    columns: Mapping[str, str] | None = None
    labels: Mapping[str, Sequence[str]] | None = None


class JsonFiles(ArrowBasedBuilder):
    """
    Builder of a data set from JSON files: objects, one a line, or a list of objects.

    Strings are never converted. In the columns that are read as questions, numbers and booleans become the text that
    stands in the file. A column whose values have different types is stored as JSON.
    """

    BUILDER_CONFIG_CLASS = FilesConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        files = dl_manager.download_and_extract(self.config.data_files)
        labels = self.config.labels or self.config.data_files
        return [
            SplitGenerator(
                name=split,
                gen_kwargs={
                    "files": [
                        (file, label)
                        for path, label in zip(paths, labels[split], strict=True)
                        for file in dl_manager.iter_files(path)  # a zip file becomes a folder
                    ]
                },
            )
            for split, paths in files.items()
        ]

    def _generate_tables(self, files: list[tuple[str, str]]) -> Iterator[tuple[Any, pa.Table]]:
        texts = _find_texts(files, self.config.columns or {})
        types = infer_types(rows for path, label in files for rows in _batches(path, label, texts))
        for shard, (path, label) in enumerate(files):
            for number, rows in enumerate(_batches(path, label, texts)):
                yield (shard, number), _table(rows, types)

    def stream(self, split: str) -> tuple[IterableDataset, Features]:
        """The stream of a split, and the types of its columns, inferred from the first rows."""
        files = self.config.data_files[split]
        labels = (self.config.labels or self.config.data_files)[split]
        return _stream(list(files), list(labels), self.config.columns or {})


def code_hash(*parts: object) -> str:
    """Hash of this code and of the values on which the tables depend. It is part of the path in the cache."""
    files = ("json_files.py", "table_files.py", "rows.py", "values.py")
    code = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in files)
    return hashlib.sha256("\n".join([code, *map(repr, parts)]).encode()).hexdigest()[:16]


def read_files(builder: JsonFiles, split: str | None, streaming: bool) -> tuple[Any, Features | None]:
    """
    Read a split.

    Args:
        builder ([`JsonFiles`]):
            The files.
        split (`str`, *optional*):
            Name of the split, or a slice of it. Required if there are several.
        streaming (`bool`):
            Whether to stream the rows.

    Returns:
        `tuple`: The data set or, without a `split`, a dictionary of it. For a stream, also the types of its columns.
    """
    if not streaming:
        builder.download_and_prepare()
        return builder.as_dataset(split), None
    files = builder.config.data_files
    split = next(iter(files)) if split is None else split
    if split not in files:
        raise ValueError(f'Unknown split "{split}": a stream is one of {list(files)}, without slices.')
    return builder.stream(split)


def _stream(
    files: Sequence[str], labels: Sequence[str], columns: Mapping[str, str]
) -> tuple[IterableDataset, Features]:
    """The stream, whose rows are Python objects, and the types of its columns, inferred from the first rows."""
    pairs = list(zip(files, labels, strict=True))
    texts = _find_texts(pairs, columns)
    rows = chain.from_iterable(read_json(path, label, texts) for path, label in pairs)
    types = infer_types([list(islice(rows, _ROWS))])
    types = {name: None if kind == pa.null() else kind for name, kind in types.items()}  # later rows may have a value
    stream = IterableDataset.from_generator(_stream_rows, gen_kwargs={"files": pairs, "texts": texts, "types": types})
    return stream, Features.from_arrow_schema(_schema(types))


def _stream_rows(
    files: list[tuple[str, str]], texts: tuple[Keys, ...], types: dict[str, pa.DataType | None]
) -> Iterator[dict[str, Any]]:
    whole = {keys[0] for keys in texts if len(keys) == 1}
    for path, label in files:
        for place, row in read_json(path, label, texts):
            fitted = {}
            for name, kind in types.items():
                value = row.get(name)
                # Values read whole are checked as questions and answers; columns of different types take any value
                if kind is not None and name not in whole:
                    try:
                        value = pa.array([value], kind).to_pylist()[0]
                    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                        found = _KINDS.get(type(value), "a number")
                        raise ValueError(
                            f"{label}, {place}, column {name!r}: found {found} that is unlike the first {_ROWS} rows "
                            f"({kind}). Without streaming, such columns can be read."
                        ) from None
                fitted[name] = value
            yield fitted


def _find_texts(files: Sequence[tuple[str, str]], columns: Mapping[str, str]) -> tuple[Keys, ...]:
    """The keys that lead to the values which are read as questions, according to the first rows."""
    for path, label in files:
        if rows := [row for _, row in islice(read_json(path, label), _ROWS)]:
            found = choose_columns(list(dict.fromkeys(key for row in rows for key in row)), rows, columns)
            return tuple(keys for ours, paths in found.items() if ours != "prompt" for keys in paths)
    raise ValueError(f"{files[0][1]} has no rows.")


def read_json(path: str, label: str, texts: Iterable[Keys] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the rows of a JSON file: objects, one a line, or a list of objects.

    Args:
        path (`str`):
            Path or URL, which may be compressed.
        label (`str`):
            Name of the file in error messages.
        texts (`Iterable[tuple[str, ...]]`, *optional*, defaults to `()`):
            The keys that lead to values which become text.

    Yields:
        `tuple`: The place of a row in its file, for instance `"line 3"`, and the row.

    Raises:
        `ValueError`: If a row is not a JSON object. The message names the file and the line.
    """
    expected = 'expected an object such as {"question": "...", "golden_answers": ["..."]}'
    texts = list(texts)
    with file_errors(label):
        for place, row in _parse_file(path):
            if not isinstance(row, dict):
                raise ValueError(f"{label}, {place}: {expected}, found {row!r:.200}.")
            for name, value in row.items():
                if _is_broken(value):
                    raise ValueError(
                        f"{label}, {place}, column {name!r}: found a lone surrogate, half of a character, in "
                        f"{value!r:.200}."
                    )
            for keys in texts:
                _make_text(row, keys)
            yield place, row


@contextmanager
def file_errors(label: str) -> Iterator[None]:
    """
    Name the file in errors of its encoding, compression and JSON.

    Args:
        label (`str`):
            Name of the file in error messages.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{label}, line {error.lineno}: not valid JSON ({error.msg}, character {error.colno})."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{label}: not a complete gzip file ({error}).") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{label}: not UTF-8 text ({error.reason}).") from None


def _parse_file(path: str) -> Iterator[tuple[str, Any]]:
    with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer") as lines:
        first = None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if first is None:
                first = number
                if line.lstrip().startswith("[") or not _is_json(line):
                    # A list, or objects over several lines
                    yield from _parse_text("\n" * (number - 1) + line + lines.read())
                    return
            try:
                yield f"line {number}", _parse(line)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise


def _parse_text(text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a list of objects, or of objects one after the other."""
    if text.lstrip().startswith("["):
        yield from ((f"row {index} (from 0)", row) for index, row in enumerate(_parse(text)))
        return
    start, index = _end_of_space(text, 0), 0
    while start < len(text):
        row, end = _DECODER.raw_decode(text, start)
        yield f"row {index} (from 0)", row
        start, index = _end_of_space(text, end), index + 1


def _end_of_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]


def _integer(text: str) -> int | _Number:
    number = int(text)
    return number if -(2**63) <= number < 2**63 else _Number(text)  # Arrow's integers have 64 bits


def _constant(text: str) -> float | None:
    return None if text == "NaN" else float(text)  # Python writes a missing value as NaN


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_Number, parse_constant=_constant)


def _parse(text: str) -> Any:
    return _DECODER.decode(text)


def _is_json(line: str) -> bool:
    try:
        _parse(line)
    except json.JSONDecodeError:
        return False
    return True


def _is_broken(value: Any) -> bool:
    """Whether a text has a lone surrogate, which Arrow deletes from columns of different types."""
    if isinstance(value, str):
        return not value.isascii() and SURROGATES.search(value) is not None
    if isinstance(value, dict):
        return any(map(_is_broken, value.values()))
    return isinstance(value, list) and any(map(_is_broken, value))


def _make_text(value: Any, keys: Keys) -> None:
    """Turn the numbers and booleans to which the keys lead into text, in place."""
    if isinstance(value, list):
        for item in value:
            _make_text(item, keys)
    elif isinstance(value, dict):
        key, *rest = keys
        if rest:
            _make_text(value.get(key), tuple(rest))
        elif key in value:
            value[key] = _as_text(value[key])


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return value.text if isinstance(value, _Number) else str(value)
    return value


def infer_types(batches: Iterable[Sequence[tuple[str, Mapping[str, Any]]]]) -> dict[str, pa.DataType | None]:
    """The Arrow type of each column; `None` if its values have different types."""
    types: dict[str, pa.DataType | None] = {}
    for rows in batches:
        for name in dict.fromkeys(key for _, row in rows for key in row):
            known = types.get(name, pa.null())
            types[name] = None if known is None else _unify(known, [row.get(name) for _, row in rows])
    return types


def _unify(known: pa.DataType, values: list[Any]) -> pa.DataType | None:
    try:
        schemas = [pa.schema([("", known)]), pa.schema([("", pa.array(values).type)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _batches(path: str, label: str, texts: Iterable[Keys]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    rows = read_json(path, label, texts)
    while batch := list(islice(rows, _ROWS)):
        yield batch


def _schema(types: Mapping[str, pa.DataType | None]) -> pa.Schema:
    return pa.schema([(name, _JSON if kind is None else kind) for name, kind in types.items()])


def _dump(value: Any) -> str | None:
    """A value of a column of different types. Versions of `datasets` without `Json` read the column as text."""
    return value if value is None or (isinstance(value, str) and pa.string() == _JSON) else json.dumps(value)


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]], types: Mapping[str, pa.DataType | None]) -> pa.Table:
    columns = []
    for name, kind in types.items():
        values = [row.get(name) for _, row in rows]
        if kind is None:
            values = [_dump(value) for value in values]
        try:
            columns.append(pa.array(values, _JSON if kind is None else kind))
        except pa.ArrowInvalid:  # a large integer in a column of floats
            columns.append(pa.array(values).cast(kind, safe=False))
    return pa.Table.from_arrays(columns, schema=_schema(types))
