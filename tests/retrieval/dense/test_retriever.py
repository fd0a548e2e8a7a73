"""Dense indexes: made, interrupted, continued, converted, opened, and opened by mistake."""

import json

import faiss
import numpy as np
import pytest

from helpers.encoders import CountingEncoder, make_bert
from tspo_trl.retrieval import Passage
from tspo_trl.retrieval.dense import DenseRetriever, TextEncoder, build, build_index, convert_faiss

NAMES = ["emma", "paris", "rome", "austen", "steventon", "france", "italy", "jane", "novel", "capital"]
PASSAGES = [
    Passage(str(i), f"{NAMES[i % 10]} {i}", f"{NAMES[i % 7]} is {NAMES[(i * 3) % 10]} number{i}") for i in range(200)
]
QUERIES = ["emma number7", "rome italy", "novel number12 jane"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in PASSAGES))
    return path


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(build, "STEP", 32)


def ids(results):
    return [[passage.id for passage in passages] for passages in results]


@pytest.mark.parametrize("form", ["exact", "small"])
def test_an_index_finds_what_the_encoder_says(corpus, tmp_path, form):
    encoder = CountingEncoder()
    in_memory = DenseRetriever(PASSAGES, encoder).search(QUERIES, 5)
    retriever = DenseRetriever.build(corpus, tmp_path / "index", encoder, form=form, dtype="float32", progress=False)
    found = retriever.search(QUERIES, 5)
    scores = np.array([[p.score for p in passages] for passages in found])
    if form == "exact":
        assert ids(found) == ids(in_memory)
    np.testing.assert_allclose(scores, [[p.score for p in passages] for passages in in_memory], atol=0.02)
    assert found[0][0].text == PASSAGES[int(found[0][0].id)].text
    assert not (tmp_path / "index.partial").exists()


def test_equal_queries_are_encoded_once_and_order_is_kept():
    encoder = CountingEncoder()
    retriever = DenseRetriever(PASSAGES, encoder)
    asked = []
    encode = encoder.encode_queries
    encoder.encode_queries = lambda queries: asked.extend(queries) or encode(queries)
    found = retriever.search([QUERIES[0], QUERIES[1], QUERIES[0]], 500)
    assert asked == QUERIES[:2]
    assert ids(found)[0] == ids(found)[2] != ids(found)[1]
    assert {len(passages) for passages in found} == {200}
    assert retriever.search([], 3) == []


@pytest.mark.parametrize("fails_after", [0, 100])
def test_an_interrupted_index_goes_on_where_it_was(corpus, tmp_path, fails_after):
    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, tmp_path / "index", CountingEncoder(fails_after=fails_after), progress=False)
    assert not (tmp_path / "index").exists()
    encoder = CountingEncoder()
    build_index(corpus, tmp_path / "index", encoder, progress=False)
    assert encoder.encoded == 200 - fails_after // 32 * 32
    build_index(corpus, tmp_path / "whole", CountingEncoder(), progress=False)
    assert (tmp_path / "index/vectors.npy").read_bytes() == (tmp_path / "whole/vectors.npy").read_bytes()
    assert (tmp_path / "index/index.json").read_text() == (tmp_path / "whole/index.json").read_text()


@pytest.mark.parametrize("form", ["exact", "small"])
def test_an_interruption_at_the_very_end_loses_no_vectors(corpus, tmp_path, form, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build.os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tmp_path / "index", CountingEncoder(), form=form, progress=False)
    encoder = CountingEncoder()
    build_index(corpus, tmp_path / "index", encoder, form=form, progress=False)
    assert encoder.encoded == 0
    names = {"exact": {"vectors.npy"}, "small": {"bits.npy", "codes.npy", "scales.npy"}}[form]
    assert {path.name for path in (tmp_path / "index").iterdir()} == {
        "index.json",
        "passages.jsonl",
        "offsets.npy",
        *names,
    }
    assert len(DenseRetriever.load(tmp_path / "index", encoder).search(QUERIES, 3)) == 3


