"""What retrievers return, how they are called, and the trial search before training."""

import gc
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from helpers.servers import free_port
from tspo_trl import BM25Retriever, CachedRetriever, HTTPRetriever, LoggedRetriever, Passage, RetrievalError
from tspo_trl.retrieval import LuceneRetriever
from tspo_trl.retrieval.base import RetrievalLogError
from tspo_trl.retrieval.probe import try_retriever
from tspo_trl.retrieval.results import check_retriever, search_each
from tspo_trl.retrieval.server import create_app

PARIS = Passage("7", "Paris", "The capital of France.", 0.5)
RECORD = {"id": np.int64(7), "title": "Paris", "text": "The capital of France.", "score": np.float32(0.5)}


class Returning:
    """Returns what a function makes of the queries and `k`."""

    fingerprint = "returning"

    def __init__(self, function):
        self.function, self.calls = function, []

    def search(self, queries, k):
        self.calls.append(list(queries))
        return self.function(queries, k)


class Broken(dict):
    """A mapping and a number that cannot be read."""

    def get(self, *_):
        raise KeyError("boom")

    items = __float__ = get


def wrappers(retriever, tmp_path):
    """A retriever, and the same with a cache and with a log."""
    return [
        retriever,
        CachedRetriever(retriever, folder=tmp_path / "cache"),
        LoggedRetriever(retriever, tmp_path / "log"),
        LoggedRetriever(CachedRetriever(retriever), tmp_path / "both"),
    ]


# Results


@pytest.mark.parametrize(
    "function",
    [
        lambda queries, k: [[RECORD] for _ in queries],
        lambda queries, k: ([PARIS] for _ in queries),
        lambda queries, k: tuple((PARIS,) for _ in queries),
        lambda queries, k: [(passage for passage in [PARIS]) for _ in queries],
        lambda queries, k: [[PARIS] * 10 for _ in queries],
        lambda queries, k: [np.array([PARIS], dtype=object) for _ in queries],
        lambda queries, k: [[{"document": RECORD, "score": 0.5}] for _ in queries],
        lambda queries, k: map(list, [[PARIS]] * len(queries)),
    ],
)
def test_other_collections_and_forms_are_converted(tmp_path, function):
    for retriever in wrappers(Returning(function), tmp_path):
        for _ in range(2):
            assert search_each(retriever, ["a", "b"], 1) == [[PARIS], [PARIS]]


async def coroutine():
    return []


async def generator():
    yield []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda queries, k: None, "`Returning.search` returned None instead of a list of lists"),
        (lambda queries, k: {"result": []}, r"returned a dict with the keys \['result'\] instead of a list"),
        (lambda queries, k: "passages", "returned `str` instead of a list"),
        (lambda queries, k: pd.DataFrame({"id": [1], "text": ["x"]}), "returned a DataFrame: .* instead of a list"),
        (lambda queries, k: 5, "returned `int` instead of a list"),
        (lambda queries, k: coroutine(), "returned `coroutine` .*: it is asynchronous"),
        (lambda queries, k: generator(), "returned `async_generator` .*: it is asynchronous"),
        (lambda queries, k: [PARIS, PARIS], "returned a flat list of `Passage`"),
        (lambda queries, k: [RECORD] * 5, "returned a flat list of a dict"),
        (lambda queries, k: ["one", "two"], "returned a flat list of `str`"),
        (lambda queries, k: [[PARIS]], "asked for 2 queries, got 1 results"),
        (lambda queries, k: [[PARIS]] * 3, "asked for 2 queries, got 3 results"),
        (lambda queries, k: [], "asked for 2 queries, got 0 results"),
    ],
)
def test_other_results_fail_all_queries(tmp_path, function, message):
    for retriever in wrappers(Returning(function), tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            outcomes = search_each(retriever, ["a", "b"], 3)
            gc.collect()
        assert not any("never awaited" in str(warning.message) for warning in caught)
        assert [type(outcome) for outcome in outcomes] == [RetrievalError, RetrievalError]
        with pytest.raises(RetrievalError, match=message) as error:
            raise outcomes[0]
        assert error.value.kind == "reply"


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (None, "query 'odd': expected a list of passages, found None"),
        ("text", "query 'odd': expected a list of passages, found `str`"),
        (PARIS, "query 'odd': expected a list of passages, found `Passage`"),
        ([PARIS, None], "query 'odd', passage 1: expected a passage .*, found NoneType"),
        ([{"id": 7, "text": 5}], "query 'odd', passage 0: expected a string under \"text\", found int"),
        ([Passage("7", "", "x", float("nan"))], 'a finite number under "score", found nan'),
        ([Passage("7", "", "x", float("inf"))], 'a finite number under "score", found inf'),
        ([{"id": np.array([1, 2]), "text": "x"}], "query 'odd', passage 0: .* as id, found ndarray"),
        ([{"text": "x", "score": Broken()}], "query 'odd', passage 0: .* found Broken .*boom"),
        ([Broken(text="x")], "query 'odd', passage 0: the passage cannot be read: KeyError"),
        (pd.DataFrame([{"id": 1, "text": "x"}]), r"expected a list of passages, found a DataFrame: .*to_dict\("),
    ],
)
def test_malformed_passages_fail_only_their_query(tmp_path, odd, message):
    inner = Returning(lambda queries, k: [odd if query == "odd" else [RECORD] for query in queries])
    for retriever in wrappers(inner, tmp_path):
        outcomes = search_each(retriever, ["a", "odd", "b"], 3)
        failed = outcomes.pop(1)
        assert outcomes == [[PARIS], [PARIS]]
        assert isinstance(failed, RetrievalError)
        assert (failed.kind, failed.permanent) == ("reply", True)
        with pytest.raises(RetrievalError, match=message):
            raise failed
    for retriever in wrappers(inner, tmp_path)[1:]:
        with pytest.raises(RetrievalError, match=message):
            retriever.search(["new", "odd"], 3)


