"""A trial search before training, so that a retriever that cannot work is reported before the first step."""

import logging
from typing import Any

from .base import TRIAL_QUERY, RetrievalError
from .bm25 import BM25Retriever
from .cache import CachedRetriever
from .http import HTTPRetriever
from .log import LoggedRetriever
from .results import Outcome, check_retriever, search_each

logger = logging.getLogger(__name__)
_HTTP_SECONDS = 10.0  # for a server that does not answer yet
# Mistakes in the code of a retriever, which do not depend on the query
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)


def try_retriever(retriever: Any, k: int) -> None:
    """
    Check a retriever and search once with it. The search bypasses caches and logs, so they stay as they are. A retriever
    whose log has answers is not tried, because the run is repeated or resumed.

    A failure that may be temporary, such as a server that does not answer, is only a warning: training may start before
    the server, and the limits of a run apply to failed searches.

    Args:
        retriever ([`Retriever`]):
            The retriever.
        k (`int`):
            Maximum number of passages.

    Raises:
        `ValueError`: If the object is not a retriever, see [`check_retriever`].
        [`RetrievalError`]: If it returned something else than passages, if the failure is permanent, or if its code
            raised an exception such as a `TypeError`.
    """
    check_retriever(retriever)
    while isinstance(retriever, (CachedRetriever, LoggedRetriever)):
        logged = isinstance(retriever, LoggedRetriever) and retriever.has_answers
        retriever = retriever.retriever
        if retriever is not None:
            check_retriever(retriever)
        if logged or retriever is None:
            return
    if type(retriever) is BM25Retriever:
        return  # it searches in memory, and would report that it finds nothing
    (outcome,) = _search(retriever, k)
    if not isinstance(outcome, Exception):
        return
    permanent = isinstance(outcome, RetrievalError) and outcome.permanent
    if permanent or isinstance(outcome, _MISTAKES):
        kind = outcome.kind if isinstance(outcome, RetrievalError) else "other"
        reason = str(outcome) if permanent else repr(outcome)
        message = f"A trial search with {retriever!r} failed: {reason}"
        raise RetrievalError(message, kind, permanent=True) from outcome
    logger.warning(
        "A trial search with %r failed. Searches that fail in training are excluded from it. The failure: %r",
        retriever,
        outcome,
    )


def _search(retriever: Any, k: int) -> list[Outcome]:
    if isinstance(retriever, HTTPRetriever) and type(retriever).search is HTTPRetriever.search:
        return retriever._search_each([TRIAL_QUERY], k, total_timeout=min(retriever.total_timeout, _HTTP_SECONDS))
    return search_each(retriever, [TRIAL_QUERY], k)
