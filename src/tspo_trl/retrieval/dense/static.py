"""Static embeddings: models that have one vector for each token, as model2vec and sentence-transformers save them."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PretrainedConfig
from transformers.utils import cached_file

from .settings import STATIC, read_json, read_modules


class StaticConfig(PretrainedConfig):
    """The size of static embeddings."""

    model_type = "static"
    vocab_size: int = 0
    hidden_size: int = 0


class StaticModel(torch.nn.Module):
    """
    Looks up the vectors of tokens. It stands in for a model of `transformers` in [`TextEncoder`], which averages them.

    Args:
        table (`torch.Tensor`):
            The vectors, of shape (V, D).
    """

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(table.float())
        self.config = StaticConfig(vocab_size=table.shape[0], hidden_size=table.shape[1])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """The vectors of tokens: `last_hidden_state` of shape (B, T, D)."""
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


class StaticTokenizer:
    """
    A tokenizer without special tokens. It stands in for one of `transformers` in [`TextEncoder`].

    Args:
        tokenizer (`tokenizers.Tokenizer`):
            The tokenizer.
        skipped (`int`, *optional*):
            A token that is left out, for unknown words.
    """

    pad_token_id, eos_token_id = 0, None

    def __init__(self, tokenizer: Tokenizer, skipped: int | None):
        self.tokenizer, self.skipped = tokenizer, skipped
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def __call__(
        self, texts: Sequence[str], *, truncation: bool = False, max_length: int | None = None, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        """The tokens of texts, under `input_ids`."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [[token for token in row.ids if token != self.skipped] for row in encoded]
        return {"input_ids": [row[:max_length] for row in rows] if truncation else rows}


def load_static(model: str) -> tuple[StaticModel, StaticTokenizer] | None:
    """
    Load the static embeddings of a repository.

    Args:
        model (`str`):
            Name of a repository on the Hub, or a local folder.

    Returns:
        `tuple[StaticModel, StaticTokenizer]` or `None`: `None` if the repository is of another kind.

    Raises:
        `ValueError`: If the file of the embeddings is malformed.
        `OSError`: If a file is missing.
    """
    of_model2vec = (read_json(model, "config.json") or {}).get("model_type") == "model2vec"
    folder = "" if of_model2vec else read_modules(model).get(STATIC)
    if folder is None:
        return None
    prefix = f"{folder}/" if folder.strip(".") else ""
    weights, words = (cached_file(model, prefix + name) for name in ("model.safetensors", "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(words))
    table = _read_table(load_file(str(weights)), str(weights))
    if tokenizer.get_vocab_size() > len(table):
        raise ValueError(
            f"{weights} has vectors of {len(table)} tokens, the tokenizer has {tokenizer.get_vocab_size()}."
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    return StaticModel(table), StaticTokenizer(
        tokenizer, tokenizer.token_to_id(unknown) if of_model2vec and unknown else None
    )


def _read_table(tensors: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
    """The vectors of all tokens. Newer files of model2vec have weights of tokens, and rows that several tokens share."""
    names = [name for name in ("embeddings", "embedding.weight") if name in tensors]
    if not names:
        raise ValueError(f"{path} has no tensor 'embeddings' or 'embedding.weight', but {sorted(tensors)}.")
    table = tensors[names[0]].float()
    if "mapping" in tensors:
        table = table[tensors["mapping"].long()]
    return table * tensors["weights"].float()[:, None] if "weights" in tensors else table
