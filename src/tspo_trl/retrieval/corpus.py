"""Corpora: files of passages, read into memory or mapped into it."""

import csv
import gzip
import hashlib
import json
import mmap
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar, cast, overload

import numpy as np
from tqdm.auto import tqdm

from .base import Passage
from .passages import TEXT_KEYS, describe_type, plain_name, read_passage, same_ids

T = TypeVar("T")

#: Seconds after which a progress bar appears by default
_PATIENCE = 3.0

_OTHER_FORMATS = {
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ",
    "Zstandard": b"(\xb5/\xfd",
    "zip": b"PK\x03\x04",
    "Parquet": b"PAR1",
}


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """
    Read a corpus file in one of its published forms: plain, compressed with gzip, or the first file of a gzip-compressed tar
    archive.

    - JSONL: one passage a line, for instance `{"id", "title", "text"}`, `{"_id", "title", "text"}` (BEIR) or `{"id",
      "contents"}` with the title on the first line of `contents`, as in the corpora of FlashRAG and Search-R1. See
      [`read_passage`] for all names.
    - JSON: a list of such objects.
    - TSV or CSV with the names of the columns on the first line, for instance `id`, `text` and `title`, as in the corpus
      of DPR. Texts with quotes are quoted.

    A passage without an id gets the number of its line or item, from 0.

    Args:
        path (`str` or `Path`):
            Path of the file.

    Yields:
        [`Passage`]: The passages in file order, with score 0.

    Raises:
        `TypeError`: If `path` is not a path.
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a line is not a passage (the message names file, line and the type found), or if the file has no
            passages, is damaged or has another form.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"The corpus must be the path of a file, got {describe_type(path)}.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"The corpus {str(path)!r} is a folder: name a file in it."
            if path.is_dir()
            else f"The corpus file {str(path)!r} does not exist."
        )
    empty = True
    try:
        with _open_corpus(path) as file:
            for record, where, default_id in _read_records(file, path):
                yield read_passage(record, where, default_id=default_id, score=0.0)
                empty = False
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"The corpus file {str(path)!r} is damaged or incomplete: {error}") from error
    if empty:
        raise ValueError(f"The corpus file {str(path)!r} has no passages.")


def load_corpus(path: str | Path) -> list[Passage]:
    """Read a whole corpus file into memory. See [`iter_corpus`] for its forms and the errors."""
    return list(iter_corpus(path))


@contextmanager
def _open_corpus(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a corpus file, decompressed."""
    with path.open("rb") as file:
        start = file.peek(8)
        for name, magic in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise ValueError(
                    f"The corpus file {str(path)!r} is in the format {name}, which cannot be read: convert it to JSONL."
                )
        if start.startswith(b"\x1f\x8b"):
            with decompressed(file) as content:
                yield content
        else:
            yield file


@contextmanager
def decompressed(source: IO[bytes]) -> Iterator[IO[bytes]]:
    """
    Open a file that is compressed with gzip, or the first file of a gzip-compressed tar archive: the published corpus of
    Wikipedia is such an archive, despite its name. Both are read as a stream.

    Args:
        source (`IO[bytes]`):
            The compressed file, open for reading at its beginning.

    Raises:
        `tarfile.TarError`: If the archive is damaged, or holds no file.
    """
    with gzip.open(source) as content:
        is_archive = content.read(512)[257:262] == b"ustar"
        content.seek(0)
        if not is_archive:
            yield cast(IO[bytes], content)
            return
        with tarfile.open(fileobj=content, mode="r|") as archive:  # as a stream
            for member in archive:
                if member.isfile():
                    yield cast(IO[bytes], archive.extractfile(member))
                    return
        raise tarfile.ReadError("the archive has no file")


def _read_records(file: IO[bytes], path: Path) -> Iterator[tuple[Any, str, str]]:
    """The records of a corpus, the names of their places, and their default ids."""
    number, first = 0, b""
    while not first.strip():  # the first line with content tells the form
        number, first = number + 1, file.readline()
        if not first:
            return
        first = first.removeprefix(b"\xef\xbb\xbf") if number == 1 else first
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if first.lstrip().startswith(b"["):
        yield from _read_json(b"\n" * (number - 1) + first + file.read(), path, number)
    elif not first.lstrip().startswith(b"{") and (suffix in (".tsv", ".csv") or b"\t" in first):
        yield from _read_table(_decode(chain([first], file), path, number), path, number, suffix)
    else:
        for i, line in enumerate(chain([first], file), start=number):
            if line.strip():
                where = f"{path}, line {i}"
                yield _parse_line(line, where), where, str(i - 1)


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        found = line.strip()[:80].decode("utf-8", errors="replace")
        raise ValueError(
            f"{where}: not valid JSON ({error}). Found: {found!r}. Expected a passage on one line, or a file that is a list "
            "of passages, `[{…}, {…}]`."
        ) from error


def _read_json(content: bytes, path: Path, number: int) -> Iterator[tuple[Any, str, str]]:
    """The records of a JSON list."""
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = number
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
        elif isinstance(error, UnicodeDecodeError):
            line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not valid JSON ({error}).") from error
    for number, record in enumerate(records):
        yield record, f"{path}, item {number}", str(number)


def _decode(lines: Iterable[bytes], path: Path, first: int) -> Iterator[str]:
    for number, line in enumerate(lines, start=first):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error}).") from error


