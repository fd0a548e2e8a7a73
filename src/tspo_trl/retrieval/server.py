"""An HTTP server for any retriever, with the interfaces of Search-R1, SkyRL, FlashRAG and ReCall."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, StrictStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .base import Passage, Retriever, failure_kind
from .results import Outcome, search_queries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """
    The largest request that a server answers. A larger one gets an HTTP 4xx that names the limit.

    Args:
        max_body_bytes (`int`, *optional*, defaults to `16777216`):
            Maximum number of bytes of a request.
        max_queries (`int`, *optional*, defaults to `1024`):
            Maximum number of queries of a request.
        max_query_chars (`int`, *optional*, defaults to `10000`):
            Maximum number of characters of a query.
        max_topk (`int`, *optional*, defaults to `100`):
            Maximum number of passages for each query.
        max_waiting (`int`, *optional*, defaults to `16384`):
            Maximum number of queries that wait. Further requests get an HTTP 503 with `Retry-After`.
    """

    max_body_bytes: int = 16 * 2**20
    max_queries: int = 1024
    max_query_chars: int = 10_000
    max_topk: int = 100
    max_waiting: int = 16_384


class RetrieveRequest(BaseModel):
    """`POST /retrieve`: `queries` as in Search-R1, or one `query` as in SkyRL."""

    queries: list[StrictStr] | None = Field(None, fail_fast=True)  # an error for each item could fill the memory
    query: StrictStr | None = None
    topk: int | None = None
    return_scores: bool = False


class SearchRequest(BaseModel):
    """`POST /search`, as in FlashRAG and ReCall."""

    query: StrictStr
    top_n: int | None = None
    return_score: bool = False


class BatchSearchRequest(BaseModel):
    """`POST /batch_search`, as in FlashRAG and ReCall."""

    query: list[StrictStr] = Field(fail_fast=True)
    top_n: int | None = None
    return_score: bool = False


def create_app(
    open_retriever: Callable[[], Retriever],
    *,
    topk: int = 3,
    limits: ServerLimits | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """
    Create the server as an ASGI application.

    A bad request is answered with 422 (400 for an empty `query` of `/search`, 413 for a body that is too large) and one
    sentence in `detail`. While the retriever is being opened, or too many queries wait, a search is answered with 503; if it
    cannot be opened or a search fails, with 500. Requests that arrive during a search are searched together after it. If the
    retriever returns malformed passages for some queries of `/retrieve`, their results are `null`.

    Args:
        open_retriever (`Callable[[], Retriever]`):
            Opens the retriever. It is called in the background when the server starts.
        topk (`int`, *optional*, defaults to `3`):
            Number of passages for each query of a request that does not give one.
        limits ([`ServerLimits`], *optional*):
            Largest request that is answered.
        on_failure (`Callable[[BaseException], None]`, *optional*):
            Called with the exception if `open_retriever` raises one.
    """
    limits = limits or ServerLimits()
    service = _Service(open_retriever, topk, limits, on_failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="Retrieval server", lifespan=lifespan)
    app.add_middleware(_BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_exception_handler(RequestValidationError, _explain)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        return {"status": "ready", "retriever": repr(service.retriever())}

    @app.post("/retrieve")
    async def retrieve(http: Request, body: RetrieveRequest) -> Response:
        if (body.queries is None) == (body.query is None):
            raise HTTPException(422, "Give either `queries`, a list of strings, or `query`, one string.")
        queries = body.queries or [] if body.query is None else [body.query]
        encode = _documents_with_scores if body.return_scores else _documents
        return await service.search(
            http,
            queries,
            body.topk,
            lambda results: {"result": [None if found is None else encode(found) for found in results]},
            partial=True,
        )

    @app.post("/search")
    async def search_one(http: Request, body: SearchRequest) -> Response:
        if not body.query.strip():
            raise HTTPException(400, "`query` is empty.")
        encode = _documents_and_scores if body.return_score else _documents
        return await service.search(http, [body.query], body.top_n, lambda results: encode(results[0]))

    @app.post("/batch_search")
    async def search_batch(http: Request, body: BatchSearchRequest) -> Response:
        encode = _batch_documents_and_scores if body.return_score else _batch_documents
        return await service.search(http, body.query, body.top_n, encode)

    return app


def check_request(queries: Sequence[str], k: int, limits: ServerLimits) -> None:
    """
    Check that a request stays within the limits of the server.

    Args:
        queries (`Sequence[str]`):
            Q queries.
        k (`int`):
            Number of passages for each.
        limits ([`ServerLimits`]):
            The limits.

    Raises:
        `HTTPException`: With status 422 and a sentence that names the limit, if the request exceeds one.
    """
    if not 1 <= k <= limits.max_topk:
        raise HTTPException(422, f"The number of passages must be between 1 and {limits.max_topk}, got {k}.")
    if len(queries) > limits.max_queries:
        raise HTTPException(422, f"At most {limits.max_queries} queries a request, got {len(queries)}.")
    for number, query in enumerate(queries):
        if len(query) > limits.max_query_chars:
            raise HTTPException(
                422, f"At most {limits.max_query_chars} characters a query, query {number} has {len(query)}."
            )


class _Service:
    """The retriever of a server: opened in the background, then searched for all waiting requests at once."""

    def __init__(
        self,
        open_retriever: Callable[[], Retriever],
        topk: int,
        limits: ServerLimits,
        on_failure: Callable[[BaseException], None] | None,
    ):
        self._open_retriever, self._topk, self._limits, self._on_failure = open_retriever, topk, limits, on_failure
        # One thread opens the retriever and searches: backends need not be thread-safe, and health is answered meanwhile
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retriever")
        self._waiting: deque[_Waiting] = deque()
        self._searching: asyncio.Task[None] | None = None
        self._opening: asyncio.Future[Retriever] | None = None

    def start(self) -> None:
        """Start to open the retriever."""
        self._opening = asyncio.get_running_loop().run_in_executor(self._worker, self._open_retriever)
        self._opening.add_done_callback(self._report_failure)

    def stop(self) -> None:
        """Cancel waiting searches, and end the thread after the current one."""
        if self._searching is not None:
            self._searching.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _report_failure(self, opening: asyncio.Future[Retriever]) -> None:
        """Log the exception of a retriever that cannot be opened, and pass it to `on_failure`."""
        if not opening.cancelled() and (error := opening.exception()) is not None:
            logger.error("The retriever cannot be opened: %s", error)
            if self._on_failure is not None:
                self._on_failure(error)

    def retriever(self) -> Retriever:
        """The retriever. Raises an HTTP 503 while it is being opened, and 500 if it cannot be opened."""
        if self._opening is None or not self._opening.done():
            raise HTTPException(503, "The index is being loaded.", headers={"Retry-After": "1"})
        if (error := self._opening.exception()) is not None:
            raise HTTPException(500, f"The retriever cannot be opened: {type(error).__name__}.")
        return self._opening.result()

    async def search(
        self,
        http: Request,
        queries: Sequence[str],
        k: int | None,
        encode: Callable[[list[Any]], Any],
        *,
        partial: bool = False,
    ) -> Response:
        """
        Search for the queries of a request, and encode the passages in the format of the requested interface. With
        `partial`, `None` stands for malformed passages of a query.
        """
        k = self._topk if k is None else k
        check_request(queries, k, self._limits)
        self.retriever()
        waiting = sum(len(request.queries) for request in self._waiting)
        if self._waiting and waiting + len(queries) > self._limits.max_waiting:
            raise HTTPException(503, f"{waiting} queries are waiting.", headers={"Retry-After": "1"})
        request = _Waiting(http, queries, k, encode, partial, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._searching is None or self._searching.done():
            self._searching = asyncio.create_task(self._search_all())
        try:
            content = await request.reply
        except Exception as error:
            raise HTTPException(500, f"The retriever failed: {type(error).__name__}.") from error
        return Response(content, media_type="application/json") if content else Response(status_code=499)

    async def _search_all(self) -> None:
        """Search until no request waits. Each search takes all requests that have arrived, with the same number of passages."""
        while self._waiting:
            k, batch, rest = self._waiting[0].k, list[_Waiting](), list[_Waiting]()
            room = max(self._limits.max_queries, len(self._waiting[0].queries))
            for request in self._waiting:
                if request.k == k and len(request.queries) <= room:
                    batch.append(request)
                    room -= len(request.queries)
                else:
                    rest.append(request)
            self._waiting = deque(rest)
            try:
                connected = [request for request in batch if not await request.http.is_disconnected()]
                for request in batch:
                    if request not in connected:  # the client has already repeated its request
                        request.finish("")
                if connected:
                    await asyncio.get_running_loop().run_in_executor(self._worker, self._answer, connected, k)
            except Exception as error:  # no request may wait for ever
                for request in batch:
                    request.finish(error)

    def _answer(self, batch: Sequence["_Waiting"], k: int) -> None:
        """Search for the queries of several requests, and reply to each."""
        queries = list(dict.fromkeys(query for request in batch for query in request.queries))
        try:
            found = dict(zip(queries, search_queries(self.retriever(), queries, k), strict=True))
        except Exception as error:
            if len(batch) > 1:  # one request must not fail the others
                for request in batch:
                    self._answer([request], k)
                return
            logger.exception("The retriever failed")
            batch[0].finish(error)
            return
        for request in batch:
            try:
                request.finish(request.content([found[query] for query in request.queries]))
            except Exception as error:
                logger.error("The retriever failed: %s", error)
                request.finish(error)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits for its passages."""

    http: Request
    queries: Sequence[str]
    k: int
    encode: Callable[[list[Any]], Any]
    partial: bool
    reply: asyncio.Future[str]

    def content(self, outcomes: Sequence[Outcome]) -> str:
        """The reply to the request."""
        results: list[Any] = list(outcomes)
        failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if failed and self.partial and all(failure_kind(error) == "reply" for error in failed):
            logger.error("The retriever failed for %d of %d queries: %s", len(failed), len(results), failed[0])
            results = [None if isinstance(outcome, Exception) else outcome for outcome in results]
        elif failed:
            raise failed[0]
        # `json.dumps` escapes lone surrogates, which a corpus may contain and UTF-8 cannot encode
        return json.dumps(self.encode(results))

    def finish(self, outcome: str | Exception) -> None:
        """Reply, from any thread."""

        def reply() -> None:
            if not self.reply.done():  # the request may have been cancelled
                if isinstance(outcome, Exception):
                    self.reply.set_exception(outcome)
                else:
                    self.reply.set_result(outcome)

        self.reply.get_loop().call_soon_threadsafe(reply)


