"""Encoders of texts for tests: a tiny BERT, and one that counts words."""

import zlib

import numpy as np
import torch
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
