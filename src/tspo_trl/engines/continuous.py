"""Generation by `transformers`' continuous batching: turns join and leave the batch as they come."""

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
