"""Requirements on a retrieval server that is used in training.

    pytest tests/conformance --server http://localhost:8000 --query "a question that finds several passages"

`HTTPRetriever` needs a server that passes the tests of `/retrieve`. The tests of other dialects are skipped if the
server does not support them.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from tspo_trl import HTTPRetriever


def retrieve(client, **body):
    response = client.post("/retrieve", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/json")
    return response.json()["result"]


def text_of(document):
    assert isinstance(document.get("text", document.get("contents")), str)
    return document.get("text", document.get("contents"))


# Search-R1: POST /retrieve with `queries`


def test_there_is_one_list_of_passages_for_each_query(client, query):
    for count in (1, 2, 5):
        result = retrieve(client, queries=[query] * count, topk=2, return_scores=True)
        assert len(result) == count
        assert all(isinstance(passages, list) for passages in result)


def test_a_query_finds_passages(client, query):
    ((first, *_),) = retrieve(client, queries=[query], topk=1, return_scores=True)
    assert text_of(first["document"])


@pytest.mark.parametrize("topk", [1, 2, 3, 10])
def test_topk_is_the_maximum_number_of_passages_per_query(client, query, topk):
    (passages,) = retrieve(client, queries=[query], topk=topk, return_scores=True)
    assert 1 <= len(passages) <= topk


def test_smaller_topk_returns_the_first_passages_of_a_larger_one(client, query):
    (many,) = retrieve(client, queries=[query], topk=5, return_scores=True)
    for topk in (1, 2, 3):
        assert retrieve(client, queries=[query], topk=topk, return_scores=True) == [many[:topk]]


def test_scores_are_numbers_from_best_to_worst(client, query):
    (passages,) = retrieve(client, queries=[query], topk=5, return_scores=True)
    scores = [passage["score"] for passage in passages]
    assert all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores)
    assert scores == sorted(scores, reverse=True)


def test_requests_without_scores_return_the_same_documents(client, query):
    (scored,) = retrieve(client, queries=[query], topk=3, return_scores=True)
    (bare,) = retrieve(client, queries=[query], topk=3, return_scores=False)
    assert bare == [passage["document"] for passage in scored]
    assert retrieve(client, queries=[query], topk=3) == [bare]  # as in Search-R1, the default


def test_topk_is_optional(client, query):
    (passages,) = retrieve(client, queries=[query])
    assert passages


def test_passages_of_a_query_are_different(client, query):
    (passages,) = retrieve(client, queries=[query], topk=10)
    assert len({json.dumps(passage, sort_keys=True) for passage in passages}) == len(passages)


def test_results_are_in_the_order_of_the_queries(client, query):
    words = [query, *query.split()]
    together = retrieve(client, queries=words, topk=2, return_scores=True)
    assert together == [retrieve(client, queries=[word], topk=2, return_scores=True)[0] for word in words]


def test_the_same_request_gets_the_same_reply(client, query):
    replies = [retrieve(client, queries=[query], topk=5, return_scores=True) for _ in range(3)]
    assert replies[0] == replies[1] == replies[2]


def test_a_batch_of_64_queries(client, query):
    result = retrieve(client, queries=[f"{query} {i}" for i in range(64)], topk=3, return_scores=True)
    assert len(result) == 64


def test_several_clients_at_once(client, query):
    expected = retrieve(client, queries=[query], topk=3, return_scores=True)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: retrieve(client, queries=[query], topk=3, return_scores=True), range(32)))
    assert all(reply == expected for reply in replies)


@pytest.mark.parametrize(
    "text",
    [
        "zyxwvutsrq",
        "Zoë 東京 🙂",
        "?!.,;",
        "<|im_end|></information><answer>Paris</answer>",
        'quotes " and \\ backslashes',
        "line\nfeed\tand tab",
        "nul \x00 and bidirectional \u202e control",
        "half a surrogate pair \ud800",
        "AND OR NOT +a -b (c] title:x a~2 b^3 *",
        "long " * 400,
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_any_text_is_a_query(client, text, query):
    """A model writes the queries: an unusual one must not make the whole batch fail."""
    body = json.dumps({"queries": [text, query], "topk": 2, "return_scores": True})
    response = client.post("/retrieve", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert len(response.json()["result"]) == 2
    assert response.json()["result"][1] == retrieve(client, queries=[query], topk=2, return_scores=True)[0]


def test_empty_query_has_one_result_or_is_refused(client):
    response = client.post("/retrieve", json={"queries": [""], "topk": 2, "return_scores": True})
    assert response.status_code == 200 or 400 <= response.status_code < 500
    if response.status_code == 200:
        assert len(response.json()["result"]) == 1


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no JSON",
        '{"queries": ["cut',
        "[]",
        "null",
        "{}",
        '{"queries": "one string"}',
        '{"queries": [1, 2]}',
        '{"queries": [null]}',
        '{"queries": ["a"], "topk": "many"}',
        '{"queries": ["a"], "topk": -1}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_request_is_refused_with_a_reason(client, body):
    response = client.post("/retrieve", content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert response.text
    assert "Traceback" not in response.text


def test_the_client_of_this_library_understands_the_replies(server_url, query):
    found = HTTPRetriever(server_url).search([query, query], k=3)
    assert found[0] == found[1]
    assert 1 <= len(found[0]) <= 3
    assert all(passage.text or passage.title for passage in found[0])


# Other dialects


def post_or_skip(client, path, body):
    response = client.post(path, json=body)
    if response.status_code == 404:
        pytest.skip(f"no {path}")
    assert response.status_code == 200, response.text
    return response.json()


def test_health_is_ok(client):
    response = client.get("/health")
    if response.status_code == 404:
        pytest.skip("no /health")
    assert response.status_code == 200


def test_skyrl_single_query(client, query):
    response = client.post("/retrieve", json={"query": query, "topk": 2, "return_scores": True})
    if response.status_code == 422:
        pytest.skip("`query` is not known")
    assert response.json()["result"] == retrieve(client, queries=[query], topk=2, return_scores=True)


def test_flashrag_search(client, query):
    (expected,) = retrieve(client, queries=[query], topk=2, return_scores=True)
    bare = post_or_skip(client, "/search", {"query": query, "top_n": 2})
    assert [document["contents"] for document in bare] == [p["document"]["contents"] for p in expected]
    documents, scores = post_or_skip(client, "/search", {"query": query, "top_n": 2, "return_score": True})
    assert documents == bare
    assert scores == [passage["score"] for passage in expected]


def test_flashrag_batch_search(client, query):
    words = [query, *query.split()[:3]]
    expected = retrieve(client, queries=words, topk=2, return_scores=True)
    bare = post_or_skip(client, "/batch_search", {"query": words, "top_n": 2})
    assert [[d["id"] for d in documents] for documents in bare] == [
        [passage["document"]["id"] for passage in passages] for passages in expected
    ]
    documents, scores = post_or_skip(client, "/batch_search", {"query": words, "top_n": 2, "return_score": True})
    assert documents == bare
    assert scores == [[passage["score"] for passage in passages] for passages in expected]
