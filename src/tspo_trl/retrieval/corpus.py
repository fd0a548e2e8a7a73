"""Corpora: JSONL files of passages."""

import json
from collections.abc import Iterator
from pathlib import Path

from .base import Passage


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """
    Read a JSONL corpus, one passage a line: `{"id", "title", "text"}`, or `{"id", "contents"}` with the title on the
    first line of `contents` (quotes around it are removed), as in the corpora of FlashRAG and Search-R1.

    Args:
        path (`str` or `Path`):
            The file.

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
                yield _parse(line, f"{path}, line {number}", default_id=str(number - 1))
                empty = False
    if empty:
        raise ValueError(f"The corpus file {str(path)!r} has no passages.")


def load_corpus(path: str | Path) -> list[Passage]:
    """Read a whole JSONL corpus into memory. See [`iter_corpus`] for the format and the errors."""
    return list(iter_corpus(path))


def _parse(line: bytes, where: str, default_id: str) -> Passage:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        found = line.strip()[:80].decode("utf-8", errors="replace")
        raise ValueError(f"{where}: not valid JSON ({error}). Found: {found!r}") from error
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
    return Passage(id=str(record.get("id", default_id)), title=title, text=text)
