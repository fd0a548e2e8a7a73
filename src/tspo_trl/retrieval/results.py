"""Conversion and checks of the results of retrievers, with one outcome for each query."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from .base import Passage, RetrievalError, RetrievalLogError, Retriever
from .passages import describe_type, is_table, read_passage

# The passages of a query, or why its search failed
Outcome = list[Passage] | Exception


def read_arguments(queries: Sequence[str], k: int) -> tuple[list[str], int]:
    """
    Check the arguments of a search.

    Args:
        queries (`Sequence[str]`):
            Q queries.
        k (`int`):
            Maximum number of passages for each query.

    Returns:
        `tuple[list[str], int]`: The queries, and `k`.

    Raises:
        `TypeError`: If `queries` is one string or does not consist of strings, or if `k` is not an integer.
        `ValueError`: If `k` is less than 1.
    """
    if isinstance(queries, str):
        raise TypeError(f"`queries` must be a list of strings, got the string {queries!r}: write [{queries!r}].")
    if isinstance(queries, Mapping) or not isinstance(queries, Iterable):
        raise TypeError(f"`queries` must be a list of strings, got {describe_type(queries)}.")
    queries = list(queries)
    for query in queries:
        if not isinstance(query, str):
            raise TypeError(f"`queries` must be a list of strings, one of its items is {describe_type(query)}.")
    try:
        number = operator.index(k)
    except TypeError:
        raise TypeError(f"`k` must be an integer, got {describe_type(k)}.") from None
    if number < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    return [str(query) for query in queries], number


def read_results(found: Any, queries: Sequence[str], k: int, source: str) -> list[Outcome]:
    """
    Convert what a retriever returned. Tuples, generators and other iterables are read like lists, and passages in all
    forms of [`read_passage`]. Passages after the first `k` are ignored.

    Args:
        found (`Any`):
            The returned object.
        queries (`Sequence[str]`):
            Q queries.
        k (`int`):
            Maximum number of passages for each query.
        source (`str`):
            Name of the retriever in error messages.

    Returns:
        `list[list[Passage] | Exception]`: For each query its passages, or a [`RetrievalError`] if they are malformed,
            or what their generator raised.

    Raises:
        [`RetrievalError`]: If the object does not have a result for each query.
    """
    results = _read_list(found)
    if results is None:
        if inspect.iscoroutine(found):
            found.close()  # otherwise Python warns that it was never awaited
        asynchronous = inspect.isawaitable(found) or inspect.isasyncgen(found)
        reason = ": it is asynchronous, but it must return when the search has ended" if asynchronous else ""
        raise _malformed(f"{source} returned {describe_type(found)} instead of a list of lists of passages{reason}.")
    if results and all(isinstance(result, (str, Mapping, Passage)) for result in results):
        raise _malformed(
            f"{source} returned a flat list of {describe_type(results[0])}. It must return a list of passages for each "
            f"query, so a list of lists also for one query."
        )
    if len(results) != len(queries):
        raise _malformed(f"{source}: asked for {len(queries)} queries, got {len(results)} results")
    return [_read_result(result, query, k, source) for result, query in zip(results, queries, strict=True)]


def search_each(retriever: Retriever, queries: Sequence[str], k: int) -> list[Outcome]:
    """
    Search for all queries at once. A search that fails raises no exception, so that the others are kept.

    Args:
        retriever ([`Retriever`]):
            The retriever.
        queries (`Sequence[str]`):
            Q queries.
        k (`int`):
            Maximum number of passages for each query, at least 1.

    Returns:
        `list[list[Passage] | Exception]`: For each query at most `k` passages, best first, or why the search failed.

    Raises:
        [`RetrievalLogError`]: If a run is repeated from its log, and the log does not have a query.
    """
    try:
        return search_queries(retriever, queries, k)
    except RetrievalLogError:
        raise
    except Exception as error:
        return [error] * len(queries)


def search_queries(retriever: Retriever, queries: Sequence[str], k: int) -> list[Outcome]:
    """Like [`search_each`], but a failure of the whole call raises its exception."""
    if (own := _own_search_each(retriever)) is not None:
        return own(list(queries), k)
    return read_results(retriever.search(queries, k), queries, k, f"`{type(retriever).__name__}.search`")


def all_results(outcomes: Sequence[Outcome]) -> list[list[Passage]]:
    """The passages of all queries. Raises the first failure, if there is one."""
    results = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        results.append(outcome)
    return results


def is_number(value: Any) -> bool:
    """Whether an option is a number, also one of NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether an option is an integer, also one of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_retriever(retriever: Any) -> None:
    """
    Check that an object can be called like a [`Retriever`]. It is not called.

    Args:
        retriever (`Any`):
            The object.

    Raises:
        `ValueError`: If it has no method `search(queries, k)`, if this method is asynchronous or has other arguments, or
            if it is a class and not an instance of it.
    """
    required = "`retriever` must be an object with a method `search(queries, k)`"
    if isinstance(retriever, type):
        raise ValueError(f"{required}, got the class `{retriever.__name__}` itself. Pass an instance of it.")
    name = f"`{type(retriever).__name__}.search`"
    search = getattr(retriever, "search", None)
    if not callable(search):
        raise ValueError(f"{required}, for instance `BM25Retriever.from_jsonl('corpus.jsonl')`, got {retriever!r}.")
    if inspect.iscoroutinefunction(search) or inspect.isasyncgenfunction(search):
        raise ValueError(f"{required}, but {name} is asynchronous. It must return when the search has ended.")
    try:
        signature = inspect.signature(search)
    except (TypeError, ValueError):  # unknown, as of some functions in C
        return
    try:
        signature.bind([], 1)
    except TypeError as error:
        raise ValueError(f"{required}, but {name} has the arguments {signature} ({error}).") from error


def _own_search_each(retriever: Any) -> Callable[[list[str], int], list[Outcome]] | None:
    """The method `_search_each` of a retriever, unless a subclass or the instance has another `search`."""
    if "search" in getattr(retriever, "__dict__", {}):
        return None
    for owner in type(retriever).__mro__:
        if "_search_each" in vars(owner):
            method: Callable[[list[str], int], list[Outcome]] = retriever._search_each
            return method
        if "search" in vars(owner):
            return None
    return None


def _read_list(value: Any) -> list[Any] | None:
    """The items of an iterable; `None` if the value is a text, a mapping, a DataFrame or not iterable."""
    if isinstance(value, (str, bytes, Mapping, Passage)) or is_table(value) or not isinstance(value, Iterable):
        return None
    return list(value)


def _read_result(result: Any, query: str, k: int, source: str) -> Outcome:
    """The passages of one query."""
    where = f"{source}, query {query[:80]!r}"
    try:
        passages = _read_list(result)
    except RetrievalLogError:
        raise
    except Exception as error:  # of a generator, which searches while it is read
        return error
    if passages is None:
        return _malformed(f"{where}: expected a list of passages, found {describe_type(result)}.")
    try:
        return [read_passage(passage, f"{where}, passage {i}") for i, passage in enumerate(passages[:k])]
    except ValueError as error:
        return _malformed(str(error))


def _malformed(message: str) -> RetrievalError:
    return RetrievalError(message, "reply", permanent=True)
