"""The HTTP client with a server process that fails on demand, and the limits of the server."""

import gc
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
import uvicorn

from helpers.paths import HELPERS, HOTPOTQA
from helpers.servers import Server, free_port
from tspo_trl import BM25Retriever, HTTPRetriever, Passage, RetrievalError, Retriever, load_corpus
from tspo_trl.retrieval.results import search_each

CORPUS = HOTPOTQA / "passages.jsonl"
QUERIES = ["capital of France", "film director", "", "album by an American singer"]


@pytest.fixture(scope="module")
def server():
    with Server("--corpus", CORPUS, script=HELPERS / "faulty_server.py") as server:
        yield server


@pytest.fixture
def misbehave(server):
    def set_mode(mode, left=-1):
        return httpx2.post(f"{server.url}/mode", json={"mode": mode, "left": left}).json()["requests"]

    set_mode("ok")
    yield set_mode
    set_mode("ok")


@pytest.fixture(scope="module")
def local():
    return BM25Retriever(load_corpus(CORPUS))


def test_results_equal_those_of_the_local_retriever(server, local):
    retriever = HTTPRetriever(server.url)
    assert isinstance(retriever, Retriever)
    assert retriever.search(QUERIES, 3) == local.search(QUERIES, 3)
    assert retriever.search([], 3) == []
    assert retriever.retries == 0


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_large_batches_are_split_and_results_are_joined(server, local, misbehave, batch_size):
    queries = [f"{word} film" for word in Path(CORPUS).read_text(encoding="utf-8").split()[:10]]
    before = misbehave("ok")
    found = HTTPRetriever(server.url, batch_size=batch_size).search(queries, 2)
    assert found == local.search(queries, 2)
    assert misbehave("ok") - before == -(-10 // batch_size)


def test_url_may_contain_a_path(server, local):
    assert HTTPRetriever(f"{server.url}/retrieve").search(["film"], 1) == local.search(["film"], 1)
    assert HTTPRetriever(f"{server.url}/").url == f"{server.url}/retrieve"
    assert HTTPRetriever("http://localhost:8000/api/search?x=1").url == "http://localhost:8000/api/search?x=1"


FAILURES = [
    ("slow", "timeout", "no answer within"),
    ("drip", "timeout", "no answer within"),
    ("500", "status", "HTTP 500"),
    ("429", "status", "HTTP 429"),
    ("garbage", "reply", "is not JSON"),
    ("not utf-8", "reply", "is not JSON"),
    ("too few", "reply", r"asked for \d queries, got 0 results"),
    ("not zipped", "reply", "DecodingError"),
    ("cut", "connection", "RemoteProtocolError|ReadError"),
]


@pytest.mark.parametrize(("mode", "kind", "message"), FAILURES)
def test_request_is_repeated_after_a_temporary_failure(server, local, misbehave, mode, kind, message):
    misbehave(mode, left=2)
    retriever = HTTPRetriever(server.url, timeout=0.5)
    assert retriever.search(QUERIES, 3) == local.search(QUERIES, 3)
    assert retriever.retries == 2


@pytest.mark.parametrize(("mode", "kind", "message"), FAILURES)
def test_error_of_a_lasting_failure_names_server_and_kind(server, misbehave, mode, kind, message):
    misbehave(mode)
    retriever = HTTPRetriever(server.url, timeout=0.3, total_timeout=0.9)
    with pytest.raises(RetrievalError, match=message) as error:
        retriever.search(["film", "album"], 3)
    assert error.value.kind == kind
    assert not error.value.permanent
    assert server.url in str(error.value)
    misbehave("ok")
    assert retriever.search(["film"], 1)  # works again


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("another object", "'results'"),
        ("not passages", r"query 'film', passage 0: .* found the keys"),
        ("huge score", "query 'film', passage 0: .* too large"),
    ],
)
def test_a_malformed_reply_is_not_requested_again(server, misbehave, mode, message):
    before = misbehave(mode)
    retriever = HTTPRetriever(server.url)
    with pytest.raises(RetrievalError, match=message) as error:
        retriever.search(["film", "album"], 3)
    assert (error.value.kind, error.value.permanent) == ("reply", True)
    assert server.url in str(error.value)
    assert misbehave("ok") - before == 1
    assert retriever.retries == 0


