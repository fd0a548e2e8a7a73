"""Encoders: texts become vectors, as an embedding model of the Hub was trained to make them."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...support.devices import default_device
from ...support.paths import check_place
from ..base import Passage
from .settings import EncoderSettings, Pooling, find_settings
from .static import StaticModel, load_static

logger = logging.getLogger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """
    The protocol of encoders: any object with these two methods.

    An encoder may have a string `fingerprint` that changes whenever its vectors may change. An index stores it, and is not
    opened with another encoder.
    """

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """
        Encode queries.

        Args:
            queries (`Sequence[str]`):
                Q queries.

        Returns:
            `np.ndarray`: Vectors of shape (Q, D), `float32`. The score of a passage is the inner product with its vector.
        """
        ...

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """
        Encode passages.

        Args:
            passages (`Sequence[Passage]`):
                N passages.

        Returns:
            `np.ndarray`: Vectors of shape (N, D), `float32`.
        """
        ...


class TextEncoder:
    """
    Encodes texts with an embedding model of `transformers`, or with static embeddings of `model2vec` or
    `sentence-transformers`, which have one vector for each token.

    A passage is encoded as its title in quotes, a line feed and its text, as in the corpora of Search-R1 and FlashRAG; without
    a title, as its text.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Name of a repository on the Hub, a local folder, or a loaded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Required with a loaded model.
        device (`str` or `torch.device`, *optional*):
            Where the model runs. Defaults to the accelerator if there is one.
        dtype (`torch.dtype`, *optional*):
            Type of the weights. Defaults to `float16` on an accelerator and `float32` on a CPU. A loaded model keeps its own.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Maximum number of tokens in a batch, padding included. A batch has at least one text.
        **settings:
            Settings to use instead of those found by [`find_settings`], for instance `query_prefix="query: "`. With a loaded
            model, `pooling` is required.

    Raises:
        `ValueError`: If the pooling of the model is not known, or a tokenizer is missing.

    Example:

    ```python
    encoder = TextEncoder("intfloat/e5-base-v2")
    encoder.encode_queries(["Who wrote Emma?"])  # (1, 768)
    ```
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_tokens: int = 16384,
        **settings: Any,
    ):
        self.model: PreTrainedModel | StaticModel
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("`tokenizer` is required with a loaded model.")
            if "pooling" not in settings:
                raise ValueError("`pooling` is required with a loaded model: 'mean', 'first' or 'last'.")
            self.settings = EncoderSettings(**settings)
            self.device = model.device if device is None else torch.device(device)
            self.model, self.name = model.to(self.device), model.name_or_path or type(model).__name__  # type: ignore[arg-type]
        else:
            check_place(model, "The embedding model")
            self.settings = find_settings(model, **settings)
            self.device = default_device() if device is None else torch.device(device)
            dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
            self.name, static = str(model), load_static(str(model))
            if static is not None:
                self.model, tokenizer = static[0].to(self.device), cast(PreTrainedTokenizerBase, static[1])
            else:
                self.model = AutoModel.from_pretrained(model, dtype=dtype).to(self.device)
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        self.model.eval()
        limit = _positions(self.model)
        if limit is not None and limit < self.settings.max_length:
            self.settings = replace(self.settings, max_length=limit)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` must be at least 1, got {batch_tokens}.")
        self.batch_tokens = batch_tokens
        #: Whether another process can load it again
        self.loaded_by_name = not isinstance(model, PreTrainedModel)
        self._warned = False

    def __repr__(self) -> str:
        return f"TextEncoder({self.name!r}, pooling={self.settings.pooling!r})"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def dimensions(self) -> int:
        """Number of dimensions of a vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def fingerprint(self) -> str:
        """A string that changes with the model's name, version and shape, and with the settings; not with device or type."""
        config = self.model.config.get_text_config()
        version = getattr(self.model.config, "_commit_hash", None)
        about = [asdict(self.settings), version, config.model_type, self.dimensions, config.vocab_size]
        digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return f"{Path(self.name).name} {digest}"

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """
        Encode queries, see [`Encoder`].

        Args:
            queries (`Sequence[str]`):
                Q queries.

        Returns:
            `np.ndarray`: Vectors of shape (Q, D), `float32`.
        """
        return self._encode([self.settings.query_prefix + query for query in queries])

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """
        Encode passages, see [`Encoder`]. A passage that is longer than `max_length`, or than the model has positions for, is
        cut; this is reported once.

        Args:
            passages (`Sequence[Passage]`):
                N passages.

        Returns:
            `np.ndarray`: Vectors of shape (N, D), `float32`.
        """
        return self._encode([self.settings.passage_prefix + passage_text(passage) for passage in passages])

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        if not texts:
            return vectors
        ids = self._tokenize(texts)
        for rows in _batches([len(row) for row in ids], self.batch_tokens):
            vectors[rows] = self._vectors([ids[row] for row in rows]).float().cpu().numpy()
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(
                f"{self!r} gives a vector with NaN or infinite values for the text {texts[bad][:80]!r}. If the model runs "
                "in float16, give `dtype=torch.bfloat16` or `torch.float32`."
            )
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, at most `max_length`."""
        limit = self.settings.max_length
        eos = self.tokenizer.eos_token_id if self.settings.append_eos else None
        # A text has at least one token for 64 characters in natural language: longer texts are cut before tokenizing
        encoded: list[list[int]] = self.tokenizer([text[: limit * 64] for text in texts], verbose=False)["input_ids"]
        cut = sum(len(row) > limit for row in encoded)
        if cut and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d texts have more than the %d tokens that %r encodes, and are cut. This is reported once.",
                *(cut, len(texts), limit, self),
            )
        if cut:
            encoded = self.tokenizer([t[: limit * 64] for t in texts], truncation=True, max_length=limit)["input_ids"]
        if eos is not None:
            encoded = [row if row and row[-1] == eos else [*row[: limit - 1], eos] for row in encoded]
        # A text without a token has a vector too
        return [row or [cast(int, self.tokenizer.pad_token_id)] for row in encoded]

    def _vectors(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """The vectors of a batch, of shape (B, D)."""
        width = max(map(len, rows))
        padding = cast(int, self.tokenizer.pad_token_id)
        # Padded on the right: causal models never see it, others are given the mask
        ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        vectors = pool(states, lengths, self.settings.pooling)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.settings.normalize else vectors


def pool(states: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """
    The vectors of texts from the hidden states of their tokens.

    Args:
        states (`torch.Tensor`):
            Hidden states of shape (B, T, D), padded on the right.
        lengths (`torch.Tensor`):
            Number of tokens of each text, of shape (B,).
        pooling (`str`):
            `"mean"`, `"first"` or `"last"`.

    Returns:
        `torch.Tensor`: Vectors of shape (B, D).
    """
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return (states * mask[..., None]).sum(dim=1) / lengths[:, None]


def passage_text(passage: Passage) -> str:
    """The text of a passage that is encoded: as `contents` in the corpora of Search-R1 and FlashRAG."""
    return f'"{passage.title}"\n{passage.text}' if passage.title else passage.text


def _positions(model: torch.nn.Module) -> int | None:
    """The number of tokens that a model has positions for. `None` if it takes texts of any length."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length, in batches of at most `batch_tokens` tokens with padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the first row of a batch is its longest
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