def test_a_null_id_of_pandas_is_no_id():
    retriever = Returning(lambda queries, k: [[{"id": pd.NA, "text": "x"}] for _ in queries])
    assert search_each(retriever, ["a", "b"], 3) == [[Passage("", "", "x")]] * 2


@pytest.mark.parametrize("error", [KeyError("boom"), TimeoutError("late")])
def test_a_generator_that_fails_fails_only_its_query(tmp_path, error):
    def lazily(query):
        yield PARIS
        if query == "odd":
            raise error

    for retriever in wrappers(Returning(lambda queries, k: map(lazily, queries)), tmp_path):
        assert search_each(retriever, ["a", "odd", "b"], 3) == [[PARIS], error, [PARIS]]


def test_a_query_that_the_log_lacks_stops_the_run_also_in_a_generator(tmp_path):
    def lazily(query):
        yield from LoggedRetriever(None, tmp_path).search([query], 3)[0]

    LoggedRetriever(Returning(lambda queries, k: [[PARIS] for _ in queries]), tmp_path).search(["a"], 3)
    with pytest.raises(RetrievalLogError):
        search_each(Returning(lambda queries, k: map(lazily, queries)), ["b"], 3)


def test_an_odd_passage_after_the_first_k_is_ignored():
    assert search_each(Returning(lambda queries, k: [[PARIS, None]]), ["a"], 1) == [[PARIS]]


def test_only_failed_queries_are_searched_again(tmp_path):
    inner = Returning(lambda queries, k: [None if query == "odd" else [PARIS] for query in queries])
    for retriever in wrappers(inner, tmp_path)[1:]:
        inner.calls.clear()
        search_each(retriever, ["a", "odd", "b"], 3)
        search_each(retriever, ["b", "odd", "a"], 3)
        assert inner.calls == [["a", "odd", "b"], ["odd"]]


def test_a_run_with_a_failed_query_is_repeated_from_its_log(tmp_path):
    inner = Returning(lambda queries, k: [None if query == "odd" else [PARIS] for query in queries])
    logged = LoggedRetriever(inner, tmp_path)
    logged.begin("train 0")
    first = [search_each(logged, queries, 3) for queries in (["a", "odd"], ["odd", "a"], ["b"])]
    repeated = LoggedRetriever(None, tmp_path)
    repeated.begin("train 0")
    again = [search_each(repeated, queries, 3) for queries in (["a", "odd"], ["odd", "a"], ["b"])]
    assert [[str(outcome) for outcome in outcomes] for outcomes in again] == [
        [str(outcome) for outcome in outcomes] for outcomes in first
    ]
    assert isinstance(again[0][1], RetrievalError)
    with pytest.raises(RetrievalLogError):
        search_each(repeated, ["unknown"], 3)


