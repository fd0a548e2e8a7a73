"""The sweep of chance: the same policies learn in encyclopedias in which more and more passages name answers of other questions."""

from pathlib import Path

import numpy as np

from .analysis import mean_interval
from .arms import ARMS, GRPO
from .pictures import COLORS, GREY, make_axes, save
from .regimes import ALL_REGIMES
from .report import Results, differences, origin, table, with_interval


def is_sweep(results: Results) -> bool:
    """Return whether all regimes belong to the sweep."""
    return all(ALL_REGIMES[regime].share is not None for regime in results)


def found_by_chance(results: Results) -> dict[str, float]:
    """Return the share of rollouts that would find an answer by chance, by regime: the mean over the steps of GRPO."""
    return {
        regime: float(np.mean([cell["curves"]["chance"] for cell in of_regime.get(GRPO, {}).values()] or np.nan))
        for regime, of_regime in results.items()
    }


def points(results: Results, arm: str) -> dict[float, list[float]]:
    """
    Return an arm minus GRPO in the mean exact match of the steps.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        arm (`str`):
            Key of `ARMS`.

    Returns:
        `dict[float, list[float]]`: For each share of passages that name answers of other questions, the differences of the seeds.
    """
    found = differences(results, arm, GRPO)
    shares = {regime: ALL_REGIMES[regime].share for regime in found}
    return {share: list(found[regime].values()) for regime, share in shares.items() if share is not None}


def markdown(results: Results) -> str:
    """Format the table of the sweep, and those of its regimes."""
    arms = _arms(results)
    lines = [
        "| passages with other answers | found by chance | "
        + " | ".join(f"{ARMS[arm].title}, minus GRPO" for arm in arms)
        + " |",
        "|---" * (2 + len(arms)) + "|",
    ]
    chance, of_arms = found_by_chance(results), {arm: points(results, arm) for arm in arms}
    for regime in results:
        share = ALL_REGIMES[regime].share
        row = [f"{share:.0%}", f"{chance[regime]:.2f}"]
        row += [with_interval(of_arms[arm][share]) if share in of_arms[arm] else "" for arm in arms]
        lines.append("| " + " | ".join(row) + " |")
    note = "Exact match, mean of the steps: paired differences with 95 % t intervals, each read alone."
    parts = [origin(results), note, "\n".join(lines), *(table(results, regime) for regime in results)]
    return "\n\n".join(parts) + "\n"


def draw_sweep(results: Results, path: Path) -> None:
    """
    Draw the mean exact match of the steps minus GRPO against the share of passages that name answers of other questions.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    figure, ((axis,),) = make_axes(1, 1, (6.4, 4))
    axis.axhline(0, color=COLORS[GRPO], linewidth=2, label=ARMS[GRPO].title)
    for arm in _arms(results):
        shares, values = zip(*points(results, arm).items(), strict=True)
        means, lows, highs = np.array([mean_interval(of_seeds) for of_seeds in values]).T
        color = COLORS.get(arm, GREY)
        axis.plot(shares, means, "o-", color=color, linewidth=2, label=ARMS[arm].title)
        axis.fill_between(shares, lows, highs, color=color, alpha=0.15, linewidth=0)
    axis.set_xlabel("share of passages that name answers of other questions")
    axis.set_ylabel("mean exact match of the steps, minus GRPO")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save(figure, path)


def _arms(results: Results) -> list[str]:
    """The arms that can be compared with GRPO."""
    return [arm for arm in ARMS if arm != GRPO and differences(results, arm, GRPO)]
