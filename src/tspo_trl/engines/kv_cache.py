"""Keys and values that outlive a turn, so that no context is read twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .shared_prefix import Prefix

#: Columns that a layer has to spare when it grows
SPARE = 64


class GrowingLayer(DynamicLayer):
    """
    Keys and values in buffers with columns to spare: writing a token does not copy all that was written before it. What
    all rows begin with is stored apart, once.

    Attributes:
        prefix (`tuple[torch.Tensor, torch.Tensor]` or `None`):
            Keys and values that all rows have in common, of shape (1, H, P, D). `keys` and `values` are of what follows.
        attended (`bool`):
            Whether attention has last taken `keys` and `values` as they are, see [`attending_to`].
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attended = False
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_seq_length(self) -> int:
        """Columns of a row, those of the prefix included."""
        return super().get_seq_length() + (0 if self.prefix is None else self.prefix[0].shape[2])

    def share(self) -> None:
        """Make what one row has read the prefix of all rows that follow."""
        self.prefix = (self.keys.clone(), self.values.clone())
        self.hold(self.keys[:, :, :0], self.values[:, :, :0])

    def forget(self) -> None:
        """Be empty again."""
        self.__init__()  # type: ignore[misc]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of shape (B, H, T, D); return all that are no prefix, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = super().get_seq_length()
        end = start + key_states.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._buffers = (
                _with_spare(self.keys, start, key_states, end + SPARE),
                _with_spare(self.values, start, value_states, end + SPARE),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Go on from these keys and values, of shape (B, H, L, D)."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._buffers = keys, values, None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be there several times."""
        indices = indices.to(self.keys.device)
        self.hold(self.keys.index_select(0, indices), self.values.index_select(0, indices))


def _with_spare(held: torch.Tensor, start: int, states: torch.Tensor, columns: int) -> torch.Tensor:
    buffer = states.new_empty(*states.shape[:2], columns, states.shape[3])
    if start:
        buffer[:, :, :start] = held
    return buffer


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """
    What R rows of a batch have read and written.

    Args:
        rows (`list[int]`):
            The places of the rows in the batch.
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of every layer, of shape (R, H, L, D), without a shared prefix.
        valid (`torch.Tensor`):
            Which of the L columns hold a token and no padding, booleans of shape (R, L).
    """

    rows: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeptCache:
    """
    What rollouts have read and written so far.

    Args:
        blocks (`list[CacheBlock]`):
            The caches: one of the rows that were in the batch to the end of the turn, one of each lot that left before.
        numbers (`Sequence[int]`):
            The numbers of the rollouts, by their places in the batch.
        contexts (`Sequence[list[int]]`):
            What they have read, and in the turn written, as far as it is in the cache.
        prefix (`Prefix`):
            Keys and values that all of them begin with, for every layer; empty if there is no shared prefix.
    """

    blocks: list[CacheBlock]
    numbers: Sequence[int]
    contexts: Sequence[list[int]]
    prefix: Prefix

    @property
    def prefix_length(self) -> int:
        """How many tokens are stored once."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def move(self, cache: DynamicCache, numbers: Sequence[int], contexts: Sequence[list[int]]) -> list[int] | None:
        """
        Move what is kept of some rollouts into an empty cache, padded on the left (after a shared prefix), for contexts
        that go on where it ends.

        Args:
            cache ([`~transformers.DynamicCache`]):
                An empty cache, see [`new_cache`]. It gets R rows, each as long as the longest.
            numbers (`Sequence[int]`):
                R of the rollouts.
            contexts (`Sequence[list[int]]`):
                Their R contexts.

        Returns:
            `list[int]` or `None`: How many tokens of each context the cache now holds, or `None` if a context does not go
            on where the cache ends: then nothing was moved. Otherwise nothing is kept any more.
        """
        places = {number: place for place, number in enumerate(self.numbers)}
        for number, context in zip(numbers, contexts, strict=True):
            if number not in places:
                return None
            tokens = self.contexts[places[number]]
            if len(context) <= len(tokens) or context[: len(tokens)] != tokens:
                return None
        lengths = [len(self.contexts[places[number]]) for number in numbers]
        own = [length - self.prefix_length for length in lengths]
        targets = {places[number]: target for target, number in enumerate(numbers)}
        moves = [move for block in self.blocks if (move := _Move.of(block, targets, own)) is not None]
        for i, layer in enumerate(cache.layers):
            assert isinstance(layer, GrowingLayer)
            layer.hold(*(self._gather(moves, len(numbers), max(own), i, part) for part in (0, 1)))
            layer.prefix = self.prefix[i] if self.prefix else None
            for block in self.blocks:  # so that never more than one layer is there twice
                block.layers[i] = (torch.empty(0), torch.empty(0))
        return lengths

    @staticmethod
    def _gather(moves: "list[_Move]", rows: int, width: int, layer: int, part: int) -> torch.Tensor:
        if len(moves) == 1:  # of all rows, in their order
            return moves[0].read(layer, part)
        # Padding is masked, but must be finite
        held = moves[0].block.layers[layer][part]
        gathered = held.new_zeros(rows, held.shape[1], width, held.shape[3])
        for move in moves:
            gathered[move.target.to(held.device), :, width - move.columns.shape[1] :] = move.read(layer, part)
        return gathered


@dataclass(frozen=True, slots=True)
class _Move:
    """Some rows of a block, and which rows of the next batch they become, in ascending order."""

    block: CacheBlock
    source: torch.Tensor  # (R,)
    columns: torch.Tensor  # (R, W): padding first, then the tokens in their order
    target: torch.Tensor  # (R,)

    @classmethod
    def of(cls, block: CacheBlock, targets: dict[int, int], lengths: Sequence[int]) -> "_Move | None":
        """The rows of a block that go on, by `targets` (place in the last batch -> in the next); `None` if there are none."""
        taken = [(i, targets[row]) for i, row in enumerate(block.rows) if row in targets]
        taken.sort(key=lambda move: move[1])
        if not taken:
            return None
        source, target = (torch.tensor(part, device=block.valid.device) for part in zip(*taken, strict=True))
        width = max(lengths[row] for _, row in taken)
        # A stable sort moves padding to the left and leaves the order of the tokens as it is
        columns = block.valid[source].byte().argsort(dim=1, stable=True)[:, -width:]
        return cls(block, source, columns, target)

    def read(self, layer: int, part: int) -> torch.Tensor:
        """Keys or values (part 0 or 1) of a layer, of shape (R, H, W, D)."""
        held = self.block.layers[layer][part]
        heads = torch.arange(held.shape[1], device=held.device)[:, None]
        return held[self.source.to(held.device)[:, None, None], heads, self.columns.to(held.device)[:, None]]


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """
    An empty cache whose rows and columns can be moved, or `None` where the model's cannot: with sliding windows, states of
    linear attention and the like, what is kept of a token depends on its place; prompt tuning puts columns before it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, or one that PEFT has wrapped.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache
