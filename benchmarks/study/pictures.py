"""Draw the results: curves, and differences from GRPO."""

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
    Draw exact match and found answers against steps, as means over seeds with 95 % t intervals.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    figure, axes = make_axes(2, len(results), (3.4 * len(results), 6), sharey=True)
    for column, (regime, of_regime) in enumerate(results.items()):
        for row, (curve, label) in enumerate((("em", "exact match"), ("hit", "answer found"))):
            axis = axes[row, column]
            for arm in COLORS:
                if arm not in of_regime:
                    continue
                runs = np.array([running_mean(cell["curves"][curve]) for cell in of_regime[arm].values()])
                bands = np.array([mean_interval(at_step) for at_step in runs.T])
                steps = np.arange(1, len(bands) + 1)
                axis.plot(steps, bands[:, 0], color=COLORS[arm], linewidth=2, label=ARMS[arm].title)
                axis.fill_between(steps, bands[:, 1], bands[:, 2], color=COLORS[arm], alpha=0.15, linewidth=0)
            axis.grid(alpha=0.25)
            axis.set(ylim=(0, 1), xlim=(1, None))
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(ALL_REGIMES[regime].title, fontsize=10)
            else:
                axis.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(COLORS), frameon=False)
    save(figure, path)


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
    size = (3.1 * len(results) + 1.2, 1.6 + 0.34 * len(arms))
    figure, axes = make_axes(1, len(results), size, sharex=True, sharey=True)
    found = {arm: differences(results, arm, GRPO) for arm in arms}
    for axis, regime in zip(axes[0], results, strict=True):
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
    figure.supxlabel("mean exact match of the steps, minus GRPO", fontsize=10)
    save(figure, path)
