"""The load test of the server: nothing is lost, and each reply belongs to its request."""

import subprocess
import sys

import pytest

from benchmarks.server import is_right, load
from helpers.paths import ROOT
from helpers.servers import Server
from tspo_trl.retrieval import BM25Retriever, Passage


def test_no_request_is_lost_and_each_reply_is_that_of_a_direct_search():
    command = [sys.executable, "-m", "benchmarks.server", "--passages", 400, "--clients", 12, "--requests", 60]
    command += ["--queries", 4, "--max_waiting", 8]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    names, *rows = table
    assert [row[0] for row in rows] == ["bm25", "bm25", "dense", "dense", "hybrid", "hybrid"]
    for row in rows:
        cells = dict(zip(names, row, strict=True))
        assert (cells["requests"], cells["lost"], cells["wrong"]) == ("60", "0", "0"), done.stderr[-4000:]
        assert float(cells["queries/s"].replace(",", "")) > 0


BEST = [Passage(str(i), "", "", 10.0 - i) for i in range(9)]


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (BEST[:3], True),
        ([Passage("0", "", "", 10.0001), *BEST[1:3]], True),
        (BEST[1:4], False),
        (BEST[:2], False),
        ([], False),
        ([BEST[0], Passage("other", "", "", 9.0), BEST[2]], False),
    ],
)
def test_a_reply_is_compared_with_a_direct_search(found, right):
    assert is_right(found, BEST) == right


def test_a_reply_to_another_request_is_noticed(tmp_path):
    passages = [Passage(str(i), "", f"word{i} word{i + 1}") for i in range(30)]
    retriever = BM25Retriever(passages)
    retriever.save(tmp_path / "index")
    requests = [[f"word{i}"] for i in range(1, 20)]
    direct = [retriever.search(request, 30) for request in requests]
    with Server("--index", tmp_path / "index") as server:
        assert load(server.url, requests, direct, clients=4).wrong == []
        seen = load(server.url, requests, [*direct[1:], direct[0]], clients=4)
    assert (sorted(seen.wrong), seen.lost, len(seen.seconds)) == (list(range(19)), [], 19)


def test_requests_without_a_reply_are_lost(monkeypatch):
    from benchmarks import server

    class Impatient(server.HTTPRetriever):
        def __init__(self, url):
            super().__init__(url, total_timeout=0.01)

    monkeypatch.setattr(server, "HTTPRetriever", Impatient)
    seen = load("http://127.0.0.1:9", [["a"], ["b"], ["c"]], [[[]], [[]], [[]]], clients=2)
    assert (len(seen.lost), seen.seconds) == (3, [])
