"""Encoders: texts become vectors, as an embedding model of the Hub was trained to make them."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ...support.devices import default_device
from ..base import Passage

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "first", "last"]


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


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """
    How an embedding model makes a vector of a text.

    Args:
        pooling (`str`):
            The hidden states that become the vector: `"mean"` (of all tokens), `"first"` or `"last"` (token).
        query_prefix (`str`, *optional*, defaults to `""`):
            Text before a query.
        passage_prefix (`str`, *optional*, defaults to `""`):
            Text before a passage.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether vectors have length 1, so that inner products are cosines.
        max_length (`int`, *optional*, defaults to `512`):
            Number of tokens after which a text is cut, special tokens included.
        append_eos (`bool`, *optional*, defaults to `False`):
            Whether the end-of-sequence token is appended to a text that lacks it.
    """

    pooling: Pooling
    query_prefix: str = ""
    passage_prefix: str = ""
    normalize: bool = True
    max_length: int = 512
    append_eos: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"`pooling` must be one of {list(get_args(Pooling))}, got {self.pooling!r}.")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")


_WEB_TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
_BGE_TASK = "Represent this sentence for searching relevant passages: "
# The beginning of a model's name (without its owner) -> its settings, from the cards of these models. The first one counts
_KNOWN: tuple[tuple[str, EncoderSettings], ...] = (
    ("qwen3-embedding", EncoderSettings("last", query_prefix=_WEB_TASK, max_length=8192, append_eos=True)),
    ("multilingual-e5-large-instruct", EncoderSettings("mean", query_prefix=f"{_WEB_TASK} ")),
    ("multilingual-e5", EncoderSettings("mean", query_prefix="query: ", passage_prefix="passage: ")),
    ("e5-", EncoderSettings("mean", query_prefix="query: ", passage_prefix="passage: ")),
    ("bge-m3", EncoderSettings("first", max_length=8192)),
    ("bge-small-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("bge-base-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("bge-large-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("gte-qwen2", EncoderSettings("last", query_prefix=f"{_WEB_TASK} ", max_length=8192, append_eos=True)),
    ("gte-multilingual", EncoderSettings("first", max_length=8192)),
    ("gte-base-en-v1.5", EncoderSettings("first", max_length=8192)),
    ("gte-large-en-v1.5", EncoderSettings("first", max_length=8192)),
    ("gte-", EncoderSettings("mean")),
)


def find_settings(model: str | Path, **options: Any) -> EncoderSettings:
    """
    Find out how an embedding model is used: from a list of known families (E5, BGE, GTE, Qwen3-Embedding), else from the
    files of its repository that sentence-transformers reads.

    Args:
        model (`str` or `Path`):
            Name of a repository on the Hub, or a local folder.
        **options:
            Settings to use instead of those found, see [`EncoderSettings`].

    Returns:
        [`EncoderSettings`]: The settings.

    Raises:
        `ValueError`: If the model is not known, has no such files, and `pooling` is not given.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else str(model).rpartition("/")[2]
    for start, settings in _KNOWN:
        if name.lower().startswith(start):
            return replace(settings, **options)
    found = _read_repository(str(model))
    if found is not None:
        return replace(found, **options)
    if "pooling" in options:
        return EncoderSettings(**options)
    raise ValueError(
        f"How {str(model)!r} makes a vector of a text is not known: it is not of the families E5, BGE, GTE or "
        "Qwen3-Embedding, and has no file `modules.json` of sentence-transformers. Give `pooling` ('mean', 'first' or "
        "'last') and, if its card names them, `query_prefix` and `passage_prefix`."
    )


class TextEncoder:
    """
    Encodes texts with an embedding model of `transformers`.

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
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("`tokenizer` is required with a loaded model.")
            if "pooling" not in settings:
                raise ValueError("`pooling` is required with a loaded model: 'mean', 'first' or 'last'.")
            self.settings = EncoderSettings(**settings)
            self.device = model.device if device is None else torch.device(device)
            self.model, self.name = model.to(self.device), model.name_or_path or type(model).__name__  # type: ignore[arg-type]
        else:
            self.settings = find_settings(model, **settings)
            self.device = default_device() if device is None else torch.device(device)
            dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
            self.model = AutoModel.from_pretrained(model, dtype=dtype).to(self.device)
            self.name = str(model)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        self.model.eval()
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` must be at least 1, got {batch_tokens}.")
        self.batch_tokens = batch_tokens
        self._warned = False

    def __repr__(self) -> str:
        return f"TextEncoder({self.name!r}, pooling={self.settings.pooling!r})"

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
        Encode passages, see [`Encoder`]. A passage that is longer than `max_length` is cut; this is reported once.

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
        # A text has at least one token for 64 characters in natural language: no more is encoded and thrown away
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


def _read_repository(model: str) -> EncoderSettings | None:
    """The settings in the files of sentence-transformers. `None` if there are none."""
    modules = _read_json(model, "modules.json")
    if not isinstance(modules, list):
        return None
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if "Pooling" not in kinds:
        return None
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"The embedding model {model!r} has modules that are not supported: {sorted(unknown)}. Write an encoder of your "
            "own with sentence-transformers, see `Encoder`."
        )
    pooling = _read_json(model, f"{kinds['Pooling']}/config.json") or {}
    # Older versions write one flag for each mode, newer ones the name of the mode
    flags = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    names = {"mean": "mean", "cls": "first", "lasttoken": "last"}
    given = [name for flag, name in flags.items() if pooling.get(f"pooling_mode_{flag}")]
    given = given or [names[mode] for mode in [pooling.get("pooling_mode")] if mode in names]
    if len(given) != 1:
        raise ValueError(f"The pooling of the embedding model {model!r} is not supported: {pooling}.")
    prompts: Mapping[str, str] = (_read_json(model, "config_sentence_transformers.json") or {}).get("prompts") or {}
    length = (_read_json(model, "sentence_bert_config.json") or {}).get("max_seq_length") or 512
    return EncoderSettings(
        cast(Pooling, given[0]),
        query_prefix=prompts.get("query") or "",
        passage_prefix=prompts.get("document") or prompts.get("passage") or "",
        normalize="Normalize" in kinds,
        max_length=int(length),
    )


def _read_json(model: str, name: str) -> Any:
    """A file of a repository, from a local folder or the Hub. `None` if it cannot be had."""
    optional = ("gated_repo", "missing_entries", "connection_errors")
    try:
        path = cached_file(model, name, **{f"_raise_exceptions_for_{kind}": False for kind in optional})
    except OSError:  # not the name of a repository: loading the model says so
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
