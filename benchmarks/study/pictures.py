"""Draw the results: curves, and differences from GRPO."""

from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import mean_interval, running_mean
from .arms import ARMS, GRPO
from .regimes import ALL_REGIMES
from .report import Results, differences

#: Colors of the arms that are drawn as curves. Other arms are grey.
COLORS = {"grpo": "#c0504d", "merged": "#e0a030", "tspo": "#1b6ca8", "turn": "#3a9d5d", "chance": "#7b4ea3"}
GREY = "#6f6f6f"
COLUMNS = 5  # more pictures side by side would be too small to read


def make_axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Make a figure and its axes, for a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file and close it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(results: Results, path: Path) -> None:
    """
    Draw exact match and found answers against steps, as means over seeds with bands of one standard error.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    columns, blocks = grid(len(results))
    figure, axes = make_axes(2 * blocks, columns, (3.4 * columns, 6 * blocks), sharey=True)
    for place, (regime, of_regime) in enumerate(results.items()):
        for row, (curve, label) in enumerate((("em", "exact match"), ("hit", "answer found"))):
            axis = axes[2 * (place // columns) + row, place % columns]
            for arm in COLORS:
                if arm in of_regime:
                    runs = [running_mean(cell["curves"][curve]) for cell in of_regime[arm].values()]
                    draw_band(axis, np.array(runs), arm)
            axis.grid(alpha=0.25)
            axis.set(ylim=(0, 1), xlim=(1, None))
            axis.spines[["top", "right"]].set_visible(False)
            if place % columns == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(ALL_REGIMES[regime].title, fontsize=10)
            else:
                axis.set_xlabel("step")
    hide_rest(axes[2 * blocks - 2 :], len(results) - columns * (blocks - 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(COLORS), frameon=False)
    save(figure, path)


def draw_band(axis: Any, runs: np.ndarray, arm: str) -> None:
    """Draw the mean of the runs of an arm, of shape (seeds, steps), and its standard error if there are several."""
    steps, mean = np.arange(1, runs.shape[1] + 1), runs.mean(axis=0)
    axis.plot(steps, mean, color=COLORS[arm], linewidth=2, label=ARMS[arm].title)
    if len(runs) > 1:
        error = runs.std(axis=0, ddof=1) / sqrt(len(runs))
        axis.fill_between(steps, mean - error, mean + error, color=COLORS[arm], alpha=0.15, linewidth=0)


def grid(count: int) -> tuple[int, int]:
    """The columns and the rows for a number of pictures, with rows of similar length."""
    rows = ceil(count / COLUMNS)
    return ceil(count / rows), rows


def hide_rest(axes: Any, used: int) -> None:
    """Hide the axes of the last rows that have no regime."""
    for axis in axes[:, used:].flat:
        axis.set_visible(False)


def draw_differences(results: Results, path: Path) -> None:
    """
    Draw the mean exact match of the steps of every arm minus GRPO: one dot per seed, the mean and its 95 % t interval.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    arms = [arm for arm in ARMS if arm != GRPO and any(arm in of_regime for of_regime in results.values())]
    columns, blocks = grid(len(results))
    size = (3.1 * columns + 1.2, (1.6 + 0.34 * len(arms)) * blocks)
    figure, axes = make_axes(blocks, columns, size, sharex=True, sharey=True)
    found = {arm: differences(results, arm, GRPO) for arm in arms}
    for axis, regime in zip(axes.flat, results, strict=False):
        axis.axvline(0, color="#777777", linewidth=1)
        for place, arm in enumerate(arms):
            values = list(found[arm].get(regime, {}).values())
            if not values:
                continue
            mean, low, high = mean_interval(values)
            color = COLORS.get(arm, GREY)
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=4)
            axis.plot([low, high], [place, place], color=color, linewidth=2)
            axis.plot([mean], [place], "D", color=color, markersize=6)
        axis.set(title=ALL_REGIMES[regime].title, ylim=(len(arms) - 0.5, -0.5))
        axis.title.set_fontsize(10)
        axis.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms], fontsize=9)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
    hide_rest(axes[blocks - 1 :], len(results) - columns * (blocks - 1))
    figure.supxlabel("mean exact match of the steps, minus GRPO", fontsize=10)
    save(figure, path)
