"""Deals the rollouts of a generation batch to micro-batches and processes, so that each has rollouts of similar lengths."""

from math import gcd
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .masking import has_signal, loss_mask

Batch = dict[str, Any]
LEFT_PADDED = ("prompt_ids", "prompt_mask")


def deal(batches: list[Batch], accelerator: Accelerator, *, accumulation: int, leave_out: bool) -> list[Batch]:
    """
    Deal rollouts to micro-batches and processes.

    A rollout stays in its optimizer step, so that the gradient of the step is the same for losses that do not depend on
    which rollouts share a micro-batch. Rollouts without a signal go to the last micro-batches of the step, whose forward
    can then be left out. The others are sorted by length; those of a micro-batch are dealt to the processes back and
    forth, so that the processes have about the same number of tokens.

    Args:
        batches (`list[dict]`):
            The micro-batches of this process. Tensors have a rollout in each row; those without rows stay.
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes.
        accumulation (`int`):
            Number of micro-batches in an optimizer step.
        leave_out (`bool`):
            Whether rollouts without a signal are left out of the forward.

    Returns:
        `list[dict]`: The new micro-batches of this process, as many and of the same size.
    """
    window = gcd(accumulation, len(batches))
    if window == accelerator.num_processes == 1:
        return batches
    dealt: list[Batch] = []
    for first in range(0, len(batches), window):
        group = batches[first : first + window]
        size = len(group[0]["completion_ids"])
        rows = gather_rows(_concatenate(group), accelerator)
        order = _order(rows, leave_out)
        mine = [share[accelerator.process_index] for share in _shares(order, size, accelerator.num_processes)]
        dealt.extend(take_rows(rows, index) for index in mine)
    return dealt


def _order(rows: Batch, leave_out: bool) -> Tensor:
    """Rollouts with a signal first, then by the number of tokens that a forward reads, the longest first. Shape (N,)."""
    trained = loss_mask(rows) != 0
    columns = torch.arange(1, trained.size(1) + 1, device=trained.device)
    lengths = rows["prompt_mask"].sum(dim=1) + (trained * columns).amax(dim=1)
    if leave_out:
        lengths = torch.where(has_signal(rows), lengths, -1)
    return torch.argsort(lengths, descending=True, stable=True)


def _shares(order: Tensor, size: int, processes: int) -> list[Tensor]:
    """The rows of each micro-batch for each process, W micro-batches with a tensor of shape (processes, size)."""
    rounds = order.view(-1, size, processes).clone()
    rounds[:, 1::2] = rounds[:, 1::2].flip(-1)  # back and forth
    return [micro.T for micro in rounds]


def _concatenate(batches: list[Batch]) -> Batch:
    """The rows of several batches with the same columns."""
    return {
        key: torch.cat([b[key] for b in batches]) if has_rows(value) else value for key, value in batches[0].items()
    }


def gather_rows(rows: Batch, accelerator: Accelerator) -> Batch:
    """
    The rollouts of all processes, padded with zeros to the longest.

    Args:
        rows (`dict`):
            Tensors with a row for each rollout of this process, and others.
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes.

    Returns:
        `dict`: Tensors with a row for each rollout of all processes.
    """
    if accelerator.num_processes == 1:
        return rows
    gathered = {}
    for key, value in rows.items():
        if has_rows(value):
            value = accelerator.gather(accelerator.pad_across_processes(value, dim=1, pad_first=key in LEFT_PADDED))
        gathered[key] = value
    return gathered


def take_rows(rows: Batch, index: Tensor | slice) -> Batch:
    """
    Some of the rollouts.

    Args:
        rows (`dict`):
            Tensors with a row for each rollout, and others, which stay.
        index (`torch.Tensor` or `slice`):
            The rollouts to take.

    Returns:
        `dict`: Tensors with a row for each of them.
    """
    return {key: value[index] if has_rows(value) else value for key, value in rows.items()}


def has_rows(value: Any) -> bool:
    """
    Whether a value has a row for each rollout.

    Args:
        value (`Any`):
            An input of the loss.
    """
    return isinstance(value, Tensor) and value.dim() > 0
