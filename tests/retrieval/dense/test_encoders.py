"""Vectors of texts: pooling, prefixes, batches, and the settings of published models."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from helpers.encoders import make_bert
from tspo_trl.retrieval import Passage
from tspo_trl.retrieval.dense.encoders import EncoderSettings, TextEncoder, find_settings, pool

TEXTS = ["who wrote emma ?", "jane austen", "the capital of france is paris .", "emma"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert") / "e5-tiny")


def reference(folder, text, pooling, max_length=512):
    """The vector of one text, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    vector = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_a_vector_does_not_depend_on_the_texts_beside_it(bert, pooling, batch_tokens):
    encoder = TextEncoder(bert, pooling=pooling, query_prefix="query : ", batch_tokens=batch_tokens, device="cpu")
    found = encoder.encode_queries(TEXTS)
    expected = np.stack([reference(bert, f"query : {text}", pooling) for text in TEXTS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_passages_are_encoded_with_their_titles(bert):
    encoder = TextEncoder(bert, passage_prefix="passage : ", device="cpu")
    found = encoder.encode_passages([Passage("0", "emma", "jane austen wrote"), Passage("1", "", "paris")])
    np.testing.assert_allclose(found[0], reference(bert, 'passage : "emma"\njane austen wrote', "mean"), atol=1e-5)
    np.testing.assert_allclose(found[1], reference(bert, "passage : paris", "mean"), atol=1e-5)


def test_a_long_passage_is_cut_and_reported_once(bert, caplog):
    encoder = TextEncoder(bert, max_length=8, passage_prefix="", device="cpu")
    long = Passage("0", "", "paris rome " * 20)
    found = encoder.encode_passages([long, Passage("1", "", "emma")])
    np.testing.assert_allclose(found[0], reference(bert, long.text, "mean", max_length=8), atol=1e-5)
    encoder.encode_passages([long])
    assert [record.getMessage() for record in caplog.records if "8 tokens" in record.getMessage()] == [
        f"1 of 2 texts have more than the 8 tokens that {encoder!r} encodes, and are cut. This is reported once."
    ]


def test_a_passage_with_more_tokens_than_the_model_has_positions_is_cut(bert, caplog):
    encoder = TextEncoder(bert, passage_prefix="", device="cpu")
    assert encoder.settings.max_length == 64  # of 512 for this family
    long = Passage("0", "", "paris rome " * 100)
    np.testing.assert_allclose(
        encoder.encode_passages([long])[0], reference(bert, long.text, "mean", max_length=64), atol=1e-5
    )
    assert "more than the 64 tokens" in caplog.text


def test_vectors_without_normalisation_keep_their_length(bert):
    lengths = np.linalg.norm(TextEncoder(bert, normalize=False, device="cpu").encode_queries(TEXTS), axis=1)
    assert np.abs(lengths - 1).min() > 0.1


def test_an_empty_text_has_a_vector(bert):
    assert np.isfinite(TextEncoder(bert, query_prefix="", device="cpu").encode_queries([""])).all()
    assert TextEncoder(bert, device="cpu").encode_queries([]).shape == (0, 32)


def test_vectors_with_nan_are_an_error(bert):
    encoder = TextEncoder(bert, device="cpu")
    encoder.model.embeddings.word_embeddings.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values for the text 'query: passage'.*torch.bfloat16"):
        encoder.encode_queries(["emma", "passage"])


def test_pooling_ignores_padding():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [9.0]]])
    lengths = torch.tensor([2, 3])
    assert pool(states, lengths, "mean").tolist() == [[2.0], [5.0]]
    assert pool(states, lengths, "first").tolist() == [[1.0], [2.0]]
    assert pool(states, lengths, "last").tolist() == [[3.0], [9.0]]


@pytest.mark.parametrize(
    ("name", "pooling", "query", "passage"),
    [
        ("intfloat/e5-base-v2", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large", "mean", "query: ", "passage: "),
        ("BAAI/bge-base-en-v1.5", "first", "Represent this sentence for searching relevant passages: ", ""),
        ("BAAI/bge-m3", "first", "", ""),
        ("thenlper/gte-large", "mean", "", ""),
        ("Alibaba-NLP/gte-base-en-v1.5", "first", "", ""),
        (
            "Qwen/Qwen3-Embedding-0.6B",
            "last",
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "",
        ),
    ],
)
def test_settings_of_known_families(name, pooling, query, passage):
    settings = find_settings(name)
    assert (settings.pooling, settings.query_prefix, settings.passage_prefix) == (pooling, query, passage)
    assert settings.normalize
    assert find_settings(name, max_length=128).max_length == 128


def repository(folder, pooling, *, modules=("Transformer", "Pooling"), prompts=None, length=256):
    """The files of a repository that sentence-transformers reads."""
    (folder / "1_Pooling").mkdir(parents=True)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    (folder / "modules.json").write_text(
        json.dumps([{"path": paths.get(m, "9"), "type": f"sentence_transformers.models.{m}"} for m in modules])
    )
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    return folder


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_settings_are_read_from_files_of_sentence_transformers(tmp_path, pooling, expected):
    folder = repository(
        tmp_path / "my-model",
        pooling,
        modules=("Transformer", "Pooling", "Normalize"),
        prompts={"query": "q: ", "document": "d: "},
    )
    assert find_settings(folder) == EncoderSettings(expected, "q: ", "d: ", normalize=True, max_length=256)
    plain = repository(tmp_path / "plain", pooling)
    assert find_settings(plain) == EncoderSettings(expected, normalize=False, max_length=256)


@pytest.mark.parametrize("path", ["./nonesuch", "/nonesuch/e5-base"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"The embedding model: there is no folder '{path}'"):
        TextEncoder(path)


def test_unknown_models_need_a_pooling(tmp_path):
    with pytest.raises(ValueError, match=r"my-model' makes a vector .* Give `pooling` \('mean', 'first' or 'last'\)"):
        find_settings(tmp_path / "my-model")
    assert find_settings(tmp_path / "my-model", pooling="last") == EncoderSettings("last")
    with pytest.raises(ValueError, match=r"not supported: \['Dense'\]"):
        find_settings(
            repository(tmp_path / "dense", {"pooling_mode": "mean"}, modules=("Transformer", "Pooling", "Dense"))
        )
    with pytest.raises(ValueError, match=r"pooling of the embedding model .* is not supported: .*'max'"):
        find_settings(repository(tmp_path / "max", {"pooling_mode": "max"}))
    with pytest.raises(ValueError, match=r"`pooling` must be one of \['mean', 'first', 'last'\], got 'cls'"):
        find_settings("intfloat/e5-base-v2", pooling="cls")


def test_a_loaded_model_needs_a_tokenizer_and_a_pooling(bert):
    model, tokenizer = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    with pytest.raises(ValueError, match="`tokenizer` is required"):
        TextEncoder(model)
    with pytest.raises(ValueError, match="`pooling` is required"):
        TextEncoder(model, tokenizer)
    encoder = TextEncoder(model, tokenizer, pooling="mean")
    np.testing.assert_allclose(encoder.encode_queries(["emma"])[0], reference(bert, "emma", "mean"), atol=1e-5)


def test_the_fingerprint_changes_with_the_settings_and_not_with_the_type(bert):
    encoder = TextEncoder(bert, device="cpu")
    assert encoder.fingerprint == TextEncoder(bert, device="cpu", dtype=torch.bfloat16).fingerprint
    assert encoder.fingerprint != TextEncoder(bert, device="cpu", pooling="first").fingerprint