def test_an_unfinished_index_of_something_else_is_not_continued(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, tmp_path / "index", CountingEncoder(fails_after=100), progress=False)
    with pytest.raises(ValueError, match=r"has encoder 'counting 0', now it is 'counting 1'. Remove this folder"):
        build_index(corpus, tmp_path / "index", CountingEncoder(seed=1), progress=False)
    with pytest.raises(ValueError, match=r"has dtype 'float16', now it is 'float32'"):
        build_index(corpus, tmp_path / "index", CountingEncoder(), dtype="float32", progress=False)
    corpus.write_text(corpus.read_text().replace("number7", "number8"))
    with pytest.raises(ValueError, match=r"is of another corpus than"):
        build_index(corpus, tmp_path / "index", CountingEncoder(), progress=False)


def write_flat(path, encoder, passages=PASSAGES):
    vectors = encoder.encode_passages(passages)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("form", ["exact", "small"])
def test_a_flat_file_of_faiss_is_converted_without_encoding(corpus, tmp_path, form):
    content = write_flat(tmp_path / "flat", CountingEncoder()).read_bytes()
    parts = [tmp_path / "part_aa", tmp_path / "part_ab"]
    parts[0].write_bytes(content[:3000])
    parts[1].write_bytes(content[3000:])
    encoder = CountingEncoder()
    convert_faiss(parts, corpus, tmp_path / "index", encoder, form=form, progress=False)
    assert encoder.encoded == 0
    built = DenseRetriever.build(corpus, tmp_path / "built", encoder, form=form, progress=False)
    loaded = DenseRetriever.load(tmp_path / "index", encoder, corpus=corpus)
    assert ids(loaded.search(QUERIES, 5)) == ids(built.search(QUERIES, 5))


def test_hnsw_is_searched_by_faiss(corpus, tmp_path):
    encoder = CountingEncoder()
    index = faiss.IndexHNSWFlat(64, 16, faiss.METRIC_INNER_PRODUCT)
    index.add(encoder.encode_passages(PASSAGES))
    faiss.write_index(index, str(tmp_path / "hnsw"))
    convert_faiss([tmp_path / "hnsw"], corpus, tmp_path / "index", encoder, progress=False)
    retriever = DenseRetriever.load(tmp_path / "index", encoder)
    exact = DenseRetriever(PASSAGES, encoder)
    assert [row[0] for row in ids(retriever.search(QUERIES, 3))] == [row[0] for row in ids(exact.search(QUERIES, 3))]
    assert retriever.fingerprint != exact.fingerprint


def test_a_file_of_another_corpus_or_encoder_is_refused(corpus, tmp_path):
    flat = write_flat(tmp_path / "flat", CountingEncoder(), PASSAGES[:150])
    with pytest.raises(ValueError, match=r"has 150 vectors, but the corpus .* has 200 passages"):
        convert_faiss([flat], corpus, tmp_path / "index", CountingEncoder(), progress=False)
    with pytest.raises(ValueError, match=r"have 64 dimensions, those of .* have 32"):
        convert_faiss([flat], corpus, tmp_path / "other", CountingEncoder(32), progress=False)
    # The same number of vectors and dimensions, but of another encoder
    other = CountingEncoder(seed=1)
    other.fingerprint = "counting 0"
    convert_faiss(
        [write_flat(tmp_path / "seed1", other)], corpus, tmp_path / "wrong", CountingEncoder(), progress=False
    )
    with pytest.raises(
        ValueError, match=r"encoded again, one of the first passages has a cosine of .* expected at least"
    ):
        DenseRetriever.load(tmp_path / "wrong", CountingEncoder())


def test_opening_an_index_by_mistake(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dense index in .*nowhere"):
        DenseRetriever.load(tmp_path / "nowhere", CountingEncoder())
    build_index(corpus, tmp_path / "index", CountingEncoder(), progress=False)
    with pytest.raises(ValueError, match=r"names no model: give the `encoder`"):
        DenseRetriever.load(tmp_path / "index")
    with pytest.raises(ValueError, match=r"made with the encoder 'counting 0', got 'counting 1'"):
        DenseRetriever.load(tmp_path / "index", CountingEncoder(seed=1))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "0", "text": "something else"}))
    with pytest.raises(ValueError, match=r"does not belong to the corpus"):
        DenseRetriever.load(tmp_path / "index", CountingEncoder(), corpus=other)
    vectors = tmp_path / "index" / "vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read"):
        DenseRetriever.load(tmp_path / "index", CountingEncoder())


