"""Encoders of texts for tests: a tiny BERT, static embeddings, and one that counts words."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = "query passage represent emma austen novel jane steventon paris rome capital of france italy who wrote the is".split()


def make_bert(folder, *, dimensions=32):
    """Save a tiny BERT with random weights and a tokenizer of words."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ":", '"', ".", "?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dimensions,
        intermediate_size=2 * dimensions,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_static(folder, *, package="model2vec", dimensions=32, normalize=True, tensors=None, words=(*WORDS, "?", ".")):
    """Save static embeddings as model2vec or sentence-transformers do, with a tokenizer of words. Return their table."""
    inner = Path(folder) / ("" if package == "model2vec" else "0_StaticEmbedding")
    inner.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(words[3], 4)]  # added to texts by other users of the tokenizer
    backend.post_processor = processors.TemplateProcessing(single=f"{words[3]} $A", special_tokens=special)
    backend.save(str(inner / "tokenizer.json"))
    table = torch.randn(len(vocabulary), dimensions, generator=torch.Generator().manual_seed(0))
    name = "embeddings" if package == "model2vec" else "embedding.weight"
    save_file(tensors or {name: table}, inner / "model.safetensors")
    kinds = [
        ("StaticEmbedding", inner.name if inner != Path(folder) else "."),
        *([("Normalize", "1")] if normalize else []),
    ]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (Path(folder) / "modules.json").write_text(json.dumps(modules))
    if package == "model2vec":
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": normalize}))
    return table.numpy()


class CountingEncoder:
    """Vectors of random directions, one for each word. Counts the passages that it encodes, and may fail after some."""

    def __init__(self, dimensions=64, seed=0, fails_after=None):
        self.dimensions, self.seed, self.fails_after = dimensions, seed, fails_after
        self.encoded = 0
        self.fingerprint = f"counting {seed}"

    def encode_queries(self, queries):
        vectors = np.stack([sum(map(self._word, text.lower().split()), np.zeros(self.dimensions)) for text in queries])
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def encode_passages(self, passages):
        if len(passages) > 3:  # a few are encoded to check an index
            self.encoded += len(passages)
            if self.fails_after is not None and self.encoded > self.fails_after:
                raise KeyboardInterrupt
        return self.encode_queries([f"{passage.title} {passage.text}" for passage in passages])

    def _word(self, word):
        return np.random.default_rng([self.seed, zlib.crc32(word.encode())]).standard_normal(self.dimensions)
