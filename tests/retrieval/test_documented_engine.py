"""The retriever around Elasticsearch that the documentation shows, with a small server in its place."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.paths import ROOT
from tspo_trl.retrieval import CachedRetriever, RetrievalError
from tspo_trl.retrieval.results import search_each

PASSAGES = {
    "7": {"title": "Emma", "text": "Emma is a novel by Jane Austen."},
    "8": {"title": "Rome", "text": "Rome is the capital of Italy."},
    "9": {"title": "Paris", "text": "Paris is the capital of France.", "url": "https://paris.fr"},
}


class FakeElasticsearch(BaseHTTPRequestHandler):
    """Answers `_msearch`: documents are ranked by the number of words that they share with the query."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path != "/_msearch" or self.headers["Content-Type"] != "application/x-ndjson" or body[-1] != "\n":
            return self.answer({"error": "bad request"}, 400)
        lines = [json.loads(line) for line in body.splitlines()]
        return self.answer({"responses": [self.find(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)]})

    def find(self, header, search):
        assert header == {"index": "wiki"}
        match = search["query"]["multi_match"]
        assert match["fields"] == ["title", "text"]
        words = set(match["query"].lower().split())
        if "broken" in words:
            return {"error": {"type": "search_phase_execution_exception"}, "status": 500}
        scores = {
            i: len(words & set(re.findall(r"\w+", f"{p['title']} {p['text']}".lower()))) for i, p in PASSAGES.items()
        }
        best = sorted((i for i in scores if scores[i]), key=lambda i: -scores[i])[: search["size"]]
        hits = [{"_index": "wiki", "_id": i, "_score": float(scores[i]), "_source": PASSAGES[i]} for i in best]
        return {"took": 1, "hits": {"total": {"value": len(hits)}, "hits": hits}, "status": 200}

    def answer(self, content, status=200):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def retriever():
    page = (ROOT / "docs" / "retrieval.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Elasticsearch" in block)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeElasticsearch)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {}
    exec(code, names)
    yield names["ElasticsearchRetriever"](f"http://127.0.0.1:{server.server_port}", "wiki")
    server.shutdown()
    server.server_close()


def test_passages_of_each_query(retriever):
    cached = CachedRetriever(retriever)
    results = cached.search(["capital of Italy", "who wrote Emma", "zebra"], 2)
    assert [[(p.id, p.title) for p in passages] for passages in results] == [
        [("8", "Rome"), ("9", "Paris")],
        [("7", "Emma")],
        [],
    ]
    assert results[0][0].text == "Rome is the capital of Italy."
    assert results[0][0].score == 3.0
    assert cached.search(["capital of Italy"], 2) == results[:1]


def test_a_failed_search_is_reported(retriever):
    (outcome,) = search_each(retriever, ["broken"], 2)
    assert isinstance(outcome, RetrievalError)
    assert outcome.kind == "status"
    assert "search_phase_execution_exception" in str(outcome)