def _documents(passages: Sequence[Passage]) -> list[Any]:
    """The passages of a query, without scores."""
    return [_document(passage) for passage in passages]


def _documents_with_scores(passages: Sequence[Passage]) -> list[Any]:
    """The passages of a query, each with its score, as in Search-R1 and SkyRL."""
    return [{"document": _document(passage), "score": passage.score} for passage in passages]


def _documents_and_scores(passages: Sequence[Passage]) -> list[Any]:
    """The passages of a query, and a list of their scores, as in FlashRAG and ReCall."""
    return [_documents(passages), [passage.score for passage in passages]]


def _batch_documents(results: Sequence[Sequence[Passage]]) -> list[Any]:
    """The passages of several queries, without scores."""
    return [_documents(passages) for passages in results]


def _batch_documents_and_scores(results: Sequence[Sequence[Passage]]) -> list[Any]:
    """The passages of several queries, and lists of their scores, as in FlashRAG and ReCall."""
    return [_batch_documents(results), [[passage.score for passage in passages] for passages in results]]


def _document(passage: Passage) -> dict[str, str]:
    """A passage without its score."""
    contents = f'"{passage.title}"\n{passage.text}'  # as in the corpora of Search-R1
    return {"id": passage.id, "title": passage.title, "text": passage.text, "contents": contents}


async def _explain(request: Request, error: Exception) -> Response:
    """Answer 422 to a body that is not JSON or has a field of the wrong type, with the reasons in `detail`."""
    assert isinstance(error, RequestValidationError)
    problems = (
        f"{'.'.join(map(str, problem['loc'][1:])) or 'the body'}: {problem['msg']}" for problem in error.errors()
    )
    return Response(json.dumps({"detail": "; ".join(problems)[:1000]}), 422, media_type="application/json")


class _BodyLimit:
    """Middleware that answers 413 to a body that is too large, before the whole body is in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, f"At most {self.max_bytes} bytes a request.")
            return message

        await self.app(scope, limited, send)
