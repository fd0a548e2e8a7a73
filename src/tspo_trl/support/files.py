"""Atomic replacement of files and folders: a killed process never leaves a half-written one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from uuid import uuid4


def replace_file(path: str | Path, text: str) -> None:
    """
    Replace the content of a text file. If that fails, the old file is unchanged.

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
    Open a temporary file in the same folder for writing, and rename it to `path` when the block ends. If the block
    raises an exception, the old file is unchanged. If several processes replace the same file, the last one wins.

    Args:
        path (`str` or `Path`):
            The file to replace. Its folder must exist.

    Yields:
        `BinaryIO`: The temporary file, open for writing.
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


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """
    Make a temporary folder beside `folder`, and rename it to `folder` when the block ends. If the block raises an exception,
    the old folder is unchanged.

    Args:
        folder (`str` or `Path`):
            The folder to replace with all its files. It need not exist, nor its parents.

    Yields:
        `Path`: The temporary folder, empty.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / "new"
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        unfinished.rename(folder)
