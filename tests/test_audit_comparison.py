"""Retrievers side by side, on the questions of a user."""

import importlib
import json
import re

import pytest

from helpers.encoders import make_static
from helpers.paths import ROOT
from helpers.servers import Server
from tspo_trl import BM25Retriever, HybridRetriever, TextEncoder, load_corpus, open_retriever
from tspo_trl.audit import Ranks, compare, summarize
from tspo_trl.retrieval.dense import DenseRetriever, build_index

SAMPLE = ROOT / "tests" / "data" / "hotpotqa"
CORPUS, QUESTIONS = SAMPLE / "passages.jsonl", SAMPLE / "questions.jsonl"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder with a vector for each word of the corpus."""
    words = sorted({word for p in load_corpus(CORPUS) for word in re.findall(r"\w+|[^\w\s]", f'"{p.title}" {p.text}')})
    folder = tmp_path_factory.mktemp("encoder") / "static"
    make_static(folder, words=words, dimensions=64)
    return str(folder)


@pytest.fixture
def audit(monkeypatch, tmp_path, capsys):
    """A function that runs the command, and returns its results and what it prints."""

    def run(*arguments):
        options = ["--dataset", QUESTIONS, "--top_k", 5, "--output_dir", tmp_path / "audit", *arguments]
        importlib.import_module("tspo_trl.commands.audit").main(list(map(str, options)))
        return json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def recall(retriever, k):
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    found = retriever.search([row["question"] for row in rows], k)
    shares = [
        len({p.id for p in passages} & set(row["supporting_ids"])) / len(row["supporting_ids"])
        for row, passages in zip(rows, found, strict=True)
    ]
    return sum(shares) / len(shares)


def test_backends_side_by_side(audit, encoder):
    data, printed = audit("--corpus", CORPUS, "--retriever_encoder", encoder, "--backend", "bm25", "dense", "hybrid")
    bm25 = BM25Retriever.from_jsonl(CORPUS)
    dense = DenseRetriever(load_corpus(CORPUS), TextEncoder(encoder))
    expected = {"bm25": bm25, "dense": dense, "hybrid": HybridRetriever([bm25, dense])}
    assert list(data["retrievers"]) == list(expected)
    for name, retriever in expected.items():
        for k in (1, 3, 5):
            assert data["retrievers"][name]["supporting"]["rates"][k - 1] == pytest.approx(recall(retriever, k))
    rates = {name: curves["plain"]["rates"][2] for name, curves in data["retrievers"].items()}
    assert len(set(rates.values())) == 3
    # The rest is about the first one
    assert {name: data[name] for name in ("plain", "supporting", "ideal", "chance")} == data["retrievers"]["bm25"]
    alone, _ = audit("--corpus", CORPUS)
    assert alone["plain"] == data["plain"]
    assert "retrievers" not in alone
    assert data["about"]["retriever_backend"] == "bm25 dense hybrid"
    table = printed.partition("Found in the first")[0]
    assert [line.split("│")[2].strip() for line in table.splitlines() if "plain question" in line] == list(rates)
    for rate in rates.values():
        assert f"{rate:.3f}" in table
    best = max(rates, key=rates.get)
    assert data["comparison"][0].startswith(
        f"A golden answer in 3 passages for the plain question: {best} {rates[best]:.1%}"
    )
    assert " ".join(data["comparison"][0].split()) in " ".join(printed.split())


def test_the_index_of_the_hybrid_retriever_holds_the_others(audit, encoder, tmp_path):
    index = tmp_path / "index"
    BM25Retriever.from_jsonl(CORPUS).save(index / "bm25")
    build_index(CORPUS, index / "dense", TextEncoder(encoder), progress=False)
    data, _ = audit("--index", index, "--backend", "dense", "hybrid", "bm25")
    assert list(data["retrievers"]) == ["dense", "hybrid", "bm25"]
    hybrid = open_retriever(index=index, backend="hybrid")
    assert data["retrievers"]["hybrid"]["supporting"]["rates"][2] == pytest.approx(recall(hybrid, 3))
    assert data["plain"] == data["retrievers"]["dense"]["plain"]


def test_servers_side_by_side(audit, tmp_path):
    BM25Retriever.from_jsonl(CORPUS).save(tmp_path / "index")
    with Server("--index", tmp_path / "index") as one, Server("--corpus", CORPUS, "--backend", "rank_bm25") as other:
        data, printed = audit("--retriever_url", one.url, other.url)
    assert list(data["retrievers"]) == [one.url, other.url]
    assert one.url in printed
    assert other.url in printed
    assert data["retrievers"][one.url] != data["retrievers"][other.url]


def test_options_that_do_not_fit(audit, capsys):
    for arguments, message in [
        (["--corpus", CORPUS, "--backend", "bm25", "bm25"], "--retriever_backend repeats a value: bm25 bm25"),
        (["--retriever_url", "http://a", "http://a"], "--retriever_url repeats a value"),
        (["--retriever_url", "http://a", "--backend", "bm25", "dense"], "a server has its own"),
    ]:
        with pytest.raises(SystemExit):
            audit(*arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="need an encoder for a corpus"):
        audit("--corpus", CORPUS, "--backend", "bm25", "dense")


def row(ids=()):
    return {"question": "q", "golden_answers": ["a blue boat"], "supporting_titles": [], "supporting_ids": list(ids)}


def test_the_comparison_names_the_best_first_and_what_may_be_chance():
    def audited(plain, supporting):
        ranks = [Ranks(rank, None, (other,)) for rank, other in zip(plain, supporting, strict=True)]
        return summarize([row(["x"])] * 4, ranks, top_k=2, num_passages=2)

    audits = {"bm25": audited([1, None, None, 2], [1, 1, 1, 1]), "dense": audited([1, 2, None, 2], [1, None, 2, 2])}
    assert compare(audits) == [
        "A golden answer in 2 passages for the plain question: dense 75.0%, bm25 50.0% (4 questions; differences below "
        "68.5 points may be chance).",
        "The share of supporting passages in 2 passages for the plain question: bm25 100.0%, dense 75.0% (4 questions; "
        "differences below 46.8 points may be chance).",
    ]
    assert compare({"bm25": audits["bm25"]}) == []
    without = [summarize([row()], [Ranks(1, None, ())], top_k=1, num_passages=1)] * 2
    assert len(compare(dict(zip("ab", without, strict=True)))) == 1
