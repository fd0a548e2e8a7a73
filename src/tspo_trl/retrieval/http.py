"""Retrieval over HTTP: a client that survives outages of its server."""

import asyncio
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence

import httpx2

from ..support.http import (
    check_header,
    check_proxies,
    check_url,
    describe_reply,
    lasting_failure,
    open_client,
    without_password,
)
from ..support.retry import is_temporary, retry_after_seconds, retry_delay
from .base import FailureKind, Passage, RetrievalError
from .results import Outcome, all_results, is_integer, is_number, read_arguments, read_results

logger = logging.getLogger(__name__)
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 5.0
_REFUSED_CONTENT = frozenset({400, 413, 422})  # statuses that may be the fault of one of several queries
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_STUBBORN = 5  # attempts after which a failing query is given up, if the server answers others


class HTTPRetriever:
    """
    Searches with a retrieval server that has the interface of Search-R1: a `POST` request of
    `{"queries": [...], "topk": k, "return_scores": true}` returns `{"result": [[{"document": {...}, "score": ...}]]}`, or
    the documents without scores. `tspo serve` starts such a server.

    A request is sent again after temporary failures: a timeout, a refused or broken connection, an HTTP status 408, 425,
    429 or 5xx, and a reply that is not JSON or has the wrong number of results. Delays between requests double up to 5
    seconds and are drawn at random; the server can ask for longer ones with a `Retry-After` header. When `total_timeout`
    has passed, or would pass during the next delay, [`RetrievalError`] reports the last failure. Any other HTTP error, a
    reply without passages, and encryption that the server does not have or is not trusted for are permanent failures, which
    are not repeated. Idle connections are kept for the next call.

    In training, a malformed passage only fails the search that found it. If the server refuses the content of a request
    (400, 413 or 422), or answers it several times with 500 or a wrong reply, its queries are sent in smaller requests. So
    only the queries which cause the failure fail, and not all of a batch.

    Args:
        url (`str`):
            Address of the server, for instance `"http://10.0.0.5:8000"`. Without a path, `/retrieve` is appended.
        timeout (`float`, *optional*, defaults to `30.0`):
            Seconds for one request, from the connection to the last byte of the reply.
        total_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for a whole call of `search`, including retries. Shorter outages do not fail the call. In distributed training,
            the other processes wait meanwhile, so it should be well below `ddp_timeout` (1800 by default).
        batch_size (`int`, *optional*, defaults to `64`):
            Maximum number of queries per request. More queries are sent in several concurrent requests.
        max_connections (`int`, *optional*, defaults to `8`):
            Maximum number of concurrent requests.
        headers (`Mapping[str, str]`, *optional*):
            Headers of every request, for instance for authorization.

    Attributes:
        retries (`int`): Number of requests sent again so far.

    Raises:
        `ValueError`: If an argument is out of range, if the URL is not an HTTP URL, or if an environment variable names a
            proxy that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        total_timeout: float = 120.0,
        batch_size: int = 64,
        max_connections: int = 8,
        headers: Mapping[str, str] | None = None,
    ):
        parsed = check_url(url)
        for name, value in (("timeout", timeout), ("total_timeout", total_timeout)):
            if not is_number(value) or not value > 0:
                raise ValueError(f"`{name}` must be more than 0 seconds, got {value!r}.")
        for name, count in (("batch_size", batch_size), ("max_connections", max_connections)):
            if not is_integer(count) or count < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}.")
        if headers is not None and not isinstance(headers, Mapping):
            raise ValueError(f"`headers` must be a dictionary of names and values, got `{type(headers).__name__}`.")
        for name, text in (headers or {}).items():
            if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"`headers`: the name {name!r} must consist of letters, digits and '-'.")
            check_header(text, f"`headers`: the value of {name!r}")
        self._address = parsed.copy_with(path="/retrieve") if parsed.path in ("", "/") else parsed
        self.url = without_password(self._address)
        check_proxies(self.url)
        self.timeout = timeout
        self.total_timeout = total_timeout
        self.batch_size = batch_size
        self.max_connections = max_connections
        self.headers = dict(headers or {})
        self.retries = 0
        self._process: int | None = None
        self._opening = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """The URL. If the server gets another corpus, another cache must be used."""
        return f"http {self.url}"

    def __repr__(self) -> str:
        return f"HTTPRetriever({self.url!r})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages per query, at least 1.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first.

        Raises:
            [`RetrievalError`]: If the server did not answer within `total_timeout`, or if it refused the request.
        """
        return all_results(self._search_each(*read_arguments(queries, k)))

    def _search_each(self, queries: list[str], k: int, total_timeout: float | None = None) -> list[Outcome]:
        if not queries:
            return []
        loop = self._event_loop()
        call = asyncio.run_coroutine_threadsafe(self._search(queries, k, total_timeout or self.total_timeout), loop)
        try:
            return call.result()
        finally:
            call.cancel()  # no effect on a finished call; after an interrupt, it cancels open requests

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop in a separate thread, because notebooks already run a loop in theirs."""
        with self._opening:
            if self._process != os.getpid():  # threads and connections do not survive a fork
                self._client = open_client(
                    httpx2.AsyncClient,
                    self.url,
                    headers=self.headers,
                    timeout=None,  # a timeout per read or write does not limit the whole request
                    limits=httpx2.Limits(max_connections=self.max_connections, keepalive_expiry=60.0),
                )
                self._last_success = -float("inf")
                self._slots = asyncio.Semaphore(self.max_connections)
                self._loop = loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name=repr(self), daemon=True).start()
                weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
                self._process = os.getpid()
            return self._loop

    async def _search(self, queries: list[str], k: int, total_timeout: float) -> list[Outcome]:
        """Search in batches that are requested concurrently."""
        deadline = self._loop.time() + total_timeout
        batches = [queries[i : i + self.batch_size] for i in range(0, len(queries), self.batch_size)]
        return await self._search_batches(batches, k, deadline)

    async def _search_batches(self, batches: list[list[str]], k: int, deadline: float) -> list[Outcome]:
        results = await asyncio.gather(*(self._search_batch(batch, k, deadline) for batch in batches))
        return [outcome for outcomes in results for outcome in outcomes]

    async def _search_halves(self, queries: list[str], k: int, deadline: float) -> list[Outcome]:
        """Search for the two halves of a batch, of which only one may contain the cause of a failure."""
        middle = len(queries) // 2
        halves = (queries[:middle], queries[middle:])
        results = await asyncio.gather(*(self._search_batch(half, k, deadline, attempts=2) for half in halves))
        return [outcome for outcomes in results for outcome in outcomes]

    async def _search_batch(self, queries: list[str], k: int, deadline: float, *, attempts: int = 3) -> list[Outcome]:
        """
        Send a request until it succeeds, fails permanently, or the deadline passes. After `attempts`
        attempts, a failure that one query may have caused is retried with each half of the batch separately.
        """
        attempt, start = 0, self._loop.time()
        failure: _Failure | None = None
        while True:
            attempt += 1
            async with self._slots:
                left = max(deadline - self._loop.time(), 0.0)
                try:
                    outcomes = await asyncio.wait_for(self._request(queries, k), min(self.timeout, left))
                    self._last_success = self._loop.time()
                    return outcomes
                except TimeoutError:
                    # If the request had less time than `timeout`, the failure before it says more
                    if failure is None or left >= self.timeout:
                        failure = _Failure("timeout", f"no answer within {min(self.timeout, left):.3g} s")
                except httpx2.DecodingError as error:
                    failure = _Failure("reply", f"{type(error).__name__}: {error}")
                except httpx2.RequestError as error:
                    lasting = lasting_failure(error)
                    message = lasting or f"{type(error).__name__}: {error}"
                    failure = _Failure("connection", message, final=lasting is not None)
                except _Failure as error:
                    failure = error
            delay = retry_delay(attempt, _FIRST_DELAY, _LONGEST_DELAY, failure.retry_after)
            now = self._loop.time()
            ended = failure.final or now + delay >= deadline
            # A failed program of the server (500) or a wrong reply may be the fault of one query
            suspicious = not ended and (failure.kind == "reply" or failure.status == 500)
            if len(queries) > 1 and (failure.status in _REFUSED_CONTENT or (suspicious and attempt >= attempts)):
                return await self._search_halves(queries, k, deadline)
            if ended or (suspicious and attempt >= _STUBBORN and self._last_success > start):
                times = "once" if attempt == 1 else f"{attempt} times"
                message = f"A request to the retrieval server {self.url} failed {times}. {failure}"
                return [RetrievalError(message, failure.kind, permanent=failure.final)] * len(queries)
            if attempt == 1:
                logger.warning("%r failed, trying again for up to %.0f s: %s", self, deadline - now, failure)
            self.retries += 1
            await asyncio.sleep(delay)

    async def _request(self, queries: list[str], k: int) -> list[Outcome]:
        """Send one request and read its reply."""
        body = {"queries": queries, "topk": k, "return_scores": True}
        content = json.dumps(body).encode()  # escapes lone surrogates, which UTF-8 cannot encode
        response = await self._client.post(self._address, content=content, headers={"Content-Type": "application/json"})
        if not response.is_success:
            status = response.status_code
            raise _Failure(
                "status",
                describe_reply(response),
                status=status,
                final=not is_temporary(status),
                retry_after=retry_after_seconds(response.headers.get("retry-after")),
            )
        try:
            reply = response.json()
        except (ValueError, RecursionError) as error:  # for instance a page of a proxy
            raise _Failure("reply", f"Its reply is not JSON ({error}). {describe_reply(response)}") from error
        results = reply.get("result") if isinstance(reply, dict) else None
        if not isinstance(results, list):
            message = (
                f'Its reply does not match: expected an object with a list under "result", found {str(reply)[:200]!r}'
            )
            raise _Failure("reply", message, final=True)
        try:
            return read_results(results, queries, k, f"The retrieval server {self.url}")
        except RetrievalError as error:
            # Too few or too many lists may be temporary: a server that is still loading may have no results yet
            final = not all(isinstance(result, list) for result in results)
            raise _Failure("reply", str(error), final=final) from error


class _Failure(Exception):
    """A failed request: its kind and status, whether it is final, and the seconds that the server asks to wait."""

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        status: int | None = None,
        final: bool = False,
        retry_after: float = 0.0,
    ):
        super().__init__(message)
        self.kind, self.status, self.final, self.retry_after = kind, status, final, retry_after
