"""What the protocols need to know about a tokenizer."""

import copy
import json
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


def with_plain_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> PreTrainedTokenizerBase:
    """
    A tokenizer that keeps some tokens when it decodes text without special tokens. All tokens keep their ids.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It is not changed.
        tokens (`Collection[str]`):
            The tokens to keep.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The same tokenizer if none of the tokens is special, else a copy.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not tokenizer.is_fast or not special & set(tokens):
        return tokenizer
    backend: Any = tokenizer
    data = json.loads(backend.backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in tokens
    plain: Any = copy.deepcopy(tokenizer)
    plain._tokenizer = Tokenizer.from_str(json.dumps(data))
    result: PreTrainedTokenizerBase = plain
    return result
