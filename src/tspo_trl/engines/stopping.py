"""When a turn ends, and what is written down of it while it is generated."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria


class StopRule:
    """Whether a turn ends with a token: decodes only after tokens that can complete a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Collection[str], generation_config: GenerationConfig
    ):
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        eos = generation_config.eos_token_id
        self._eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        last_chars = {stop[-1] for stop in stop_strings}
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._candidates = frozenset(i for i, t in enumerate(tokens) if t is not None and last_chars & set(t))
        # A token may end a few characters after the stop string, and begin before it: one per character is enough
        self._tail = 2 * max(map(len, stop_strings), default=0)

    def __call__(self, token_ids: list[int]) -> bool:
        """Whether the turn with these tokens (T,) has just ended; it had not before the last one."""
        last = token_ids[-1]
        if last in self._eos:
            return True
        if last not in self._candidates:
            return False
        text = self._tokenizer.decode(token_ids[-self._tail :])
        return any(stop in text for stop in self._stop_strings)


class Recorder(LogitsProcessor):
    """Keeps the scores of the current step, so that no (B, T, V) tensor of scores has to exist."""

    def __init__(self, generation_config: GenerationConfig):
        sampled = generation_config.do_sample and generation_config.temperature
        self._temperature = generation_config.temperature if sampled else 1.0
        self.scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scores = scores
        return scores

    def logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of shape (B,) of the tokens (B,) that were sampled from the scores of this step."""
        assert self.scores is not None
        scores = self.scores.float() / self._temperature
        return scores.gather(1, token_ids[:, None]).squeeze(1) - scores.logsumexp(dim=1)


class Turns:
    """
    The turns of a batch while they are written.

    Args:
        stop ([`StopRule`]):
            Ends a turn before its budget.
        budgets (`Sequence[int]`):
            The most tokens of each of the B turns.

    Attributes:
        token_ids (`list[list[int]]`):
            What was written so far.
        open (`list[int]`):
            The turns that have not ended, in ascending order.
    """

    def __init__(self, stop: StopRule, budgets: Sequence[int]):
        self._stop = stop
        self._budgets = budgets
        self.token_ids: list[list[int]] = [[] for _ in budgets]
        self.open = list(range(len(budgets)))

    def write(self, tokens: dict[int, int]) -> None:
        """Append a token to every open turn; `tokens` may hold more than these."""
        still_open = []
        for row in self.open:
            token_ids = self.token_ids[row]
            token_ids.append(tokens[row])
            if len(token_ids) < self._budgets[row] and not self._stop(token_ids):
                still_open.append(row)
        self.open = still_open


class TurnEnd(StoppingCriteria):
    """Ends each row of `generate` with its turn."""

    def __init__(self, turns: Turns, recorder: Recorder):
        self._turns = turns
        self._recorder = recorder
        self.logprobs: list[torch.Tensor] = []  # one of shape (B,) a step

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, -1]
        self.logprobs.append(self._recorder.logprobs(last))
        self._turns.write(dict(enumerate(last.tolist())))
        done = torch.ones(len(last), dtype=torch.bool)
        done[self._turns.open] = False
        return done.to(input_ids.device)
