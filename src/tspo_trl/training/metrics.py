"""What is logged about the rollouts of a step: pure functions of trajectories and of what was gathered over ranks."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..credit import group_composition, is_near_miss
from ..retrieval.base import FAILURE_KINDS
from ..rollout.facts import RolloutFacts
from ..rollout.stats import RolloutStats
from ..rollout.trajectory import Trajectory

#: Short names of metrics, logged for each of several evaluation data sets: `eval_<name>_em`, `eval_<name>_hit`.
EVAL_ALIASES = {"em": "rewards/exact_match_reward/mean", "hit": "search/hit"}

_RETRIEVAL = ("generate", "searches", "queries", "cached", "retries", *FAILURE_KINDS)


def mean_logprob(trajectory: Trajectory) -> float:
    """
    The mean log-probability of the tokens that the model sampled, NaN where the engine gives none.

    Args:
        trajectory ([`Trajectory`]):
            A rollout.
    """
    values: list[float] = []
    for turn in trajectory.turns:
        if turn.logprobs is None:
            return math.nan
        values += turn.logprobs
    return sum(values) / len(values) if values else math.nan


def rollout_metrics(
    facts: torch.Tensor,
    outcomes: torch.Tensor,
    has_signal: torch.Tensor,
    logps: torch.Tensor,
    *,
    num_generations: int,
    success_threshold: float,
) -> dict[str, float]:
    """
    The metrics of a step over the rollouts of all ranks.

    Args:
        facts (`torch.Tensor`):
            Integers of shape (N, F), one row of [`rollout_facts`] a rollout, group-major.
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for unscorable rollouts.
        has_signal (`torch.Tensor`):
            Whether any turn of a rollout has a non-zero advantage, booleans of shape (N,).
        logps (`torch.Tensor`):
            The mean log-probability of the sampled tokens of a rollout, of shape (N,), NaN where the engine gives none.
        num_generations (`int`):
            The size of a group.
        success_threshold (`float`):
            A rollout is correct if its outcome is at least this.

    Returns:
        `dict[str, float]`: Metrics by name. Groups without a scorable rollout count in no share of groups; a share of
        nothing is NaN, which TRL leaves out.
    """
    column: Any = RolloutFacts(*facts.float().unbind(dim=1))  # type: ignore[arg-type]
    scorable = ~outcomes.isnan()
    correct = outcomes >= success_threshold
    hit = (column.occurrence >= 0) & scorable
    near_miss = torch.tensor(
        [
            is_near_miss(outcome, turn, success_threshold=success_threshold)
            for outcome, turn in zip(outcomes.tolist(), column.occurrence.tolist(), strict=True)
        ]
    )
    signal = has_signal.view(-1, num_generations).any(dim=1).tolist()
    kinds = [
        group_composition(group, has_signal=some, success_threshold=success_threshold)
        for group, some in zip(outcomes.view(-1, num_generations).tolist(), signal, strict=True)
    ]
    scored = [(kind, some) for kind, some in zip(kinds, signal, strict=True) if kind != "unscored"]
    rollouts, searches = scorable.sum(), column.searches.sum()

    values = {
        "groups/all_wrong": _share(kind in ("all_wrong", "rescued") for kind, _ in scored),
        "groups/mixed": _share(kind == "mixed" for kind, _ in scored),
        "groups/all_correct": _share(kind == "all_correct" for kind, _ in scored),
        "groups/rescued": _share(kind == "rescued" for kind, _ in scored),
        "groups/no_signal": _share(not some for _, some in scored),
        "logps/correct": logps[correct].nanmean(),
        "search/calls": column.searches.mean(),
        "search/none": (column.searches == 0).float().mean(),
        "search/invalid": column.invalid.sum() / column.turns.sum(),
        "search/duplicate": column.duplicate.sum() / searches,
        "search/failed": column.failed.sum() / searches,
        "search/hit": hit.sum() / rollouts,
        "search/near_miss": near_miss.sum() / rollouts.cpu(),
        "search/first_turn": (column.occurrence + 1)[hit].mean(),
        "turns/mean": column.turns.mean(),
        "turns/truncated": column.truncated.mean(),
    }
    return {name: value.item() for name, value in values.items()}


def _share(flags: Iterable[bool]) -> torch.Tensor:
    """The share of flags that are set; NaN where there are none."""
    return torch.tensor(list(flags)).float().mean()


def retrieval_facts(stats: RolloutStats, *, cached: int, retries: int, max_calls: int) -> list[float]:
    """
    What the metrics of retrieval are computed from, as numbers that can be gathered over ranks.

    Args:
        stats ([`RolloutStats`]):
            What the rollouts of a rank cost.
        cached (`int`):
            How many of their queries a cache answered.
        retries (`int`):
            Requests that the retriever sent again.
        max_calls (`int`):
            The most calls of the retriever that the rollouts of a rank can make.

    Returns:
        `list[float]`: As many values on every rank: counts, then the latencies, filled up with NaN.
    """
    counts = [stats.generate_seconds, stats.searches, stats.queries, cached, retries]
    failed = [stats.failed_searches[kind] for kind in FAILURE_KINDS]
    return [*counts, *failed, *stats.latencies, *[math.nan] * (max_calls - len(stats.latencies))]


def retrieval_metrics(facts: torch.Tensor) -> dict[str, float]:
    """
    The metrics of retrieval over all ranks.

    Args:
        facts (`torch.Tensor`):
            Shape (R, F), one row of [`retrieval_facts`] a rank.

    Returns:
        `dict[str, float]`: Metrics by name; NaN where there was no search.
    """
    total = dict(zip(_RETRIEVAL, facts.sum(dim=0), strict=False))
    latencies = facts[:, len(_RETRIEVAL) :]
    values = {
        # Ranks wait for the slowest
        "time/generate": facts[:, 0].max(),
        "time/search": latencies.nansum(dim=1).max() if latencies.numel() else torch.tensor(0.0),
        "retrieval/searches": total["searches"],
        "retrieval/calls": (~latencies.isnan()).sum(),
        "retrieval/unique": total["queries"] / total["searches"],
        "retrieval/cached": total["cached"] / total["queries"],
        "retrieval/retries": total["retries"],
        **{f"retrieval/failed_{kind}": total[kind] for kind in FAILURE_KINDS},
    }
    for percent in (50, 95):
        values[f"retrieval/latency_p{percent}"] = (
            latencies.nanquantile(percent / 100) if latencies.numel() else torch.tensor(math.nan)
        )
    return {name: value.item() for name, value in values.items()}
