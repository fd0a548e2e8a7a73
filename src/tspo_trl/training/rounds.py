"""Dynamic sampling: groups without a signal are replaced by groups of further questions, in several rounds."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from .dealing import LEFT_PADDED, Batch, gather_rows, has_rows, take_rows
from .masking import has_signal, loss_mask
from .metrics import add_metrics


def replace_without_signal(trainer: Any, batch: Batch, roll_out: Callable[[list[dict[str, Any]]], Batch]) -> Batch:
    """
    Replace the groups of a step that have no signal by those of further questions, see `dynamic_sampling` of
    [`TSPOConfig`]. The metrics of rollouts stay those of the first round, so that runs with and without it can be compared.

    Args:
        trainer ([`TSPOTrainer`]):
            The trainer.
        batch (`dict`):
            The inputs of the loss for the rollouts of this process.
        roll_out (`Callable[[list[dict]], dict]`):
            Makes the inputs of the loss from rows of the training set, one for each rollout of this process.

    Returns:
        `dict`: The inputs of the loss, of the same size.
    """
    args, accelerator, size = trainer.args, trainer.accelerator, trainer.num_generations
    dataset = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    metrics = trainer._metrics["train"]
    first_round = {name: list(values) for name, values in metrics.items()}
    first = len(batch["completion_ids"]) * accelerator.num_processes

    def sample(count: int, drawn: int) -> tuple[Batch, int]:
        questions = further_questions(
            count,
            len(dataset),
            num_generations=size,
            num_processes=accelerator.num_processes,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            step=trainer.state.global_step * args.gradient_accumulation_steps
            + trainer._step % args.gradient_accumulation_steps,
            drawn=drawn,
        )
        trainer._further_rollouts = first + drawn * size
        local = len(questions) * size // accelerator.num_processes
        start = accelerator.process_index * local
        return roll_out([dict(dataset[questions[i // size]]) for i in range(start, start + local)]), len(questions)

    try:
        batch, counts = sample_rounds(
            batch, sample, accelerator, num_generations=size, max_rounds=args.max_sampling_rounds
        )
    finally:
        trainer._further_rollouts = 0
    metrics.clear()
    metrics.update(first_round)
    add_metrics(metrics, counts)
    return batch


def further_questions(
    count: int, dataset_size: int, *, num_generations: int, num_processes: int, seed: int, step: int, drawn: int
) -> list[int]:
    """
    Draw questions for one more round. They depend on nothing but the arguments, so that they are the same in every process
    and in a resumed run.

    Args:
        count (`int`):
            Number of groups to replace.
        dataset_size (`int`):
            Number of questions of the training set.
        num_generations (`int`):
            Number of rollouts in a group.
        num_processes (`int`):
            Number of processes, which get equal numbers of rollouts.
        seed (`int`):
            Seed of the run.
        step (`int`):
            Number of the batch.
        drawn (`int`):
            Number of questions that earlier rounds of the step have drawn. They are not drawn again until all
            others have been drawn.

    Returns:
        `list[int]`: Indices of at least `count` questions.
    """
    while count * num_generations % num_processes:
        count += 1
    order = torch.randperm(dataset_size, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return [int(order[(drawn + i) % dataset_size]) for i in range(count)]


def sample_rounds(
    batch: Batch,
    sample: Callable[[int, int], tuple[Batch, int]],
    accelerator: Accelerator,
    *,
    num_generations: int,
    max_rounds: int,
) -> tuple[Batch, dict[str, float]]:
    """
    Replace groups without a signal by groups of further rounds that have one. The rollouts of all processes are counted
    together, because groups may span processes. Groups for which no replacement is found stay.

    Args:
        batch (`dict`):
            The inputs of the loss for the rollouts of this process.
        sample (`Callable[[int, int], tuple[dict, int]]`):
            Samples further groups. It gets the number of groups that are wanted and the number that was sampled before, and
            returns the inputs of the loss for its rollouts of this process, and their number of groups.
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes.
        num_generations (`int`):
            Number of rollouts in a group.
        max_rounds (`int`):
            Maximum number of further rounds.

    Returns:
        `tuple[dict, dict[str, float]]`: The inputs of the loss, of the same size, and metrics of dynamic sampling.
    """
    rows = gather_rows(batch, accelerator)
    signal = group_signal(rows, num_generations)
    at_first, sampled, rounds = int((~signal).sum()), 0, 0
    while rounds < max_rounds and not signal.all():
        further, groups = sample(int((~signal).sum()), sampled)
        rounds, sampled = rounds + 1, sampled + groups
        rows = replace_groups(rows, gather_rows(further, accelerator), num_generations)
        signal = group_signal(rows, num_generations)
    missing = int((~signal).sum())
    metrics = {
        "sampling/rounds": float(rounds),
        "sampling/further_groups": float(sampled),
        "sampling/replaced_groups": float(at_first - missing),
        "sampling/no_signal": missing / len(signal),
    }
    if not rounds:
        return batch, metrics
    rows["num_items_in_batch"] = loss_mask(rows).sum()
    size = len(batch["completion_ids"])
    start = accelerator.process_index * size
    return take_rows(rows, slice(start, start + size)), metrics


def group_signal(rows: Batch, num_generations: int) -> Tensor:
    """
    The groups that add to the gradient.

    Args:
        rows (`dict`):
            The inputs of the loss of N rollouts. Those of a group are adjacent.
        num_generations (`int`):
            Number of rollouts in a group, G.

    Returns:
        `torch.Tensor`: Booleans of shape (N / G,).
    """
    return has_signal(rows).view(-1, num_generations).any(dim=1)


def replace_groups(rows: Batch, further: Batch, num_generations: int) -> Batch:
    """
    Replace groups without a signal by groups with one, in their order.

    Args:
        rows (`dict`):
            The inputs of the loss of N rollouts.
        further (`dict`):
            Those of M further rollouts.
        num_generations (`int`):
            Number of rollouts in a group, G.

    Returns:
        `dict`: The inputs of the loss of N rollouts.
    """
    wanted = (~group_signal(rows, num_generations)).nonzero().squeeze(1)
    found = group_signal(further, num_generations).nonzero().squeeze(1) + len(rows["completion_ids"]) // num_generations
    groups = torch.arange(len(rows["completion_ids"]) // num_generations, device=found.device)
    count = min(len(wanted), len(found))
    groups[wanted[:count]] = found[:count]
    index = (groups[:, None] * num_generations + torch.arange(num_generations, device=found.device)).flatten()
    joined = {
        key: _join(value, further[key], left=key in LEFT_PADDED) if has_rows(value) else value
        for key, value in rows.items()
    }
    return take_rows(joined, index)


def _join(one: Tensor, other: Tensor, left: bool) -> Tensor:
    """The rows of both, padded with zeros to the same width."""
    if one.dim() > 1:
        width = max(one.size(1), other.size(1))
        one, other = (pad(x, (width - x.size(1), 0) if left else (0, width - x.size(1))) for x in (one, other))
    return torch.cat([one, other])
