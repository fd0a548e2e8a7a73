"""A log of the passages that a run retrieved. The run can be repeated from it, bit for bit, without its retriever."""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from .base import FAILURE_KINDS, Passage, RetrievalError, RetrievalLogError, Retriever, failure_kind
from .results import Outcome, all_results, read_arguments, search_each


class LoggedRetriever:
    """
    A retriever that writes the results of another retriever to a log, and answers from the log.

    With a retriever, queries in the log are answered from it. All other queries are sent to the retriever, and their
    results are added to the log. So a repeated or resumed run sees the same passages, even if the index has changed.
    Failed searches are also logged, and are tried again. Without a retriever, all answers come from the log: a query that
    failed fails again at the same place (see [`LoggedRetriever.begin`]), and a query that is not in the log is an error.

    Args:
        retriever ([`Retriever`], *optional*):
            The retriever that searches. If `None`, the log must exist.
        folder (`str` or `Path`):
            Folder of the log, with one JSONL file for each process. All files are read, so a run can be repeated with a
            different number of processes.
        rank (`int`, *optional*, defaults to `0`):
            Rank of the process. It names the file that is written.

    Raises:
        `FileNotFoundError`: If there is neither a retriever nor a log.
        `ValueError`: If a line of the log is damaged. An unfinished last line, as a killed run leaves it, is ignored.
    """

    def __init__(self, retriever: Retriever | None, folder: str | Path, rank: int = 0):
        self.retriever = retriever
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The retrieval log {str(folder)!r} must be a folder, it is a file.")
        self._own = self.folder / f"rank{rank:03d}.jsonl"
        # If processes got different answers, the answer of this process counts: its file is read last
        files = sorted(self.folder.glob("rank*.jsonl"), key=lambda file: (file == self._own, file))
        if retriever is None and not files:
            raise FileNotFoundError(
                f"There is no retrieval log in {str(folder)!r} to repeat a run from (no rank*.jsonl), and no retriever."
            )
        # Passages stay on disk, because those of a long run do not fit into memory: only their offsets are kept
        self._found: dict[tuple[str, int], tuple[BinaryIO, int]] = {}
        self._failed: dict[tuple[str, int, str, int], RetrievalError] = {}
        self._phase, self._calls = "", 0
        if retriever is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._own.open("ab", buffering=0)
            self._writer.truncate(_end_of_last_line(self._own))
            self._reader = self._own.open("rb")
        for file in files:
            self._read_log(file)

    def __repr__(self) -> str:
        return f"LoggedRetriever({str(self.folder)!r})" if self.retriever is None else repr(self.retriever)

    @property
    def has_answers(self) -> bool:
        """Whether the log has the passages of any query."""
        return bool(self._found)

    def begin(self, phase: str) -> None:
        """
        Start a phase of the run. Calls are counted from the start of a phase, so that a failure is repeated at the same
        call. A phase that runs again after a restart replaces the failures logged for it.

        Args:
            phase (`str`):
                Name of the phase, for instance `"train 7"`. The name of the current phase continues it.
        """
        if phase != self._phase:
            self._phase, self._calls = phase, 0

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

        Raises:
            [`RetrievalError`]: Without a retriever, if a query failed in this call of the logged run.
            [`RetrievalLogError`]: Without a retriever, if a query is not in the log.
        """
        return all_results(self._search_each(*read_arguments(queries, k)))

    def _search_each(self, queries: list[str], k: int) -> list[Outcome]:
        if self.retriever is None:
            failed = self._find_failures(queries, k)
        else:
            self._replace_failures(queries, k)
            unknown = [query for query in dict.fromkeys(queries) if (query, k) not in self._found]
            failed = self._search_and_log(self.retriever, unknown, k) if unknown else {}
        self._calls += 1
        return [failed[query] if query in failed else self._read_passages(query, k) for query in queries]

    def _read_passages(self, query: str, k: int) -> list[Passage]:
        file, offset = self._found[query, k]
        file.seek(offset)
        return [Passage(**passage) for passage in json.loads(file.readline())["passages"]]

    def _find_failures(self, queries: Sequence[str], k: int) -> dict[str, Exception]:
        """The queries that failed in this call of the logged run."""
        failed: dict[str, Exception] = {}
        for query in queries:
            if error := self._failed.get((self._phase, self._calls, query, k)):
                failed[query] = error
            elif (query, k) not in self._found:
                raise RetrievalLogError(
                    f"The query {query!r} (k={k}) is not in the retrieval log {str(self.folder)!r}: this run differs from "
                    "the logged one, or is longer. Repeat it with the same configuration, seed and software, or give a "
                    "retriever."
                )
        return failed

    def _replace_failures(self, queries: Sequence[str], k: int) -> None:
        """Log known queries again that failed in this call before a restart. A repeated run must not fail there."""
        for query in queries:
            place = (self._phase, self._calls, query, k)
            if (query, k) in self._found and place in self._failed:
                del self._failed[place]
                passages = self._read_passages(query, k)
                self._append(query, k, {"passages": [asdict(passage) for passage in passages]})

    def _search_and_log(self, retriever: Retriever, queries: list[str], k: int) -> dict[str, Exception]:
        """Search for queries that are not in the log, and add them to it. Returns the failed ones."""
        failed: dict[str, Exception] = {}
        for query, outcome in zip(queries, search_each(retriever, queries, k), strict=True):
            if isinstance(outcome, Exception):
                failed[query] = outcome
                self._append(query, k, {"failure": failure_kind(outcome), "message": str(outcome)})
            else:
                offset = self._append(query, k, {"passages": [asdict(passage) for passage in outcome]})
                self._found[query, k] = (self._reader, offset)
        return failed

    def _append(self, query: str, k: int, outcome: dict[str, Any]) -> int:
        """Append a line to the log, and return its offset in bytes."""
        record = {"phase": self._phase, "call": self._calls, "query": query, "k": k, **outcome}
        line = json.dumps(record, default=float).encode() + b"\n"
        offset = self._writer.seek(0, os.SEEK_END)
        written = 0
        try:
            written = self._writer.write(line)
        finally:
            if written < len(line):  # the disk is full: half a line would damage the next line
                self._writer.truncate(offset)
        if written < len(line):
            raise OSError(errno.ENOSPC, f"The retrieval log {str(self._own)!r} cannot be written")
        return offset

    def _read_log(self, path: Path) -> None:
        file = path.open("rb")
        end = _end_of_last_line(path)
        number = 0
        while (offset := file.tell()) < end:
            number += 1
            try:
                record = json.loads(file.readline())
                query, k, where = record["query"], record["k"], (record["phase"], record["call"])
                if "passages" in record:
                    [Passage(**passage) for passage in record["passages"]]
                    self._found[query, k] = (file, offset)
                    self._failed.pop((*where, query, k), None)
                elif record["failure"] not in FAILURE_KINDS:
                    raise ValueError(f"unknown failure {record['failure']!r}")
                elif path == self._own:
                    self._failed[(*where, query, k)] = RetrievalError(record["message"], record["failure"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a line of a retrieval log ({error!r}).") from error


def _end_of_last_line(path: Path) -> int:
    """Number of bytes up to the end of the last complete line. A killed run may have left half a line after it."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            if (last := file.read(end - start).rfind(b"\n")) >= 0:
                return start + last + 1
            end = start
    return 0
