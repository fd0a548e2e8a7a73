"""Turns with planned ends, to compare search loops: the model samples tokens freely, but each turn ends as planned."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

#: Marks a token in a plan that the model samples freely.
FREE = -1


@dataclass(slots=True)
class Calls:
    """
    The cost of calls of `generate`.

    Args:
        seconds (`float`, *optional*, defaults to `0.0`):
            Total time of the calls.
    """

    seconds: float = 0.0


@dataclass(slots=True)
class DrawnTurns(LogitsProcessor):
    """
    Logits processor that forces the planned tokens of a turn and lets the model sample the other tokens. A turn ends
    with the end-of-sequence token after its plan. Rows are identified by a token of their prompt, because rows can be
    removed or regrouped during generation.

    Args:
        plan (`Callable[[int, int], Sequence[int]]`):
            Maps a rollout and its turn, both counted from 0, to the tokens of the turn. `FREE` marks a free token.
        rollouts (`int`):
            Number of rollouts.
        banned (`torch.Tensor`):
            Boolean mask of shape (V,) with the tokens that are never sampled freely.
        eos_token_id (`int`):
            The end-of-sequence token.
        first_mark (`int`, *optional*):
            The token that marks rollout 0. The tokens with the next ids mark the other rollouts. By default, every row
            is rollout 0.
    """

    plan: Callable[[int, int], Sequence[int]]
    rollouts: int
    banned: torch.Tensor
    eos_token_id: int
    first_mark: int | None = None
    turn: int = -1
    step: int = 0
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))

    def begin_rollouts(self) -> None:
        """Reset to the first turn."""
        self.turn = -1

    def begin_turn(self) -> None:
        """Advance to the next turn of all rollouts."""
        self.turn += 1
        self.step = 0
        rows = [torch.tensor(self.plan(rollout, self.turn), dtype=torch.long) for rollout in range(self.rollouts)]
        self.table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Compute the scores (B, V) of the next token from the previous tokens (B, W)."""
        rollouts = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        if self.first_mark is not None:
            marks = input_ids - self.first_mark
            marked = (marks >= 0) & (marks < self.rollouts)
            rollouts = marks.gather(1, marked.int().argmax(dim=1, keepdim=True)).squeeze(1)
        if self.step < self.table.shape[1]:
            column = self.table.to(rollouts.device)[rollouts, self.step]
        else:
            column = torch.full_like(rollouts, self.eos_token_id)
        self.step += 1
        scores = scores.masked_fill(self.banned.to(scores.device), -torch.inf)
        forced = column != FREE
        scores[forced] = -torch.inf
        scores[forced, column[forced]] = 0.0
        return scores


@contextmanager
def drawing(model: PreTrainedModel, turns: DrawnTurns) -> Iterator[Calls]:
    """
    Make every call of `model.generate` write the next turn, and time the calls.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        turns ([`DrawnTurns`]):
            The turns to write.
    """
    generate: Any = type(model).generate
    calls = Calls()

    def drawn(*args: Any, **kwargs: Any) -> Any:
        turns.begin_turn()
        processors = LogitsProcessorList([turns, *kwargs.pop("logits_processor", [])])
        start = time.perf_counter()
        output = generate(model, *args, logits_processor=processors, **kwargs)
        calls.seconds += time.perf_counter() - start
        return output

    model.generate = drawn
    try:
        yield calls
    finally:
        del model.generate
