"""Answers that are already known: in memory, and on disk for the next run."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..support.files import replace_file
from .base import Passage, RetrievalError, Retriever, check_k
from .corpus import parse_passage

logger = logging.getLogger(__name__)
_FORMAT = 1


class CachedRetriever:
    """
    Asks another retriever only for what is not known yet. Failures are not kept.

    Args:
        retriever ([`Retriever`]):
            The retriever to ask.
        max_queries (`int`, *optional*, defaults to `10000`):
            How many queries to keep in memory; those that were used least recently are dropped. 0 keeps none.
        folder (`str` or `Path`, *optional*):
            Keep all queries in this folder too, one file for each. The name of a file is a hash of the query, `k` and the
            retriever's `fingerprint`, so that processes, runs and retrievers may share a folder, also over a network. It
            is never emptied.

    Attributes:
        hits (`int`): Queries that were known.
        misses (`int`): Queries that the retriever was asked for.

    Raises:
        `ValueError`: If `folder` is given and the retriever has no `fingerprint`, which would mix up its results with
            those of another.
    """

    def __init__(self, retriever: Retriever, max_queries: int = 10_000, folder: str | Path | None = None):
        if max_queries < 0:
            raise ValueError(f"`max_queries` must not be negative, got {max_queries}.")
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
        """Requests that the retriever has sent again so far."""
        return getattr(self.retriever, "retries", 0)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once, see [`Retriever`].

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                How many passages to return for each, at least 1.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.
        """
        check_k(k)
        known = {query: self._recall(query, k) for query in dict.fromkeys(queries)}
        unknown = [query for query, passages in known.items() if passages is None]
        self.hits += len(known) - len(unknown)
        if unknown:
            self.misses += len(unknown)
            results = self.retriever.search(unknown, k)
            if len(results) != len(unknown):  # kept, this would be wrong for ever
                raise RetrievalError(f"asked for {len(unknown)} queries, got {len(results)} results", "reply")
            for query, found in zip(unknown, results, strict=True):
                known[query] = found
                self._write(query, k, found)
        for query, passages in known.items():
            self._keep(query, k, passages or [])
        return [list(known[query] or []) for query in queries]

    def _recall(self, query: str, k: int) -> list[Passage] | None:
        passages = self._memory.get((query, k))
        if passages is not None or self.folder is None:
            return passages
        try:
            record = json.loads(self._file(query, k).read_bytes())
            if record["query"] != query or not isinstance(record["passages"], list):
                raise ValueError("it is not what was written")
            return [
                parse_passage(passage, "a passage", score=float(passage["score"])) for passage in record["passages"]
            ]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s cannot be read and is asked for again: %r", self._file(query, k), error)
            return None

    def _keep(self, query: str, k: int, passages: list[Passage]) -> None:
        self._memory[query, k] = passages
        self._memory.move_to_end((query, k))
        while len(self._memory) > self.max_queries:
            self._memory.popitem(last=False)

    def _file(self, query: str, k: int) -> Path:
        assert self.folder is not None
        key = json.dumps([_FORMAT, self.fingerprint, k, query])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _write(self, query: str, k: int, passages: list[Passage]) -> None:
        if self.folder is None:
            return
        file = self._file(query, k)
        try:
            file.parent.mkdir(exist_ok=True)
            record = {"query": query, "k": k, "passages": [asdict(passage) for passage in passages]}
            replace_file(file, json.dumps(record, default=float))
        except OSError as error:  # a full disk must not cost the rollouts
            if not self._warned:
                logger.warning("Retrieved passages are not kept on disk, %s cannot be written: %r", file, error)
                self._warned = True
