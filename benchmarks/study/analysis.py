"""Analyse the results of cells, with pure functions of the content of their files. All arms use the same seeds, so they
are compared seed by seed."""

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
    Compute the mean of each value and the values before it, over at most `window` values.

    Args:
        values (`Sequence[float]`):
            S values.
        window (`int`, *optional*, defaults to `8`):
            Maximum number of values in a mean.

    Returns:
        `np.ndarray`: Shape (S,).
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return (sums[ends] - sums[begins]) / (ends - begins)


def steps_to(values: Sequence[float], target: float) -> int | None:
    """Return the first step, counted from 1, whose full running mean reaches the target, or `None` if no step does."""
    means = running_mean(values)
    reached = np.flatnonzero(means[WINDOW - 1 :] >= target)
    return int(reached[0]) + WINDOW if len(reached) else None


def largest_drop(values: Sequence[float]) -> float:
    """Return the largest fall of the running mean below its highest earlier value."""
    means = running_mean(values)[WINDOW - 1 :]
    return float((np.maximum.accumulate(means) - means).max()) if len(means) else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """
    The measures of a cell.

    Args:
        em (`float`):
            Exact match on held-out questions after training.
        hit (`float`):
            Share of held-out questions whose passages contain the answer.
        area (`float`):
            Mean exact match of the rollouts of all steps, which is the area under the curve.
        hit_area (`float`):
            Mean share of rollouts that find the answer, over all steps.
        steps (`int` or `None`):
            Number of steps until the target is reached, see [`steps_to`].
        drop (`float`):
            Largest fall of the exact match, see [`largest_drop`].
        all_wrong (`float`):
            Share of groups without a correct rollout, over all steps.
        rescued (`float`):
            Share of these groups that turn rewards gave a learning signal. NaN if there are no such groups.
        seconds (`float`):
            Mean time of a step, in seconds.
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
    Compute the measures of a cell.

    Args:
        cell (`Mapping`):
            The content of the cell's file.
        target (`float`):
            The exact match to reach.
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
    """Return the target of a regime: the exact match at which the mean initial error is halved."""
    return (1 + float(np.mean([cell["before"]["em"] for cell in cells]))) / 2


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """
    Compute the mean over seeds and its 95 % bootstrap interval.

    Args:
        values (`Sequence[float]`):
            One value per seed.

    Returns:
        `tuple[float, float, float]`: The mean, the lower bound and the upper bound.
    """
    column = np.asarray(values, dtype=float)[:, None]
    ((low, high),) = interval(bootstrap_means(column, seed=0))
    return float(column.mean()), float(low), float(high)


def mean_interval_of_regimes(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """
    Compute the mean over equally weighted regimes and its 95 % bootstrap interval. Seeds are resampled in every regime.

    Args:
        values (`Sequence[Sequence[float]]`):
            For each regime, one value per seed.

    Returns:
        `tuple[float, float, float]`: The mean, the lower bound and the upper bound.
    """
    means = np.mean(
        [bootstrap_means(np.asarray(v, dtype=float)[:, None], seed=i) for i, v in enumerate(values)], axis=0
    )
    ((low, high),) = interval(means)
    return float(np.mean([np.mean(v) for v in values])), float(low), float(high)
