"""Deals the rollouts of a generation batch to micro-batches and processes, so that each has rollouts of like lengths."""

from math import gcd
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .masking import has_signal, loss_mask

Batch = dict[str, Any]


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
        rows = _gather(_concatenate(group), accelerator)
        order = _order(rows, leave_out)
        mine = [share[accelerator.process_index] for share in _shares(order, size, accelerator.num_processes)]
        dealt.extend(_take(rows, index) for index in mine)
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
        key: torch.cat([b[key] for b in batches]) if _has_rows(value) else value for key, value in batches[0].items()
    }


def _gather(rows: Batch, accelerator: Accelerator) -> Batch:
    """The rows of all processes, padded to the longest."""
    if accelerator.num_processes == 1:
        return rows
    gathered = {}
    for key, value in rows.items():
        if _has_rows(value):
            left = key in ("prompt_ids", "prompt_mask")
            value = accelerator.gather(accelerator.pad_across_processes(value, dim=1, pad_first=left))
        gathered[key] = value
    return gathered


def _take(rows: Batch, index: Tensor) -> Batch:
    return {key: value[index] if _has_rows(value) else value for key, value in rows.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
