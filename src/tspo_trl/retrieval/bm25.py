"""BM25 inside the training process: nothing to install, nothing to start, nothing that dies mid-run."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import bm25s
import numpy as np
import Stemmer
from rank_bm25 import BM25Okapi

from .base import Passage
from .corpus import iter_corpus

_WORD = re.compile(r"\w+")


class BM25Retriever:
    """
    Okapi BM25 over passages held in memory, by `bm25s` (default) or by `rank_bm25`.

    A document is the title followed by the text. With `bm25s`, English stop words are removed and words are stemmed
    (Snowball); with `rank_bm25`, documents are lower-cased words, which is slower by orders of magnitude and finds a
    little less, and is there for comparison with projects that use it.

    Args:
        passages (`Iterable[Passage]`):
            The corpus.
        backend (`str`, *optional*, defaults to `"bm25s"`):
            `"bm25s"` or `"rank_bm25"`.
        k1 (`float`, *optional*, defaults to `1.5`):
            Saturation of the term frequency.
        b (`float`, *optional*, defaults to `0.75`):
            Strength of the length normalisation.

    Raises:
        `ValueError`: If there are no passages, two passages share an id, no passage has any text, or the backend is
            unknown.

    Example:

    ```python
    >>> from tspo_trl import BM25Retriever, Passage
    >>> retriever = BM25Retriever([
    ...     Passage(id="0", title="Paris", text="Paris is the capital of France."),
    ...     Passage(id="1", title="Rome", text="Rome is the capital of Italy."),
    ... ])
    >>> retriever.search(["capital of Italy"], k=1)[0][0].title
    'Rome'
    ```
    """

    def __init__(
        self,
        passages: Iterable[Passage],
        backend: Literal["bm25s", "rank_bm25"] = "bm25s",
        *,
        k1: float = 1.5,
        b: float = 0.75,
    ):
        self.passages = [passage if isinstance(passage, Passage) else Passage(**passage) for passage in passages]
        self.backend = backend
        if not self.passages:
            raise ValueError("`passages` is empty: BM25Retriever needs at least one passage to search in.")
        seen: set[str] = set()
        for passage in self.passages:
            if passage.id in seen:
                raise ValueError(f"`passages` has two passages with the id {passage.id!r}: ids must be unique.")
            seen.add(passage.id)
        documents = [f"{passage.title} {passage.text}" for passage in self.passages]
        # query -> the score of every document, and which documents share a term with the query, both of shape (N,)
        self._score: Callable[[str], tuple[np.ndarray, np.ndarray]]
        if backend == "bm25s":
            self._stemmer = Stemmer.Stemmer("english")
            tokens = self._require_words(self._tokenize(documents))
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
            self._index.index(tokens, show_progress=False)
            self._score = self._score_bm25s
        elif backend == "rank_bm25":
            tokens = self._require_words([_WORD.findall(document.lower()) for document in documents])
            self._okapi = BM25Okapi(tokens, k1=k1, b=b)
            self._score = self._score_okapi
        else:
            raise ValueError(f"`backend` must be 'bm25s' or 'rank_bm25', got {backend!r}.")

    @classmethod
    def from_jsonl(cls, path: str | Path, **kwargs: Any) -> "BM25Retriever":
        """
        Index a JSONL corpus.

        Args:
            path (`str` or `Path`):
                The corpus file, see [`~retrieval.iter_corpus`] for its format.
            **kwargs:
                Passed to the constructor.
        """
        return cls(iter_corpus(path), **kwargs)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        The best passages for each query.

        Passages that share no term with the query are never returned, so a list may be shorter than `k` or empty.
        Equal scores are ordered as in the corpus.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                How many passages to return for each, at least 1. More than the corpus has returns all that match.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.
        """
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        if not queries:
            return []
        return [
            [replace(self.passages[i], score=float(scores[i])) for i in _best(scores, matches, k)]
            for scores, matches in map(self._score, queries)
        ]

    @staticmethod
    def _require_words(documents: list[list[str]]) -> list[list[str]]:
        if not any(documents):
            raise ValueError("`passages` has no passage with any word to search for in its title or text.")
        return documents

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False)

    def _score_bm25s(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._tokenize([query])[0]
        scores = self._index.get_scores(tokens) if tokens else np.zeros(len(self.passages))
        return scores, scores > 0

    def _score_okapi(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        words = _WORD.findall(query.lower())
        # Okapi's idf is zero or negative for a word in half of the documents, so a match is not a positive score
        matches = np.array([any(word in counts for word in words) for counts in self._okapi.doc_freqs])
        return np.asarray(self._okapi.get_scores(words)), matches


def _best(scores: np.ndarray, matches: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k best matches; ties in corpus order, so that a run can be repeated bit for bit."""
    candidates = np.flatnonzero(matches)
    if k < len(candidates):
        threshold = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= threshold]
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]
