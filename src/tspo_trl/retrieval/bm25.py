"""BM25 inside the training process, without a server and without Java."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from rank_bm25 import BM25Okapi

from ..support.files import replacing_folder
from .base import TRIAL_QUERY, Passage
from .corpus import PassageFile, copy_corpus, corpus_fingerprint, iter_corpus
from .passages import hold_passages
from .postings import Postings, best_of, write_postings
from .results import is_number, read_arguments
from .words import WORDS_VERSION, check_language, index_words, lower_words, split_words

BM25Backend = Literal["bm25s", "rank_bm25"]
_FORMAT = 2
_SEVERAL = 8  # queries that all find nothing: a single one may be the mistake of a model
logger = logging.getLogger(__name__)


class BM25Retriever:
    """
    Okapi BM25, as in `bm25s` (default) or by `rank_bm25`.

    The constructor takes passages that are in memory. [`BM25Retriever.from_jsonl`] indexes a corpus file, and
    [`BM25Retriever.build`] saves the index too; both read the file as a stream and hold no passages in memory.

    A document is the title followed by the text. Words of one character count ("Apollo 9", "the language R"). Text of
    scripts without spaces between words (Chinese, Japanese, Thai) is split into pairs of characters. `bm25s` removes the
    stop words of `language`, stems words (Snowball), and uses the inverse document frequency of Lucene. `rank_bm25`
    lower-cases words, and gives a word in more than half of the documents a positive weight by its `epsilon`. It is
    slower by orders of magnitude and finds a little less; it is provided for comparison with projects that use it.

    Args:
        passages (`Iterable[Passage]`):
            Passages of the corpus. See [`~retrieval.read_passage`] for other forms, such as dictionaries.
        backend (`str`, *optional*, defaults to `"bm25s"`):
            `"bm25s"` or `"rank_bm25"`.
        k1 (`float`, *optional*, defaults to `1.5`):
            Saturation of the term frequency, at least 0.
        b (`float`, *optional*, defaults to `0.75`):
            Strength of the length normalisation, from 0 to 1.
        language (`str` or `None`, *optional*, defaults to `"english"`):
            Language of the stop words and the stemmer, for instance `"german"`. `None` keeps all words as they are. Not
            used by `rank_bm25`.

    Raises:
        `TypeError`: If `passages` is not a collection of passages.
        `ValueError`: If there are no passages, one is malformed, two share an id, none has any text, or an option has a value
            that is not allowed.

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
        _check_options(backend, k1, b, language)
        self.passages: Sequence[Passage] = hold_passages(passages, "BM25Retriever", "BM25Retriever.from_jsonl({})")
        self.backend, self.k1, self.b, self.language = backend, k1, b, language
        if backend == "bm25s":
            with TemporaryDirectory(prefix="bm25-") as folder:
                documents = _documents(self.passages)
                _index("`passages`", self.passages, documents, Path(folder), k1=k1, b=b, language=language)
                self._postings = Postings.load(Path(folder), mapped=False)
        else:
            tokens = [lower_words(document, indexed=True) for document in _documents(self.passages)]
            _require_words("`passages`", self.passages, np.array([len(words) for words in tokens]))
            self._okapi = BM25Okapi(tokens, k1=k1, b=b)

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        backend: BM25Backend = "bm25s",
        *,
        k1: float = 1.5,
        b: float = 0.75,
        language: str | None = "english",
    ) -> "BM25Retriever":
        """
        Index a corpus file.

        With `bm25s`, the index and a copy of the passages are written to the folder for temporary files (the environment
        variable `TMPDIR` sets another one) and mapped into memory, as by [`BM25Retriever.build`]. They disappear with the
        process. `rank_bm25` holds everything in memory.

        Args:
            path (`str` or `Path`):
                The corpus file. See [`~retrieval.iter_corpus`] for its forms.
            backend, k1, b, language:
                As in the constructor.
        """
        if backend != "bm25s":
            return cls(iter_corpus(path), backend, k1=k1, b=b, language=language)
        # Mapped files can still be read after they are deleted
        with TemporaryDirectory(prefix="bm25-", ignore_cleanup_errors=True) as folder:
            return cls.build(path, Path(folder) / "index", k1=k1, b=b, language=language)

    @classmethod
    def build(
        cls,
        corpus: str | Path,
        folder: str | Path,
        *,
        k1: float = 1.5,
        b: float = 0.75,
        language: str | None = "english",
    ) -> "BM25Retriever":
        """
        Index a corpus file, save the index, and open it. The file is read as a stream, so that memory is only needed for the
        different words of the corpus and for blocks of them. The folder gets its name when the index is complete.

        Args:
            corpus (`str` or `Path`):
                The corpus file. See [`~retrieval.iter_corpus`] for its forms.
            folder (`str` or `Path`):
                A new or empty folder, or a folder with an index, which is replaced.
            k1, b, language:
                As in the constructor.

        Raises:
            `FileExistsError`: If the folder holds something else.
            `ValueError`: If the corpus is malformed or damaged, two passages share an id, none has any text, or an option has a
                value that is not allowed.
        """
        _check_options("bm25s", k1, b, language)
        _check_folder(folder)
        with replacing_folder(folder) as unfinished:
            fingerprint = copy_corpus(corpus, unfinished)
            passages = PassageFile(unfinished)
            # Read, not mapped: its pages would count as memory of this process
            documents = _documents(iter_corpus(unfinished / PassageFile.TEXTS))
            name = f"The corpus {str(corpus)!r}"
            _index(name, passages, documents, unfinished, k1=k1, b=b, language=language)
            _write_about(unfinished, len(passages), fingerprint, {"k1": k1, "b": b, "language": language})
        return cls.load(folder)

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
        if self.backend != "bm25s":
            raise ValueError(
                f"Only an index of the backend 'bm25s' can be saved, this one has the backend {self.backend!r}."
            )
        _check_folder(folder)
        with replacing_folder(folder) as unfinished:
            self._postings.save(unfinished, k1=self.k1, b=self.b)
            PassageFile.write(unfinished, self.passages)
            options = {"k1": self.k1, "b": self.b, "language": self.language}
            _write_about(unfinished, len(self.passages), self._corpus_fingerprint, options)

    @classmethod
    def load(cls, folder: str | Path, corpus: str | Path | None = None) -> "BM25Retriever":
        """
        Open a saved index. Its arrays and passages are mapped into memory: opening is quick, and the processes of a
        machine share one copy.

        Args:
            folder (`str` or `Path`):
                Folder that [`BM25Retriever.build`] or [`BM25Retriever.save`] has written.
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
            self._words = about.get("words", 2)
            if self._words != WORDS_VERSION:  # the words of most languages are the same
                logger.warning(
                    "The index in %r was made by version %r of the rule for words, the present one is %r. Index the corpus "
                    "again if it has Korean, Turkish, or scripts without spaces.",
                    str(folder),
                    self._words,
                    WORDS_VERSION,
                )
            self.k1, self.b, self.language = about["k1"], about["b"], about["language"]
            self._corpus_fingerprint = about["corpus"]
            self.passages = PassageFile(folder)
            self._postings = Postings.load(folder, mapped=True)
            sizes = {about["passages"], len(self.passages), self._postings.num_passages}
            if len(sizes) > 1:
                raise ValueError(f"its files disagree about the number of passages: {sorted(sizes)}")
            if corpus is not None and (
                changed := [n for n, h in _hashes(folder).items() if about["files"].get(n) != h]
            ):
                raise ValueError(f"its files have changed: {', '.join(changed)}")
        except Exception as error:
            raise ValueError(f"The BM25 index in {str(folder)!r} cannot be read: {error}") from error
        if corpus is not None and (found := corpus_fingerprint(iter_corpus(corpus))) != self._corpus_fingerprint:
            raise ValueError(
                f"The index in {str(folder)!r} does not belong to the corpus {str(corpus)!r}: its passages have the fingerprint "
                f"{self._corpus_fingerprint}, those of the corpus {found}. Index the corpus again."
            )
        return self

    @cached_property
    def _corpus_fingerprint(self) -> str:
        return corpus_fingerprint(self.passages)

    _words = WORDS_VERSION  # an index that is loaded may be of an earlier one

    @property
    def fingerprint(self) -> str:
        """A string that changes with the corpus, the backend and its parameters."""
        words = f"language={self.language} words={self._words}"
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
        if self.backend == "bm25s":
            best = self._postings.search(index_words(queries, self.language), k)
        else:
            best = [self._search_okapi(query, k) for query in queries]
        results = [
            [replace(self.passages[i], score=score) for i, score in zip(ids.tolist(), scores.tolist(), strict=True)]
            for ids, scores in best
        ]
        if set(queries) <= {TRIAL_QUERY}:
            return results
        several = not self._searched or len(queries) >= _SEVERAL
        if several and not self._warned and not any(results):
            self._warned = True
            self._warn_of_empty(queries[0])
        self._searched = True
        return results

    def _warn_of_empty(self, query: str) -> None:
        """Warn why a query finds nothing: all queries of a language may be affected."""
        words = index_words([query], self.language)[0] if self.backend == "bm25s" else split_words(query)
        if words:
            reason = f"none of its words {words[:8]} is in the corpus"
        elif split_words(query):
            reason = f"all its words are stop words of the language {self.language!r}"
        else:
            reason = "it has no letters or digits"
        logger.warning("The query %.200r finds no passage: %s. This is reported once.", query, reason)

    def _search_okapi(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        words = lower_words(query)
        # Okapi's idf is zero or negative for a word in half of the documents, so a match is not a positive score
        matches = np.flatnonzero([any(word in counts for word in words) for counts in self._okapi.doc_freqs])
        scores = np.asarray(self._okapi.get_scores(words))[matches]
        best = best_of(scores, k)
        return matches[best], scores[best]


def _check_options(backend: str, k1: float, b: float, language: str | None) -> None:
    if backend not in ("bm25s", "rank_bm25"):
        raise ValueError(f"`backend` must be 'bm25s' or 'rank_bm25', got {backend!r}.")
    if not is_number(k1) or not 0 <= k1 < math.inf:
        raise ValueError(f"`k1` must be a finite number of at least 0, got {k1!r}.")
    if not is_number(b) or not 0 <= b <= 1:
        raise ValueError(f"`b` must be a number from 0 to 1, got {b!r}.")
    check_language(language)


def _documents(passages: Iterable[Passage]) -> Iterator[str]:
    """The texts that are searched."""
    return (f"{passage.title} {passage.text}" for passage in passages)


def _index(corpus: str, passages: Sequence[Passage], documents: Iterable[str], folder: Path, **options: Any) -> None:
    _require_words(corpus, passages, write_postings(documents, len(passages), folder, **options))


def _require_words(corpus: str, passages: Sequence[Passage], lengths: np.ndarray) -> None:
    """Raise an error if no passage has a word, and warn of passages without one."""
    empty = np.flatnonzero(lengths == 0)
    if len(empty) == len(passages):
        raise ValueError(f"{corpus} has no passage with any word to search for in its title or text.")
    if len(empty):
        logger.warning(
            "%d of %d passages have no words, so they are never found. The first is %r.",
            *(len(empty), len(passages), passages[int(empty[0])].id),
        )


def _check_folder(folder: str | Path) -> None:
    """Raise an error if a folder holds something else than an index, and so must not be replaced."""
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise ValueError("`folder` must not be the working directory: name a folder in it.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: choose a new or empty folder for the index.")
    if folder.exists() and not (folder / "index.json").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} is not empty and holds no index: choose another folder.")


def _write_about(folder: Path, passages: int, corpus: str, options: dict[str, Any]) -> None:
    """Write the description of an index."""
    about = {
        "format": _FORMAT,
        "words": WORDS_VERSION,
        **options,
        "passages": passages,
        "corpus": corpus,
        "files": _hashes(folder),
    }
    (folder / "index.json").write_text(json.dumps(about, indent=1))


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
