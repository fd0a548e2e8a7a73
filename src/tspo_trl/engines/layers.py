"""Layers of a cache whose rows and columns can be moved: keys and values of all tokens, and states of recurrent layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

#: Number of unused columns that a layer allocates when it grows, if this many can be needed. A long layer allocates a quarter
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
        rows (`int` or `None`):
            Number of rows, if the passes to come read tokens of the first rows only. In the others, they leave padding.
        attended (`bool`):
            Whether the last call of attention used `keys` and `values` unchanged, see [`attending_to`].
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit: int | None = None
        self.rows: int | None = None
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
        """Append keys and values of shape (B, H, T, D). Returns views of their rows' keys and values after the prefix."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = super().get_seq_length()
        end, read = start + key_states.shape[2], len(key_states)
        rows = read if self.rows is None else self.rows
        if self._buffers is None or end > self._buffers[0].shape[2]:
            columns = self._columns_for(end)
            self._buffers = (
                _enlarged(self.keys, start, key_states, rows, columns),
                _enlarged(self.values, start, value_states, rows, columns),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:read, :, start:end] = states
            if read < rows:
                buffer[read:, :, start:end] = 0  # padding is masked, but must be finite
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return (self.keys, self.values) if read == rows else (self.keys[:read], self.values[:read])

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
    the same columns in all rows. The mask leaves tokens out, see [`masks_by_position`].

    Args:
        window (`int`):
            Number of tokens of a window, or of a chunk.

    Attributes:
        first (`int`):
            The first column that attention gets: no token of the next pass attends to the columns before.
    """

    is_sliding = True

    def __init__(self, window: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window
        self.first = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that attention gets, and the number of those before them."""
        length, offset = super().get_mask_sizes(query_length)
        return length - self.first, offset + self.first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of shape (B, H, T, D). Returns views of those that attention gets."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, self.first :], values[:, :, self.first :]


def _enlarged(stored: torch.Tensor, start: int, states: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A buffer with this many rows and columns, in the form of `states`, that begins with the `start` columns stored so far."""
    buffer = states.new_empty(rows, states.shape[1], columns, states.shape[3])
    if start:
        buffer[:, :, :start] = stored
    return buffer


class RowStates:
    """
    The part of a layer that holds one state per row. A pass may read tokens of the first rows only, see [`restrict`].
    Models write states in place.
    """

    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]
    _whole: Sequence[torch.Tensor] = ()  # the states of all rows, while the next pass reads the first rows only

    @property
    def states(self) -> list[torch.Tensor]:
        """The states of the layer, of shape (B, ...) each. Empty before the first pass."""
        return [state for _, _, state in self._entries()]

    @states.setter
    def states(self, states: Iterable[torch.Tensor]) -> None:
        for (part, index, _), state in zip(list(self._entries()), states, strict=True):
            part[index] = state

    def _entries(self) -> Iterator[tuple[dict[int, torch.Tensor | None], int, torch.Tensor]]:
        for part in (self.conv_states, self.recurrent_states):
            for index, state in part.items():
                if state is not None:
                    yield part, index, state

    def restrict_states(self, rows: int, total: int) -> None:
        """Let the next pass read tokens of the first `rows` of `total` rows. States that do not exist yet are zeros."""
        whole = []
        for read, stored in zip(self.states, self._whole or self.states, strict=True):
            if len(stored) < total:
                stored = torch.cat([stored, stored.new_zeros(total - len(stored), *stored.shape[1:])])
            if read.data_ptr() != stored.data_ptr():
                stored[: len(read)] = read
            whole.append(stored)
        self.states = [stored[:rows] for stored in whole]
        self._whole = whole if rows < total else ()

    def select_states(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Copies of the states of these rows, in this order."""
        return [state.index_select(0, indices.to(state.device)) for state in self.states]


class StateLayer(RowStates, LinearAttentionLayer):
    """A layer that holds a state instead of keys and values."""

    is_compileable = False  # so that `generate` does not make masks for a compiled model

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select these rows, in this order. A row may be selected several times."""
        self.states = self.select_states(indices)


class HybridLayer(RowStates, GrowingLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """A layer that holds a state as well as keys and values."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select these rows, in this order. A row may be selected several times."""
        super().batch_select_indices(indices)
        self.states = self.select_states(indices)


class HybridWindowLayer(HybridLayer, WindowLayer):  # type: ignore[misc, override]
    """A layer that holds a state, and keys and values for a sliding window."""


def growing_layers(cache: Cache) -> list[GrowingLayer]:
    """The layers of a cache that hold keys and values."""
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]


def state_layers(cache: Cache) -> list[RowStates]:
    """The layers of a cache that hold states."""
    return [layer for layer in cache.layers if isinstance(layer, RowStates)]


def window_layers(cache: Cache) -> list[WindowLayer]:
    """The layers of a cache whose attention is local, so that masks depend on positions."""
    return [layer for layer in cache.layers if isinstance(layer, WindowLayer)]


def is_plain(cache: Cache) -> bool:
    """Whether all layers of a cache are of full attention."""
    return all(type(layer) is GrowingLayer for layer in cache.layers)
