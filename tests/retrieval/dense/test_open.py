"""Dense and hybrid retrieval by the options of commands, and over HTTP."""

import json

import pytest

from helpers.encoders import make_bert
from helpers.servers import Server
from tspo_trl import DenseRetriever, HTTPRetriever, HybridRetriever, TextEncoder, open_retriever
from tspo_trl.retrieval import BM25Retriever
from tspo_trl.retrieval.corpus import PassageFile
from tspo_trl.retrieval.dense import build_index

ROWS = [
    {"id": "emma", "title": "emma", "text": "emma is the novel jane austen wrote ."},
    {"id": "paris", "title": "paris", "text": "paris is the capital of france ."},
    {"id": "rome", "title": "rome", "text": "rome is the capital of italy ."},
]
QUERIES = ["who wrote emma ?", "capital of italy"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A corpus, an encoder, and the indexes of all backends."""
    folder = tmp_path_factory.mktemp("dense")
    encoder, corpus = make_bert(folder / "e5-tiny"), folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    build_index(corpus, folder / "both" / "dense", TextEncoder(encoder, device="cpu"), progress=False)
    BM25Retriever.from_jsonl(corpus).save(folder / "both" / "bm25")
    return {"corpus": str(corpus), "encoder": encoder, "folder": folder}


def ids(results):
    return [[passage.id for passage in passages] for passages in results]


def test_an_index_and_a_corpus_give_the_same(files):
    saved = open_retriever(index=files["folder"] / "both" / "dense", backend="dense")
    fresh = open_retriever(corpus=files["corpus"], encoder=files["encoder"], backend="dense")
    assert isinstance(saved, DenseRetriever)
    assert ids(saved.search(QUERIES, 3)) == ids(fresh.search(QUERIES, 3))
    assert isinstance(fresh.passages, PassageFile)  # not held as Python objects
    both = open_retriever(index=files["folder"] / "both", backend="hybrid", corpus=files["corpus"])
    assert isinstance(both, HybridRetriever)
    in_memory = open_retriever(corpus=files["corpus"], encoder=files["encoder"], backend="hybrid")
    assert ids(both.search(QUERIES, 3)) == ids(in_memory.search(QUERIES, 3))


def test_options_that_do_not_fit(files):
    with pytest.raises(ValueError, match=r"need an encoder for a corpus: .* 'intfloat/e5-base-v2'"):
        open_retriever(corpus=files["corpus"], backend="dense")
    with pytest.raises(ValueError, match=r"encoder 'e5' is only for the backends 'dense' and 'hybrid'"):
        open_retriever(corpus=files["corpus"], encoder="e5")
    with pytest.raises(ValueError, match=r"language 'german' is only for the backends 'bm25' and 'hybrid'"):
        open_retriever(corpus=files["corpus"], backend="dense", encoder=files["encoder"], language="german")
    with pytest.raises(FileNotFoundError, match="no dense index in"):
        open_retriever(index=files["folder"], backend="dense")


@pytest.mark.parametrize("backend", ["dense", "hybrid"])
def test_a_server_indexes_once_and_starts_again(files, tmp_path, backend):
    options = ["--retriever_backend", backend]
    index = ["--corpus", files["corpus"], "--retriever_encoder", files["encoder"], "--index_form", "small"]
    local = open_retriever(corpus=files["corpus"], encoder=files["encoder"], backend=backend)
    with Server(*options, *index, "--save_index", tmp_path / "index") as server:
        found = HTTPRetriever(server.url).search(QUERIES, 2)
    with Server(*options, "--index", tmp_path / "index") as server:
        assert HTTPRetriever(server.url).search(QUERIES, 2) == found
    assert ids(found) == ids(local.search(QUERIES, 2))
    saved = {path.name for path in (tmp_path / "index").rglob("*.npy")}
    assert {"bits.npy", "codes.npy"} <= saved
    assert "vectors.npy" not in saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "demo", "--retriever_backend", "dense"], "--corpus demo is for --retriever_backend bm25"),
        (["--retriever_backend", "hybrid"], "--retriever_backend hybrid needs --retriever_encoder"),
        (["--retriever_backend", "lucene", "--save_index", "x"], "--save_index saves the index of a --corpus"),
    ],
)
def test_the_server_refuses_options_that_do_not_fit(files, arguments, message):
    corpus = [] if "--corpus" in arguments else ["--corpus", files["corpus"]]
    server = Server(*corpus, *arguments).start()
    _, errors = server.process.communicate(timeout=120)
    assert server.process.returncode == 2
    assert message in errors
    assert "Traceback" not in errors
