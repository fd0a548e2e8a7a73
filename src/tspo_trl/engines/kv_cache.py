"""Key-value caches that are kept between turns, so that no context is read twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .layers import GrowingLayer, HybridLayer, HybridWindowLayer, StateLayer, WindowLayer, growing_layers
from .masks import SUPPORTED
from .shared_prefix import Prefix
from .states import StateBlock, restore_states

#: Name of the cache among the arguments of `generate`, which transformers 5.24 has changed
CACHE_NAME = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


def cache_name(model: PreTrainedModel) -> str:
    """Name of the cache among the arguments of a model, which may be wrapped by PEFT."""
    network: Any = model
    if hasattr(network, "get_base_model"):
        network = network.get_base_model()
    return "cache_params" if "cache_params" in signature(network.forward).parameters else CACHE_NAME


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
    Keys, values and states of the tokens that rollouts have read and written so far.

    Args:
        cache ([`~transformers.DynamicCache`]):
            The cache of the last batch, whose layers are used again.
        blocks (`list[CacheBlock]`):
            Keys and values: one block for the rows that stayed in the batch until the end, and one for each set of rows that
            left earlier.
        states (`list[StateBlock]`):
            States, if the cache has some: one block for each set of rows that ended together.
        numbers (`Sequence[int]`):
            The number of the rollout in each row of the batch.
        contexts (`Sequence[list[int]]`):
            The tokens of each rollout that are in the cache, including those of its last turn.
        prefix (`Prefix`):
            Keys and values of the shared prefix, for every layer. Empty if there is none.
    """

    cache: DynamicCache
    blocks: list[CacheBlock]
    states: list[StateBlock]
    numbers: Sequence[int]
    contexts: Sequence[list[int]]
    prefix: Prefix

    @property
    def prefix_length(self) -> int:
        """Number of tokens in the shared prefix."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def lengths(self, numbers: Sequence[int], contexts: Sequence[list[int]]) -> list[int] | None:
        """
        Check that contexts continue the kept ones.

        Args:
            numbers (`Sequence[int]`):
                Numbers of R rollouts.
            contexts (`Sequence[list[int]]`):
                Their R contexts.

        Returns:
            `list[int]` or `None`: The number of tokens of each context that are kept. `None` if a context does not continue
            the kept one.
        """
        kept = dict(zip(self.numbers, self.contexts, strict=True))
        for number, context in zip(numbers, contexts, strict=True):
            tokens = kept.get(number)
            if tokens is None or len(context) <= len(tokens) or context[: len(tokens)] != tokens:
                return None
        return [len(kept[number]) for number in numbers]

    def move(self, numbers: Sequence[int]) -> DynamicCache:
        """
        Move the keys, values and states of some rollouts to the rows of the next batch. Rows are padded on the left, after
        the shared prefix. This object is empty afterwards.

        Args:
            numbers (`Sequence[int]`):
                Numbers of R rollouts, see [`lengths`].

        Returns:
            [`~transformers.DynamicCache`]: A cache with R rows, each as long as the longest.
        """
        # Plan which rows and columns of each block become which rows of the cache
        row_of = {number: row for row, number in enumerate(self.numbers)}
        rows = [row_of[number] for number in numbers]
        own = [len(self.contexts[row]) - self.prefix_length for row in rows]
        targets = {row: target for target, row in enumerate(rows)}
        moves = [move for block in self.blocks if (move := _Move.plan(block, targets, own)) is not None]

        # Move layer by layer, so that at most one layer is in memory twice
        for i, layer in enumerate(growing_layers(self.cache)):
            layer.replace(*(self._gather(moves, len(numbers), max(own), i, part) for part in (0, 1)))
            layer.prefix = self.prefix[i] if self.prefix else None
            for block in self.blocks:
                block.layers[i] = (torch.empty(0), torch.empty(0))
        if self.states:
            restore_states(self.cache, self.states, rows)
            self.states.clear()
        return self.cache

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


#: The layer that takes the place of each kind of layer of `transformers`
_LAYERS: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: WindowLayer,
    LinearAttentionLayer: StateLayer,
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridWindowLayer,
}
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
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in _LAYERS})
    if others or not layers:
        return f"its cache has layers of the type {', '.join(others)}" if others else "its cache has no layers"
    if any(issubclass(_LAYERS[type(layer)], WindowLayer) for layer in layers):
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
    for i, layer in enumerate(cache.layers):
        options = {"window": "sliding_window", "number_of_states": "number_of_states"}
        given = {name: getattr(layer, of_layer) for name, of_layer in options.items() if hasattr(layer, of_layer)}
        cache.layers[i] = _LAYERS[type(layer)](**given)
    return cache
