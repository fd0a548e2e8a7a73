"""The tokens that are trained on, and those that are not: these must not affect the loss."""

from collections.abc import Sequence
from typing import Any

import torch

_UNLIKELY = -1e4  # a log-probability whose ratio to any other is 0, and whose difference is finite


def keep_ratios_finite(batch: dict[str, torch.Tensor | Any]) -> None:
    """
    Replace the old and the reference log-probabilities of observations and padding, in place.

    TRL computes the ratios of all tokens before it masks them. If the policy makes an observation token about 90 nats less
    likely than the reference model, the ratio overflows in float32, and its product with the mask is NaN. With the values
    set here, the ratio of a masked token is at most 1. The loss, its gradient and the metrics are unchanged otherwise.

    Args:
        batch (`dict`):
            The inputs of the loss, with `completion_mask` and optionally `tool_mask`, `ref_per_token_logps` and
            `old_per_token_logps`, all of shape (B, L).
    """
    mask = loss_mask(batch)
    for name, value in (("ref_per_token_logps", _UNLIKELY), ("old_per_token_logps", 0.0)):
        if batch.get(name) is not None:
            batch[name] = batch[name].masked_fill(mask == 0, value)


def mean_trained_advantages(batch: dict[str, torch.Tensor | Any]) -> torch.Tensor:
    """
    The mean advantage of the trained tokens of each rollout.

    Args:
        batch (`dict`):
            The inputs of the loss, with `advantages` of shape (B,) or (B, L).

    Returns:
        `torch.Tensor`: Shape (B,), 0 for a rollout without trained tokens.
    """
    advantages = batch["advantages"]
    if advantages.dim() == 1:
        return advantages
    mask = loss_mask(batch)
    return (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def replace_last(logged: Any, values: Sequence[Any]) -> None:
    """
    Replace the last values of a log.

    Args:
        logged (`collections.deque`):
            The log, which may hold fewer values.
        values (`Sequence`):
            The new values.
    """
    for _ in range(min(len(logged), len(values))):
        logged.pop()
    logged.extend(values)


def loss_mask(batch: dict[str, torch.Tensor | Any]) -> torch.Tensor:
    """
    The mask of the tokens that are trained on.

    Args:
        batch (`dict`):
            The inputs of the loss, with `completion_mask` and optionally `tool_mask`, of shape (B, L).

    Returns:
        `torch.Tensor`: 1 for the tokens that the model wrote, else 0, shape (B, L).
    """
    mask = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def has_signal(batch: dict[str, torch.Tensor | Any]) -> torch.Tensor:
    """
    The rollouts that add to the gradient of the policy: a trained token has an advantage that is not zero.

    Args:
        batch (`dict`):
            The inputs of the loss, with `advantages` of shape (B,) or (B, L).

    Returns:
        `torch.Tensor`: Booleans of shape (B,).
    """
    advantages = batch["advantages"]
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    return ((advantages != 0) & (loss_mask(batch) != 0)).any(dim=1)
