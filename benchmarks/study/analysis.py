"""Analyse the results of cells, with pure functions of the content of their files. All arms use the same seeds, so they
are compared seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import atan, cos, nan, pi, sin, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Cell = Mapping[str, Any]

WINDOW = 8  # steps of the running mean
LEVEL = 0.95  # of an interval that is read alone


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


@cache
def t_quantile(level: float, degrees: int) -> float:
    """
    Compute the limit between whose negative and positive value a variable with Student's t distribution is with probability
    `level`, by bisection.

    Args:
        level (`float`):
            A probability below 1.
        degrees (`int`):
            Degrees of freedom, from 1 on.
    """
    low, high = 0.0, 1.0
    while t_within(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < level else (low, middle)
    return high


def t_within(limit: float, degrees: int) -> float:
    """
    Compute the probability that a variable with Student's t distribution is between -`limit` and `limit`, by the finite sum for
    whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        limit (`float`):
            A number from 0 on.
        degrees (`int`):
            Degrees of freedom, from 1 on.
    """
    angle, odd = atan(limit / sqrt(degrees)), degrees % 2
    total, term = 0.0, cos(angle) if odd else 1.0
    for j in range(1, degrees // 2 + 1):
        total += term
        term *= cos(angle) ** 2 * (2 * j - 1 + odd) / (2 * j + odd)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """
    Compute the mean over seeds and its t interval. With few seeds, a bootstrap interval would be too narrow.

    Args:
        values (`Sequence[float]`):
            One value per seed.
        level (`float`, *optional*, defaults to `0.95`):
            The share of such intervals that contain the true mean.

    Returns:
        `tuple[float, float, float]`: The mean, the lower bound and the upper bound, which are NaN for a single value.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, nan, nan
    half = t_quantile(level, len(values) - 1) * float(np.std(values, ddof=1)) / sqrt(len(values))
    return mean, mean - half, mean + half


def mean_of_regimes(differences: Sequence[Mapping[int, float]]) -> list[float]:
    """
    Compute the mean over equally weighted regimes, for every seed that all of them have. Regimes of the same seed share their
    policies, so their differences are not independent.

    Args:
        differences (`Sequence[Mapping[int, float]]`):
            For each regime, the difference of each seed.
    """
    seeds = set.intersection(*(set(of_seed) for of_seed in differences)) if differences else set()
    return [float(np.mean([of_seed[seed] for of_seed in differences])) for seed in sorted(seeds)]


def behind(differences: Sequence[float], margin: float) -> str:
    """
    Decide whether an arm is behind by more than a margin.

    Args:
        differences (`Sequence[float]`):
            The arm minus the baseline, one value per seed.
        margin (`float`):
            The margin, a positive number.

    Returns:
        `str`: `"no"` if the whole 95 % interval is above -`margin`, `"yes"` if it is below, else `"open"`.
    """
    _, low, high = mean_interval(differences)
    return "no" if low > -margin else "yes" if high < -margin else "open"


def mean_curve(cells: Sequence[Cell], name: str = "em") -> Floats:
    """Return the mean over seeds of a curve, by step."""
    return np.mean([cell["curves"][name] for cell in cells], axis=0)


def steps_ratio(curve: Sequence[float], of_base: Sequence[float], target: float) -> tuple[str, float] | None:
    """
    Compare the steps that two mean curves need to reach a target. If the baseline does not reach it, its highest running mean is
    the target.

    Args:
        curve (`Sequence[float]`):
            The exact match of an arm, by step.
        of_base (`Sequence[float]`):
            That of the baseline, of the same length.
        target (`float`):
            The exact match to reach.

    Returns:
        `tuple[str, float]` or `None`: The ratio of the steps; before it `">"` if the arm does not reach the target in its steps,
        else `""`. `None` if there are fewer steps than the running mean has.
    """
    if len(of_base) < WINDOW:
        return None
    target = min(target, float(running_mean(of_base)[WINDOW - 1 :].max()))
    steps, base = steps_to(curve, target), steps_to(of_base, target)
    return ("" if steps else ">"), (steps or len(curve)) / (base or len(of_base))
