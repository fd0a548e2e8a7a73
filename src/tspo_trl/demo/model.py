"""A tokenizer of whole words and a tiny language model, made without any download."""

from collections.abc import Iterable
from itertools import chain

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..rollout.protocol import NOTHING_FOUND
from ..rollout.tags import HINT
from . import world as words

_TAGS = ("<think>", "</think>", "<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>")
_FRAMES = (
    "Question: Who wrote x? Where was the author of x born? In which country was x born? In which country is x?",
    "Which language do people speak in x? is a novel by x. is a writer born in x. is a city in x. is a country where.",
    "Doc 1 (Title: x) Doc 2 (Title: x) Doc 3 (Title: x) Doc 4 Doc 5\n",
)


def make_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """
    Make a tokenizer with one token for each word of the encyclopedia and for each tag of the protocol.

    Args:
        texts (`Iterable[str]`, *optional*):
            Texts whose words also become tokens. All other words become `<unk>`.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: A tokenizer without a chat template, which pads on the left.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    lists = (v for name, v in sorted(vars(words).items()) if name.startswith("_") and isinstance(v, list))
    known = chain((" ".join(v) for v in lists), _FRAMES, (HINT, NOTHING_FOUND), texts)
    vocabulary = {"<unk>": 0, "<pad>": 1, "<eos>": 2}
    for text in known:
        for token, _ in pre_tokenizer.pre_tokenize_str(text):
            vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in _TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(
    tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, hidden_size: int = 128, num_layers: int = 3
) -> LlamaForCausalLM:
    """
    Make a small untrained Llama in float32, with about 0.6 million parameters by default.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights.
        hidden_size (`int`, *optional*, defaults to `128`):
            Size of the hidden states.
        num_layers (`int`, *optional*, defaults to `3`):
            Number of layers.
    """
    # Not Qwen2: AutoTokenizer would load any tokenizer of a Qwen2 model as Qwen's own
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with the usual 0.02, this narrow model needs four times as many steps to learn copying
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
