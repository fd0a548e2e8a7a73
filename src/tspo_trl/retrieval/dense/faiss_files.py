"""Index files of FAISS. Flat ones are read as a stream, without FAISS and without the whole file in memory."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from ...support.files import replacing
from .vectors import import_faiss

_FLAT = {b"IxFI": "inner product", b"IxF2": "squared distance"}
# Dimensions, number of vectors, two unused numbers, whether it is trained, the metric; then the number of values
_HEADER = struct.Struct("<4siqqq?i")
_COUNT = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class FlatFile:
    """
    A flat index of FAISS, in one file or in parts (as `split` makes them). See [`open_flat`].

    Args:
        parts (`tuple[Path, ...]`):
            The files, in order.
        rows (`int`):
            Number of vectors.
        dimensions (`int`):
            Number of dimensions.
        start (`int`):
            Position of the first vector, in bytes.
    """

    parts: tuple[Path, ...]
    rows: int
    dimensions: int
    start: int

    def blocks(self, rows: int, first: int = 0) -> Iterator[np.ndarray]:
        """
        Read the vectors in blocks.

        Args:
            rows (`int`):
                Maximum number of vectors in a block.
            first (`int`, *optional*, defaults to `0`):
                Index of the first vector to read.

        Yields:
            `np.ndarray`: Vectors of shape (at most `rows`, D), `float32`.
        """
        position = self.start + first * self.dimensions * 4
        for number in range(first, self.rows, rows):
            size = min(rows, self.rows - number) * self.dimensions * 4
            yield np.frombuffer(_read(self.parts, position, size), dtype="<f4").reshape(-1, self.dimensions)
            position += size


def is_flat(parts: Sequence[Path]) -> bool:
    """Whether a file of FAISS is a flat index, by its first bytes."""
    return _read(parts, 0, 4) in _FLAT


def open_flat(parts: Sequence[str | Path]) -> FlatFile:
    """
    Read the header of a flat index of FAISS.

    Args:
        parts (`Sequence[str | Path]`):
            The file, or the parts of it in order, such as `part_aa` and `part_ab`.

    Raises:
        `FileNotFoundError`: If a part does not exist.
        `ValueError`: If it is not a flat index, is of squared distances, or bytes are missing or too many.
    """
    files = tuple(Path(part) for part in parts)
    name = " + ".join(map(str, files))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"The file {str(file)!r} of the FAISS index does not exist.")
    size = sum(file.stat().st_size for file in files)
    header = _read(files, 0, _HEADER.size + _COUNT.size)
    if len(header) < _HEADER.size + _COUNT.size or header[:4] not in _FLAT:
        raise ValueError(f"{name} is not a flat index of FAISS: it begins with {header[:4]!r}, expected b'IxFI'.")
    if _FLAT[header[:4]] != "inner product":
        raise ValueError(f"{name} compares vectors by their squared distance. Only inner products are supported.")
    _, dimensions, rows, _, _, _, _ = _HEADER.unpack_from(header)
    (count,) = _COUNT.unpack_from(header, _HEADER.size)
    if count != rows * dimensions:
        raise ValueError(f"{name} is damaged: {rows} vectors of {dimensions} dimensions, but {count} numbers.")
    expected = len(header) + 4 * count
    if size != expected:
        raise ValueError(
            f"{name} has {size} bytes, expected {expected} for {rows} vectors of {dimensions} dimensions: "
            + ("a part is missing, or the download is incomplete." if size < expected else "a part is given twice.")
        )
    return FlatFile(files, rows, dimensions, len(header))


def is_complete(parts: Sequence[str | Path]) -> bool:
    """Whether files are a flat index of FAISS in which nothing is missing."""
    try:
        open_flat(parts)
    except (FileNotFoundError, ValueError):
        return False
    return True


def write_head(source: BinaryIO, path: str | Path, rows: int) -> None:
    """
    Write the first vectors of a flat index of FAISS as an index of their own.

    Args:
        source (`BinaryIO`):
            The file, or its first part, open for reading at its beginning.
        path (`str` or `Path`):
            The new file.
        rows (`int`):
            Number of vectors.

    Raises:
        `ValueError`: If the file is not a flat index, or has fewer vectors.
    """
    header = source.read(_HEADER.size + _COUNT.size)
    if header[:4] not in _FLAT:
        raise ValueError(f"Not a flat index of FAISS: it begins with {header[:4]!r}, expected b'IxFI'.")
    kind, dimensions, available, *rest = _HEADER.unpack_from(header)
    left = rows * dimensions * 4
    with replacing(path) as file, tqdm(total=left, desc="Getting vectors", unit="B", unit_scale=True) as bar:
        file.write(_HEADER.pack(kind, dimensions, rows, *rest) + _COUNT.pack(rows * dimensions))
        while left and (block := source.read(min(left, 2**22))):
            file.write(block)
            bar.update(len(block))
            left -= len(block)
        if left:
            raise ValueError(f"The file ends before vector {rows} of {available}.")


class FaissVectors:
    """
    Vectors in an index file that `faiss` reads, for instance HNSW. It is read into memory.

    Args:
        path (`str` or `Path`):
            The file.
    """

    def __init__(self, path: str | Path):
        self._index: Any = import_faiss().read_index(str(path))

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors N and of dimensions D."""
        return self._index.ntotal, self._index.d

    def first(self, count: int) -> np.ndarray:
        """The first vectors as the index stores them, see [`Vectors`]."""
        vectors: np.ndarray = self._index.reconstruct_n(0, min(count, self._index.ntotal))
        return vectors

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the vectors that the index holds for the nearest, see [`Vectors`]. An index of -1 stands for none."""
        scores, indices = self._index.search(
            np.ascontiguousarray(queries, dtype=np.float32), min(k, self._index.ntotal)
        )
        return scores, indices


def _read(parts: Sequence[Path], position: int, size: int) -> bytes:
    """Bytes of files that are read one after the other."""
    content = bytearray()
    for part in parts:
        length = part.stat().st_size
        if position < length and size > len(content):
            with part.open("rb") as file:
                file.seek(position)
                content += file.read(size - len(content))
        position = max(0, position - length)
    return bytes(content)
