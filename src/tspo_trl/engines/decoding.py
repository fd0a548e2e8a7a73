"""The decode loop of a search turn: what `generate` of `transformers` does, for many short turns that end one by one."""

from collections.abc import Sequence
from contextlib import nullcontext
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

from .kv_cache import CacheBlock, GrowingLayer
from .shared_prefix import Prefix, attending_to
from .stopping import Recorder, Turns

#: Processors that tell rows by their places, or keep something of each: with them, no row may leave the batch
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
    Writes one turn for each row of a batch. Passed to `generate` as `custom_generate`, which prepares and checks as ever
    and then calls it instead of its own loop. It differs in what it does not do:

    - Contexts that are the same, as those of a group are in their first turn, are read once. So is what all contexts begin
      with, as instructions and descriptions of tools are; it is also stored once, and attended to by all rows together.
    - Rows whose turns have ended leave the batch once they are half of it.
    - A token is appended without copying the cache, the mask or the tokens before it.
    - A token is drawn with one random number, not with one for each entry of the vocabulary. A row gets the same random
      numbers whether others have left or not.

    Args:
        turns ([`Turns`]):
            Ends and collects the turns of the B rows.
        recorder ([`Recorder`]):
            One of the processors that `generate` was given.
        budgets (`Sequence[int]`):
            The most tokens of each turn.
        same (`Sequence[int]`):
            For each row, the first one with the same context, if the cache is still empty; otherwise the row itself.
        prefix (`int`):
            How many tokens all contexts begin with are stored once. Padding comes after them.

    Attributes:
        logprobs (`torch.Tensor`):
            Log-probabilities of what was sampled, of shape (B, T); meaningless from where the turn of a row has ended.
        blocks (`list[CacheBlock]`):
            What the rows have read and written after the shared prefix.
        prefix (`Prefix`):
            Keys and values of the shared prefix; empty if there is none.
        cached (`list[int]`):
            How many tokens of each turn that is: all, or all but the last.
    """

    logprobs: torch.Tensor

    def __init__(self, turns: Turns, recorder: Recorder, budgets: Sequence[int], same: Sequence[int], prefix: int):
        self._turns = turns
        self._recorder = recorder
        self._budgets = budgets
        self._same = same
        self._prefix_length = prefix
        self.prefix: Prefix = []
        self.blocks: list[CacheBlock] = []
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
        Write the turns.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model.
            input_ids (`torch.Tensor`):
                Contexts of shape (B, W), padded on the left.
            logits_processor ([`~transformers.LogitsProcessorList`]):
                What `generate` has made of the sampling parameters.
            stopping_criteria ([`~transformers.StoppingCriteriaList`]):
                Not used: `turns` knows when a turn ends.
            generation_config ([`~transformers.GenerationConfig`]):
                Sampling parameters.
            model_kwargs (`Any`):
                Arguments of the model, among them the mask, the positions and the cache.

        Returns:
            `torch.Tensor`: The contexts. The turns are in `turns`.

        Raises:
            `RuntimeError`: If the model does not use its cache, or its logits are not numbers.
        """
        cache: Cache = model_kwargs.pop("past_key_values")
        mask: torch.Tensor | None = model_kwargs.pop("attention_mask")  # `None` if nothing is padding
        positions: torch.Tensor | None = model_kwargs.pop("position_ids", None)
        device, width, room = input_ids.device, input_ids.shape[1], max(self._budgets)
        logits = self._read(model, input_ids, mask, positions, cache, model_kwargs)

        # Buffers with room for the turn, of which views are passed on
        ids = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), room)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
            if self.prefix and positions is not None:
                # As attention takes it, so that the model does not make it anew for every token
                mask = mask[:, None, None].bool()
        if positions is not None:
            positions = positions[:, -1:]
            # A row whose turn has ended must not run out of the model's positions
            last_positions = positions + torch.tensor(self._budgets, device=device)[:, None]
        self.logprobs = torch.zeros(ids.shape[0], room, device=device)
        rows = list(range(len(ids)))
        index = torch.arange(len(ids), device=device)
        may_leave = not any(isinstance(processor, BOUND_TO_ROWS) for processor in logits_processor)

        for step in range(room):
            seen, scores = ids[:, : width + step], logits
            for processor in logits_processor:
                scores = processor(seen, scores)
            if generation_config.do_sample:
                # Drawn for all rows of the turn, so that what one gets does not depend on the others
                uniform = torch.rand(len(self._budgets), dtype=_exact(device), device=device)
                tokens = sample(scores, uniform[index])
            else:
                tokens = scores.argmax(dim=-1)
            self.logprobs[index, step] = self._recorder.logprobs(tokens)
            ids[:, width + step] = tokens
            self._turns.write(dict(zip(rows, tokens.tolist(), strict=True)))
            if not self._turns.open:
                break
            if may_leave and 2 * len(self._turns.open) <= len(rows):
                going = set(self._turns.open)
                left = [i for i, row in enumerate(rows) if row not in going]
                self._keep(cache, mask, rows, width, left)
                staying = torch.tensor([i for i, row in enumerate(rows) if row in going], device=device)
                cache.batch_select_indices(staying)
                ids, index = ids[staying], index[staying]
                mask = None if mask is None else mask[staying]
                if positions is not None:
                    positions, last_positions = positions[staying], last_positions[staying]
                rows = list(self._turns.open)
            if positions is not None:
                positions = torch.minimum(positions + 1, last_positions)
            length = width + step + 1
            seen_mask = None if mask is None else mask[..., :length]
            logits = self._forward(model, cache, ids[:, :length], seen_mask, positions, model_kwargs)

        self._keep(cache, mask, rows, width, list(range(len(rows))))
        if self.logprobs.isnan().any():
            raise RuntimeError(
                "The model's logits are not numbers (NaN or infinite), so nothing can be sampled from them."
            )
        return input_ids

    def _read(
        self,
        model: Any,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache,
        model_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Read the contexts as far as they are not in the cache; return the logits after them, of shape (B, V)."""
        if self._prefix_length and not cache.get_seq_length():
            self._read_prefix(model, input_ids, mask, positions, cache, model_kwargs)
        self.prefix = [layer.prefix for layer in cast(list[GrowingLayer], cache.layers) if layer.prefix is not None]
        first = sorted(set(self._same))
        distinct = torch.tensor(first, device=input_ids.device) if len(first) < len(input_ids) else slice(None)
        mask, positions = (None if part is None else part[distinct] for part in (mask, positions))
        logits = self._forward(
            model, cache, input_ids[distinct], mask, positions, model_kwargs, is_first_iteration=True
        )
        if isinstance(distinct, slice):
            return logits
        places = {row: place for place, row in enumerate(first)}
        back = torch.tensor([places[row] for row in self._same], device=input_ids.device)
        cache.batch_select_indices(back)
        return logits[back]

    def _read_prefix(
        self,
        model: Any,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache,
        model_kwargs: dict[str, Any],
    ) -> None:
        """Read what all contexts begin with, and store it once, if the model's attention takes it as it is stored."""
        of_prefix = (slice(1), slice(self._prefix_length))
        ids = input_ids[of_prefix]
        mask, positions = (None if part is None else part[of_prefix] for part in (mask, positions))
        self._forward(model, cache, ids, mask, positions, model_kwargs, is_first_iteration=True)
        layers = cast(list[GrowingLayer], cache.layers)
        if all(layer.attended for layer in layers):
            for layer in layers:
                layer.share()
        else:
            self._prefix_length = 0
            for layer in layers:
                layer.forget()

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
        """Read what is not yet in the cache; the logits after it, of shape (B, V), without a hold on those before."""
        if positions is not None:
            model_kwargs = {**model_kwargs, "position_ids": positions}
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1] - cache.get_seq_length(),
            past_key_values=cache,
            attention_mask=mask,
            is_first_iteration=is_first_iteration,
            **model_kwargs,
        )
        with attending_to(cast(DynamicCache, cache), model) if self._prefix_length else nullcontext():
            logits = model(**inputs, return_dict=True).logits
        if cache.get_seq_length() != ids.shape[1]:
            raise RuntimeError(
                "The model does not write into its key-value cache. Is gradient checkpointing on during generation? If "
                "the model has no cache, set `generation_kwargs={'use_cache': False}`."
            )
        return logits[:, -1].to(torch.float32, copy=logits.shape[1] > 1)

    def _keep(
        self, cache: Cache, mask: torch.Tensor | None, rows: Sequence[int], width: int, places: Sequence[int]
    ) -> None:
        """Keep what the cache holds of some of its rows."""
        length = cache.get_seq_length()
        index = torch.tensor(places, device=self.logprobs.device)
        whole = len(places) == len(rows)
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        layer: Any
        for layer in cache.layers:
            keys, values = layer.keys, layer.values
            if not whole:
                keys, values = (part.index_select(0, index.to(part.device)) for part in (keys, values))
            layers.append((keys, values))
        # The last token of the longest turn was sampled, but not read; rows that ended before have read padding
        for i in places:
            self.cached[rows[i]] = min(len(self._turns.token_ids[rows[i]]), length - width)
        written = torch.tensor([self.cached[rows[i]] for i in places], device=index.device)
        valid = torch.arange(length, device=index.device) < width + written[:, None]
        if mask is not None:
            valid[:, :width] &= mask[index][..., :width].flatten(1).bool()
        self.blocks.append(CacheBlock([rows[i] for i in places], layers, valid[:, self._prefix_length :]))


def sample(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    Draw a token from each row of scores.

    Args:
        scores (`torch.Tensor`):
            Unnormalised log-probabilities of shape (B, V).
        uniform (`torch.Tensor`):
            Random numbers in [0, 1) of shape (B,), in the precision in which probabilities are to be added up.

    Returns:
        `torch.Tensor`: B tokens: the first whose probability, added to that of all before it, exceeds the random number.
    """
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=uniform.dtype)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp_(max=scores.shape[1] - 1)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
