"""The common part of engines that request turns from a server: threads, an HTTP client, repeated requests."""

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx2

from ..support.http import describe_reply, open_client, without_password
from ..support.retry import is_temporary, retry_after_seconds, retry_delay
from .base import Generation


class RequestEngine(ABC):
    """
    An [`Engine`] that requests each turn from a server with OpenAI's interface for completions, one request per turn, in
    threads. Subclasses define the request, how its reply is read, and when a failed request is given up.

    Args:
        url (`str`):
            Base address of the requests.
        max_requests (`int`):
            Maximum number of concurrent requests.
        timeout (`float`):
            Seconds to wait for the reply to a request.
        headers (`Mapping[str, str]`, *optional*):
            Headers of every request.
    """

    in_rounds = False
    _completions_path = "/completions"
    _first_delay, _longest_delay = 0.25, 8.0  # seconds between the attempts of a request, see `retry_delay`

    def __init__(self, url: str, *, max_requests: int, timeout: float, headers: Mapping[str, str] | None = None):
        if max_requests < 1:
            raise ValueError(f"`max_requests` must be at least 1, got {max_requests}.")
        self.url = without_password(url)
        self._address = url  # with the password, which messages must not show
        self.max_context_length: int | None = None
        self._max_requests = max_requests
        self._timeout = httpx2.Timeout(timeout, connect=10.0)
        self._headers = dict(headers or {})
        self._client: Any = None
        self._executor: Any = None
        self._closed = Event()
        self._finished: queue.SimpleQueue[tuple[int, Future[Generation]]] = queue.SimpleQueue()

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        self._finished = queue.SimpleQueue()
        self._closed = Event()
        with self._open_client():
            self._executor = ThreadPoolExecutor(self._max_requests, type(self).__name__)
            try:
                yield
            finally:
                self._closed.set()
                self._executor.shutdown(wait=False, cancel_futures=True)

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        finished = self._finished
        future = self._executor.submit(self._request_turn, number, context, max_new_tokens)
        future.add_done_callback(lambda future: finished.put((number, future)))

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        turns = []
        try:
            number, future = self._finished.get(timeout=None if wait else 0.005)
            while True:
                turns.append((number, self._result(number, future)))
                number, future = self._finished.get_nowait()
        except queue.Empty:
            return turns

    def _result(self, number: int, future: Future[Generation]) -> Generation:
        """The turn of a finished request. Raises the error of a request that failed."""
        return future.result()

    @contextmanager
    def _open_client(self) -> Iterator[None]:
        limits = httpx2.Limits(max_connections=self._max_requests)
        with open_client(
            httpx2.Client, self.url, headers=self._headers, limits=limits, timeout=self._timeout
        ) as self._client:
            yield

    def _request_turn(self, number: int, context: list[int], max_new_tokens: int) -> Generation:
        """Request one turn. Repeats the request after temporary failures."""
        body = self._request_body(number, context, max_new_tokens)
        client, closed = self._client, self._closed  # of the session in which the turn was submitted
        attempt, first_failure = 0, None
        while True:
            attempt += 1
            retry_after = 0.0
            try:
                reply = client.post(f"{self._address}{self._completions_path}", json=body)
                if reply.status_code == 200:
                    (choice,) = reply.json()["choices"]
                    return self._read_choice(choice)
                failure = describe_reply(reply)
                if not is_temporary(reply.status_code):
                    raise self._refusal(failure)
                retry_after = retry_after_seconds(reply.headers.get("retry-after"))
            except httpx2.RequestError as error:
                failure = repr(error)
            except (ValueError, LookupError, TypeError) as error:
                failure = f"Its reply is not a completion ({error!r}). {describe_reply(reply)}"
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            delay = retry_delay(attempt, self._first_delay, self._longest_delay, retry_after)
            if not self._may_retry(attempt, now - first_failure, delay) or closed.wait(delay):
                raise self._exhaustion(attempt, failure)

    @abstractmethod
    def _request_body(self, number: int, context: list[int], max_new_tokens: int) -> dict[str, Any]:
        """The body of the request for one turn."""

    @abstractmethod
    def _read_choice(self, choice: Any) -> Generation:
        """The turn in the only choice of a reply. A `ValueError`, `LookupError` or `TypeError` rejects the reply."""

    @abstractmethod
    def _may_retry(self, attempts: int, elapsed: float, delay: float) -> bool:
        """Whether to send a request again in `delay` seconds, `elapsed` seconds after its first failure."""

    @abstractmethod
    def _refusal(self, failure: str) -> Exception:
        """The error for a request that the server refused."""

    @abstractmethod
    def _exhaustion(self, attempts: int, failure: str) -> Exception:
        """The error for a request that is not sent again."""
