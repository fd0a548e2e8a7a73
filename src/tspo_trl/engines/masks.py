"""Attention masks by position. In a cache that is kept, padding lies between tokens: columns are not positions."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

#: Attention implementations of `transformers` whose masks may be of any form
SUPPORTED = ("sdpa", "eager")


@dataclass(slots=True)
class Masks:
    """The masks that a model asked for: whether one of them was local, that is, of a sliding window or of chunks."""

    local: bool = False


_masks: ContextVar[Masks | None] = ContextVar("masks", default=None)
#: The mask functions of `transformers`, while ours are in their places
_replaced: dict[str, Callable[..., Any]] = {}
_lock, _users = Lock(), 0


@contextmanager
def masks_by_position() -> Iterator[Masks]:
    """
    Inside this context, sliding windows and chunks of attention count the tokens of a row, without the padding between them.
    Models call their mask functions as usual. Other threads are not affected.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _replaced.update((name, ALL_MASK_ATTENTION_FUNCTIONS[name]) for name in SUPPORTED)
            ALL_MASK_ATTENTION_FUNCTIONS.update(sdpa=_sdpa_mask, eager=_eager_mask)
    token = _masks.set(masks := _masks.get() or Masks())
    try:
        yield masks
    finally:
        _masks.reset(token)
        with _lock:
            _users -= 1
            if not _users:
                ALL_MASK_ATTENTION_FUNCTIONS.update(_replaced)


def allowed_by_position(
    mask_function: Callable[..., torch.Tensor], mask: torch.Tensor, query_length: int, first: int = 0
) -> torch.Tensor:
    """
    Evaluate a mask function of `transformers` at the positions of tokens.

    Args:
        mask_function (`Callable`):
            Takes indices of rows, heads, queries and keys, and returns whether a query attends to a key.
        mask (`torch.Tensor`):
            Which of the L columns hold a token, booleans of shape (B, L).
        query_length (`int`):
            Number T of queries. They are the last columns.
        first (`int`, *optional*, defaults to `0`):
            The column of the first key.

    Returns:
        `torch.Tensor`: Whether a query attends to a key, booleans of shape (B, 1, T, L - first).
    """
    count = mask.cumsum(dim=1)
    # Padding before the first token counts, as in the columns that `transformers` uses: chunks begin after it
    index = count - 1 + (count == 0).sum(dim=1, keepdim=True)
    rows = torch.arange(len(mask), device=mask.device)[:, None, None, None]
    queries, keys = index[:, None, mask.shape[1] - query_length :, None], index[:, None, None, first:]
    return mask_function(rows, torch.zeros_like(rows), queries, keys) & mask[:, None, None, first:]


def reach(mask: torch.Tensor) -> list[int]:
    """
    Count how many tokens at the ends of rows are needed to reach a column from the right.

    Args:
        mask (`torch.Tensor`):
            Which of the L columns hold a token, of shape (B, L).

    Returns:
        `list[int]`: For each column, the smallest n such that the last n tokens of some row begin at or before this column.
    """
    mask = mask.bool()
    counts = mask.flip(1).cumsum(dim=1).flip(1).where(mask, mask.shape[1] + 1)
    return list(accumulate(counts.amin(dim=0).tolist(), min))


def first_visible(reached: Sequence[int], window: int, new: int) -> int:
    """
    The first column with a token of a window.

    Args:
        reached (`Sequence[int]`):
            See [`reach`].
        window (`int`):
            Number of tokens of the window, which ends with the last column.
        new (`int`):
            Number of columns after those of `reached`. All hold tokens.
    """
    if new >= window:
        return len(reached) + new - window
    return bisect_left(reached, new - window, key=lambda count: -count)


def _sdpa_mask(*, q_length: int, mask_function: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """A mask for PyTorch's attention: booleans, or `None`."""
    masks = _masks.get()
    if masks is not None:
        masks.local |= kwargs.get("local_size") is not None
    if masks is None or attention_mask is None:  # without padding, columns are positions
        options = {"q_length": q_length, "mask_function": mask_function, "attention_mask": attention_mask}
        return _replaced["sdpa"](**options, **kwargs)
    return allowed_by_position(mask_function, attention_mask, q_length, kwargs["kv_offset"])


def _eager_mask(*, dtype: torch.dtype, **kwargs: Any) -> Any:
    """A mask for eager attention: numbers that are added to scores."""
    if _masks.get() is None:
        return _replaced["eager"](dtype=dtype, **kwargs)
    allowed = _sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    if allowed is None:
        return None
    return torch.zeros((), dtype=dtype, device=allowed.device).where(allowed, torch.finfo(dtype).min)
