"""Encoding on several devices at once."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from helpers.encoders import WORDS, CountingEncoder, make_bert, make_static
from tspo_trl.retrieval.dense import DenseRetriever, TextEncoder, build, build_index


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "STEP", 16)
    path = tmp_path / "corpus.jsonl"
    texts = [f"{WORDS[i % 17]} {WORDS[i % 5]} is {WORDS[(i * 7) % 17]} ." for i in range(150)]
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["bert", "static"])
def test_several_processes_write_the_same_index_as_one(corpus, tmp_path, kind):
    name = str(tmp_path / "e5-tiny")
    make_bert(name) if kind == "bert" else make_static(name)
    torch.set_num_threads(1)
    encoder = TextEncoder(name, device="cpu", max_length=8, query_prefix="q ")
    build_index(corpus, tmp_path / "one", encoder, dtype="float32", progress=False)
    build_index(corpus, tmp_path / "two", encoder, dtype="float32", devices=["cpu", "cpu"], progress=False)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_build_by_several_processes_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    name = make_bert(tmp_path / "e5-tiny")
    encoder = TextEncoder(name, device="cpu")
    remember = build._Work._remember

    def interrupted(self, **done):
        remember(self, **done)
        if done.get("vectors") == 64:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build._Work, "_remember", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tmp_path / "index", encoder, devices=["cpu", "cpu"], progress=False)
    assert not (tmp_path / "index").exists()
    recorded = []
    monkeypatch.setattr(build._Work, "_remember", lambda self, **done: recorded.append(done) or remember(self, **done))
    build_index(corpus, tmp_path / "index", encoder, devices=["cpu", "cpu"], progress=False)
    assert [done["vectors"] for done in recorded] == [80, 96, 112, 128, 144, 150]
    assert len(DenseRetriever.load(tmp_path / "index").search(["emma"], 200)[0]) == 150


def test_each_process_must_be_able_to_load_the_encoder(corpus, tmp_path):
    name = make_bert(tmp_path / "e5-tiny")
    loaded = TextEncoder(AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name), pooling="mean")
    for encoder in (CountingEncoder(), loaded):
        with pytest.raises(ValueError, match="`devices` need a `TextEncoder` that was loaded by name"):
            build_index(corpus, tmp_path / "index", encoder, devices=["cpu"], progress=False)
    assert not (tmp_path / "index.partial").exists()
