"""The decode loop of a search turn: the work of `generate` of `transformers`, for many short turns of different lengths."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .kv_cache import CacheBlock, cache_name
from .layers import StateLayer, growing_layers, is_plain, state_layers, window_layers
from .masks import first_visible, masks_by_position, reach
from .sampling import deterministic_sums, draw, sample
from .shared_prefix import Prefix, attending_to, is_replaceable
from .states import StateBlock, save_states, staircase
from .stopping import ScoreRecorder, TurnBatch

#: Processors that identify rows by their index or keep state per row: with them, no row may leave the batch
BOUND_TO_ROWS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class TurnDecoder:
    """
    Generates one turn for each row of a batch. It is passed to `generate` as `custom_generate`: `generate` prepares and
    checks its arguments as usual, and then calls the decoder instead of its own loop. It differs from that loop as follows:

    - Equal contexts, such as those of a group in its first turn, are read once.
    - The tokens with which all contexts begin, such as instructions and tool descriptions, are read once and stored once.
      All rows attend to them together.
    - Rows whose turns have ended leave the batch as soon as they are at least half of it.
    - A token is appended without copying the cache, the mask or the tokens before it.
    - A token is drawn with one random number instead of one for each entry of the vocabulary. The random numbers of a row
      do not depend on whether other rows have left.

    Args:
        turns ([`TurnBatch`]):
            Collects the tokens of the B rows and decides when their turns end.
        recorder ([`ScoreRecorder`]):
            One of the logits processors passed to `generate`.
        budgets (`Sequence[int]`):
            Maximum number of tokens for each turn.
        first_equal (`Sequence[int]`):
            For each row, the first row with the same context. If the cache is not empty, the row itself.
        prefix_length (`int`):
            Number of tokens at the beginning of all contexts that are stored once. Padding follows them.
        unread (`Sequence[int]`):
            For each row, the number of tokens that are not in the cache. In descending order if the cache has states.

    Attributes:
        logprobs (`torch.Tensor`):
            Log-probabilities of the sampled tokens, of shape (B, T). Values after the end of a turn are meaningless.
        blocks (`list[CacheBlock]`):
            Keys and values of the rows after the shared prefix, in blocks of rows that left the batch together.
        states (`list[StateBlock]`):
            States of the rows, if the cache has some, in blocks of rows that ended together.
        prefix (`Prefix`):
            Keys and values of the shared prefix. Empty if there is none.
        cached (`list[int]`):
            For each turn, the number of its tokens in the cache: all, or all but the last.
    """

    logprobs: torch.Tensor
    _cache_name: str

    def __init__(
        self,
        turns: TurnBatch,
        recorder: ScoreRecorder,
        budgets: Sequence[int],
        first_equal: Sequence[int],
        prefix_length: int,
        unread: Sequence[int],
    ):
        self._turns = turns
        self._recorder = recorder
        self._budgets = budgets
        self._first_equal = first_equal
        self._prefix_length = prefix_length
        self._unread = unread
        self._columns = 0  # of the cache
        self.prefix: Prefix = []
        self.blocks: list[CacheBlock] = []
        self.states: list[StateBlock] = []
        self.cached = [0] * len(budgets)

    def __call__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """
        Generate the turns.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model.
            input_ids (`torch.Tensor`):
                Contexts of shape (B, W), padded on the left.
            logits_processor ([`~transformers.LogitsProcessorList`]):
                The processors that `generate` created from the sampling parameters.
            stopping_criteria ([`~transformers.StoppingCriteriaList`]):
                Not used: `turns` decides when a turn ends.
            generation_config ([`~transformers.GenerationConfig`]):
                Sampling parameters.
            model_kwargs (`Any`):
                Arguments of the model, including the mask, the positions and the cache.

        Returns:
            `torch.Tensor`: The contexts. The turns are in the argument `turns` of the constructor.

        Raises:
            `RuntimeError`: If the model does not use its cache, or if its logits are not finite.
        """
        # What the loop passes to the model itself, as views for each step
        self._cache_name = cache_name(model)
        cache: Cache = model_kwargs.pop(self._cache_name)
        mask: torch.Tensor | None = model_kwargs.pop("attention_mask")  # `None` if nothing is padding
        positions: torch.Tensor | None = model_kwargs.pop("position_ids", None)
        device, width, room = input_ids.device, input_ids.shape[1], max(self._budgets)
        self._columns = width - max(self._unread)

        # Prefill: read the contexts
        logits = self._read_contexts(model, input_ids, mask, positions, cache, model_kwargs)

        # Buffers with room for the longest turn, so that a step needs views only
        ids = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), room)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
            if positions is not None and is_replaceable(model) and is_plain(cache):
                # In the form that attention uses, so that the model does not convert and inspect it for every token
                mask = mask[:, None, None].bool()
        if positions is not None:
            # A row that stays after its turn has ended must not exceed the positions of the model
            steps = torch.arange(1, room + 1, device=device)
            positions = positions[:, -1:] + steps.minimum(torch.tensor(self._budgets, device=device)[:, None])
        self.logprobs = torch.zeros(ids.shape[0], room, device=device)

        # The rows of the batch, and what their layers and processors allow
        written: list[torch.Tensor] = []  # log-probabilities of the steps since rows left the batch
        rows = list(range(len(ids)))  # the rows that are still in the batch
        index = torch.arange(len(ids), device=device)  # the same as a tensor
        has_states, windows = bool(state_layers(cache)), window_layers(cache)
        reached = [] if not windows else list(range(width, 0, -1)) if mask is None else reach(mask[:, :width])
        may_leave = not any(isinstance(processor, BOUND_TO_ROWS) for processor in logits_processor)

        for step in range(room):
            # Choose the next token of each row
            tokens = self._choose(ids[:, : width + step], logits, logits_processor, index, generation_config.do_sample)
            written.append(self._recorder.logprobs(tokens))
            ids[:, width + step] = tokens

            # Note which turns end, and keep the states and the log-probabilities of their rows
            before = self._turns.open
            self._turns.append(dict(zip(rows, tokens.tolist(), strict=True)))
            if has_states and len(self._turns.open) < len(before):
                self._store_states(cache, rows, before)
            leaving = may_leave and 2 * len(self._turns.open) <= len(rows)
            if leaving or not self._turns.open or step + 1 == room:
                self.logprobs[index, step + 1 - len(written) : step + 1] = torch.stack(written, dim=1)
                written.clear()
            if not self._turns.open:
                break

            # Remove ended rows from the batch once they are at least half of it
            if leaving:
                open_rows = set(self._turns.open)
                ended = [i for i, row in enumerate(rows) if row not in open_rows]
                staying = torch.tensor([i for i, row in enumerate(rows) if row in open_rows], device=device)
                self._store_block(cache, mask, rows, width, ended, staying)
                ids, index = ids[staying], index[staying]
                mask, positions = (None if part is None else part[staying] for part in (mask, positions))
                rows = list(self._turns.open)

            # Read the new tokens
            length = width + step + 1
            for window in windows:
                window.first = first_visible(reached, window.window, step + 1)
            seen_mask = None if mask is None else mask[..., :length]
            position = None if positions is None else positions[:, step : step + 1]
            logits = self._forward(model, cache, ids[:, :length], seen_mask, position, model_kwargs)

        # Keep the cache of the last rows
        self._store_block(cache, mask, rows, width, list(range(len(rows))))
        if self.logprobs.isnan().any():
            raise RuntimeError(
                "The model's logits are not numbers (NaN or infinite), so nothing can be sampled from them."
            )
        return input_ids

    def _choose(
        self,
        seen: torch.Tensor,
        scores: torch.Tensor,
        logits_processor: LogitsProcessorList,
        index: torch.Tensor,
        do_sample: bool | None,
    ) -> torch.Tensor:
        """The next token of each row in the batch. `index` holds their rows."""
        with deterministic_sums(scores.device):
            for processor in logits_processor:
                scores = processor(seen, scores)
        if not do_sample:
            return scores.argmax(dim=-1)
        # One number for each of the B rows, so that a row does not depend on the rows that have left
        uniform = draw(len(self._budgets), scores.device)
        return sample(scores, uniform if len(index) == len(uniform) else uniform[index])

    def _read_contexts(
        self,
        model: Any,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache,
        model_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Read the tokens of the contexts that are not in the cache. Returns the next logits, of shape (B, V)."""
        self._limit(cache, input_ids.shape[1])
        # The shared prefix, once for all rows
        if self._prefix_length and not self._columns:
            self._read_prefix(model, input_ids, mask, positions, cache, model_kwargs)
        self.prefix = [layer.prefix for layer in growing_layers(cache) if layer.prefix is not None]

        # The rest of each distinct context
        first = sorted(set(self._first_equal))
        distinct = torch.tensor(first, device=input_ids.device) if len(first) < len(input_ids) else slice(None)
        mask, positions = (None if part is None else part[distinct] for part in (mask, positions))
        unread = [self._unread[row] for row in first]
        logits = self._read_rows(model, input_ids[distinct], mask, positions, cache, model_kwargs, unread)
        if isinstance(distinct, slice):
            return logits

        # Copies of the cache and the logits for rows with equal contexts
        index_of = {row: index for index, row in enumerate(first)}
        copied = torch.tensor([index_of[row] for row in self._first_equal], device=input_ids.device)
        cache.batch_select_indices(copied)
        return logits[copied]

    def _read_rows(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache,
        model_kwargs: dict[str, Any],
        unread: Sequence[int],
    ) -> torch.Tensor:
        """Read the unread tokens of rows, with padding only if no layer has a state. Returns the next logits."""
        total, width = ids.shape
        with_states = state_layers(cache)
        logits = torch.empty(0)
        for rows, end in staircase(unread, width) if with_states else [(total, width)]:
            for layer in with_states:
                layer.restrict_states(rows, total)
            for growing in growing_layers(cache):
                growing.rows = total
            part = (slice(rows), slice(end))
            logits = self._forward(
                model,
                cache,
                ids[part],
                None if mask is None else mask[part],
                None if positions is None else positions[part],
                model_kwargs,
                is_first_iteration=True,
            )
        for growing in growing_layers(cache):
            growing.rows = None
        return logits

    def _limit(self, cache: Cache, width: int) -> None:
        """Tell the layers how many columns they will have: all but the last token of the longest turn."""
        for window in window_layers(cache):
            window.first = 0
        for layer in growing_layers(cache):
            layer.limit = width + max(self._budgets) - 1 - self._prefix_length

    def _read_prefix(
        self,
        model: Any,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache,
        model_kwargs: dict[str, Any],
    ) -> None:
        """Read the shared prefix from the first row, and store it once if attention uses keys and values unchanged."""
        of_prefix = (slice(1), slice(self._prefix_length))
        ids = input_ids[of_prefix]
        mask, positions = (None if part is None else part[of_prefix] for part in (mask, positions))
        self._forward(model, cache, ids, mask, positions, model_kwargs, is_first_iteration=True)
        layers = growing_layers(cache)
        if all(layer.attended for layer in layers):
            for layer in layers:
                layer.share()
        else:  # read whole contexts instead
            self._prefix_length = self._columns = 0
            for layer in layers:
                layer.clear()
            self._limit(cache, input_ids.shape[1])

    def _forward(
        self,
        model: Any,
        cache: Cache,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        model_kwargs: dict[str, Any],
        *,
        is_first_iteration: bool = False,
    ) -> torch.Tensor:
        """Read the tokens that are not in the cache. Returns the next logits, of shape (B, V)."""
        if positions is not None:
            model_kwargs = {**model_kwargs, "position_ids": positions}
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1] - self._columns,
            **{self._cache_name: cache},
            attention_mask=mask,
            is_first_iteration=is_first_iteration,
            **model_kwargs,
        )
        context: AbstractContextManager[Any] = nullcontext()
        if self._prefix_length:
            context = attending_to(cast(DynamicCache, cache), model)
        elif window_layers(cache):
            context = masks_by_position()
        with context:
            logits = model(**inputs, return_dict=True).logits
        self._columns = ids.shape[1]
        if growing_layers(cache) and cache.get_seq_length() != self._columns:
            raise RuntimeError(
                "The model does not write into its key-value cache. Is gradient checkpointing on during generation? If "
                "the model has no cache, set `generation_kwargs={'use_cache': False}`."
            )
        # A copy, so that the logits of all other positions can be freed
        return logits[:, -1].to(torch.float32, copy=logits.shape[1] > 1)

    def _store_states(self, cache: Cache, rows: Sequence[int], before: Sequence[int]) -> None:
        """Store the states of the rows that ended with the last token: those that stay in the batch read padding from now."""
        ended = sorted(set(before) - set(self._turns.open))
        place = {row: i for i, row in enumerate(rows)}
        self.states.append(save_states(cache, ended, [place[row] for row in ended]))

    def _store_block(
        self,
        cache: Cache,
        mask: torch.Tensor | None,
        rows: Sequence[int],
        width: int,
        places: Sequence[int],
        staying: torch.Tensor | None = None,
    ) -> None:
        """Store keys and values of some rows of the cache (by their places in the batch) as a block. The others stay."""
        # Keys and values of these rows, layer by layer, so that at most one layer is in memory twice
        length = self._columns
        index = torch.tensor(places, device=self.logprobs.device)
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in growing_layers(cache):
            if staying is None:
                layers.append((layer.keys, layer.values))
            else:
                keys, values = (part.index_select(0, index.to(part.device)) for part in (layer.keys, layer.values))
                layers.append((keys, values))
                layer.batch_select_indices(staying)
        if staying is not None:
            for other in state_layers(cache):
                if isinstance(other, StateLayer):
                    other.batch_select_indices(staying)

        # Which columns hold tokens. The last token of the longest turn was sampled, but not read. Rows that ended earlier
        # have read padding since
        for i in places:
            written_tokens = len(self._turns.token_ids[rows[i]])
            # A state is that of the moment at which the turn ended
            self.cached[rows[i]] = written_tokens - 1 if self.states else min(written_tokens, length - width)
        written = torch.tensor([self.cached[rows[i]] for i in places], device=index.device)
        valid = torch.arange(length, device=index.device) < width + written[:, None]
        if mask is not None:
            valid[:, :width] &= mask[index][..., :width].flatten(1).bool()
        self.blocks.append(CacheBlock([rows[i] for i in places], layers, valid[:, self._prefix_length :]))
