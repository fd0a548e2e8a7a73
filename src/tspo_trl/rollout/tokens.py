"""What the protocols need to know about a tokenizer."""

import copy
import json
import re
import unicodedata
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r".*[<>].*|[\[{|].*[\]}|]", re.DOTALL)
_WORD = re.compile(r"[\w\s'’.,\-▁]+")


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


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    The added tokens that may mean more than their text: special tokens, tokens that look like markup (`<think>`, `[INST]`),
    and tokens of the chat template that are not words. Words that were added to the vocabulary are ordinary text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `list[str]`: The tokens, longest first. Single characters and white space are left out.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    template = str(tokenizer.chat_template or "")
    tokens = [
        token
        for token in tokenizer.get_added_vocab()
        if len(token.strip()) > 1
        and (token in special or _MARKUP.fullmatch(token.strip()) or (token in template and not _WORD.fullmatch(token)))
    ]
    return sorted(tokens, key=len, reverse=True)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """
    The special tokens that a tokenizer puts before every text, such as BOS.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `list[int]`: The tokens, or `None` if they cannot be distinguished from the text.
    """
    whole: list[int] = tokenizer("a")["input_ids"]
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = [n for n in range(len(whole) - len(text) + 1) if text and whole[n : n + len(text)] == text]
    return whole[: starts[0]] if starts else None


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Whether a tokenizer puts a space before every text that it encodes, as SentencePiece does.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return bool(tokens) and str(tokens[0]).startswith(("▁", "Ġ"))


class Normalizer:
    """
    The changes that a tokenizer makes to text before it splits it into tokens: NFKC, lower case and others.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. NFKC is assumed if it is not a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer: Any = None if backend is None else backend.normalizer
        self._is_known = backend is not None
        self._before, _, self._after = self("xx").partition("xx")

    def __call__(self, text: str) -> str:
        """The text as the tokenizer changes it."""
        if self._normalizer is not None:
            return str(self._normalizer.normalize_str(text))
        return text if self._is_known else unicodedata.normalize("NFKC", text)

    def to_ascii(self, text: str) -> str:
        """The text with the characters that the tokenizer turns into ASCII, or removes, already replaced."""
        return text.translate({ord(char): self._char(char) for char in set(text) if not char.isascii()})

    def to_text(self, text: str) -> str:
        """The text as the tokenizer changes it, with plain spaces."""
        return self(text).removeprefix(self._before).replace("▁", " ")

    def _char(self, char: str) -> str:
        """A character as the tokenizer changes it between letters, if that is ASCII."""
        text = self(f"x{char}x").removeprefix(self._before).removesuffix(self._after)
        inner = text[1:-1]
        return inner if text == f"x{inner}x" and inner.isascii() else char
