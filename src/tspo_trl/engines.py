"""The ways to generate a turn. An engine continues many contexts by one turn each; it knows nothing of searches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .decoding import TurnDecoder
from .kv_cache import KeptCache, new_cache
from .shared_prefix import shared_length
from .stopping import Recorder, StopRule, TurnEnd, Turns


@dataclass(frozen=True, slots=True)
class Generation:
    """
    One generated turn.

    Args:
        token_ids (`list[int]`):
            The T sampled tokens, the one that ends the turn included.
        logprobs (`list[float]`, *optional*):
            Their T log-probabilities under the sampling distribution, where the engine gives them: with temperature
            applied; before any truncation such as top-p by static batching, after it by the other engines.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None


class Engine(Protocol):
    """
    Continues contexts by one turn each. Turns are submitted and collected under the number of their rollout, so that a
    rollout can go on while others are still generated or search.

    Attributes:
        in_rounds (`bool`):
            Whether `collect` generates all submitted turns together. A search loop then submits whatever it can before.
            Otherwise turns are generated from when they are submitted, in the background or during `collect`.
        max_context_length (`int` or `None`):
            The most tokens of a context and its turn together, where the engine has a limit of its own.
    """

    in_rounds: bool
    max_context_length: int | None

    def session(self) -> AbstractContextManager[Any]:
        """
        Held open around all turns of a rollout, so that what is expensive (gathering sharded parameters, allocating a
        cache) is done once a rollout and not once a turn. Turns that nobody has collected when it closes are dropped.
        """
        ...

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """
        Ask for one turn.

        Args:
            number (`int`):
                The rollout. It has at most one turn under way.
            context (`list[int]`):
                Token ids.
            max_new_tokens (`int`):
                The budget of the turn, at least 1.
        """
        ...

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """
        Take the turns that are finished.

        Args:
            wait (`bool`):
                Whether to wait until at least one is. Otherwise it returns soon, perhaps with none.

        Returns:
            `list[tuple[int, Generation]]`: Rollouts and their turns, each ended by an end-of-sequence token, by the
            token that completes a stop string, or by its budget.
        """
        ...


class BatchEngine(ABC):
    """An [`Engine`] that generates in rounds: all submitted turns as one batch, in the order of their numbers."""

    in_rounds = True
    max_context_length: int | None = None

    def __init__(self) -> None:
        self._submitted: dict[int, tuple[list[int], int]] = {}

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        try:
            yield
        finally:
            self._submitted.clear()

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        self._submitted[number] = (context, max_new_tokens)

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        numbers = sorted(self._submitted)
        if not numbers:
            return []
        contexts, budgets = zip(*(self._submitted.pop(number) for number in numbers), strict=True)
        return list(zip(numbers, self._generate_round(numbers, contexts, budgets), strict=True))

    def _generate_round(
        self, numbers: Sequence[int], contexts: Sequence[list[int]], max_new_tokens: Sequence[int]
    ) -> list[Generation]:
        """Generate the turns of a round, for an engine that keeps something of a rollout (by its number) for the next."""
        return self.generate(contexts, max_new_tokens)

    @abstractmethod
    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """
        Generate one turn for each context, within `session()`.

        Args:
            contexts (`Sequence[list[int]]`):
                B contexts of token ids, possibly of different lengths.
            max_new_tokens (`Sequence[int]`):
                B budgets, each at least 1.

        Returns:
            `list[Generation]`: B turns.
        """


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


@dataclass(slots=True)
class _Request:
    """A turn under way in a continuous batch."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class ContinuousBatchingEngine:
    """
    Generation by `transformers`' continuous batching, with the model that is being trained: finished turns leave the
    batch, new ones join it, and what contexts have in common is computed once.

    Args:
        model_context (`Callable[[], ContextManager[PreTrainedModel]]`):
            Opened once for all turns of a rollout; yields the model to generate with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        generation_config ([`~transformers.GenerationConfig`]):
            Sampling parameters. `eos_token_id` must be set.
        batching_config ([`~transformers.ContinuousBatchingConfig`]):
            The size of the cache and of the batches.
        stop_strings (`Collection[str]`):
            See [`TransformersEngine`].
    """

    in_rounds = False
    max_context_length: int | None = None

    def __init__(
        self,
        model_context: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batching_config: ContinuousBatchingConfig,
        stop_strings: Collection[str],
    ):
        self._model_context = model_context
        self._generation_config = generation_config
        self._batching_config = batching_config
        self._stop = StopRule(tokenizer, stop_strings, generation_config)
        self._open: dict[str, _Request] = {}
        self._count = 0
        self._manager: Any = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Open the model and a cache for all turns of a rollout, see [`Engine.session`]."""
        with self._model_context() as opened:
            model: Any = opened
            training = model.training
            config = replace(self._batching_config, return_logprobs=True)
            if model.dtype == torch.float32:
                config.auto_switch_to_flash = False  # which has no kernels for it
            try:
                with model.continuous_batching_context_manager(
                    generation_config=self._generation_config, continuous_batching_config=config
                ) as self._manager:
                    try:
                        yield
                    finally:
                        for request_id in self._open:
                            self._manager.cancel_request(request_id)
                        self._open.clear()
            finally:
                self._manager = None
                model.train(training)  # the manager has put it into evaluation mode

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        if self._manager is None:
            raise RuntimeError("`submit` must be called within `session()`.")
        self._count += 1
        request_id = str(self._count)
        self._open[request_id] = _Request(number)
        # Streamed, because only here it is known where a stop string ends
        self._manager.add_request(context, request_id=request_id, max_new_tokens=max_new_tokens, streaming=True)

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        written: list[tuple[int, Generation]] = []
        while not written:
            running = self._manager.is_running()
            output = self._manager.get_result(timeout=0.1 if wait else 0.005)
            while output is not None:
                written += self._read(output)
                output = self._manager.get_result(timeout=0)
            if not wait:
                break
            if not running and not written:
                raise RuntimeError("Continuous batching has stopped. Its own error is in the log above.")
        return written

    def _read(self, output: Any) -> list[tuple[int, Generation]]:
        """The turn that ends with this output of the manager, if one does."""
        request = self._open.get(output.request_id)
        if request is None:  # it has ended, and the manager did not know yet
            return []
        if output.error is not None:
            raise RuntimeError(
                f"Continuous batching failed: {output.error}. If it lacks memory or blocks, change "
                "`transformers_continuous_batching_config`, for instance `max_memory_percent` or `num_blocks`."
            )
        total = len(output.generated_tokens)
        ended = False
        for i in range(len(request.token_ids), total):
            request.token_ids.append(output.generated_tokens[i])
            request.logprobs.append(output.logprobs[i - total])
            if ended := self._stop(request.token_ids):
                break
        if not ended and not output.is_finished():
            return []
        del self._open[output.request_id]
        if not output.is_finished():
            self._manager.cancel_request(output.request_id)
        return [(request.number, Generation(request.token_ids, request.logprobs))]
