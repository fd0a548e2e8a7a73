"""What the results of cells say: pure functions of what their files hold. Seeds are what is drawn at random, and all arms
have the same, so arms are compared seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspo_trl.evaluation.intervals import bootstrap_means, interval

Floats = NDArray[np.float64]
Cell = Mapping[str, Any]

WINDOW = 8  # steps of the running mean


def running_mean(values: Sequence[float], window: int = WINDOW) -> Floats:
    """
    The mean of each value and of those before it, over at most `window` of them.

    Args:
        values (`Sequence[float]`):
            S values.
        window (`int`, *optional*, defaults to `8`):
            The most values of a mean.

    Returns:
        `np.ndarray`: Shape (S,).
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return (sums[ends] - sums[begins]) / (ends - begins)


def steps_to(values: Sequence[float], target: float) -> int | None:
    """The first step, counted from 1, whose full running mean has come to the target; `None` if none has."""
    means = running_mean(values)
    reached = np.flatnonzero(means[WINDOW - 1 :] >= target)
    return int(reached[0]) + WINDOW if len(reached) else None


def largest_drop(values: Sequence[float]) -> float:
    """How far the running mean falls below its highest value before."""
    means = running_mean(values)[WINDOW - 1 :]
    return float((np.maximum.accumulate(means) - means).max()) if len(means) else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """
    A cell in numbers.

    Args:
        em (`float`):
            Exact match on held-out questions after training.
        hit (`float`):
            The share of them whose passages hold the answer.
        area (`float`):
            Mean exact match of the rollouts of all steps: the area under the curve.
        hit_area (`float`):
            The same for the share of rollouts that find the answer.
        steps (`int` or `None`):
            Steps to the target, see [`steps_to`].
        drop (`float`):
            See [`largest_drop`].
        all_wrong (`float`):
            The share of groups without a correct rollout, over all steps.
        rescued (`float`):
            The share of these that taught something all the same. NaN if there were none.
        seconds (`float`):
            A step.
    """

    em: float
    hit: float
    area: float
    hit_area: float
    steps: int | None
    drop: float
    all_wrong: float
    rescued: float
    seconds: float


def summarize(cell: Cell, target: float) -> Summary:
    """
    A cell in numbers.

    Args:
        cell (`Mapping`):
            What its file holds.
        target (`float`):
            The exact match to come to.
    """
    curves = cell["curves"]
    wrong = sum(curves["all_wrong"])
    return Summary(
        em=cell["after"]["em"],
        hit=cell["after"]["hit"],
        area=float(np.mean(curves["em"])),
        hit_area=float(np.mean(curves["hit"])),
        steps=steps_to(curves["em"], target),
        drop=largest_drop(curves["em"]),
        all_wrong=wrong / len(curves["all_wrong"]),
        rescued=sum(curves["rescued"]) / wrong if wrong else float("nan"),
        seconds=cell["seconds"] / cell["steps"],
    )


def half_of_the_error(cells: Sequence[Cell]) -> float:
    """The target of a regime: half of the error that its policies start with is gone."""
    return (1 + float(np.mean([cell["before"]["em"] for cell in cells]))) / 2


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """
    The mean of the seeds and its 95 % bootstrap interval.

    Args:
        values (`Sequence[float]`):
            One value for each seed.

    Returns:
        `tuple[float, float, float]`: The mean, and the lower and the upper bound.
    """
    column = np.asarray(values, dtype=float)[:, None]
    ((low, high),) = interval(bootstrap_means(column, seed=0))
    return float(column.mean()), float(low), float(high)


def mean_interval_of_regimes(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """
    The mean over regimes, each with the same weight, and its 95 % bootstrap interval: seeds are drawn in every regime.

    Args:
        values (`Sequence[Sequence[float]]`):
            For each regime, one value for each seed.

    Returns:
        `tuple[float, float, float]`: The mean, and the lower and the upper bound.
    """
    means = np.mean(
        [bootstrap_means(np.asarray(v, dtype=float)[:, None], seed=i) for i, v in enumerate(values)], axis=0
    )
    ((low, high),) = interval(means)
    return float(np.mean([np.mean(v) for v in values])), float(low), float(high)
