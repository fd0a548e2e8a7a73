"""Corpora: JSONL files of passages, read into memory or mapped into it."""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from .base import Passage


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """
    Read a JSONL corpus, one passage a line: `{"id", "title", "text"}`, or `{"id", "contents"}` with the title on the
    first line of `contents` (quotes around it are removed), as in the corpora of FlashRAG and Search-R1.

    Args:
        path (`str` or `Path`):
            Path of the file.

    Yields:
        [`Passage`]: The passages in file order, with score 0.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a line is not such a JSON object (the message names file, line and what was found), or if the
            file has no passages at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The corpus file {str(path)!r} does not exist.")
    empty = True
    with path.open("rb") as file:  # decoded line by line, so that an error can name its line
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_line(line, f"{path}, line {number}", default_id=str(number - 1))
                empty = False
    if empty:
        raise ValueError(f"The corpus file {str(path)!r} has no passages.")


def load_corpus(path: str | Path) -> list[Passage]:
    """Read a whole JSONL corpus into memory. See [`iter_corpus`] for the format and the errors."""
    return list(iter_corpus(path))


def parse_passage(record: Any, where: str, *, default_id: str = "", score: float = 0.0) -> Passage:
    """
    Read a passage in one of the formats of [`iter_corpus`].

    Args:
        record (`dict`):
            The decoded JSON.
        where (`str`):
            Name of its place in error messages.
        default_id (`str`, *optional*, defaults to `""`):
            Id of a passage that has none.
        score (`float`, *optional*, defaults to `0.0`):
            Score of the passage.

    Raises:
        `ValueError`: If the record is not a passage.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    if isinstance(record.get("text"), str):
        title, text = record.get("title", ""), record["text"]
    elif isinstance(record.get("contents"), str):
        title, _, text = record["contents"].partition("\n")
        title = title.strip().strip('"')
    else:
        raise ValueError(
            f'{where}: expected a string under "text" (with "title") or under "contents", found the keys '
            f"{sorted(record)}."
        )
    if not isinstance(title, str):
        raise ValueError(f'{where}: expected a string under "title", found {type(title).__name__}.')
    identifier = default_id if record.get("id") is None else str(record["id"])
    return Passage(id=identifier, title=title, text=text, score=score)


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
        digest.update(json.dumps([passage.id, passage.title, passage.text]).encode())
    return digest.hexdigest()[:16]


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

    _TEXTS, _OFFSETS = "passages.jsonl", "offsets.npy"

    def __init__(self, folder: str | Path):
        texts = Path(folder) / self._TEXTS
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
        offsets = [0]
        with (Path(folder) / cls._TEXTS).open("wb") as file:
            for passage in passages:
                line = json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}) + "\n"
                offsets.append(offsets[-1] + file.write(line.encode()))
        np.save(Path(folder) / cls._OFFSETS, np.array(offsets, dtype=np.int64))

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


def _parse_line(line: bytes, where: str, default_id: str) -> Passage:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        found = line.strip()[:80].decode("utf-8", errors="replace")
        raise ValueError(f"{where}: not valid JSON ({error}). Found: {found!r}") from error
    return parse_passage(record, where, default_id=default_id)
