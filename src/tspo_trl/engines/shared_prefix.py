"""Attention to a prefix that all rows of a batch share: it is stored once, and all queries read it in one matrix product."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
_layers: ContextVar[Sequence[Any]] = ContextVar("layers")


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
    config = model.config
    replaceable = model._supports_attention_backend and config._attn_implementation == "sdpa"
    if len(contexts) < 2 or not replaceable or config.sub_configs:
        return 0
    # The common prefix of all contexts is that of the first and the last one in lexicographic order
    pairs = zip(min(contexts), max(contexts), strict=False)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = min(agreed, min(map(len, contexts)) - 1)
    return length if length >= SHORTEST else 0


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
    config, token = model.config, _layers.set(cache.layers)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _layers.reset(token)


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
    layer = _layers.get()[module.layer_idx]
    layer.attended = key is layer.keys and value is layer.values
    if layer.prefix is not None:
        # A single query per row: attend to the prefix without copying it for every row
        if query.shape[2] == 1 and not dropout and position_bias is None:
            mask = None if attention_mask is None else attention_mask[..., layer.prefix[0].shape[2] :]
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend(query, layer.prefix, key, value, mask, scaling), None
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
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    Softmax attention of one query per row to a shared prefix and to the keys of the row. Scores are computed in single
    precision.

    Args:
        query (`torch.Tensor`):
            Queries of shape (B, H, 1, D).
        prefix (`tuple[torch.Tensor, torch.Tensor]`):
            Shared keys and values, of shape (1, K, P, D); the H heads are in K groups.
        key (`torch.Tensor`):
            Keys of shape (B, K, L, D).
        value (`torch.Tensor`):
            Values of shape (B, K, L, D).
        mask (`torch.Tensor`, *optional*):
            Which of its own keys a row attends to, booleans of shape (B, 1, 1, L). All if `None`.
        scaling (`float`):
            Factor by which scores are multiplied.

    Returns:
        `torch.Tensor`: The result of attention, of shape (B, 1, H, D).
    """
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    shared_key, shared_value = (part[0] for part in prefix)
    shared = shared_key.shape[1]

    # Scores of the prefix, for all rows in one product, and of each row's own keys
    queries = query.view(rows, groups, heads // groups, size).float() * scaling
    to_shared = _by_row(_by_group(queries) @ shared_key.float().mT, rows)
    to_own = queries @ key.float().mT
    if mask is not None:
        to_own.masked_fill_(~mask, -torch.inf)

    # One softmax over both, then the weighted values of both
    weights = torch.cat([to_shared, to_own], dim=-1).softmax(dim=-1).to(value.dtype)
    result = weights[..., shared:] @ value
    result += _by_row(_by_group(weights[..., :shared]) @ shared_value, rows)
    return result.reshape(rows, 1, heads, -1)


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """Reshape (B, K, G, X) to (K, B * G, X), so that one matrix product covers all rows."""
    return values.transpose(0, 1).flatten(1, 2)


def _by_row(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Reshape (K, B * G, X) to (B, K, G, X)."""
    return values.unflatten(1, (rows, -1)).transpose(0, 1)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