def test_one_odd_passage_fails_only_its_query(server, misbehave):
    before = misbehave("odd passage")
    queries = [f"film {i}" for i in range(130)]
    queries[77] = "an odd film"
    retriever = HTTPRetriever(server.url)
    outcomes = search_each(retriever, queries, 3)
    failed = outcomes.pop(77)
    assert isinstance(failed, RetrievalError)
    assert (failed.kind, failed.permanent) == ("reply", True)
    assert "query 'an odd film', passage 0: expected a string under \"text\", found NoneType" in str(failed)
    del queries[77]
    assert outcomes == [[Passage("1", "", query)] for query in queries]
    assert misbehave("ok") - before == 3  # batches
    assert retriever.retries == 0


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("422 odd", "status", "HTTP 422: an odd query"),
        ("500 odd", "status", "HTTP 500: an odd query"),
        ("garbage odd", "reply", "is not JSON"),
        ("drop odd", "reply", "asked for 1 queries, got 0 results"),
    ],
)
def test_a_query_that_the_server_cannot_answer_fails_alone(server, local, misbehave, mode, kind, message):
    before = misbehave(mode)
    queries = [f"film {i}" for i in range(16)]
    queries[5] = "an odd film"
    outcomes = search_each(HTTPRetriever(server.url), queries, 1)  # without waiting for the timeout of 120 s
    failed = outcomes.pop(5)
    assert isinstance(failed, RetrievalError)
    assert failed.kind == kind
    assert message in str(failed)
    assert failed.permanent == (mode == "422 odd")
    assert all(isinstance(outcome, list) for outcome in outcomes)
    if mode == "422 odd":
        del queries[5]
        assert outcomes == local.search(queries, 1)
        assert misbehave("ok") - before == 1 + 2 * 4


def test_a_failed_batch_does_not_fail_the_others(server, local, misbehave):
    misbehave("403", left=1)
    outcomes = search_each(HTTPRetriever(server.url, batch_size=1, max_connections=1), ["film", "album"], 1)
    assert "HTTP 403" in str(outcomes[0])
    assert outcomes[1] == local.search(["album"], 1)[0]


def test_refused_request_is_not_repeated(server, misbehave):
    misbehave("403")
    retriever = HTTPRetriever(server.url)
    with pytest.raises(RetrievalError, match=r"failed once.*HTTP 403.*no key") as error:
        retriever.search(["film"], 3)
    assert error.value.kind == "status"
    with pytest.raises(RetrievalError, match="HTTP 404"):
        HTTPRetriever(f"{server.url}/nowhere").search(["film"], 3)
    misbehave("ok")
    with pytest.raises(RetrievalError, match="between 1 and 100"):
        retriever.search(["film"], 101)


def test_refused_connection():
    retriever = HTTPRetriever(f"http://127.0.0.1:{free_port()}", total_timeout=0.7)
    with pytest.raises(RetrievalError, match="ConnectError") as error:
        retriever.search(["film"], 3)
    assert error.value.kind == "connection"
    assert retriever.retries >= 1


@pytest.mark.parametrize("mode", ["slow", "drip", "500"])
def test_total_timeout_limits_the_whole_call(server, misbehave, mode):
    """Not a measurement: without the bound, the call would never end."""
    misbehave(mode)
    outcome = []

    def search():
        with pytest.raises(RetrievalError) as error:
            HTTPRetriever(server.url, timeout=3600, total_timeout=1, batch_size=1).search(list("abcdefghijkl"), 3)
        outcome.append(error.value.kind)

    thread = threading.Thread(target=search, daemon=True)
    thread.start()
    thread.join(60)
    assert outcome == ["status" if mode == "500" else "timeout"]


def test_retries_leave_the_global_random_state_unchanged(server, misbehave):
    misbehave("500", left=1)
    states = random.getstate(), torch.get_rng_state()
    HTTPRetriever(server.url).search(["film"], 1)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_restart_of_the_server_is_survived(local):
    with Server("--corpus", CORPUS) as server:
        retriever = HTTPRetriever(server.url)
        expected = local.search(QUERIES, 3)
        assert retriever.search(QUERIES, 3) == expected
        server.kill()
        again = threading.Timer(1.0, server.start)
        again.start()
        assert retriever.search(QUERIES, 3) == expected
        assert retriever.retries > 0
        again.join()


