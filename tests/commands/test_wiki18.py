"""Wikipedia of 2018: downloads in the published formats from a local Hub, conversion, and the server."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import faiss
import pytest

from helpers.dataset_hub import DatasetHub
from helpers.encoders import WORDS, make_bert
from helpers.paths import ROOT
from helpers.servers import Server
from tspo_trl import DenseRetriever, HTTPRetriever, Passage, TextEncoder
from tspo_trl.commands import wiki18
from tspo_trl.commands.wiki18 import Places, check_download, unpack
from tspo_trl.retrieval.corpus import PassageFile

RECIPE = ROOT / "recipes" / "wiki18.py"
PASSAGES = [
    Passage(str(i), f"{WORDS[i % 7]}", f"{WORDS[i % 5]} is {WORDS[i % 11]} of {WORDS[i % 13]} .") for i in range(40)
]
QUERIES = ["who wrote emma", "capital of france"]


def write_archive(path, content):
    """A corpus as it is published: an archive in spite of its name."""
    name = "data00/jiajie_jin/flashrag_indexes/wiki_dpr_100w/wiki_dump.jsonl"
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder, member = tarfile.TarInfo("data00"), tarfile.TarInfo(name)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The repositories of the corpus and of the vectors, as they are published, and an encoder."""
    root = tmp_path_factory.mktemp("hub")
    encoder = make_bert(tmp_path_factory.mktemp("encoder") / "e5-tiny")
    corpus = root / "PeterJinGo" / "wiki-18-corpus"
    corpus.mkdir(parents=True)
    rows = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES]
    write_archive(corpus / "wiki-18.jsonl.gz", "".join(json.dumps(row) + "\n" for row in rows).encode())
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


def test_a_damaged_file_of_vectors_is_downloaded_again(published, tmp_path):
    places = Places(tmp_path, 20)
    done = run(published, tmp_path, "download", "--subset", "20")
    assert done.returncode == 0, done.stderr
    (vectors,) = places.vectors
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-40])
    damaged = run(published, tmp_path, "convert", "--subset", "20", "--form", "exact")
    assert damaged.returncode == 2
    assert f"has {len(whole) - 40} bytes, expected {len(whole)} for 20 vectors" in damaged.stderr
    assert not list(tmp_path.glob("dense-*"))
    again = run(published, tmp_path, "download", "--subset", "20")
    assert again.returncode == 0, again.stderr
    assert vectors.read_bytes() == whole
    early = run(published, tmp_path, "serve", "--subset", "20", "--form", "exact")
    options = f"--folder {tmp_path} --subset 20 --index_form exact --retriever_encoder {published['encoder']}"
    assert f"not there yet. Run `tspo wiki18 convert {options}` first." in early.stderr


def test_without_a_network_the_error_says_what_to_do(published, tmp_path):
    nowhere = {"hub": SimpleNamespace(url="http://127.0.0.1:9"), "encoder": published["encoder"]}
    for size in ([], ["--subset", "5"]):
        done = run(nowhere, tmp_path, "download", *size)
        assert done.returncode == 2
        assert "The Hub cannot be reached" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_index_of_lucene_needs_the_corpus_and_no_vectors(published, tmp_path):
    early = run(published, tmp_path, "convert", "--backend", "bm25")
    expected = f"Run `tspo wiki18 download --folder {tmp_path} --retriever_backend bm25` first"
    assert f"not there yet. {expected}" in early.stderr
    published["hub"].requested.clear()
    for step in ("download", "convert"):
        done = run(published, tmp_path, step, "--backend", "bm25")
        assert done.returncode == 0, done.stderr
    assert set(published["hub"].requested) == {"wiki-18.jsonl.gz", "bm25/segments_1"}
    places = Places(tmp_path, None)
    assert (places.lucene_index / "segments_1").read_text() == "an index of Lucene"
    passages = PassageFile(places.index("passages"))
    assert [passages[i] for i in range(40)] == PASSAGES
    assert not places.archive.exists()
    served = run(published, tmp_path, "serve", "--backend", "hybrid")
    assert served.returncode == 2
    options = f"--folder {tmp_path} --retriever_backend hybrid --retriever_encoder {published['encoder']}"
    assert f"dense-small-all: not there yet. Run `tspo wiki18 convert {options}` first." in served.stderr


@pytest.mark.parametrize("folder", ["", "bm25", "index/bm25"])
def test_the_folder_of_the_index_of_lucene_is_found(tmp_path, folder):
    places = Places(tmp_path, None)
    for path in (places.lucene / folder / "segments_2", places.lucene / ".cache/huggingface/segments_2.metadata"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert places.lucene_index == places.lucene / folder


@pytest.mark.parametrize("archived", [True, False])
def test_the_corpus_is_unpacked_whatever_is_compressed(tmp_path, archived):
    content = "".join(json.dumps({"id": str(i), "contents": "x" * 1000}) + "\n" for i in range(500)).encode()
    packed, corpus = tmp_path / "packed", tmp_path / "corpus"
    if archived:
        write_archive(packed, content)
    else:
        packed.write_bytes(gzip.compress(content))
    for count in (None, 3):
        with packed.open("rb") as source:
            unpack(source, corpus, count)
        assert corpus.read_bytes() == b"".join(content.splitlines(keepends=True)[:count])
    corpus.unlink()
    for damaged in (packed.read_bytes()[:-400], packed.read_bytes()[:100], b"<html>not found</html>"):
        packed.write_bytes(damaged)
        with packed.open("rb") as source, pytest.raises(ValueError, match="damaged or incomplete after"):
            unpack(source, corpus)
    assert list(tmp_path.iterdir()) == [packed]


def test_steps_out_of_order_and_too_large_subsets(published, tmp_path):
    early = run(published, tmp_path, "convert", "--subset", "30")
    assert early.returncode == 2
    assert f"not there yet. Run `tspo wiki18 download --folder {tmp_path} --subset 30` first" in early.stderr
    large = run(published, tmp_path, "download", "--subset", "41")
    assert large.returncode == 2
    assert "--subset: the corpus has only 40 passages, got 41" in large.stderr
    assert not list((tmp_path / "download").iterdir())  # nothing has its final name
    assert "Traceback" not in early.stderr + large.stderr


def test_a_missing_extra_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for module in ("tspo_trl.commands.serve", "tspo_trl.retrieval.server"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'tspo-trl\[server\]'"):
        wiki18.main(["all", "--folder", str(tmp_path / "wiki")])
    assert not (tmp_path / "wiki").exists()


def test_too_little_room_is_said_before_the_download(published, tmp_path, monkeypatch):
    usage = wiki18.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(wiki18.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(OSError, match=r"need 64.5 GB, but the disk of .* has 1.0 GB. .*--subset 100000"):
        wiki18._check_disk(tmp_path, 60_000_000_000, 4_500_000_000)


def test_damaged_downloads_are_removed(tmp_path):
    path = tmp_path / "part_aa"
    path.write_bytes(b"vectors")
    right = "fe3b93e2f4b5f8c0ab3a1ca3bf94d1a8d9e2ac0ee6c4ab1f2c73ac9bf17d9a0c"
    with pytest.raises(ValueError, match=r"has 7 bytes, expected 8. It was deleted. Run the command again"):
        check_download(path, 8, None)
    assert not path.exists()
    path.write_bytes(b"vectors")
    with pytest.raises(ValueError, match=r"has the SHA-256 \w{64}, expected fe3b"):
        check_download(path, 7, right)
    assert not path.exists()
    path.write_bytes(b"vectors")
    check_download(path, 7, None)
    assert path.exists()