def test_a_failure_before_a_restart_is_not_repeated_if_its_query_is_known_afterwards(tmp_path):
    inner = Returning(lambda queries, k: [None if query == "odd" else [PARIS] for query in queries])
    first = LoggedRetriever(inner, tmp_path)
    first.begin("train 0")
    search_each(first, ["a"], 3)
    assert isinstance(search_each(first, ["a", "odd"], 3)[1], RetrievalError)
    inner.function = lambda queries, k: [[PARIS] for _ in queries]
    for retriever in (inner, None):  # the resumed run, and its repetition
        logged = LoggedRetriever(retriever, tmp_path)
        logged.begin("train 0")
        assert search_each(logged, ["odd"], 3) == [[PARIS]]
        assert search_each(logged, ["a", "odd"], 3) == [[PARIS], [PARIS]]


def test_a_failed_search_keeps_the_queries_that_are_known(tmp_path):
    inner = Returning(lambda queries, k: [[PARIS] for _ in queries])
    for retriever in wrappers(inner, tmp_path)[1:]:
        assert search_each(retriever, ["a"], 3) == [[PARIS]]
        error = ConnectionError("down")
        inner.function = lambda queries, k: (_ for _ in ()).throw(error)  # noqa: B023
        assert search_each(retriever, ["b", "a"], 3) == [error, [PARIS]]
        inner.function = lambda queries, k: [[PARIS] for _ in queries]


def test_search_of_a_subclass_is_used():
    class Shouting(CachedRetriever):
        def search(self, queries, k):
            return super().search([query.upper() for query in queries], k)

    inner = Returning(lambda queries, k: [[PARIS] for _ in queries])
    assert search_each(Shouting(inner), ["a"], 3) == [[PARIS]]
    assert inner.calls == [["A"]]
    cached = CachedRetriever(inner)
    cached.search = lambda queries, k: [[]]
    assert search_each(cached, ["b"], 3) == [[]]


# Arguments


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        ("one string", 2, r"`queries` must be a list of strings, got the string 'one string': write \['one string'\]"),
        (["a", 5], 2, "`queries` must be a list of strings, one of its items is `int`"),
        ([None], 2, "one of its items is None"),
        (5, 2, "`queries` must be a list of strings, got `int`"),
        (2, "a", "`queries` must be a list of strings, got `int`"),
        (["a"], "3", "`k` must be an integer, got `str`"),
        (["a"], 3.0, "`k` must be an integer, got `float`"),
        (["a"], None, "`k` must be an integer, got None"),
    ],
)
def test_error_of_a_wrong_call_names_the_type(tmp_path, queries, k, message):
    bm25 = BM25Retriever([PARIS])
    for retriever in (*wrappers(bm25, tmp_path), HTTPRetriever(f"http://127.0.0.1:{free_port()}")):
        with pytest.raises(TypeError, match=message):
            retriever.search(queries, k)


def test_queries_may_be_any_collection_of_strings(tmp_path):
    for retriever in wrappers(BM25Retriever([PARIS]), tmp_path):
        for queries in (("Paris",), np.array(["Paris"]), iter(["Paris"]), {"Paris": 1}.keys()):
            assert [[passage.id for passage in found] for found in retriever.search(queries, np.int64(2))] == [["7"]]


# The check without a search


class WithoutK:
    def search(self, query):
        return []


class OnlyKeywords:
    def search(self, queries, *, top_k):
        return []


class Asynchronous:
    async def search(self, queries, k):
        return []


class Streaming:
    async def search(self, queries, k):
        yield []


class Attribute:
    search = "http://localhost"


@pytest.mark.parametrize(
    ("retriever", "message"),
    [
        (BM25Retriever, "got the class `BM25Retriever` itself. Pass an instance"),
        (WithoutK, "got the class `WithoutK` itself"),
        (WithoutK(), r"but `WithoutK.search` has the arguments \(query\)"),
        (OnlyKeywords(), r"but `OnlyKeywords.search` has the arguments \(queries, \*, top_k\)"),
        (Asynchronous(), "but `Asynchronous.search` is asynchronous"),
        (Streaming(), "but `Streaming.search` is asynchronous"),
        (Attribute(), "for instance `BM25Retriever.from_jsonl"),
        ("corpus.jsonl", "for instance `BM25Retriever.from_jsonl.*got 'corpus.jsonl'"),
        (None, "got None"),
    ],
)
def test_error_of_an_object_that_is_no_retriever(retriever, message):
    for check in (check_retriever, lambda retriever: try_retriever(retriever, 3)):
        with pytest.raises(ValueError, match=r"`retriever` must be an object with a method `search\(queries, k\)`"):
            check(retriever)
        with pytest.raises(ValueError, match=message):
            check(retriever)


def test_other_signatures_are_accepted():
    class Wide:
        def search(self, *args, **kwargs):
            return []

    class Named:
        def search(self, texts, n, boost=1.0):
            return []

    for retriever in (Wide(), Named(), Returning(None)):
        check_retriever(retriever)


