"""Sampling by a given configuration alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


@contextmanager
def sampling_by(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    """
    Replace the generation configuration of a model inside a context. `generate` takes values that are not set from the
    model's own `generation_config.json`, which may hold penalties, a `min_p` or beams that change sampling silently.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`]):
            The configuration.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = network.generation_config
    network.generation_config = generation_config
    try:
        yield
    finally:
        network.generation_config = own
