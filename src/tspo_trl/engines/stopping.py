"""The end of a turn, and the tokens and scores of turns while they are generated."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria


class StopRule:
    """
    Decides whether a turn ends with its last token. Decodes only after tokens that can complete a stop string.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        stop_strings (`Collection[str]`):
            A turn ends with the token that completes one of these.
        generation_config ([`~transformers.GenerationConfig`]):
            Its `eos_token_id` ends a turn too.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Collection[str], generation_config: GenerationConfig
    ):
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        eos = generation_config.eos_token_id
        self._eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        last_chars = {stop[-1] for stop in stop_strings}
        # Ids may have gaps, so the largest id may be larger than the number of tokens
        ids = sorted({*range(len(tokenizer)), *tokenizer.get_vocab().values()})
        tokens = tokenizer.convert_ids_to_tokens(ids)
        self._candidates = frozenset(
            i for i, t in zip(ids, tokens, strict=True) if t is not None and last_chars & set(t)
        )
        # A stop string spans at most one token per character, and its last token may carry more text
        self._tail = 2 * max(map(len, stop_strings), default=0)

    def __call__(self, token_ids: list[int]) -> bool:
        """Whether the last of these T tokens ends the turn. The tokens before it must not end it."""
        last = token_ids[-1]
        if last in self._eos:
            return True
        if last not in self._candidates:
            return False
        text = self._tokenizer.decode(token_ids[-self._tail :])
        return any(stop in text for stop in self._stop_strings)


class ScoreRecorder(LogitsProcessor):
    """Keeps the scores of the current step only, so that no tensor of shape (B, T, V) is needed for log-probabilities."""

    def __init__(self, generation_config: GenerationConfig):
        sampled = generation_config.do_sample and generation_config.temperature
        self._temperature = generation_config.temperature if sampled else 1.0
        self.scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scores = scores
        return scores

    def logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, of shape (B,), of the tokens sampled from the scores of this step, of shape (B,)."""
        assert self.scores is not None
        scores = self.scores.float()
        if self._temperature != 1.0:
            scores = scores / self._temperature
        return scores.log_softmax(dim=1).gather(1, token_ids[:, None]).squeeze(1)


class TurnBatch:
    """
    The turns of a batch while they are generated.

    Args:
        stop ([`StopRule`]):
            Ends turns before their budgets.
        budgets (`Sequence[int]`):
            Maximum number of tokens for each of the B turns.

    Attributes:
        token_ids (`list[list[int]]`):
            The tokens generated so far, for each turn.
        open (`list[int]`):
            Rows of the turns that have not ended, in ascending order.
    """

    def __init__(self, stop: StopRule, budgets: Sequence[int]):
        self._stop = stop
        self._budgets = budgets
        self.token_ids: list[list[int]] = [[] for _ in budgets]
        self.open = list(range(len(budgets)))

    def append(self, tokens: dict[int, int]) -> None:
        """Append a token to every open turn. `tokens` maps rows to tokens; rows of ended turns are ignored."""
        still_open = []
        for row in self.open:
            token_ids = self.token_ids[row]
            token_ids.append(tokens[row])
            if len(token_ids) < self._budgets[row] and not self._stop(token_ids):
                still_open.append(row)
        self.open = still_open


class TurnStoppingCriteria(StoppingCriteria):
    """Stops each row of `generate` when its turn ends, and collects the log-probabilities of its tokens."""

    def __init__(self, turns: TurnBatch, recorder: ScoreRecorder):
        self._turns = turns
        self._recorder = recorder
        self.logprobs: list[torch.Tensor] = []  # one tensor of shape (B,) per step

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, -1]
        self.logprobs.append(self._recorder.logprobs(last))
        self._turns.append(dict(enumerate(last.tolist())))
        done = torch.ones(len(last), dtype=torch.bool)
        done[self._turns.open] = False
        return done.to(input_ids.device)
