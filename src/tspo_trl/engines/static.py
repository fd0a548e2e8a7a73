"""Generation by static batching of `transformers`, in rounds, with a key-value cache that is kept between turns."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .base import BatchEngine, Generation
from .decoding import TurnDecoder
from .kv_cache import KeptCache, cache_name, new_cache, why_not_kept
from .layers import is_plain, state_layers
from .probe import why_inexact
from .shared_prefix import shared_length
from .stopping import ScoreRecorder, StopRule, TurnBatch, TurnStoppingCriteria

logger = logging.getLogger(__name__)


class TransformersEngine(BatchEngine):
    """
    Generation by static batching of `transformers`, with the model that is being trained. The key-value cache is kept
    between the turns of a rollout, so that only observations are read in later turns. Where it cannot be kept, a line in the
    log says why.

    Args:
        model_context (`Callable[[], ContextManager[PreTrainedModel]]`):
            Opened once per session; yields the model that generates.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        generation_config ([`~transformers.GenerationConfig`]):
            Sampling parameters. `eos_token_id` and `pad_token_id` must be set.
        stop_strings (`Collection[str]`):
            A turn ends with the token that completes one of these. The whole token is kept, even if it carries more text
            after the stop string. If empty, only end-of-sequence tokens and budgets end turns.
        autocast (`Callable[[], ContextManager]`, *optional*):
            Opened around the generation of the turns of a round, not around their searches. With the autocast of mixed
            precision, the weights are converted once for all tokens of a round. A model whose `forward` opens it would
            convert them for every token.
    """

    def __init__(
        self,
        model_context: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        stop_strings: Collection[str],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        super().__init__()
        self._autocast = autocast
        self._model_context = model_context
        self._generation_config = generation_config
        self._stop = StopRule(tokenizer, stop_strings, generation_config)
        self._model: Any = None
        self._tokenizer = tokenizer
        self._kept: KeptCache | None = None
        self._said = False

    @contextmanager
    def session(self) -> Iterator[None]:
        """Open the model, see [`Engine.session`]."""
        with super().session(), self._model_context() as self._model:
            try:
                yield
            finally:
                self._model = self._kept = None

    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """Generate one turn for each of B contexts, see [`BatchEngine.generate`]."""
        with self._autocast():
            return self._generate(None, contexts, max_new_tokens)

    def _generate_round(
        self, numbers: Sequence[int], contexts: Sequence[list[int]], max_new_tokens: Sequence[int]
    ) -> list[Generation]:
        """Generate the turns of a round, and keep the cache of these rollouts for their next turn."""
        with self._autocast():
            return self._generate(numbers, contexts, max_new_tokens)

    @torch.no_grad()
    def _generate(
        self, numbers: Sequence[int] | None, contexts: Sequence[list[int]], budgets: Sequence[int]
    ) -> list[Generation]:
        """Generate one turn per context. If `numbers` are given, continue from the kept cache and keep the new one."""
        if self._model is None:
            raise RuntimeError("`generate` must be called within `session()`.")
        cache = self._new_cache() if _fits_decoder(self._generation_config) else None
        if cache is None:
            return self._generate_plainly(contexts, budgets)

        past = kept = None
        if numbers is not None:
            kept, self._kept = self._kept, None
            past = kept.lengths(numbers, contexts) if kept else None
        unread = [len(ids) - n for ids, n in zip(contexts, past or [0] * len(contexts), strict=True)]
        if not state_layers(cache):
            return self._generate_rows(cache, kept if past else None, numbers, contexts, budgets, past, unread)

        # Rows with more to read come first, see `staircase`
        order = sorted(range(len(contexts)), key=lambda row: -unread[row])

        def ordered(values: Any) -> Any:
            return None if values is None else [values[row] for row in order]

        parts = (ordered(values) for values in (numbers, contexts, budgets, past, unread))
        rows = self._generate_rows(cache, kept if past else None, *parts)
        turns = dict(zip(order, rows, strict=True))
        return [turns[row] for row in range(len(contexts))]

    def _generate_plainly(self, contexts: Sequence[list[int]], budgets: Sequence[int]) -> list[Generation]:
        """Generate turns with the loop of `generate`, if the model or the options do not allow ours."""
        recorder, turns = ScoreRecorder(self._generation_config), TurnBatch(self._stop, budgets)
        criteria = TurnStoppingCriteria(turns, recorder)
        self._call_generate(contexts, None, budgets, recorder, stopping_criteria=StoppingCriteriaList([criteria]))
        return _generations(turns, torch.stack(criteria.logprobs, dim=1))

    def _generate_rows(
        self,
        cache: DynamicCache,
        kept: KeptCache | None,
        numbers: Sequence[int] | None,
        contexts: Sequence[list[int]],
        budgets: Sequence[int],
        past: Sequence[int] | None,
        unread: Sequence[int],
    ) -> list[Generation]:
        """Generate turns with our loop: continue from the kept cache, or find equal contexts and a prefix to read once."""
        recorder, turns = ScoreRecorder(self._generation_config), TurnBatch(self._stop, budgets)
        if kept and numbers is not None:
            cache = kept.move(numbers)
            first_equal, prefix = list(range(len(contexts))), kept.prefix_length
        else:
            first_equal = _first_equal(contexts)
            # Windows leave out some tokens of a prefix, and a state holds all tokens of its row
            prefix = shared_length(self._model, contexts) if is_plain(cache) else 0

        decoder = TurnDecoder(turns, recorder, budgets, first_equal, prefix, unread)
        options = {"custom_generate": decoder, cache_name(self._model): cache}
        self._call_generate(contexts, past, budgets, recorder, prefix, **options)
        if numbers is not None:
            written = zip(contexts, turns.token_ids, decoder.cached, strict=True)
            cached = [context + turn[:length] for context, turn, length in written]
            self._kept = KeptCache(cache, decoder.blocks, decoder.states, numbers, cached, decoder.prefix)
        return _generations(turns, decoder.logprobs)

    def _new_cache(self) -> DynamicCache | None:
        """An empty cache that can be kept. `None`, with a line in the log, if the model has none."""
        model, tokenizer = self._model, self._tokenizer
        cache = new_cache(model)
        if cache is not None and is_plain(cache):
            return cache
        reason = why_not_kept(model) or why_inexact(
            model, lambda config: TransformersEngine(lambda: nullcontext(model), tokenizer, config, ())
        )
        if reason is None:
            return cache
        if not self._said:
            self._said = True
            logger.warning("The cache is not kept between turns, so every turn reads its whole context: %s.", reason)
        return None

    def _call_generate(
        self,
        contexts: Sequence[list[int]],
        past: Sequence[int] | None,
        budgets: Sequence[int],
        recorder: ScoreRecorder,
        prefix: int = 0,
        **options: Any,
    ) -> None:
        """Call `generate` of the model for padded contexts, of which `past` tokens are in the cache."""
        config = copy(self._generation_config)
        config.max_new_tokens = max(budgets)
        input_ids, mask = _pad_left(contexts, past or [prefix] * len(contexts), prefix)
        self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder]),
            # Each rank generates on its own, because the session gathers sharded parameters. Waiting would deadlock
            synced_gpus=False,
            **options,
        )


def _fits_decoder(config: GenerationConfig) -> bool:
    """Whether a [`TurnDecoder`] supports all options of `generate` that are set."""
    options = (config.cache_implementation, config.prefill_chunk_size, config.max_time)
    return config.use_cache is not False and all(option is None for option in options)


def _first_equal(contexts: Sequence[list[int]]) -> list[int]:
    """For each context, the index of the first context that is equal to it."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(context), i) for i, context in enumerate(contexts)]


