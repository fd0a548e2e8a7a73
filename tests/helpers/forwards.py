"""What a model reads in each forward pass: its tokens and its cache."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from tspo_trl.engines.kv_cache import CACHE_NAME


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Record the shape (rows, columns) of the input of each forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Let a model ignore the cache that it gets, as with gradient checkpointing before transformers 5.24."""
    ignored = {CACHE_NAME: None, "use_cache": False}
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | ignored), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