def _read_table(lines: Iterator[str], path: Path, first: int, suffix: str) -> Iterator[tuple[Any, str, str]]:
    """The records of a table, whose first line has the names of the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a text may be long
    reader = csv.reader(lines, delimiter="," if suffix == ".csv" else "\t", strict=True)
    header: list[str] = []
    count = 0
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num + first - 1}"
            if not header:
                header = [name.strip() for name in row]
                if not any(plain_name(name) in TEXT_KEYS for name in header):
                    raise ValueError(
                        f'{where}: expected JSON, or the names of columns such as "id", "text" and "title". '
                        f"Found: {str(row)[:200]}"
                    )
            elif row:
                if len(row) != len(header):
                    raise ValueError(f"{where}: expected {len(header)} columns {header}, found {len(row)}.")
                yield dict(zip(header, row, strict=True)), where, str(count)
                count += 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + first - 1}: not a valid table ({error}). A text that contains quotes must "
            "be quoted, with its quotes doubled."
        ) from error


def corpus_fingerprint(passages: Iterable[Passage]) -> str:
    """
    A hash of the ids, titles and texts of a corpus, in order.

    Args:
        passages (`Iterable[Passage]`):
            The corpus.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for passage in passages:
        _add(digest, passage)
    return digest.hexdigest()[:16]


def copy_corpus(corpus: str | Path, folder: str | Path, *, progress: bool | None = None) -> str:
    """
    Write the passages of a corpus file to a folder, for [`PassageFile`]. They are read as a stream.

    Args:
        corpus (`str` or `Path`):
            The corpus file, see [`iter_corpus`].
        folder (`str` or `Path`):
            An existing folder.
        progress (`bool`, *optional*):
            Whether to show a progress bar, see [`with_progress`].

    Returns:
        `str`: The fingerprint of the corpus, see [`corpus_fingerprint`].

    Raises:
        `ValueError`: If the corpus is malformed, or two passages share an id.
    """
    digest, ids = hashlib.sha256(), array("q")

    def noted() -> Iterator[Passage]:
        for passage in with_progress(iter_corpus(corpus), "Passages", progress=progress):
            _add(digest, passage)
            ids.append(hash(passage.id))  # 8 bytes instead of a string
            yield passage

    PassageFile.write(folder, noted())
    _check_ids(np.frombuffer(ids, dtype=np.int64), corpus)
    return digest.hexdigest()[:16]


def with_progress(
    items: Iterable[T], name: str, *, total: int | None = None, progress: bool | None = None
) -> Iterator[T]:
    """
    Iterate with a progress bar.

    Args:
        items (`Iterable`):
            The items.
        name (`str`):
            Name of the bar.
        total (`int`, *optional*):
            Number of items, if it is known.
        progress (`bool`, *optional*):
            Whether to show the bar. By default, it is shown on a terminal if the work takes longer than a few seconds.

    Yields:
        The items.
    """
    disable, delay = (None, _PATIENCE) if progress is None else (not progress, 0.0)
    yield from tqdm(items, desc=name, total=total, disable=disable, delay=delay)


def _add(digest: Any, passage: Passage) -> None:
    digest.update(json.dumps([passage.id, passage.title, passage.text]).encode())


def _check_ids(hashes: np.ndarray, corpus: str | Path) -> None:
    """Raise an error if two passages share an id. Equal hashes are compared by their ids."""
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    seen: set[str] = set()
    for passage in iter_corpus(corpus) if suspects else ():
        if hash(passage.id) in suspects:
            if passage.id in seen:
                raise ValueError(same_ids(f"The corpus {str(corpus)!r}", passage.id))
            seen.add(passage.id)


class PassageFile(Sequence[Passage]):
    """
    Passages in a file that is mapped into memory. The processes of a machine share its pages, and only the passages that
    are read are loaded.

    Args:
        folder (`str` or `Path`):
            A folder that [`PassageFile.write`] has written to.

    Raises:
        `ValueError`: If the files are damaged.
    """

    #: The file of passages, itself a corpus
    TEXTS = "passages.jsonl"
    _OFFSETS = "offsets.npy"

    def __init__(self, folder: str | Path):
        texts = Path(folder) / self.TEXTS
        # Byte offsets of the N lines and of the end, shape (N + 1,)
        self._offsets = np.load(Path(folder) / self._OFFSETS, mmap_mode="r", allow_pickle=False)
        if self._offsets[-1] != texts.stat().st_size:
            raise ValueError(f"{texts} has {texts.stat().st_size} bytes, expected {self._offsets[-1]}.")
        with texts.open("rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def write(cls, folder: str | Path, passages: Iterable[Passage]) -> None:
        """
        Write passages to a folder, for [`PassageFile`].

        Args:
            folder (`str` or `Path`):
                An existing folder.
            passages (`Iterable[Passage]`):
                The passages.
        """
        offsets = array("q", [0])
        with (Path(folder) / cls.TEXTS).open("wb") as file:
            for passage in passages:
                line = json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}) + "\n"
                offsets.append(offsets[-1] + file.write(line.encode()))
        np.save(Path(folder) / cls._OFFSETS, np.frombuffer(offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return Passage(**json.loads(self._texts[self._offsets[i] : self._offsets[i + 1]]))
