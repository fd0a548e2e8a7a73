"""Files that are replaced whole, so that a killed process never leaves half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def replace_file(path: str | Path, text: str) -> None:
    """
    Write a text file, or leave the old one as it is.

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist.
        text (`str`):
            The new content, written in UTF-8. Lone surrogates, which UTF-8 cannot encode, are escaped.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """
    Open a file for writing under a temporary name beside it, and rename it when the block ends. After an exception the old
    file is still there. Several processes may replace one file: the last one wins.

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist.

    Yields:
        `BinaryIO`: The file to write to.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
