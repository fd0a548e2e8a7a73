"""The metrics of a step: pure functions of trajectories and of values gathered over ranks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from trl.trainer.utils import nanstd

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
    The mean log-probability of the tokens that the model sampled, NaN if the engine returns no log-probabilities.

    Args:
        trajectory ([`Trajectory`]):
            The rollout.
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
            Integers of shape (N, F), one row of [`rollout_facts`] for each rollout. The rollouts of a group are adjacent.
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for rollouts without an outcome.
        has_signal (`torch.Tensor`):
            Whether any turn of a rollout has a non-zero advantage, booleans of shape (N,).
        logps (`torch.Tensor`):
            Mean log-probabilities of the sampled tokens of each rollout, shape (N,), see [`mean_logprob`].
        num_generations (`int`):
            Number of rollouts in a group.
        success_threshold (`float`):
            A rollout is correct if its outcome is at least this.

    Returns:
        `dict[str, float]`: Metrics by name. Groups in which no rollout has an outcome are excluded from the shares of
        groups. A share of an empty set is NaN, which TRL does not log.
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
        "reward_max": outcomes[scorable].max() if scorable.any() else torch.tensor(math.nan),
        "logps/correct": logps[correct].nanmean(),
        "search/calls": column.searches.mean(),
        "search/none": (column.searches == 0).float().mean(),
        "search/invalid": column.invalid.sum() / column.turns.sum(),
        "search/duplicate": column.duplicate.sum() / searches,
        "search/failed": column.failed.sum() / searches,
        "search/hit": hit.sum() / rollouts,
        "search/near_miss": near_miss.sum() / rollouts.cpu(),
        "search/first_turn": (column.occurrence + 1)[hit].mean(),
        "search/evidence": column.evidence.sum() / searches,
        "search/after_evidence": column.after_evidence[hit].mean(),
        "answers/none": (column.answered[scorable] == 0).float().mean(),
        "answers/from_memory": (~hit[correct]).float().mean(),
        "answers/unsupported": column.answered[scorable & ~hit].mean(),
        "turns/mean": column.turns.mean(),
        "turns/truncated": column.truncated.mean(),
    }
    return {name: value.item() for name, value in values.items()}


def chance_metrics(
    by_chance: torch.Tensor, weights: torch.Tensor, found: torch.Tensor, outcomes: torch.Tensor, *, num_generations: int
) -> dict[str, float]:
    """
    How much of what is found chance explains.

    Args:
        by_chance (`torch.Tensor`):
            The probability that a rollout finds a golden answer by chance, shape (N,), see
            [`~tspo_trl.chance.chance_hits`].
        weights (`torch.Tensor`):
            How much the finds of a group count, shape (N / G,), see [`~tspo_trl.chance.chance_weights`].
        found (`torch.Tensor`):
            Whether a rollout found a golden answer, booleans of shape (N,).
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for rollouts without an outcome, which do not count.
        num_generations (`int`):
            Number of rollouts in a group, G.

    Returns:
        `dict[str, float]`: Metrics by name. The mean weight is over the groups that found an answer.
    """
    scorable = ~outcomes.isnan()
    finding = (found & scorable).view(-1, num_generations).any(dim=1)
    values = {"search/chance": by_chance[scorable].mean(), "search/chance_weight": weights[finding].mean()}
    return {name: value.item() for name, value in values.items()}


def evaluation_metrics(
    facts: torch.Tensor,
    outcomes: torch.Tensor,
    has_signal: torch.Tensor,
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    reward_names: Sequence[str],
    num_generations: int,
    success_threshold: float,
) -> dict[str, float]:
    """
    The metrics of an evaluation set over all its rollouts: those of [`rollout_metrics`], and those that TRL computes for
    a batch.

    Args:
        facts, outcomes, has_signal, logps, num_generations, success_threshold:
            The rollouts of the set, see [`rollout_metrics`].
        rewards (`torch.Tensor`):
            Rewards of shape (N, F), NaN where a reward function gave none.
        reward_names (`Sequence[str]`):
            The F names of the reward functions.

    Returns:
        `dict[str, float]`: Metrics by name.
    """
    column: Any = RolloutFacts(*facts.float().unbind(dim=1))  # type: ignore[arg-type]
    ended = column.tokens[column.truncated == 0]
    grouped = outcomes.view(-1, num_generations)
    deviations = nanstd(grouped, dim=1) if num_generations > 1 else torch.zeros(len(grouped))
    values = {
        "reward": outcomes.nanmean(),
        "reward_std": nanstd(outcomes),
        "frac_reward_zero_std": deviations.isclose(torch.zeros_like(deviations)).float().mean(),
        "completions/clipped_ratio": column.truncated.mean(),
    }
    for name, by_function in zip(reward_names, rewards.unbind(dim=1), strict=True):
        values |= {f"rewards/{name}/mean": by_function.nanmean(), f"rewards/{name}/std": nanstd(by_function)}
    # TRL reports 0 if no rollout has ended
    for kind, lengths in (("length", column.tokens), ("terminated_length", ended if len(ended) else torch.zeros(1))):
        for name, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
            values[f"completions/{name}_{kind}"] = value
    sizes = {"num_generations": num_generations, "success_threshold": success_threshold}
    ours = rollout_metrics(facts, outcomes, has_signal, logps, **sizes)  # type: ignore[arg-type]
    return ours | {name: value.item() for name, value in values.items()}


def add_metrics(logged: Any, values: Mapping[str, float]) -> None:
    """
    Add the metrics of a phase to those that TRL will log. TRL logs the mean of all phases, so that of a maximum is kept as
    one value.

    Args:
        logged (`dict[str, list[float]]`):
            The values of the phases since the last log, by name. It is changed.
        values (`Mapping[str, float]`):
            The metrics of the phase; NaN for those that are undefined.
    """
    for name, value in values.items():
        phases = [*logged.get(name, ()), value]
        known = [phase for phase in phases if not math.isnan(phase)]
        logged[name] = [max(known)] if name == "reward_max" and known else phases


def _share(flags: Iterable[bool]) -> torch.Tensor:
    """The share of true flags; NaN if there are no flags."""
    return torch.tensor(list(flags)).float().mean()


def retrieval_facts(stats: RolloutStats, *, cached: int, retries: int, max_calls: int) -> list[float]:
    """
    Numbers from which the metrics of retrieval are computed, in a form that can be gathered over ranks.

    Args:
        stats ([`RolloutStats`]):
            Counts and times of the rollouts of a rank.
        cached (`int`):
            Number of queries answered by the cache.
        retries (`int`):
            Number of repeated requests of the retriever.
        max_calls (`int`):
            Maximum number of calls of the retriever by the rollouts of a rank.

    Returns:
        `list[float]`: Counts, then latencies, padded with NaN to the same length on every rank.
    """
    counts = [stats.generate_seconds, stats.searches, stats.queries, cached, retries]
    failed = [stats.failed_searches[kind] for kind in FAILURE_KINDS]
    return [*counts, *failed, *stats.latencies, *[math.nan] * (max_calls - len(stats.latencies))]


def retrieval_metrics(facts: torch.Tensor) -> dict[str, float]:
    """
    The metrics of retrieval over all ranks.

    Args:
        facts (`torch.Tensor`):
            Shape (R, F), one row of [`retrieval_facts`] for each rank.

    Returns:
        `dict[str, float]`: Metrics by name; NaN if there was no search.
    """
    total = dict(zip(_RETRIEVAL, facts.sum(dim=0), strict=False))
    latencies = facts[:, len(_RETRIEVAL) :]
    values = {
        # All ranks wait for the slowest one
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