def _generations(turns: TurnBatch, logprobs: torch.Tensor) -> list[Generation]:
    rows = zip(turns.token_ids, logprobs.tolist(), strict=True)
    return [Generation(token_ids=ids, logprobs=values[: len(ids)]) for ids, values in rows]


def _pad_left(contexts: Sequence[list[int]], past: Sequence[int], prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Contexts as a batch with its attention mask, both of shape (B, W). A row consists of the shared prefix, padding, the
    other cached tokens (up to `past`), padding, and the tokens that are not in the cache.
    """
    # Columns of the cache, and columns that are still to be read
    old, new = max(past), max(len(ids) - n for ids, n in zip(contexts, past, strict=True))
    rows = []
    for ids, n in zip(contexts, past, strict=True):
        # Padding repeats the first token: it is masked, but a repetition penalty would see a pad token, which may end turns
        first = ids[:1]
        rows.append(ids[:prefix] + first * (old - n) + ids[prefix:n] + first * (new - (len(ids) - n)) + ids[n:])
    # Prefix and cached tokens among the old columns, unread tokens at the end of the new ones
    columns, cached = torch.arange(old + new), torch.tensor(past)[:, None]
    unread = torch.tensor([len(ids) for ids in contexts])[:, None] - cached
    in_cache = (columns < prefix) | (columns >= old - cached + prefix)
    mask = torch.where(columns < old, in_cache, columns >= old + new - unread)
    return torch.tensor(rows), mask.long()
