"""Generation by continuous batching of `transformers`: turns join the batch when submitted and leave it when finished."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .base import Generation
from .stopping import StopRule


@dataclass(slots=True)
class _Request:
    """A turn that is being generated."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class ContinuousBatchingEngine:
    """
    Generation by continuous batching of `transformers`, with the model that is being trained. Finished turns leave the
    batch, new ones join it, and the common beginning of contexts is computed once.

    Args:
        model_context (`Callable[[], ContextManager[PreTrainedModel]]`):
            Opened once per session; yields the model that generates.
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
        """Open the model and allocate a cache, see [`Engine.session`]."""
        with self._model_context() as opened:
            model: Any = opened
            training = model.training
            config = replace(self._batching_config, return_logprobs=True)
            if model.dtype == torch.float32:
                config.auto_switch_to_flash = False  # flash attention does not support float32
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
                model.train(training)  # the manager switches it to evaluation mode

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        if self._manager is None:
            raise RuntimeError("`submit` must be called within `session()`.")
        self._count += 1
        request_id = str(self._count)
        self._open[request_id] = _Request(number)
        # Streamed, because only this class knows the stop strings
        self._manager.add_request(context, request_id=request_id, max_new_tokens=max_new_tokens, streaming=True)

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        turns: list[tuple[int, Generation]] = []
        while not turns:
            running = self._manager.is_running()
            output = self._manager.get_result(timeout=0.1 if wait else 0.005)
            while output is not None:
                turns += self._read_output(output)
                output = self._manager.get_result(timeout=0)
            if not wait:
                break
            if not running and not turns:
                raise RuntimeError("Continuous batching has stopped. Its own error is in the log above.")
        return turns

    def _read_output(self, output: Any) -> list[tuple[int, Generation]]:
        """The turn that ends with this output of the manager, if any."""
        request = self._open.get(output.request_id)
        if request is None:  # the turn has ended, and the manager had not processed the cancellation yet
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
