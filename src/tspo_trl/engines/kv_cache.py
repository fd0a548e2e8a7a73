"""Key-value caches that are kept between turns, so that no context is read twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .masks import SUPPORTED
from .shared_prefix import Prefix

#: Name of the cache among the arguments of `generate`, which transformers 5.24 has changed
CACHE_NAME = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)
#: Number of unused columns that a layer allocates when it grows, if so many can be needed. A long layer allocates a quarter
SPARE = 128


class GrowingLayer(DynamicLayer):
    """
    A layer of a cache whose buffers have spare columns: appending a token does not copy the tokens before it. A prefix that
    all rows share is stored separately, once.

    Under autocast, keys and values are stored in its type, because attention would convert all of them for every token.

    Attributes:
        limit (`int` or `None`):
            Number of columns, without those of the prefix, that the rows have in the end. No more are allocated.
        prefix (`tuple[torch.Tensor, torch.Tensor]` or `None`):
            Keys and values that all rows share, of shape (1, H, P, D). `keys` and `values` hold the columns after them.
        attended (`bool`):
            Whether the last call of attention used `keys` and `values` unchanged, see [`attending_to`].
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.limit: int | None = None
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attended = False
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_seq_length(self) -> int:
        """Number of columns of a row, including those of the prefix."""
        return super().get_seq_length() + (0 if self.prefix is None else self.prefix[0].shape[2])

    def share(self) -> None:
        """Turn the keys and values of the only row into the prefix of all rows."""
        self.prefix = (self.keys.clone(), self.values.clone())
        self.replace(self.keys[:, :, :0], self.values[:, :, :0])

    def clear(self) -> None:
        """Remove all keys and values, including the prefix."""
        self.__init__()  # type: ignore[misc]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of shape (B, H, T, D). Returns views of all keys and values after the prefix."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = super().get_seq_length()
        end = start + key_states.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            columns = self._columns_for(end)
            self._buffers = (
                _enlarged(self.keys, start, key_states, columns),
                _enlarged(self.values, start, value_states, columns),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _columns_for(self, end: int) -> int:
        """Number of columns to allocate for `end` columns. Few sizes, because a GPU keeps the memory of each for reuse."""
        columns = end + max(SPARE, end // 4)
        return columns if self.limit is None else max(end, min(columns, self.limit))

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the keys and values after the prefix, by tensors of shape (B, H, L, D)."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._buffers = keys, values, None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select these rows, in this order. A row may be selected several times."""
        indices = indices.to(self.keys.device)
        end, columns = self.keys.shape[2], self._columns_for(self.keys.shape[2])

        def selected(stored: torch.Tensor) -> torch.Tensor:
            buffer = stored.new_empty(len(indices), stored.shape[1], columns, stored.shape[3])
            torch.index_select(stored, 0, indices, out=buffer[:, :, :end])
            return buffer

        self._buffers = (selected(self.keys), selected(self.values))
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


class WindowLayer(GrowingLayer):
    """
    A layer whose attention has a sliding window or chunks. It keeps all columns, because the tokens of a window are not in
    the same columns in all rows. Only the mask leaves tokens out, see [`masks_by_position`].
    """


def _enlarged(stored: torch.Tensor, start: int, states: torch.Tensor, columns: int) -> torch.Tensor:
    """A buffer with this many columns, in the form of `states`, that begins with the `start` columns stored so far."""
    buffer = states.new_empty(*states.shape[:2], columns, states.shape[3])
    if start:
        buffer[:, :, :start] = stored
    return buffer


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """
    Keys and values of R rows of a batch.

    Args:
        rows (`list[int]`):
            Indices of the rows in the batch.
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of every layer that has some, of shape (R, H, L, D), without a shared prefix.
        valid (`torch.Tensor`):
            Which of the L columns hold a token instead of padding, booleans of shape (R, L).
    """

    rows: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeptCache:
    """
    Keys and values of the tokens that rollouts have read and written so far.

    Args:
        blocks (`list[CacheBlock]`):
            The caches: one for the rows that stayed in the batch until the end, and one for each set of rows that left
            earlier.
        numbers (`Sequence[int]`):
            The number of the rollout in each row of the batch.
        contexts (`Sequence[list[int]]`):
            The tokens of each rollout that are in the cache, including those of its last turn.
        prefix (`Prefix`):
            Keys and values of the shared prefix, for every layer. Empty if there is none.
    """

    blocks: list[CacheBlock]
    numbers: Sequence[int]
    contexts: Sequence[list[int]]
    prefix: Prefix

    @property
    def prefix_length(self) -> int:
        """Number of tokens in the shared prefix."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def move(self, cache: DynamicCache, numbers: Sequence[int], contexts: Sequence[list[int]]) -> list[int] | None:
        """
        Move the keys and values of some rollouts into an empty cache, if their contexts continue the kept ones. Rows are
        padded on the left, after the shared prefix.

        Args:
            cache ([`~transformers.DynamicCache`]):
                An empty cache, see [`new_cache`]. It receives R rows, each as long as the longest.
            numbers (`Sequence[int]`):
                Numbers of R rollouts.
            contexts (`Sequence[list[int]]`):
                Their R contexts.

        Returns:
            `list[int]` or `None`: The number of tokens of each context that the cache now holds; this object is empty
            afterwards. `None` if a context does not continue the kept one; nothing is moved then.
        """
        # Check that every context continues the kept one
        row_of = {number: row for row, number in enumerate(self.numbers)}
        for number, context in zip(numbers, contexts, strict=True):
            if number not in row_of:
                return None
            tokens = self.contexts[row_of[number]]
            if len(context) <= len(tokens) or context[: len(tokens)] != tokens:
                return None

        # Plan which rows and columns of each block become which rows of the cache
        lengths = [len(self.contexts[row_of[number]]) for number in numbers]
        own = [length - self.prefix_length for length in lengths]
        targets = {row_of[number]: target for target, number in enumerate(numbers)}
        moves = [move for block in self.blocks if (move := _Move.plan(block, targets, own)) is not None]

        # Move layer by layer, so that at most one layer is in memory twice
        for i, layer in enumerate(growing_layers(cache)):
            layer.replace(*(self._gather(moves, len(numbers), max(own), i, part) for part in (0, 1)))
            layer.prefix = self.prefix[i] if self.prefix else None
            for block in self.blocks:
                block.layers[i] = (torch.empty(0), torch.empty(0))
        return lengths

    @staticmethod
    def _gather(moves: "list[_Move]", rows: int, width: int, layer: int, part: int) -> torch.Tensor:
        """Keys or values (part 0 or 1) of a layer of the next batch, of shape (rows, H, width, D)."""
        if len(moves) == 1:  # it contains all rows, in their order
            return moves[0].read(layer, part)
        # Padding is masked, but must be finite
        stored = moves[0].block.layers[layer][part]
        gathered = stored.new_zeros(rows, stored.shape[1], width, stored.shape[3])
        for move in moves:
            gathered[move.target.to(stored.device), :, width - move.columns.shape[1] :] = move.read(layer, part)
        return gathered


@dataclass(frozen=True, slots=True)
class _Move:
    """Rows of a block, and the rows of the next batch that they become, in ascending order of the latter."""

    block: CacheBlock
    source: torch.Tensor  # (R,)
    columns: torch.Tensor  # (R, W): columns of padding first, then those of the tokens in their order
    target: torch.Tensor  # (R,)

    @classmethod
    def plan(cls, block: CacheBlock, targets: dict[int, int], lengths: Sequence[int]) -> "_Move | None":
        """The rows of a block that continue. `targets` maps rows of the last batch to rows of the next one."""
        continued = [(i, targets[row]) for i, row in enumerate(block.rows) if row in targets]
        continued.sort(key=lambda move: move[1])
        if not continued:
            return None
        source, target = (torch.tensor(part, device=block.valid.device) for part in zip(*continued, strict=True))
        width = max(lengths[row] for _, row in continued)
        # A stable sort moves padding to the left and leaves the order of the tokens as it is
        columns = block.valid[source].byte().argsort(dim=1, stable=True)[:, -width:]
        return cls(block, source, columns, target)

    def read(self, layer: int, part: int) -> torch.Tensor:
        """Keys or values (part 0 or 1) of a layer, of shape (R, H, W, D)."""
        stored = self.block.layers[layer][part]
        heads = torch.arange(stored.shape[1], device=stored.device)[:, None]
        return stored[self.source.to(stored.device)[:, None, None], heads, self.columns.to(stored.device)[:, None]]


def growing_layers(cache: Cache) -> list[GrowingLayer]:
    """The layers of a cache that hold keys and values."""
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]


def has_windows(cache: Cache) -> bool:
    """Whether attention is local in some layers of a cache, so that masks depend on positions."""
    return any(isinstance(layer, WindowLayer) for layer in cache.layers)


#: The layer that takes the place of each kind of layer of `transformers`
_LAYERS: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: WindowLayer}
if hasattr(cache_utils, "DummyLayer"):  # of layers that have nothing to keep, since transformers 5.16
    _LAYERS[cache_utils.DummyLayer] = cache_utils.DummyLayer


def why_not_kept(model: PreTrainedModel) -> str | None:
    """
    Find out whether the cache of a model can be kept between turns, from its configuration.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, possibly wrapped by PEFT.

    Returns:
        `str` or `None`: Why it cannot be kept. `None` if it can.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt tuning adds columns before those of the tokens"
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers} - {kind.__name__ for kind in _LAYERS})
    if others or not layers:
        return f"its cache has layers of the type {', '.join(others)}" if others else "its cache has no layers"
    if any(type(layer) is DynamicSlidingWindowLayer for layer in layers):
        attention = config._attn_implementation
        if attention not in SUPPORTED:
            return f"attention of the type {attention} takes no masks for sliding windows; {' and '.join(SUPPORTED)} do"
        if "longrope" in str(getattr(config, "rope_parameters", None)):
            return "its rotary positions (longrope) change with the length of the context"
    return None


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """
    Create an empty cache whose rows and columns can be moved.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, possibly wrapped by PEFT.

    Returns:
        [`~transformers.DynamicCache`] or `None`: The cache. `None` if the columns of the model's cache cannot be moved, see
        [`why_not_kept`].
    """
    if why_not_kept(model) is not None:
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [_LAYERS[type(layer)]() for layer in cache.layers]
    return cache
