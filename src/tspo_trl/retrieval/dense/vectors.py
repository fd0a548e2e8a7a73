"""Matrices of vectors on disk, and the nearest ones to a query: exactly, or with a small copy in memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

#: Number of rows of a matrix that are read and compared at once
BLOCK = 65536
#: Smallest number of vectors for which a core is used
PART = 65536
#: Best passages by their bits that are compared again by their bytes
CANDIDATES = 400


class Vectors(Protocol):
    """N vectors that can be searched."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors N and of dimensions D."""
        ...

    def first(self, count: int) -> np.ndarray:
        """The first vectors, `float32` of shape (min(count, N), D), as exactly as they are stored."""
        ...

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Find the vectors with the largest inner products.

        Args:
            queries (`np.ndarray`):
                Vectors of shape (Q, D), `float32`.
            k (`int`):
                Number of vectors for each query.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Scores and indices, of shape (Q, min(k, N)), best first. Equal scores are in the
            order of the indices.
        """
        ...


class ExactVectors:
    """
    All vectors, compared with every query. They are in memory, or mapped from a file, or on a device.

    On a CPU, blocks are converted to single precision one after the other. On an accelerator, all vectors are moved to it once,
    and products are computed in the type of the vectors.

    Args:
        matrix (`np.ndarray`):
            Vectors of shape (N, D), `float16` or `float32`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where products are computed.
    """

    def __init__(self, matrix: np.ndarray, device: str | torch.device = "cpu"):
        self.matrix, self.device = matrix, torch.device(device)
        self._moved: list[torch.Tensor] = []
        if self.device.type != "cpu":
            self._moved = [torch.from_numpy(np.array(block)).to(self.device) for _, block in _blocks(matrix)]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors N and of dimensions D."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def first(self, count: int) -> np.ndarray:
        """The first vectors, see [`Vectors`]."""
        return self.matrix[:count].astype(np.float32)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the vectors with the largest inner products, see [`Vectors`]."""
        k = min(k, len(self.matrix))
        best = _Best(len(queries), k)
        wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self.device)
        for start, block in self._converted(wanted):
            best.add(start, wanted.to(block.dtype) @ block.T)
        return best.scores, best.indices

    def _converted(self, wanted: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        if self._moved:
            yield from zip(range(0, len(self.matrix), BLOCK), self._moved, strict=True)
            return
        for start, block in _blocks(self.matrix):
            yield start, torch.from_numpy(block.astype(np.float32))


class _Best:
    """The best scores so far for each of Q queries, with the indices of their vectors."""

    def __init__(self, queries: int, k: int):
        self.k = k
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.indices = np.full((queries, k), np.iinfo(np.int64).max, dtype=np.int64)

    def add(self, start: int, scores: torch.Tensor) -> None:
        """Add the scores of the next vectors, of shape (Q, B), which begin at index `start`."""
        threshold = torch.topk(scores, min(self.k, scores.shape[1]), dim=1).values[:, -1:]
        rows, columns = (part.cpu().numpy() for part in torch.nonzero(scores >= threshold, as_tuple=True))
        found = scores[rows, columns].float().cpu().numpy()
        for row in range(len(self.scores)):
            of_row = slice(*np.searchsorted(rows, [row, row + 1]))
            both = np.concatenate([self.scores[row], found[of_row]])
            indices = np.concatenate([self.indices[row], columns[of_row] + start])
            order = np.lexsort((indices, -both))[: self.k]
            self.scores[row], self.indices[row] = both[order], indices[order]


class SmallVectors:
    """
    Vectors of which one bit per dimension is in memory: whether a number is larger than the mean of its dimension. The best
    vectors by their bits are compared again by their numbers in 8 bits, which are mapped from a file.

    Memory: N · D / 8 bytes, 2 GB for 21 million vectors of 768 dimensions. Disk: N · D bytes more. Bits are compared by
    `faiss`, which is required.

    Args:
        folder (`str` or `Path`):
            A folder that [`SmallVectors.write`] has written.
        candidates (`int`, *optional*, defaults to `CANDIDATES`):
            Number of vectors that are compared again.
    """

    def __init__(self, folder: str | Path, candidates: int = CANDIDATES):
        folder = Path(folder)
        self.bits: np.ndarray = np.load(folder / "bits.npy", allow_pickle=False)
        self.codes: np.ndarray = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        scales = np.load(folder / "scales.npy", allow_pickle=False)
        self.mean, self.scale = scales[0], scales[1]
        self.candidates = candidates
        self._faiss = import_faiss()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors N and of dimensions D."""
        return self.codes.shape[0], self.codes.shape[1]

    @staticmethod
    def write(folder: str | Path, matrix: np.ndarray) -> None:
        """
        Write the bits and the bytes of vectors. The matrix is read twice, in blocks.

        Args:
            folder (`str` or `Path`):
                An existing folder.
            matrix (`np.ndarray`):
                Vectors of shape (N, D).
        """
        folder, (rows, size) = Path(folder), matrix.shape
        # The mean and the largest distance to it, for each dimension
        mean = sum(block.astype(np.float64).sum(axis=0) for _, block in _blocks(matrix)) / rows
        mean = np.asarray(mean, dtype=np.float32)
        largest = np.max([np.abs(block.astype(np.float32) - mean).max(axis=0) for _, block in _blocks(matrix)], axis=0)
        scale = np.maximum(largest / 127, np.finfo(np.float32).tiny).astype(np.float32)
        np.save(folder / "scales.npy", np.stack([mean, scale]))
        # Written to mapped files, so that no more than a block is in memory
        bits = _create(folder / "bits.npy", np.uint8, (rows, (size + 7) // 8))
        codes = _create(folder / "codes.npy", np.int8, (rows, size))
        for start, block in _blocks(matrix):
            centred = block.astype(np.float32) - mean
            bits[start : start + len(block)] = np.packbits(centred > 0, axis=1)
            codes[start : start + len(block)] = np.rint(centred / scale)
        bits.flush()
        codes.flush()

    def first(self, count: int) -> np.ndarray:
        """The first vectors, rounded to 8 bits, see [`Vectors`]."""
        return self.mean + self.scale * self.codes[:count].astype(np.float32)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the vectors with the largest inner products among the candidates, see [`Vectors`]."""
        rows = len(self.codes)
        k = min(k, rows)
        wanted = np.ascontiguousarray(queries, dtype=np.float32)
        # A query in the scale of the bytes: <q, mean + scale * code> = <q, mean> + <q * scale, code>
        bits = np.packbits(wanted > self.mean, axis=1)
        candidates = self._nearest_bits(bits, min(max(self.candidates, k), rows))
        scores = np.empty((len(wanted), k), dtype=np.float32)
        indices = np.empty((len(wanted), k), dtype=np.int64)
        for row, query in enumerate(wanted):
            of_row = np.sort(candidates[row])
            products = self.codes[of_row].astype(np.float32) @ (query * self.scale) + query @ self.mean
            order = np.lexsort((of_row, -products))[:k]
            scores[row], indices[row] = products[order], of_row[order]
        return scores, indices

    def _nearest_bits(self, queries: np.ndarray, count: int) -> np.ndarray:
        """The indices of the vectors whose bits differ least from those of the queries, shape (len(queries), count)."""
        # `faiss` gives every query to one core. With fewer queries than cores, the cores share the vectors
        parts = min(self._faiss.omp_get_max_threads() // max(len(queries), 1), len(self.bits) // PART)
        if parts < 2:
            return self._faiss.knn_hamming(queries, self.bits, count)[1]
        bounds = np.linspace(0, len(self.bits), parts + 1, dtype=int)

        def search(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            distances, found = self._faiss.knn_hamming(queries, self.bits[start:end], min(count, end - start))
            return distances, found + start

        with ThreadPoolExecutor(parts) as pool:
            distances, found = map(np.hstack, zip(*pool.map(search, bounds[:-1], bounds[1:]), strict=True))
        best = np.argsort(distances, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(found, best, axis=1)


def _blocks(matrix: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows, each with the index of its first row."""
    for start in range(0, len(matrix), BLOCK):
        yield start, matrix[start : start + BLOCK]


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new file of an array that is mapped for writing."""
    created: np.memmap = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return created


def import_faiss() -> Any:
    """The module `faiss`, or an error that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"This index needs faiss: pip install 'tspo-trl[dense]' ({error}).") from error
    return faiss
