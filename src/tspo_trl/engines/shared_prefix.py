"""Attention to a prefix that all rows of a batch share: it is stored once, and all queries read it in one matrix product."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Keys and values of every layer, of shape (1, H, P, D)
Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]

#: Minimum length of a prefix, in tokens. A shorter one is not worth a separate forward pass
SHORTEST = 32
NAME = "tspo_shared_prefix"
#: Whether PyTorch (from 2.8) multiplies matrices in half precision with a result in single precision, on CUDA
_HAS_FLOAT_RESULT = hasattr(torch.ops.aten.bmm, "dtype")
#: Number of elements that a CPU converts at once, so that they stay in its cache
_CHUNK = 2**18


@dataclass(slots=True)
class _Pass:
    """A forward pass: the layers of the cache, and the mask of the layers with its inverse after the prefix."""

    layers: Sequence[Any]
    mask: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def hide(self, mask: torch.Tensor | None, start: int) -> torch.Tensor | None:
        """Invert the columns of a mask from `start` on. Layers share a mask, so this is done once."""
        if mask is not self.mask:
            self.mask, self.hidden = mask, None if mask is None else ~mask[..., start:]
        return self.hidden


_pass: ContextVar[_Pass] = ContextVar("pass")


def shared_length(model: PreTrainedModel, contexts: Sequence[list[int]]) -> int:
    """
    Number of tokens at the beginning of all contexts that are equal and can be stored once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, possibly wrapped by PEFT.
        contexts (`Sequence[list[int]]`):
            B contexts.

    Returns:
        `int`: The length, such that at least one token of each context remains after the prefix. 0 if there is only one
        context, if the prefix is shorter than `SHORTEST`, or if the model does not call PyTorch's attention through the
        interface of `transformers`.
    """
    if len(contexts) < 2 or not is_replaceable(model):
        return 0
    # The common prefix of all contexts is that of the first and the last one in lexicographic order
    pairs = zip(min(contexts), max(contexts), strict=False)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = min(agreed, min(map(len, contexts)) - 1)
    return length if length >= SHORTEST else 0


def is_replaceable(model: PreTrainedModel) -> bool:
    """Whether a model calls PyTorch's attention, for all its layers, through the interface of `transformers`."""
    config = model.config
    replaceable = model._supports_attention_backend and config._attn_implementation == "sdpa"
    return replaceable and not config.sub_configs


@contextmanager
def attending_to(cache: DynamicCache, model: PreTrainedModel) -> Iterator[None]:
    """
    Make the rows of a model attend to the shared prefix of a cache, followed by their own keys and values. Attention masks
    cover both.

    Args:
        cache ([`~transformers.DynamicCache`]):
            A cache of `GrowingLayer`s. Each records in `attended` whether attention uses its keys and values unchanged. Only
            then can a prefix be stored separately. Models with latent attention compute other keys and values from the cache.
        model ([`~transformers.PreTrainedModel`]):
            A model for which [`shared_length`] is not 0.
    """
    config, token = model.config, _pass.set(_Pass(cache.layers))
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _pass.reset(token)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of `transformers`: takes queries of shape (B, H, T, D), returns shape (B, T, H, D)."""
    of_pass = _pass.get()
    layer = of_pass.layers[module.layer_idx]
    layer.attended = key is layer.keys and value is layer.values
    if layer.prefix is not None:
        # A single query per row: attend to the prefix without copying it for every row
        if query.shape[2] == 1 and not dropout and position_bias is None:
            hidden = of_pass.hide(attention_mask, layer.prefix[0].shape[2])
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend(query, layer.prefix, key, value, hidden, scaling), None
        # Otherwise, copy it before the keys and values of every row
        key, value = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)
            for shared, own in zip(layer.prefix, (key, value), strict=True)
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, position_bias=position_bias, **kwargs
    )


def attend(
    query: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Softmax attention of one query per row to a shared prefix and to the keys of the row. Scores and sums are computed in
    single precision, also under autocast: it only rounds queries, keys and values, as it does for PyTorch's attention.

    Args:
        query (`torch.Tensor`):
            Queries of shape (B, H, 1, D).
        prefix (`tuple[torch.Tensor, torch.Tensor]`):
            Shared keys and values, of shape (1, K, P, D); the H heads are in K groups.
        key (`torch.Tensor`):
            Keys of shape (B, K, L, D).
        value (`torch.Tensor`):
            Values of shape (B, K, L, D).
        hidden (`torch.Tensor`, *optional*):
            Which of its own keys a row does not attend to, booleans of shape (B, 1, 1, L). It attends to all if `None`.
        scaling (`float`):
            Factor by which scores are multiplied.

    Returns:
        `torch.Tensor`: The result of attention, of shape (B, 1, H, D), in the type of the values.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value, *shared = (part.to(dtype) for part in (query, key, value, *prefix))
        with torch.autocast(kind, enabled=False):
            return attend(query, (shared[0], shared[1]), key, value, hidden, scaling)

    rows, heads, _, size = query.shape
    groups = key.shape[1]
    shared_key, shared_value = (part[0] for part in prefix)
    length = shared_key.shape[1]

    # Scores of the prefix, for all rows in one product, and of each row's own keys
    queries = query.view(rows, groups, heads // groups, size)
    before = not _multiplies_directly(key)  # scaled queries would be rounded to the type of the keys
    if before:
        queries = queries.float() * scaling
    to_shared = _by_row(_product(_by_group(queries), shared_key.mT), rows)
    to_own = _product(queries, key.mT)
    if hidden is not None:
        to_own.masked_fill_(hidden, -torch.inf)

    # One softmax over both, then the weighted values of both
    scores = torch.cat([to_shared, to_own], dim=-1)
    weights = (scores if before else scores.mul_(scaling)).softmax(dim=-1)
    result = _product(weights[..., length:], value)
    result += _by_row(_product(_by_group(weights[..., :length]), shared_value), rows)
    return result.to(value.dtype).reshape(rows, 1, heads, -1)


def _multiplies_directly(matrices: torch.Tensor) -> bool:
    """Whether products of matrices can be computed in single precision without converting the matrices."""
    half = matrices.dtype in (torch.bfloat16, torch.float16)
    return half and matrices.is_cuda and _HAS_FLOAT_RESULT and torch.version.hip is None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of matrices in single precision. The right ones are large, and may be of a lower precision."""
    if _multiplies_directly(right):
        left_3d, right_3d = (part.to(right.dtype).flatten(0, -3) for part in (left, right))
        return torch.bmm(left_3d, right_3d, out_dtype=torch.float32).unflatten(0, left.shape[:-2])
    if right.dtype == left.dtype or right.device.type != "cpu":
        return left @ right.to(left.dtype)
    rows = max(1, _CHUNK // right[0].numel())
    parts = zip(left.split(rows), right.split(rows), strict=True)
    return torch.cat([some @ others.to(left.dtype) for some, others in parts])


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """Reshape (B, K, G, X) to (K, B * G, X), so that one matrix product covers all rows."""
    return values.transpose(0, 1).flatten(1, 2)


def _by_row(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Reshape (K, B * G, X) to (B, K, G, X)."""
    return values.unflatten(1, (rows, -1)).transpose(0, 1)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
