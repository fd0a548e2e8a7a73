"""A tiny Qwen2 with random weights, and a byte-level tokenizer that splits words and numbers like Qwen's tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

#: Regular expression of Qwen's tokenizer, without the rule for English contractions.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def make_tokenizer(
    texts: Iterable[str], vocab_size: int, added: Sequence[str], special: Sequence[str] = (PAD, END)
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer.

    Args:
        texts (`Iterable[str]`):
            Training texts.
        vocab_size (`int`):
            Maximum number of tokens, without added tokens.
        added (`Sequence[str]`):
            Words to add as one token each. They are not special, so decoding keeps them.
        special (`Sequence[str]`, *optional*, defaults to `(PAD, END)`):
            Special tokens, in the order of their ids.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def make_model(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, seed: int, **options: Any
) -> Qwen2ForCausalLM:
    """
    Make a model with random weights.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that determines the size of the vocabulary.
        hidden_size (`int`):
            Hidden size, a multiple of 32 (the size of an attention head).
        layers (`int`):
            Number of layers.
        seed (`int`):
            Seed of the weights.
        options (`Any`):
            Additional fields of [`~transformers.Qwen2Config`].
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **options,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)
