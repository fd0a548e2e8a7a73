"""Generation by `transformers`' static batching, in rounds, with a key-value cache kept from turn to turn."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .base import BatchEngine, Generation
from .decoding import TurnDecoder
from .kv_cache import KeptCache, new_cache
from .shared_prefix import shared_length
from .stopping import Recorder, StopRule, TurnEnd, Turns


class TransformersEngine(BatchEngine):
    """
    Generation by `transformers`' static batching, with the model that is being trained. The key-value cache is kept from turn
    to turn, so that only observations are read anew.

    Args:
        model_context (`Callable[[], ContextManager[PreTrainedModel]]`):
            Opened once for all turns of a rollout; yields the model to generate with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        generation_config ([`~transformers.GenerationConfig`]):
            Sampling parameters. `eos_token_id` and `pad_token_id` must be set.
        stop_strings (`Collection[str]`):
            A turn ends as soon as its text ends with one of these (text that the same token carries after it is kept:
            tokens are never cut). May be empty: then only end-of-sequence tokens and budgets end turns.
    """

    def __init__(
        self,
        model_context: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        stop_strings: Collection[str],
    ):
        super().__init__()
        self._model_context = model_context
        self._generation_config = generation_config
        self._stop = StopRule(tokenizer, stop_strings, generation_config)
        self._model: Any = None
        self._kept: KeptCache | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Open the model for all turns of a rollout, see [`Engine.session`]."""
        with super().session(), self._model_context() as self._model:
            try:
                yield
            finally:
                self._model = self._kept = None

    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """Generate one turn for each of B contexts, within `session()`, see [`BatchEngine.generate`]."""
        return self._generate(None, contexts, max_new_tokens)

    def _generate_round(
        self, numbers: Sequence[int], contexts: Sequence[list[int]], max_new_tokens: Sequence[int]
    ) -> list[Generation]:
        """What the rollouts have read so far is kept, and not read again in their next turn."""
        return self._generate(numbers, contexts, max_new_tokens)

    @torch.no_grad()
    def _generate(
        self, numbers: Sequence[int] | None, contexts: Sequence[list[int]], budgets: Sequence[int]
    ) -> list[Generation]:
        """Generate turns; where the rollouts have numbers, go on from what is kept of them, and keep what they read."""
        if self._model is None:
            raise RuntimeError("`generate` must be called within `session()`.")
        recorder, turns = Recorder(self._generation_config), Turns(self._stop, budgets)
        cache = new_cache(self._model) if _fits_decoder(self._generation_config) else None
        if cache is None:
            turn_end = TurnEnd(turns, recorder)
            self._call(contexts, None, budgets, recorder, stopping_criteria=StoppingCriteriaList([turn_end]))
            return _generations(turns, torch.stack(turn_end.logprobs, dim=1))
        past = kept = None
        if numbers is not None:
            kept, self._kept = self._kept, None
            past = kept.move(cache, numbers, contexts) if kept else None
        if kept and past:
            same, prefix = list(range(len(contexts))), kept.prefix_length
        else:
            same, prefix = _first_equal(contexts), shared_length(self._model, contexts)
        decoder = TurnDecoder(turns, recorder, budgets, same, prefix)
        self._call(contexts, past, budgets, recorder, prefix, custom_generate=decoder, past_key_values=cache)
        if numbers is not None:
            written = zip(contexts, turns.token_ids, decoder.cached, strict=True)
            read = [ids + turn[:length] for ids, turn, length in written]
            self._kept = KeptCache(decoder.blocks, numbers, read, decoder.prefix)
        return _generations(turns, decoder.logprobs)

    def _call(
        self,
        contexts: Sequence[list[int]],
        past: Sequence[int] | None,
        budgets: Sequence[int],
        recorder: Recorder,
        prefix: int = 0,
        **options: Any,
    ) -> None:
        config = copy(self._generation_config)
        config.max_new_tokens = max(budgets)
        input_ids, mask = _pad_left(contexts, past or [prefix] * len(contexts), prefix, config.pad_token_id)
        self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder]),
            # Every rank generates on its own (parameters are gathered for the session); in step they would deadlock
            synced_gpus=False,
            **options,
        )


def _fits_decoder(config: GenerationConfig) -> bool:
    """Whether nothing is asked of `generate` that a [`TurnDecoder`] leaves out."""
    options = (config.cache_implementation, config.prefill_chunk_size, config.max_time)
    return config.use_cache is not False and all(option is None for option in options)


def _first_equal(contexts: Sequence[list[int]]) -> list[int]:
    """For each context, the place of the first one that is equal to it."""
    places: dict[tuple[int, ...], int] = {}
    return [places.setdefault(tuple(context), place) for place, context in enumerate(contexts)]


def _generations(turns: Turns, logprobs: torch.Tensor) -> list[Generation]:
    rows = zip(turns.token_ids, logprobs.tolist(), strict=True)
    return [Generation(token_ids=ids, logprobs=values[: len(ids)]) for ids, values in rows]


def _pad_left(
    contexts: Sequence[list[int]], past: Sequence[int], prefix: int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Contexts as a batch with its attention mask, both of shape (B, W). All begin with the same `prefix` tokens. Those after
    them that are in a cache (up to `past`) are padded on the left, and so are the others.
    """
    old, new = max(past), max(len(ids) - n for ids, n in zip(contexts, past, strict=True))
    rows = []
    for ids, n in zip(contexts, past, strict=True):
        # Within a context, padding repeats a token of it: it is masked, but a repetition penalty would see it
        before, between = (ids[0] if length else pad_token_id for length in (prefix, n))
        rows.append(ids[:prefix] + [before] * (old - n) + ids[prefix:n] + [between] * (new - (len(ids) - n)) + ids[n:])
    columns, cached = torch.arange(old + new), torch.tensor(past)[:, None]
    unread = torch.tensor([len(ids) for ids in contexts])[:, None] - cached
    in_cache = (columns < prefix) | (columns >= old - cached + prefix)
    mask = torch.where(columns < old, in_cache, columns >= old + new - unread)
    return torch.tensor(rows), mask.long()
