"""The tokens that a model reads in each forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Record the shape (rows, columns) of the input of each forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()
