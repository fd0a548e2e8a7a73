"""The passage, the protocol of retrievers, and the errors of a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

#: Why a search failed: no answer in time; no connection; an HTTP error; a malformed reply; another reason.
FailureKind = Literal["timeout", "connection", "status", "reply", "other"]
TRIAL_QUERY = "test"  # of a search that only finds out whether a retriever works: it is no fault if nothing is found
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True, slots=True)
class Passage:
    """
    A passage returned by a search. Its text is foreign: it is not trusted.

    Args:
        id (`str`):
            Identifier within the corpus.
        title (`str`):
            Title, possibly `""`.
        text (`str`):
            The text without its title.
        score (`float`, *optional*, defaults to `0.0`):
            The retriever's score, higher is better. Scores of different backends are not comparable.
    """

    id: str
    title: str
    text: str
    score: float = 0.0


class RetrievalError(RuntimeError):
    """
    Raised when a retriever cannot answer.

    Args:
        message (`str`):
            Description of the failure, with the name of the retriever.
        kind (`str`, *optional*, defaults to `"other"`):
            `"timeout"`, `"connection"` (refused, reset, unknown host), `"status"` (an HTTP error), `"reply"` (malformed,
            or the wrong number of results) or `"other"`.
        permanent (`bool`, *optional*, defaults to `False`):
            Whether the same search would fail again, for instance because the server has no such address.
    """

    def __init__(self, message: str, kind: FailureKind = "other", *, permanent: bool = False):
        super().__init__(message)
        self.kind: FailureKind = kind
        self.permanent = permanent


class RetrievalLogError(RuntimeError):
    """Raised when a run is repeated from its retrieval log and the log does not have a query. It stops the run."""


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure that an exception of a retriever stands for."""
    if isinstance(error, RetrievalError):
        return error.kind
    if isinstance(error, TimeoutError):
        return "timeout"
    return "connection" if isinstance(error, ConnectionError) else "other"


@runtime_checkable
class Retriever(Protocol):
    """
    The protocol of retrievers: any object with a batched `search`.

    An exception raised by `search` does not stop training. The turns that searched are marked `"timeout"` (for a
    [`RetrievalError`] of this kind, or a `TimeoutError`) or `"error"`, and their rollouts are excluded from training.

    A retriever may have a string `fingerprint` that changes whenever its results may change. A cache on disk uses it to
    keep the results of different corpora apart.
    """

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first. An empty list means no passage was found.
                See [`~retrieval.read_passage`] for other forms of passages, such as dictionaries. If the passages of a
                query are malformed, only this search fails.
        """
        ...