def test_building_an_index_by_mistake(corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"full' is not empty"):
        build_index(corpus, tmp_path / "full", CountingEncoder(), progress=False)
    with pytest.raises(ValueError, match=r"`form` must be one of \['exact', 'small'\], got 'tiny'"):
        build_index(corpus, tmp_path / "index", CountingEncoder(), form="tiny", progress=False)
    corpus.write_text(corpus.read_text() + json.dumps({"id": "7", "text": "again"}))
    with pytest.raises(ValueError, match=r"two passages with the id '7'"):
        build_index(corpus, tmp_path / "index", CountingEncoder(), progress=False)
    with pytest.raises(ValueError, match=r"`passages` is empty"):
        DenseRetriever([], CountingEncoder())
    with pytest.raises(TypeError, match=r"use `DenseRetriever.build"):
        DenseRetriever("corpus.jsonl", CountingEncoder())


def test_vectors_with_nan_stop_the_index(corpus, tmp_path):
    class Broken(CountingEncoder):
        def encode_passages(self, passages):
            return super().encode_passages(passages) * (np.nan if passages[0].id == "64" else 1)

    with pytest.raises(ValueError, match=r"vectors from number 64 on are malformed: .* NaN or infinite"):
        build_index(corpus, tmp_path / "index", Broken(), progress=False)


def test_too_little_room_on_the_disk_is_said_first(corpus, tmp_path, monkeypatch):
    usage = build.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"The vectors need 0.0 GB, but the disk"):
        build_index(corpus, tmp_path / "index", CountingEncoder(), progress=False)


def test_too_little_memory_is_said_first(corpus, tmp_path, monkeypatch, caplog):
    import tspo_trl.retrieval.dense.retriever as module

    encoder = CountingEncoder()
    build_index(corpus, tmp_path / "small", encoder, form="small", progress=False)
    index = faiss.IndexHNSWFlat(64, 16, faiss.METRIC_INNER_PRODUCT)
    index.add(encoder.encode_passages(PASSAGES))
    faiss.write_index(index, str(tmp_path / "hnsw"))
    convert_faiss([tmp_path / "hnsw"], corpus, tmp_path / "faiss", encoder, progress=False)
    build_index(corpus, tmp_path / "exact", encoder, progress=False)
    monkeypatch.setattr(module, "_free_memory", lambda: 100)
    with pytest.raises(MemoryError, match=r"small' needs 0.0 GB of memory, 0.0 GB are free. Searching it over HTTP"):
        DenseRetriever.load(tmp_path / "small", encoder)
    with pytest.raises(MemoryError, match=r"faiss' needs .* The form 'small' of a flat index would need 0.0 GB"):
        DenseRetriever.load(tmp_path / "faiss", encoder)
    assert len(DenseRetriever.load(tmp_path / "exact", encoder).search(QUERIES, 2)) == 3
    assert "do not fit into memory (0.0 GB free), so every search reads them from the disk" in caplog.text


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    import tspo_trl.retrieval.dense.retriever as module

    contents = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
    group = {"/sys/fs/cgroup/memory.max": "5000000", "/sys/fs/cgroup/memory.current": "4000000\n"}
    monkeypatch.setattr(module.Path, "is_file", lambda self: str(self) in contents)
    monkeypatch.setattr(module.Path, "read_text", lambda self: contents[str(self)])
    assert module._free_memory() == 8_192_000
    contents.update(group)
    assert module._free_memory() == 1_000_000
    contents["/sys/fs/cgroup/memory.max"] = "max\n"
    assert module._free_memory() == 8_192_000
    contents.clear()
    assert module._free_memory() is None


def test_the_index_names_its_model(tmp_path, corpus):
    folder = make_bert(tmp_path / "e5-tiny")
    build_index(corpus, tmp_path / "index", TextEncoder(folder, device="cpu", max_length=32), progress=False)
    retriever = DenseRetriever.load(tmp_path / "index")
    assert retriever.encoder.settings.max_length == 32
    expected = DenseRetriever(PASSAGES, TextEncoder(folder, device="cpu", max_length=32))
    scores = [[p.score for p in passages] for passages in retriever.search(["emma novel"], 3)]
    np.testing.assert_allclose(
        scores, [[p.score for p in passages] for passages in expected.search(["emma novel"], 3)], atol=0.01
    )
