"""A cache of search results, in memory and on disk."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..support.files import replace_file
from .base import Passage, Retriever
from .passages import read_passage
from .results import Outcome, all_results, check_retriever, read_arguments, search_each

logger = logging.getLogger(__name__)
_FORMAT = 1


class CachedRetriever:
    """
    A retriever that caches the results of another retriever. Failures are not cached.

    Args:
        retriever ([`Retriever`]):
            The retriever that searches.
        max_queries (`int`, *optional*, defaults to `10000`):
            Maximum number of queries in memory. The least recently used queries are dropped. 0 keeps none.
        folder (`str` or `Path`, *optional*):
            Folder in which all queries are also kept, one file for each. The name of a file is a hash of the query, `k`
            and the retriever's `fingerprint`, so processes, runs and retrievers can share a folder, also over a network.
            The folder is never emptied.

    Attributes:
        hits (`int`): Number of queries answered from the cache.
        misses (`int`): Number of queries sent to the retriever.

    Raises:
        `ValueError`: If the object is not a retriever, or if `folder` is given and the retriever has no `fingerprint`. Its results could be confused with
            those of another retriever.
    """

    def __init__(self, retriever: Retriever, max_queries: int = 10_000, folder: str | Path | None = None):
        if max_queries < 0:
            raise ValueError(f"`max_queries` must not be negative, got {max_queries}.")
        check_retriever(retriever)
        self.fingerprint = getattr(retriever, "fingerprint", None)
        if folder is not None and not isinstance(self.fingerprint, str):
            raise ValueError(
                f"A cache on disk needs a retriever with a string `fingerprint` that changes with its corpus; {retriever!r} "
                "has none. Add it, or keep the cache in memory only."
            )
        self.retriever = retriever
        self.max_queries = max_queries
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._warned = False
        self._memory: OrderedDict[tuple[str, int], list[Passage]] = OrderedDict()

    def __repr__(self) -> str:
        return repr(self.retriever)

    @property
    def retries(self) -> int:
        """Number of requests that the retriever has repeated so far."""
        return getattr(self.retriever, "retries", 0)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once, see [`Retriever`].

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query, at least 1.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.
        """
        return all_results(self._search_each(*read_arguments(queries, k)))

    def _search_each(self, queries: list[str], k: int) -> list[Outcome]:
        known: dict[str, list[Passage] | None] = {query: self._find(query, k) for query in dict.fromkeys(queries)}
        unknown = [query for query, passages in known.items() if passages is None]
        self.hits += len(known) - len(unknown)
        self.misses += len(unknown)
        failed: dict[str, Exception] = {}
        if unknown:
            for query, outcome in zip(unknown, search_each(self.retriever, unknown, k), strict=True):
                if isinstance(outcome, Exception):  # a cached failure would stay
                    failed[query] = outcome
                else:
                    known[query] = outcome
                    self._keep_on_disk(query, k, outcome)
        for query, passages in known.items():
            if passages is not None:
                self._keep_in_memory(query, k, passages)
        return [failed[query] if query in failed else list(known[query] or []) for query in queries]

    def _find(self, query: str, k: int) -> list[Passage] | None:
        passages = self._memory.get((query, k))
        if passages is not None or self.folder is None:
            return passages
        try:
            record = json.loads(self._file(query, k).read_bytes())
            if record["query"] != query or not isinstance(record["passages"], list):
                raise ValueError("its content is not that of a cached query")
            return [read_passage(passage, "a passage") for passage in record["passages"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s cannot be read, so the retriever is asked again: %r", self._file(query, k), error)
            return None

    def _keep_in_memory(self, query: str, k: int, passages: list[Passage]) -> None:
        self._memory[query, k] = passages
        self._memory.move_to_end((query, k))
        while len(self._memory) > self.max_queries:
            self._memory.popitem(last=False)

    def _file(self, query: str, k: int) -> Path:
        assert self.folder is not None
        key = json.dumps([_FORMAT, self.fingerprint, k, query])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _keep_on_disk(self, query: str, k: int, passages: list[Passage]) -> None:
        if self.folder is None:
            return
        file = self._file(query, k)
        try:
            file.parent.mkdir(exist_ok=True)
            record = {"query": query, "k": k, "passages": [asdict(passage) for passage in passages]}
            replace_file(file, json.dumps(record, default=float))
        except OSError as error:  # a full disk must not fail the rollouts
            if not self._warned:
                logger.warning("Retrieved passages are not kept on disk, %s cannot be written: %r", file, error)
                self._warned = True
