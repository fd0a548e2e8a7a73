"""The scripts of the rollouts: the tokens that the model of every loop is forced to write."""

import json
import random
import time
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from ..tiny_qwen import END

ROLLOUTS = 256
MAX_TURNS = 16
TURN_TOKENS = 40


class Scripts:
    """The tokens of each rollout in each protocol. The turns have the same lengths in all protocols."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, queries: list[str], longest: int, seed: int):
        self.tokenizer = tokenizer
        self.longest = longest
        rng = random.Random(seed)
        self.turns: dict[int, int] = {}  # rollout -> number of turns
        self.queries = {(i, turn): rng.choice(queries) for i in range(ROLLOUTS) for turn in range(MAX_TURNS)}
        self.lengths = {key: rng.randint(TURN_TOKENS, longest) for key in self.queries}
        self.filler = tokenizer(" so", add_special_tokens=False)["input_ids"][0]
        self.first = tokenizer.convert_tokens_to_ids("<r0>")
        self.ends = {"tool_call": "</tool_call>", "tags": "</search>"}
        self.ends = {name: tokenizer.convert_tokens_to_ids(token) for name, token in self.ends.items()}

    def draw_turns(self, most: int, seed: int) -> None:
        """Draw the number of turns of each rollout, between 1 and `most`."""
        rng = random.Random(seed)
        self.turns = {rollout: rng.randint(1, most) for rollout in range(ROLLOUTS)}

    def write(self, protocol: str, rollout: int, turn: int) -> list[int]:
        """Return the tokens of a turn. The first turn begins with the marker token of its rollout."""
        final = turn == self.turns[rollout] - 1
        query = self.queries[rollout, turn]
        if protocol == "tags":
            text = "<answer> Mira</answer>" if final else f"<search> {query}</search>"
        else:
            call = json.dumps({"name": "search", "arguments": {"query": query}})
            text = f" Mira{END}" if final else f"<tool_call>\n{call}\n</tool_call>{END}"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        mark = [self.first + rollout] if turn == 0 else []
        return mark + [self.filler] * (self.lengths[rollout, turn] - len(mark) - len(ids)) + ids


class Forced(LogitsProcessor):
    """
    Forces each row to write its script, starting at the turn that its context has reached. In the first turn, rollouts
    are identified by their position in the batch. In later turns, they are identified by the marker token that they
    have written, because rows can be moved or removed.
    """

    def __init__(self, scripts: Scripts, protocol: str):
        self.scripts, self.protocol = scripts, protocol
        self.written = torch.empty(0, 0, dtype=torch.long)
        self.width = self.tokens = 0
        self.read_at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.read_at:
            self.read_at, self.width = time.perf_counter(), input_ids.shape[1]
        if len(self.written) != len(input_ids):
            scripts = [self._script(*at) for at in enumerate(input_ids.tolist())]
            most = max(map(len, scripts))
            padded = [script + [self.scripts.filler] * (most - len(script)) for script in scripts]
            self.written = torch.tensor(padded, device=scores.device)
        step = min(input_ids.shape[1] - self.width, self.written.shape[1] - 1)
        self.tokens = step + 1
        forced = torch.full_like(scores, -1e9)
        return forced.scatter_(1, self.written[:, step, None], 0.0)

    def _script(self, place: int, row: list[int]) -> list[int]:
        first = self.scripts.first
        mark = next((i for i, token in enumerate(row) if first <= token < first + ROLLOUTS), None)
        if mark is None:
            return self.scripts.write(self.protocol, place, 0)
        turn = row[mark : self.width].count(self.scripts.ends[self.protocol])
        return self.scripts.write(self.protocol, row[mark] - first, turn)


def force(model: PreTrainedModel, scripts: Scripts, protocol: str) -> None:
    """Add a [`Forced`] to the logits processors of each `generate` call. The latest one is `model.forced`."""
    make = type(model)._get_logits_processor

    def with_script(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        model.forced = Forced(scripts, protocol)
        return LogitsProcessorList([*make(model, *args, **kwargs), model.forced])

    model._get_logits_processor = with_script