@pytest.mark.parametrize("charset", ["rot13", "base64", "idna", "nonsense"])
def test_error_with_an_unusual_charset_is_reported(server, misbehave, charset):
    misbehave(f"charset {charset}")
    with pytest.raises(RetrievalError, match="HTTP 404") as error:
        HTTPRetriever(server.url).search(["film"], 3)
    assert error.value.kind == "status"


def test_password_is_sent_but_not_shown():
    retriever = HTTPRetriever("http://user:s3cret@127.0.0.1:9/retrieve", total_timeout=0.3)
    assert retriever._address.password == "s3cret"
    with pytest.raises(RetrievalError) as error:
        retriever.search(["film"], 1)
    for text in (repr(retriever), retriever.fingerprint, str(error.value)):
        assert "s3cret" not in text
        assert "127.0.0.1:9" in text


def test_concurrent_first_searches_open_one_loop(server):
    """Two loops would have twice the maximum number of connections."""
    retriever = HTTPRetriever(f"{server.url}/retrieve?a=thread", max_connections=2)  # the URL identifies its thread
    barrier = threading.Barrier(8)

    def search(_):
        barrier.wait()
        return retriever.search(["film"], 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(search, range(8)))
    assert [thread.name for thread in threading.enumerate()].count(repr(retriever)) == 1


