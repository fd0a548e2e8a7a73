"""Static embeddings in the files of model2vec and of sentence-transformers."""

import json

import numpy as np
import pytest
import torch

from helpers.encoders import WORDS, make_static
from tspo_trl.retrieval import Passage
from tspo_trl.retrieval.dense import DenseRetriever, TextEncoder

TOKENS = {token: i for i, token in enumerate(["[UNK]", *WORDS, "?", "."])}


def mean(table, words):
    return table[[TOKENS[word] for word in words.split()]].mean(axis=0)


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_vectors_are_the_means_of_those_of_the_tokens(tmp_path):
    table = make_static(tmp_path / "potion")
    encoder = TextEncoder(tmp_path / "potion", device="cpu")
    found = encoder.encode_queries(["who wrote emma ?", "the capital of spain", "paris"])
    # Without special tokens, and model2vec leaves out unknown words
    expected = [unit(mean(table, words)) for words in ("who wrote emma ?", "the capital of", "paris")]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    (passage,) = encoder.encode_passages([Passage("0", "", "rome of italy .")])
    np.testing.assert_allclose(passage, unit(mean(table, "rome of italy .")), atol=1e-6)
    assert encoder.dimensions == 32


@pytest.mark.parametrize("normalize", [True, False])
def test_files_of_sentence_transformers(tmp_path, normalize):
    table = make_static(tmp_path / "model", package="sentence-transformers", normalize=normalize)
    about = tmp_path / "model" / "config_sentence_transformers.json"
    about.write_text(json.dumps({"prompts": {"query": "query ", "document": "passage "}, "similarity_fn_name": None}))
    encoder = TextEncoder(tmp_path / "model", device="cpu")
    expected = mean(table, "query the capital of [UNK]")  # unknown words count
    (found,) = encoder.encode_queries(["the capital of spain"])
    np.testing.assert_allclose(found, unit(expected) if normalize else expected, atol=1e-6)
    (found,) = encoder.encode_passages([Passage("0", "", "rome")])
    expected = mean(table, "passage rome")
    np.testing.assert_allclose(found, unit(expected) if normalize else expected, atol=1e-6)
    about.write_text(json.dumps({"similarity_fn_name": "cosine"}))
    assert TextEncoder(tmp_path / "model", device="cpu").settings.normalize


def test_rows_that_tokens_share_and_weights_of_tokens(tmp_path):
    rows = torch.randn(3, 8)
    mapping = torch.arange(len(TOKENS)) % 3
    weights = torch.linspace(0.5, 1.5, len(TOKENS))
    tensors = {"embeddings": rows.half(), "mapping": mapping, "weights": weights}
    make_static(tmp_path / "small", tensors=tensors, normalize=False)
    (found,) = TextEncoder(tmp_path / "small", device="cpu").encode_queries(["rome of paris"])
    ids = [TOKENS[word] for word in ("rome", "of", "paris")]
    expected = np.mean([rows[i % 3].half().float().numpy() * weights[i].item() for i in ids], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_text_without_known_words_and_a_long_one(tmp_path, caplog):
    table = make_static(tmp_path / "potion")
    encoder = TextEncoder(tmp_path / "potion", device="cpu")
    assert np.isfinite(encoder.encode_queries(["", "zebra"])).all()
    (found,) = encoder.encode_queries(["emma " * 512 + "paris " * 512])
    np.testing.assert_allclose(found, unit(table[TOKENS["emma"]]), atol=1e-5)
    assert "more than the 512 tokens" in caplog.text


def test_an_index_is_opened_by_the_name_of_its_model(tmp_path):
    make_static(tmp_path / "potion")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": word, "text": f"{word} {word} is ."}) + "\n" for word in WORDS))
    retriever = DenseRetriever.build(corpus, tmp_path / "index", TextEncoder(tmp_path / "potion"), progress=False)
    loaded = DenseRetriever.load(tmp_path / "index")
    assert loaded.search(["steventon"], 3) == retriever.search(["steventon"], 3)
    assert loaded.search(["steventon"], 3)[0][0].id == "steventon"
    make_static(tmp_path / "other", dimensions=16)
    with pytest.raises(ValueError, match="was made with the encoder 'potion"):
        DenseRetriever.load(tmp_path / "index", TextEncoder(tmp_path / "other"))


def test_malformed_files(tmp_path):
    make_static(tmp_path / "a", tensors={"table": torch.randn(99, 8)})
    with pytest.raises(ValueError, match=r"has no tensor 'embeddings' or 'embedding.weight', but \['table'\]"):
        TextEncoder(tmp_path / "a")
    make_static(tmp_path / "b", tensors={"embeddings": torch.randn(3, 8)})
    with pytest.raises(ValueError, match=r"has vectors of 3 tokens, the tokenizer has \d\d"):
        TextEncoder(tmp_path / "b")
    make_static(tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer.json"):
        TextEncoder(tmp_path / "c")
