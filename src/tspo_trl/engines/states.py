"""States of recurrent layers between turns, and how rows are read into them without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import Cache

from .layers import state_layers


@dataclass(frozen=True, slots=True)
class StateBlock:
    """
    States of R rows of a batch, each after the last token of its row that counts.

    Args:
        rows (`list[int]`):
            Indices of the rows in the batch.
        layers (`list[list[torch.Tensor]]`):
            The states of every layer that has some, of shape (R, ...) each.
    """

    rows: list[int]
    layers: list[list[torch.Tensor]]


def save_states(cache: Cache, rows: list[int], places: Sequence[int]) -> StateBlock:
    """Copy the states of some rows of a cache, by their places in it."""
    indices = torch.tensor(places)
    return StateBlock(rows, [layer.select_states(indices) for layer in state_layers(cache)])


def restore_states(cache: Cache, blocks: Sequence[StateBlock], rows: Sequence[int]) -> None:
    """Replace the states of a cache by those of these rows, in this order."""
    place = {row: place for place, row in enumerate(row for block in blocks for row in block.rows)}
    indices = torch.tensor([place[row] for row in rows])
    for number, layer in enumerate(state_layers(cache)):
        parts = zip(*(block.layers[number] for block in blocks), strict=True)
        layer.states = [torch.cat(part).index_select(0, indices.to(part[0].device)) for part in parts]


def staircase(unread: Sequence[int], width: int) -> list[tuple[int, int]]:
    """
    Plan passes that read tokens at the end of rows without padding. The longest rows first read their surplus over the others,
    then the next ones join; the last pass ends with the last token of every row.

    Args:
        unread (`Sequence[int]`):
            Number of tokens to read, for each row, in descending order.
        width (`int`):
            Number of columns.

    Returns:
        `list[tuple[int, int]]`: For each pass, the number of rows that it reads, which are the first ones, and the column at
        which it ends.
    """
    steps = sorted(set(unread), reverse=True)
    return [(sum(count >= step for count in unread), width - following) for step, following in pairwise([*steps, 0])]