def test_deleted_client_leaves_no_thread(server):
    retriever = HTTPRetriever(f"{server.url}/retrieve?another=thread")
    retriever.search(["film"], 1)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == repr(retriever)]
    del retriever
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_threads_can_share_a_client(server, local):
    retriever = HTTPRetriever(server.url)
    expected = local.search(QUERIES, 3)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(lambda _: retriever.search(QUERIES, 3), range(40)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_can_search(server, local):
    retriever = HTTPRetriever(server.url)
    expected = retriever.search(["film"], 2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(retriever_search, (server.url,)).get(60) == expected
        pool.close()
        pool.join()
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(retriever.search(["film"], 2)))
    child.start()
    assert receive.poll(60)
    assert receive.recv() == expected
    child.join()


def retriever_search(url):
    return HTTPRetriever(url).search(["film"], 2)


def test_search_works_inside_an_event_loop(server, local):
    """As in a notebook."""
    import asyncio

    async def cell():
        return HTTPRetriever(server.url).search(["film"], 1)

    assert asyncio.run(cell()) == local.search(["film"], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, r"`url`.*'localhost:8000'"),
        ({"url": ""}, "`url`"),
        ({"url": "ftp://host"}, r"`url`.*ftp"),
        ({"url": "http://"}, "`url`"),
        ({"url": "http://host:port"}, "`url`"),
        ({"url": "http://x", "timeout": 0}, "`timeout`.*0"),
        ({"url": "http://x", "total_timeout": -1}, "`total_timeout`.*-1"),
        ({"url": "http://x", "batch_size": 0}, "`batch_size`.*0"),
        ({"url": "http://x", "max_connections": 0}, "`max_connections`.*0"),
        ({"url": "http://x", "headers": {"Authorization": "Bearer x\n"}}, "`headers`.*'Authorization'"),
        ({"url": "http://x", "headers": {"X": "ü"}}, "`headers`.*'X'"),
        ({"url": 8000}, "`url` is not a URL .*got 8000. Expected one like 'http://localhost:8000'"),
        ({"url": "http://x:99999"}, "`url` must have a port from 1 to 65535, got 'http://x:99999'"),
        ({"url": "http://x:0"}, "`url` must have a port"),
        ({"url": "http://x", "timeout": "5"}, "`timeout`.*'5'"),
        ({"url": "http://x", "timeout": None}, "`timeout`.*None"),
        ({"url": "http://x", "total_timeout": float("nan")}, "`total_timeout`.*nan"),
        ({"url": "http://x", "batch_size": 1.5}, "`batch_size`.*an integer .*, got 1.5"),
        ({"url": "http://x", "max_connections": "8"}, "`max_connections`.*an integer .*, got '8'"),
        ({"url": "http://x", "headers": [("X", "y")]}, "`headers` must be a dictionary .*`list`"),
        ({"url": "http://x", "headers": {"a b\n": "y"}}, r"`headers`: the name 'a b\\n'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HTTPRetriever(**arguments)


def test_k_below_one_is_an_error():
    with pytest.raises(ValueError, match="`k`"):
        HTTPRetriever("http://localhost").search(["a"], 0)


@pytest.fixture
def replying():
    """A server that answers every request with `server.reply`, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(server.reply).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


CONTENTS = '"Paris"\nThe capital of France.'
PARIS = Passage("7", "Paris", "The capital of France.", 0.5)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"document": {"id": 7, "contents": CONTENTS}, "score": 0.5}, PARIS),
        ({"document": {"id": 7, "contents": CONTENTS}, "score": None}, replace(PARIS, score=0.0)),
        ({"document": {"_id": "7", "title": None, "text": "x"}}, Passage("7", "", "x")),
        ({"document": CONTENTS, "score": 0.5}, replace(PARIS, id="")),
        (CONTENTS, replace(PARIS, id="", score=0.0)),
        ({"title": "Paris", "text": PARIS.text, "contents": "x"}, replace(PARIS, id="", score=0.0)),
    ],
)
def test_replies_of_other_servers_are_read(replying, item, expected):
    replying.reply = {"result": [[item] * 5, []]}
    assert HTTPRetriever(replying.url).search(["a", "b"], 3) == [[expected] * 3, []]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"result": [None, [PARIS.text]]}, "query 'a': expected a list of passages, found None"),
        ({"result": [[{"text": "x", "score": float("nan")}], []]}, 'a finite number under "score", found nan'),
        ({"result": ["one", "two"]}, "a flat list of `str`"),
        ({"result": [{"text": "x"}] * 3}, "a flat list of a dict with the keys"),
        ({"result": None}, 'expected an object with a list under "result"'),
        ([], 'expected an object with a list under "result"'),
    ],
)
def test_error_of_another_reply(replying, reply, message):
    replying.reply = reply
    retriever = HTTPRetriever(replying.url)
    with pytest.raises(RetrievalError, match=message) as error:
        retriever.search(["a", "b"], 3)
    assert (error.value.kind, error.value.permanent, retriever.retries) == ("reply", True, 0)


# The server


@pytest.mark.parametrize(
    ("option", "body", "message"),
    [
        ("--max_queries 3", {"queries": ["a"] * 4}, "At most 3 queries a request, got 4"),
        ("--max_query_chars 5", {"queries": ["a", "abcdef"]}, "At most 5 characters a query, query 1 has 6"),
        ("--max_topk 2", {"queries": ["a"], "topk": 3}, "between 1 and 2, got 3"),
        ("--max_body_bytes 1000", {"queries": ["a" * 2000]}, "At most 1000 bytes a request"),
    ],
)
def test_limits_of_the_server(option, body, message):
    with Server("--corpus", CORPUS, *option.split()) as server:
        response = httpx2.post(f"{server.url}/retrieve", json=body)
        assert 400 <= response.status_code < 500
        assert message in response.json()["detail"]
        assert httpx2.post(f"{server.url}/retrieve", json={"queries": ["a"], "topk": 1}).status_code == 200


def test_server_is_ready_after_the_index_is_loaded(monkeypatch):
    from starlette.testclient import TestClient

    from tspo_trl.retrieval.server import create_app

    loaded = threading.Event()

    def open_slowly():
        loaded.wait(60)
        return BM25Retriever([Passage("0", "Paris", "France")])

    with TestClient(create_app(open_slowly)) as client:
        assert client.get("/health").status_code == 503
        assert client.post("/retrieve", json={"queries": ["Paris"]}).status_code == 503
        loaded.set()
        end = time.monotonic() + 60
        while client.get("/health").status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert "1 passages" in client.get("/health").json()["retriever"]
        reply = client.post("/retrieve", json={"queries": ["Paris"], "return_scores": True}).json()
        assert reply["result"][0][0]["document"]["contents"] == '"Paris"\nFrance'


def test_error_of_a_retriever_is_reported_without_its_message():
    from starlette.testclient import TestClient

    from tspo_trl.retrieval.server import create_app

    class Broken:
        def search(self, queries, k):
            raise RuntimeError("password 1234")

    with TestClient(create_app(Broken)) as client:
        while client.get("/health").status_code == 503:
            time.sleep(0.01)
        response = client.post("/retrieve", json={"queries": ["Paris"]})
        assert response.status_code == 500
        assert response.json() == {"detail": "The retriever failed: RuntimeError."}


def test_server_checks_the_number_of_results_and_accepts_numpy_scores():
    from starlette.testclient import TestClient

    from tspo_trl.retrieval.server import create_app

    class Dense:
        def search(self, queries, k):
            return [[Passage("0", "a", "b", np.float32(0.5))] for query in queries if query != "lost"]

    with TestClient(create_app(Dense)) as client:
        while client.get("/health").status_code == 503:
            time.sleep(0.01)
        assert client.head("/health").status_code == 200
        for path, body in (("/search", {"query": "x", "return_score": True}), ("/retrieve", {"queries": ["x"]})):
            assert client.post(path, json=body).status_code == 200
            body = {
                name: "lost" if value == "x" else ["lost"] if value == ["x"] else value for name, value in body.items()
            }
            response = client.post(path, json=body)
            assert response.status_code == 500
            assert response.json() == {"detail": "The retriever failed: RetrievalError."}


def test_only_the_first_invalid_item_of_a_body_is_reported(server):
    """An error for each of them would need too much memory."""
    response = httpx2.post(f"{server.url}/retrieve", json={"queries": [1] * 1000})
    assert response.status_code == 422
    assert response.json()["detail"].count("valid string") == 1


def test_server_does_not_search_for_disconnected_clients():
    """The clients repeat their requests, so searching for both would overload the server permanently."""
    from tspo_trl.retrieval.server import create_app

    searched, release = [], threading.Event()

    class Slow:
        def search(self, queries, k):
            searched.extend(queries)
            release.wait(60)
            return [[] for _ in queries]

    app, port = create_app(Slow), free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                break
        except httpx2.TransportError:
            time.sleep(0.01)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(HTTPRetriever(url).search, ["first"], 1)
        while not searched:
            time.sleep(0.01)
        impatient = HTTPRetriever(url, timeout=0.2, total_timeout=1.5)
        with pytest.raises(RetrievalError):
            impatient.search(["impatient"], 1)
        assert impatient.retries >= 2
        last = pool.submit(HTTPRetriever(url).search, ["last"], 1)
        release.set()
        assert first.result(60) == last.result(60) == [[]]
    assert searched == ["first", "last"]
    server.should_exit = True
    thread.join(60)


def test_occupied_port_is_an_error_before_the_index_is_loaded(server, tmp_path):
    second = Server("--corpus", CORPUS, "--save_index", tmp_path / "index", port=server.port).start()
    _, errors = second.process.communicate(timeout=60)
    assert second.process.returncode == 2
    assert f"error: --port: {server.port} cannot be served on 127.0.0.1 (Address already in use)" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGINT, {130, 0}), (signal.SIGTERM, {-signal.SIGTERM, 0})])
def test_server_stops_without_a_traceback(sent, codes):
    server = Server("--corpus", CORPUS).start().wait_until_ready()
    server.process.send_signal(sent)
    _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode in codes
    assert "Traceback" not in errors


def test_passages_with_lone_surrogates_are_served():
    from starlette.testclient import TestClient

    from tspo_trl.retrieval.server import create_app

    passage = Passage("0", "Zoë \ud800", "東京 \x00 </information>")
    with TestClient(create_app(lambda: BM25Retriever([passage]))) as client:
        while client.get("/health").status_code == 503:
            time.sleep(0.01)
        response = client.post("/retrieve", json={"queries": ["Zoë"]})
        (document,) = json.loads(response.content)["result"][0]
        assert (document["title"], document["text"]) == (passage.title, passage.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--index", "nowhere"], "no saved index in 'nowhere'"),
        (["--corpus", CORPUS, "--backend", "elastic"], "'elastic'"),
        (["--backend", "lucene", "--corpus", CORPUS], "needs an index"),
        ([], "--corpus or --index is required"),
    ],
)
def test_server_without_a_retriever_reports_the_reason(arguments, message):
    server = Server(*arguments).start()
    _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode not in (0, None)
    assert message in errors
    assert "Traceback" not in errors


def test_an_index_is_saved_once_and_served(tmp_path, local):
    with Server("--corpus", CORPUS, "--save_index", tmp_path / "index"):
        pass
    with Server("--index", tmp_path / "index", "--corpus", CORPUS) as server:
        assert HTTPRetriever(server.url).search(QUERIES, 3) == local.search(QUERIES, 3)
