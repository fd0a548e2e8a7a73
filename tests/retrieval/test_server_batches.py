"""Requests that reach the server together are searched together, and too many are turned away."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from tspo_trl.retrieval import Passage
from tspo_trl.retrieval.server import ServerLimits, create_app


class Blocked:
    """A retriever that waits until it is released. Remembers its searches."""

    def __init__(self):
        self.released, self.searches = threading.Event(), []

    def search(self, queries, k):
        self.searches.append((list(queries), k))
        if queries == ["first"]:
            self.released.wait(timeout=60)
        if "broken" in queries:
            raise RuntimeError("this query breaks the index")
        return [[Passage(query, "", f"about {query}")] for query in queries]


class Client:
    """A server whose first search is under way, and requests that wait for it."""

    def __init__(self, **limits):
        self.retriever = Blocked()
        self.client = TestClient(create_app(lambda: self.retriever, limits=ServerLimits(**limits)))

    def __enter__(self):
        self.client.__enter__()
        self.threads = ThreadPoolExecutor(16)
        self.wait_until(lambda: self.client.get("/health").status_code == 200)
        self.first = self.post(["first"])
        self.wait_until(lambda: self.retriever.searches)
        return self

    def __exit__(self, *_):
        self.retriever.released.set()
        self.threads.shutdown()
        self.client.__exit__(None, None, None)

    def wait_until(self, condition):
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        assert condition()

    def post(self, queries, topk=3):
        return self.threads.submit(self.client.post, "/retrieve", json={"queries": queries, "topk": topk})


def texts(reply):
    assert reply.status_code == 200, reply.text
    return [[document["text"] for document in documents] for documents in reply.json()["result"]]


def post_all(server, requests):
    """Send requests one after the other, so that the server has each before the next."""
    replies = []
    for queries, topk in requests:
        waiting = len(server.service._waiting)
        replies.append(server.post(queries, topk))
        server.wait_until(lambda waiting=waiting: len(server.service._waiting) > waiting)
    return replies


@pytest.fixture
def server(monkeypatch, request):
    from tspo_trl.retrieval import server as module

    services = []

    class Recorded(module._Service):
        def __init__(self, *args):
            super().__init__(*args)
            services.append(self)

    monkeypatch.setattr(module, "_Service", Recorded)
    with Client(**getattr(request, "param", {})) as client:
        client.service = services[0]
        yield client


def test_requests_that_wait_are_searched_together(server):
    replies = post_all(server, [(["a", "b"], 3), (["c"], 2), (["b", "d"], 3)])
    server.retriever.released.set()
    assert [texts(reply.result()) for reply in replies] == [
        [["about a"], ["about b"]],
        [["about c"]],
        [["about b"], ["about d"]],
    ]
    assert texts(server.first.result()) == [["about first"]]
    assert server.retriever.searches == [(["first"], 3), (["a", "b", "d"], 3), (["c"], 2)]


def test_a_request_that_fails_fails_alone(server):
    replies = post_all(server, [(["a"], 3), (["broken"], 3), (["b"], 3)])
    server.retriever.released.set()
    assert [reply.result().status_code for reply in replies] == [200, 500, 200]
    assert texts(replies[2].result()) == [["about b"]]


@pytest.mark.parametrize("how", ["cancelled", "disconnected", "both"])
def test_a_client_that_has_gone_does_not_stop_the_others(server, how):
    gone, other = post_all(server, [(["a"], 3), (["b"], 3)])
    (request, _) = server.service._waiting
    if how != "disconnected":
        request.reply.get_loop().call_soon_threadsafe(request.reply.cancel)
        server.wait_until(request.reply.cancelled)
    if how != "cancelled":

        async def is_disconnected():
            return True

        request.http.is_disconnected = is_disconnected
    server.retriever.released.set()
    assert texts(other.result()) == [["about b"]]
    assert texts(server.post(["c"]).result()) == [["about c"]]
    assert gone.exception() is not None or gone.result().status_code == 499


@pytest.mark.parametrize("server", [{"max_queries": 3}], indirect=True)
def test_a_search_has_at_most_as_many_queries_as_a_request(server):
    replies = post_all(server, [(["a", "b"], 3), (["c", "d"], 3), (["e"], 3)])
    server.retriever.released.set()
    assert [len(texts(reply.result())) for reply in replies] == [2, 2, 1]
    assert server.retriever.searches[1:] == [(["a", "b", "e"], 3), (["c", "d"], 3)]


@pytest.mark.parametrize("server", [{"max_waiting": 3}], indirect=True)
def test_too_many_waiting_queries_are_turned_away(server):
    replies = post_all(server, [(["a", "b"], 3)])
    refused = server.post(["c", "d"]).result()
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["detail"] == "2 queries are waiting."
    replies += post_all(server, [(["c"], 3)])
    server.retriever.released.set()
    assert [len(texts(reply.result())) for reply in replies] == [2, 1]
