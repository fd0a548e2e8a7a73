"""The postings of BM25: for each word, the passages that contain it, and what it adds to their scores."""

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import with_progress
from .words import WordNumbers

#: The files of an index of `bm25s`, which also reads those of this module
_WEIGHTS, _PASSAGES, _STARTS = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
_WORDS, _PARAMETERS = "vocab.index.json", "params.index.json"
_BLOCK = 2**22  # words or postings that are sorted at once: about 0.3 GB
_ROUNDING = 1e-6  # relative, above the error of each addition in single precision
_SMALL = 50_000  # passages that are scored in less time than it takes to choose among them
_LOOKUP = 16  # a binary search costs as much as reading this many postings


@dataclass(frozen=True)
class Postings:
    """
    An index of BM25 over N passages and V words, with P pairs of a word and a passage that contains it. The postings of word
    number `w` are those from `starts[w]` to `starts[w + 1]`.

    Args:
        numbers (`dict[str, int]`):
            The number of each word, from 0 to V - 1.
        starts (`np.ndarray`):
            Shape (V + 1,), int64.
        passages (`np.ndarray`):
            Indices of passages, ascending for each word. Shape (P,), int32.
        weights (`np.ndarray`):
            What the word adds to the score of the passage. Shape (P,), float32.
        num_passages (`int`):
            N.
    """

    numbers: dict[str, int]
    starts: np.ndarray
    passages: np.ndarray
    weights: np.ndarray
    num_passages: int

    @classmethod
    def load(cls, folder: Path, *, mapped: bool) -> "Postings":
        """
        Open the files of an index.

        Args:
            folder (`Path`):
                Folder of [`write_postings`], [`Postings.save`] or `bm25s`.
            mapped (`bool`):
                Whether the arrays are mapped from their files, instead of read into memory.

        Raises:
            `ValueError`, `KeyError`, `OSError`: If the files are damaged.
        """
        mode: Any = "r" if mapped else None
        # Views as plain arrays: slices of `np.memmap` are slow
        arrays = [np.asarray(np.load(folder / n, mode, allow_pickle=False)) for n in (_STARTS, _PASSAGES, _WEIGHTS)]
        starts, passages, weights = arrays
        numbers = json.loads((folder / _WORDS).read_text(encoding="utf-8"))
        if not len(weights) == len(passages) == starts[-1]:
            raise ValueError("its postings are incomplete")
        numbers.pop("", None)  # bm25s adds it as a number without postings
        if not numbers or max(numbers.values()) >= len(starts) - 1:
            raise ValueError("its vocabulary belongs to another index")
        parameters = json.loads((folder / _PARAMETERS).read_text(encoding="utf-8"))
        return cls(numbers, starts, passages, weights, parameters["num_docs"])

    def save(self, folder: Path, *, k1: float, b: float) -> None:
        """Write the files of the index to an existing folder."""
        for name, values in ((_STARTS, self.starts), (_PASSAGES, self.passages), (_WEIGHTS, self.weights)):
            np.save(folder / name, values)
        _write_texts(folder, self.numbers, self.num_passages, k1, b)

    def search(self, queries: Sequence[Sequence[str]], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        The best passages for each query, with the scores that BM25 gives them.

        Args:
            queries (`Sequence[Sequence[str]]`):
                Q lists of words. A word that occurs twice counts twice.
            k (`int`):
                Maximum number of passages.

        Returns:
            `list[tuple[np.ndarray, np.ndarray]]`: Q pairs of the indices of passages, best first, and their scores in float32.
                Passages with equal scores are in the order of the corpus.
        """
        scores = np.zeros(self.num_passages, dtype=np.float32)  # pages of it are only touched where passages match
        numbers = ([self.numbers[word] for word in words if word in self.numbers] for words in queries)
        search = self._search_all if self.num_passages < _SMALL else self._search_best
        return [search(known, k, scores) for known in numbers]

    def _search_all(self, numbers: list[int], k: int, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score all passages. `scores` must be zero, and is zero afterwards."""
        for number in numbers:
            passages, weights = self._of(number)
            scores[passages] += weights
        found = np.flatnonzero(scores)
        values = scores[found]
        scores[found] = 0
        best = best_of(values, k)
        return found[best], values[best]

    def _search_best(self, numbers: list[int], k: int, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score only passages that may be among the best."""
        candidates = self._candidates(numbers, k, scores)
        exact = np.zeros(len(candidates), dtype=np.float32)
        for number in numbers:  # in the order of the query: another order would round differently
            passages, weights = self._of(number)
            places = np.minimum(np.searchsorted(passages, candidates), len(passages) - 1)
            exact += np.where(passages[places] == candidates, weights[places], np.float32(0))
        best = best_of(exact, k)
        return candidates[best], exact[best]

    def _candidates(self, numbers: list[int], k: int, scores: np.ndarray) -> np.ndarray:
        """
        Ascending indices of passages, among them the k best. Rare words are read first: once all other words together add less
        than the k-th best score, no further passage can be among the best, and the long lists of frequent words are not read.
        `scores` must be zero, and is zero afterwards.
        """
        distinct, repeats = np.unique(np.array(numbers, dtype=np.int64), return_counts=True)
        sizes = self.starts[distinct + 1] - self.starts[distinct]
        found = np.zeros(0, dtype=np.intp)
        keep = np.zeros(0, dtype=bool)
        slack = _ROUNDING * (len(numbers) + 10)
        order = np.argsort(sizes, kind="stable").tolist()
        # A weight is the idf times a factor of at most 1. What the words after each one can add:
        bounds = [int(repeats[i]) * _idf(int(sizes[i]), self.num_passages) * (1 + slack) for i in order]
        left = np.append(np.cumsum(bounds[::-1])[::-1], 0.0)[1:].tolist()
        added = 0.0
        unread = int(sizes.sum())
        for i, bound, can_add in zip(order, bounds, left, strict=True):
            added += bound
            passages, weights = self._of(int(distinct[i]))
            passages = passages.astype(np.intp)  # once, instead of in each step
            before = scores[passages]
            scores[passages] = before + float(repeats[i]) * weights
            found = np.concatenate([found, passages[before == 0]])
            unread -= len(passages)
            if can_add > added:  # no passage can have more than what was added
                continue
            reached = scores[found]
            least = float(np.partition(reached, -k)[-k]) * (1 - slack) if k <= len(found) else 0.0
            if can_add <= least:
                keep = reached + np.float32(can_add) >= np.float32(least)
                if not unread or _LOOKUP * int(np.count_nonzero(keep)) < unread:
                    break
        scores[found] = 0
        return np.sort(found[keep]).astype(np.int32)  # the type of lists, which are searched for them

    def _of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The passages with a word, and its weights in them."""
        start, stop = self.starts[number], self.starts[number + 1]
        return self.passages[start:stop], self.weights[start:stop]


def best_of(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k best scores, best first. Ties are in order, so that a run can be repeated bit for bit."""
    candidates = np.arange(len(scores))
    if k < len(scores):
        candidates = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


def write_postings(
    documents: Iterable[str], total: int, folder: Path, *, language: str | None, k1: float, b: float
) -> np.ndarray:
    """
    Index documents with the scores of BM25 in Lucene, and write the files for [`Postings.load`].

    The documents are read as a stream. Blocks of their words are sorted and written to a temporary file, and merged at the end,
    so memory is needed only for a block, the vocabulary and the longest list of postings.

    Args:
        documents (`Iterable[str]`):
            The texts of N documents.
        total (`int`):
            N, for the progress bar.
        folder (`Path`):
            An existing folder.
        language (`str` or `None`):
            Language of stop words and stemmer, `None` for neither.
        k1 (`float`):
            Saturation of the term frequency.
        b (`float`):
            Strength of the length normalisation.

    Returns:
        `np.ndarray`: The number of words of each document, shape (N,). If all are 0, nothing is written.
    """
    words = WordNumbers(language)
    lengths = array("i")
    runs = _Runs(folder / "runs")
    frequencies = np.zeros(0, dtype=np.int64)  # number of documents with each word
    for block in _blocks(with_progress(documents, "Words", total=total), words, lengths):
        runs.append(block)
        counted = np.bincount(block[:, 0], minlength=len(words.numbers))
        counted[: len(frequencies)] += frequencies
        frequencies = counted
    words_of = np.frombuffer(lengths, dtype=np.int32)
    if len(frequencies):
        _merge(runs, frequencies, words_of, folder, k1, b)
        _write_texts(folder, words.numbers, len(lengths), k1, b)
    runs.path.unlink(missing_ok=True)
    return words_of


class _Runs:
    """A file of sorted blocks. The rows of a block are a word, a document, and how often it has the word: (n, 3), int32."""

    def __init__(self, path: Path):
        self.path = path
        self.starts = [0]  # the first row of each block, and the end

    def append(self, block: np.ndarray) -> None:
        with self.path.open("ab") as file:
            file.write(block.data)
        self.starts.append(self.starts[-1] + len(block))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows of the file. Not mapped: its pages would count as memory of the process."""
        return np.fromfile(self.path, np.int32, 3 * (stop - start), offset=12 * start).reshape(-1, 3)


def _blocks(documents: Iterable[str], words: WordNumbers, lengths: "array[int]") -> Iterator[np.ndarray]:
    """The words of documents in sorted blocks for [`_Runs`]. Adds the numbers of words to `lengths`."""
    block, first = array("i"), 0
    for document in documents:
        found = words.of(document)
        block.extend(found)
        lengths.append(len(found))
        if len(block) >= _BLOCK:
            yield _sorted(block, first, lengths)
            block, first = array("i"), len(lengths)
    if block:
        yield _sorted(block, first, lengths)


def _sorted(block: "array[int]", first: int, lengths: "array[int]") -> np.ndarray:
    owners = np.repeat(np.arange(first, len(lengths)), lengths[first:])
    keys = (np.array(block, dtype=np.int64) << 32) | owners
    pairs, counts = np.unique(keys, return_counts=True)
    return np.stack([pairs >> 32, pairs & 0xFFFFFFFF, counts], axis=1).astype(np.int32)


def _merge(runs: _Runs, frequencies: np.ndarray, lengths: np.ndarray, folder: Path, k1: float, b: float) -> None:
    """Write the postings of all words in order, by ranges of words that fit into memory."""
    starts = np.concatenate([[0], np.cumsum(frequencies)])
    np.save(folder / _STARTS, starts)
    total = int(starts[-1])
    limits = np.unique(np.append(np.searchsorted(starts, np.arange(0, total, _BLOCK), "right") - 1, len(frequencies)))
    spans = list(zip(runs.starts, runs.starts[1:], strict=False))
    # Where the ranges begin in each block
    cuts = [start + np.searchsorted(runs.read(start, stop)[:, 0], limits) for start, stop in spans]
    distinct, place = np.unique(frequencies, return_inverse=True)
    idf = np.array([_idf(int(n), len(lengths)) for n in distinct], dtype=np.float32)[place]
    average = lengths.sum(dtype=np.int64) / len(lengths)
    saturation = k1 * ((1 - b) + b * lengths / average)
    with (folder / _PASSAGES).open("wb") as passages, (folder / _WEIGHTS).open("wb") as weights:
        for file, dtype in ((passages, "<i4"), (weights, "<f4")):
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (total,)})
        for i in with_progress(range(len(limits) - 1), "Postings"):
            rows = np.concatenate([runs.read(int(cut[i]), int(cut[i + 1])) for cut in cuts])
            rows = rows[np.argsort(rows[:, 0], kind="stable")]  # the blocks are in the order of the documents
            word, document, count = rows.T
            passages.write(np.ascontiguousarray(document).data)
            # In the precision and order of bm25s, so that its indexes are the same bit for bit
            weight = idf[word] * (count / (saturation[document] + count))
            weights.write(weight.astype(np.float32).data)


def _idf(frequency: int, num_passages: int) -> float:
    """The inverse document frequency of Lucene."""
    return math.log(1 + (num_passages - frequency + 0.5) / (frequency + 0.5))


def _write_texts(folder: Path, numbers: dict[str, int], num_passages: int, k1: float, b: float) -> None:
    """Write the words and parameters of an index as `bm25s` does."""
    (folder / _WORDS).write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    parameters = {"k1": k1, "b": b, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
    parameters |= {"dtype": "float32", "int_dtype": "int32", "num_docs": num_passages, "version": version("bm25s")}
    (folder / _PARAMETERS).write_text(json.dumps({**parameters, "backend": "numpy"}, indent=4), encoding="utf-8")