# The trial search


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda queries, k: None, "returned None"),
        (lambda queries, k: [PARIS] * 3, "a flat list of `Passage`"),
        (lambda queries, k: [], "asked for 1 queries, got 0 results"),
        (lambda queries, k: [[{"id": 7}]], "found the keys"),
        (lambda queries, k: coroutine(), "it is asynchronous"),
        (lambda queries, k: [[Passage("7", "", "x", float("nan"))]], "found nan"),
        (lambda queries, k: queries.lower(), "AttributeError"),
        (lambda queries, k: undefined, "NameError"),  # noqa: F821
    ],
)
def test_mistakes_of_a_retriever_are_reported_by_a_trial(tmp_path, function, message):
    for retriever in wrappers(Returning(function), tmp_path):
        with pytest.raises(RetrievalError, match=rf"A trial search with .*Returning.* failed: .*{message}"):
            try_retriever(retriever, 3)


@pytest.mark.parametrize("error", [RetrievalError("down"), TimeoutError("late"), ConnectionError("down"), OSError("x")])
def test_a_failure_that_may_be_temporary_is_a_warning(error, caplog):
    def fail(queries, k):
        raise error

    try_retriever(Returning(fail), 3)
    assert "A trial search" in caplog.text
    assert repr(error) in caplog.text


def test_a_server_that_does_not_answer_yet_is_a_warning_after_a_while(caplog, monkeypatch):
    monkeypatch.setattr("tspo_trl.retrieval.probe._HTTP_SECONDS", 0.3)
    try_retriever(HTTPRetriever(f"http://127.0.0.1:{free_port()}", total_timeout=3600), 3)
    assert "ConnectError" in caplog.text


def test_a_trial_changes_neither_caches_nor_logs(tmp_path):
    inner = Returning(lambda queries, k: [[PARIS] for _ in queries])
    retrievers = wrappers(inner, tmp_path)
    for retriever in retrievers:
        try_retriever(retriever, 3)
    assert inner.calls == [["test"]] * 4
    assert (retrievers[1].hits, retrievers[1].misses) == (0, 0)
    assert not any((tmp_path / "cache").iterdir())
    assert (tmp_path / "log" / "rank000.jsonl").read_bytes() == b""


def test_a_run_that_is_repeated_needs_no_trial(tmp_path):
    inner = Returning(lambda queries, k: [[PARIS] for _ in queries])
    LoggedRetriever(inner, tmp_path).search(["a"], 3)
    inner.calls.clear()
    for retriever in (None, inner, CachedRetriever(inner)):
        try_retriever(LoggedRetriever(retriever, tmp_path), 3)
    assert inner.calls == []
    with pytest.raises(ValueError, match=r"OnlyKeywords\.search"):
        try_retriever(LoggedRetriever(OnlyKeywords(), tmp_path), 3)


def test_a_malformed_document_of_a_lucene_index_fails_only_its_query(monkeypatch):
    retriever = LuceneRetriever.__new__(LuceneRetriever)
    retriever.index = "index"
    documents = [{"id": "7", "raw": '{"id": "7", "contents": "Paris\\nx"}'}, {"id": "8", "raw": '{"id": "8"}'}]
    hits = [SimpleNamespace(lucene_document=document, score=0.5) for document in documents]
    monkeypatch.setattr(retriever, "_search_each", lambda queries, k: [retriever._read_hits([hit]) for hit in hits])
    found, failed = search_each(retriever, ["a", "b"], 3)
    assert found == [Passage("7", "Paris", "x", 0.5)]
    assert (failed.kind, failed.permanent) == ("reply", True)
    assert "document '8'" in str(failed)


# The server


def test_the_server_reports_a_malformed_passage_for_its_query_only():
    app = create_app(lambda: Returning(lambda queries, k: [None if query == "odd" else [RECORD] for query in queries]))
    with TestClient(app) as client:
        while client.get("/health").status_code == 503:
            time.sleep(0.01)
        reply = client.post("/retrieve", json={"queries": ["a", "odd", "b"], "return_scores": True}).json()
        assert [None if found is None else found[0]["document"]["id"] for found in reply["result"]] == ["7", None, "7"]
        assert client.post("/retrieve", json={"query": "odd"}).json() == {"result": [None]}
        for path, body in (("/search", {"query": "odd"}), ("/batch_search", {"query": ["a", "odd"]})):
            assert client.post(path, json=body).status_code == 500
