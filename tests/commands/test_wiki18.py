"""Wikipedia of 2018: downloads in the published formats from a local Hub, conversion, and the server."""

import gzip
import json
import os
import subprocess
import sys

import faiss
import pytest

from helpers.dataset_hub import DatasetHub
from helpers.encoders import WORDS, make_bert
from helpers.paths import ROOT
from helpers.servers import Server
from tspo_trl import DenseRetriever, HTTPRetriever, Passage, TextEncoder
from tspo_trl.commands import wiki18
from tspo_trl.commands.wiki18 import Places, check_download

RECIPE = ROOT / "recipes" / "wiki18.py"
PASSAGES = [
    Passage(str(i), f"{WORDS[i % 7]}", f"{WORDS[i % 5]} is {WORDS[i % 11]} of {WORDS[i % 13]} .") for i in range(40)
]
QUERIES = ["who wrote emma", "capital of france"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The repositories of the corpus and of the vectors, as they are published, and an encoder."""
    root = tmp_path_factory.mktemp("hub")
    encoder = make_bert(tmp_path_factory.mktemp("encoder") / "e5-tiny")
    corpus = root / "PeterJinGo" / "wiki-18-corpus"
    corpus.mkdir(parents=True)
    rows = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES]
    with gzip.open(corpus / "wiki-18.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    vectors = TextEncoder(encoder, device="cpu").encode_passages(PASSAGES)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(root / "flat"))
    content = (root / "flat").read_bytes()
    parts = root / "PeterJinGo" / "wiki-18-e5-index"
    parts.mkdir()
    (parts / "part_aa").write_bytes(content[:4501])
    (parts / "part_ab").write_bytes(content[4501:])
    lucene = root / "PeterJinGo" / "wiki-18-bm25-index" / "bm25"
    lucene.mkdir(parents=True)
    (lucene / "segments_1").write_text("an index of Lucene")
    with DatasetHub(root) as hub:
        yield {"hub": hub, "encoder": encoder}


def run(published, folder, *arguments):
    environment = {**os.environ, "HF_ENDPOINT": published["hub"].url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(RECIPE), *arguments, "--folder", str(folder)]
    if arguments[0] != "download":
        command += ["--encoder", published["encoder"]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def ids(results):
    return [[passage.id for passage in passages] for passages in results]


@pytest.mark.parametrize("subset", [None, 25])
def test_download_and_convert_give_the_retriever_of_the_corpus(published, tmp_path, subset):
    size = [] if subset is None else ["--subset", str(subset)]
    for step in ("download", "convert"):
        done = run(published, tmp_path, step, "--form", "exact", *size)
        assert done.returncode == 0, done.stderr
    published["hub"].requested.clear()
    again = run(published, tmp_path, "download", *size)
    assert again.returncode == 0, again.stderr
    assert published["hub"].requested == []  # nothing is downloaded twice
    encoder = TextEncoder(published["encoder"], device="cpu")
    places = Places(tmp_path, subset)
    found = DenseRetriever.load(places.index("dense", "exact"), encoder, corpus=places.corpus)
    expected = DenseRetriever(PASSAGES[:subset], encoder)
    assert ids(found.search(QUERIES, 5)) == ids(expected.search(QUERIES, 5))
    assert len(found.passages) == (subset or 40)
    assert found.passages[3].title == PASSAGES[3].title


def test_the_server_of_a_subset(published, tmp_path):
    for step in ("download", "convert"):
        done = run(published, tmp_path, step, "--backend", "hybrid", "--subset", "30")
        assert done.returncode == 0, done.stderr
    options = ["serve", "--backend", "hybrid", "--subset", 30, "--folder", tmp_path, "--encoder", published["encoder"]]
    with Server(*options, script=RECIPE) as server:
        found = HTTPRetriever(server.url).search(QUERIES, 3)
    expected = wiki18.open_index(Places(tmp_path, 30), "hybrid", "small", published["encoder"]).search(QUERIES, 3)
    assert found == expected
    assert {len(passages) for passages in found} == {3}


def test_the_index_of_lucene_needs_no_other_download(published, tmp_path):
    early = run(published, tmp_path, "convert", "--backend", "bm25")
    assert "not downloaded yet. Run `tspo wiki18 download` first" in early.stderr
    published["hub"].requested.clear()
    for step in ("download", "convert"):
        done = run(published, tmp_path, step, "--backend", "bm25")
        assert done.returncode == 0, done.stderr
    assert set(published["hub"].requested) == {"bm25/segments_1"}
    assert (Places(tmp_path, None).lucene / "bm25" / "segments_1").is_file()


def test_steps_out_of_order_and_too_large_subsets(published, tmp_path):
    early = run(published, tmp_path, "convert", "--subset", "30")
    assert early.returncode == 2
    assert "not downloaded yet. Run `tspo wiki18 download --subset 30` first" in early.stderr
    large = run(published, tmp_path, "download", "--subset", "41")
    assert large.returncode == 2
    assert "--subset: the corpus has only 40 passages, got 41" in large.stderr
    assert not list((tmp_path / "download").iterdir())  # nothing has its final name
    assert "Traceback" not in early.stderr + large.stderr


def test_too_little_room_is_said_before_the_download(published, tmp_path, monkeypatch):
    usage = wiki18.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(wiki18.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(OSError, match=r"need 64.5 GB, but the disk of .* has 1.0 GB. .*--subset 100000"):
        wiki18._check_disk(tmp_path, [(tmp_path / "part_aa", 64_500_000_000)])


def test_damaged_downloads_are_removed(tmp_path):
    path = tmp_path / "part_aa"
    path.write_bytes(b"vectors")
    right = "fe3b93e2f4b5f8c0ab3a1ca3bf94d1a8d9e2ac0ee6c4ab1f2c73ac9bf17d9a0c"
    with pytest.raises(ValueError, match=r"has 7 bytes, expected 8. It is removed: repeat the command"):
        check_download(path, 8, None)
    assert not path.exists()
    path.write_bytes(b"vectors")
    with pytest.raises(ValueError, match=r"has the SHA-256 \w{64}, expected fe3b"):
        check_download(path, 7, right)
    assert not path.exists()
    path.write_bytes(b"vectors")
    check_download(path, 7, None)
    assert path.exists()
