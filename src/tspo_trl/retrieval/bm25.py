"""BM25 inside the training process, without a server and without Java."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import bm25s
import numpy as np
from rank_bm25 import BM25Okapi

from .base import Passage
from .corpus import PassageFile, corpus_fingerprint, iter_corpus
from .passages import hold_passages
from .results import read_arguments
from .words import WORDS_VERSION, check_language, index_words, split_words

BM25Backend = Literal["bm25s", "rank_bm25"]
_FORMAT = 2
_SEVERAL = 8  # queries that all find nothing: a single one may be the mistake of a model
logger = logging.getLogger(__name__)


class BM25Retriever:
    """
    Okapi BM25 over passages held in memory, by `bm25s` (default) or by `rank_bm25`.

    A document is the title followed by the text. Words of one character count ("Apollo 9", "the language R"). Text of
    scripts without spaces between words (Chinese, Japanese, Thai) is split into pairs of characters. `bm25s` removes the
    stop words of `language`, stems words (Snowball), and uses the inverse document frequency of Lucene. `rank_bm25`
    lower-cases words, and gives a word in more than half of the documents a positive weight by its `epsilon`. It is
    slower by orders of magnitude and finds a little less; it is there for comparison with projects that use it.

    Args:
        passages (`Iterable[Passage]`):
            Passages of the corpus. See [`~retrieval.read_passage`] for other forms, such as dictionaries.
        backend (`str`, *optional*, defaults to `"bm25s"`):
            `"bm25s"` or `"rank_bm25"`.
        k1 (`float`, *optional*, defaults to `1.5`):
            Saturation of the term frequency.
        b (`float`, *optional*, defaults to `0.75`):
            Strength of the length normalisation.
        language (`str` or `None`, *optional*, defaults to `"english"`):
            Language of the stop words and the stemmer, for instance `"german"`. `None` keeps all words as they are. Not
            used by `rank_bm25`.

    Raises:
        `TypeError`: If `passages` is not a collection of passages.
        `ValueError`: If there are no passages, one is malformed, two share an id, none has any text, or the backend or the
            language is unknown.

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

    _searched = False
    _warned = False  # of queries that find nothing

    def __init__(
        self,
        passages: Iterable[Passage],
        backend: BM25Backend = "bm25s",
        *,
        k1: float = 1.5,
        b: float = 0.75,
        language: str | None = "english",
    ):
        check_language(language)
        self.passages: Sequence[Passage] = hold_passages(passages, "BM25Retriever", "BM25Retriever.from_jsonl({})")
        self.backend, self.k1, self.b, self.language = backend, k1, b, language
        documents = [f"{passage.title} {passage.text}" for passage in self.passages]
        # query -> the score of every document, and which documents share a term with the query, both of shape (N,)
        self._score: Callable[[str], tuple[np.ndarray, np.ndarray]]
        if backend == "bm25s":
            index = bm25s.BM25(k1=k1, b=b, method="lucene")
            self._set_index(index)
            index.index(self._require_words(self._tokenize(documents)), show_progress=False)
        elif backend == "rank_bm25":
            tokens = self._require_words([split_words(document.lower()) for document in documents])
            self._okapi = BM25Okapi(tokens, k1=k1, b=b)
            self._score = self._score_okapi
        else:
            raise ValueError(f"`backend` must be 'bm25s' or 'rank_bm25', got {backend!r}.")

    @classmethod
    def from_jsonl(cls, path: str | Path, **kwargs: Any) -> "BM25Retriever":
        """
        Index a corpus file.

        Args:
            path (`str` or `Path`):
                The corpus file. See [`~retrieval.iter_corpus`] for its forms.
            **kwargs:
                Passed to the constructor.
        """
        return cls(iter_corpus(path), **kwargs)

    def save(self, folder: str | Path) -> None:
        """
        Save the index and its passages. [`BM25Retriever.load`] opens them.

        Args:
            folder (`str` or `Path`):
                A new or empty folder, or a folder with an index, which is replaced.

        Raises:
            `ValueError`: If the backend is `"rank_bm25"`, whose index consists of Python objects and cannot be mapped.
            `FileExistsError`: If the folder holds something else.
        """
        folder = Path(folder).resolve()
        if self.backend != "bm25s":
            raise ValueError(
                f"Only an index of the backend 'bm25s' can be saved, this one has the backend {self.backend!r}."
            )
        if folder == Path.cwd():
            raise ValueError("`folder` must not be the working directory: name a folder in it.")
        if folder.exists() and not (folder / "index.json").is_file() and any(folder.iterdir()):
            raise FileExistsError(f"{str(folder)!r} is not empty and holds no index: choose another folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The folder gets its name when it is complete, so a crash leaves no partial index and keeps an old one
        with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "new"
            unfinished.mkdir()
            self._index.save(unfinished, show_progress=False)
            PassageFile.write(unfinished, self.passages)
            about: dict[str, Any] = {"format": _FORMAT, "k1": self.k1, "b": self.b, "language": self.language}
            about["passages"] = len(self.passages)
            about |= {"corpus": self._corpus_fingerprint, "files": _hashes(unfinished)}
            (unfinished / "index.json").write_text(json.dumps(about, indent=1))
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            unfinished.rename(folder)

    @classmethod
    def load(cls, folder: str | Path, corpus: str | Path | None = None) -> "BM25Retriever":
        """
        Open a saved index. Its arrays and passages are mapped into memory: opening is quick, and the processes of a
        machine share one copy.

        Args:
            folder (`str` or `Path`):
                Folder that [`BM25Retriever.save`] has written.
            corpus (`str` or `Path`, *optional*):
                The JSONL corpus of the index. If it is given, corpus and index are read once to check that they belong
                together and are not damaged.

        Raises:
            `FileNotFoundError`: If there is no index in the folder.
            `ValueError`: If the index is damaged, of another version, or of another corpus.
        """
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"There is no saved BM25 index in {str(folder)!r} (no index.json).")
        self = cls.__new__(cls)
        self.backend = "bm25s"
        try:
            about = json.loads((folder / "index.json").read_text())
            if about["format"] != _FORMAT:
                raise ValueError(
                    f"its format is {about['format']!r}, this version reads {_FORMAT}. Index the corpus again"
                )
            self.k1, self.b, self.language = about["k1"], about["b"], about["language"]
            self._corpus_fingerprint = about["corpus"]
            self.passages = PassageFile(folder)
            index = bm25s.BM25.load(folder, mmap=True)
            sizes = {about["passages"], len(self.passages), index.scores["num_docs"]}
            if len(sizes) > 1:
                raise ValueError(f"its files disagree about the number of passages: {sorted(sizes)}")
            if len(index.scores["data"]) != index.scores["indptr"][-1]:
                raise ValueError("its postings are incomplete")
            if max(index.vocab_dict.values()) >= len(index.scores["indptr"]):
                raise ValueError("its vocabulary belongs to another index")
            if corpus is not None and (
                changed := [n for n, h in _hashes(folder).items() if about["files"].get(n) != h]
            ):
                raise ValueError(f"its files have changed: {', '.join(changed)}")
        except Exception as error:
            raise ValueError(f"The BM25 index in {str(folder)!r} cannot be read: {error}") from error
        self._set_index(index)
        if corpus is not None and (found := corpus_fingerprint(iter_corpus(corpus))) != self._corpus_fingerprint:
            raise ValueError(
                f"The index in {str(folder)!r} does not belong to the corpus {str(corpus)!r}: its passages have the fingerprint "
                f"{self._corpus_fingerprint}, those of the corpus {found}. Index the corpus again."
            )
        return self

    @cached_property
    def _corpus_fingerprint(self) -> str:
        return corpus_fingerprint(self.passages)

    @property
    def fingerprint(self) -> str:
        """A string that changes with the corpus, the backend and its parameters."""
        words = f"language={self.language} words={WORDS_VERSION}"
        return f"bm25 {self.backend} k1={self.k1} b={self.b} {words} {self._corpus_fingerprint}"

    def __repr__(self) -> str:
        return f"BM25Retriever({len(self.passages)} passages, backend={self.backend!r})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once.

        Passages that share no word with the query are never returned, so a list may be shorter than `k` or empty. A
        warning is issued once if none of several queries finds a passage, or if the first search finds none. Equal scores
        are ordered as in the corpus.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query, at least 1. It may exceed the size of the corpus.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.
        """
        queries, k = read_arguments(queries, k)
        results = [
            [replace(self.passages[i], score=float(scores[i])) for i in _best(scores, matches, k)]
            for scores, matches in map(self._score, queries)
        ]
        several = not self._searched or len(queries) >= _SEVERAL
        if queries and several and not self._warned and not any(results):
            self._warned = True
            self._warn_of_empty(queries[0])
        self._searched = True
        return results

    def _warn_of_empty(self, query: str) -> None:
        """Tell why a query finds nothing: all queries of a language may be concerned."""
        words = self._tokenize([query])[0] if self.backend == "bm25s" else split_words(query)
        if words:
            reason = f"none of its words {words[:8]} is in the corpus"
        elif split_words(query):
            reason = f"all its words are stop words of the language {self.language!r}"
        else:
            reason = "it has no letters or digits"
        logger.warning("The query %.200r finds no passage: %s. This is reported once.", query, reason)

    def _set_index(self, index: bm25s.BM25) -> None:
        self._index = index
        self._score = self._score_bm25s

    def _require_words(self, documents: list[list[str]]) -> list[list[str]]:
        if not any(documents):
            raise ValueError("`passages` has no passage with any word to search for in its title or text.")
        empty = [number for number, words in enumerate(documents) if not words]
        if empty:
            logger.warning(
                "%d of %d passages have no words, so they are never found. The first is %r.",
                len(empty),
                len(documents),
                self.passages[empty[0]].id,
            )
        return documents

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        return index_words(texts, self.language)

    def _score_bm25s(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._tokenize([query])[0]
        scores = self._index.get_scores(tokens) if tokens else np.zeros(len(self.passages))
        return scores, scores > 0

    def _score_okapi(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        words = split_words(query.lower())
        # Okapi's idf is zero or negative for a word in half of the documents, so a match is not a positive score
        matches = np.array([any(word in counts for word in words) for counts in self._okapi.doc_freqs])
        return np.asarray(self._okapi.get_scores(words)), matches


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an index, by file name."""
    hashes = {}
    for file in sorted(folder.iterdir()):
        if file.name != "index.json":
            digest = hashlib.sha256()
            with file.open("rb") as content:
                while block := content.read(2**20):
                    digest.update(block)
            hashes[file.name] = digest.hexdigest()
    return hashes


def _best(scores: np.ndarray, matches: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k best matches. Ties are in corpus order, so that a run can be repeated bit for bit."""
    candidates = np.flatnonzero(matches)
    if k < len(candidates):
        threshold = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= threshold]
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]
