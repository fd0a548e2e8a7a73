"""Report the results as Markdown tables and pictures, with every arm and every regime that was run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from .analysis import (
    Cell,
    Summary,
    half_of_the_error,
    mean_interval,
    mean_interval_of_regimes,
    running_mean,
    summarize,
)
from .arms import ARMS, GRPO, TSPO
from .regimes import REGIMES

#: Colors of the arms that are drawn as curves. Other arms are grey.
COLORS = {"grpo": "#c0504d", "merged": "#e0a030", "tspo": "#1b6ca8", "turn": "#3a9d5d"}
Results = Mapping[str, Mapping[str, Mapping[int, Cell]]]  # regime -> arm -> seed -> cell


def arrange(cells: Sequence[Cell]) -> Results:
    """
    Arrange cells by regime, arm and seed, in the order of the tables. An arm with `same_as` gets the cells of that arm.

    Args:
        cells (`Sequence[Mapping]`):
            The content of the cells' files.
    """
    results: dict[str, dict[str, dict[int, Cell]]] = {}
    for name in REGIMES:
        arms = {
            arm: {
                c["seed"]: c for c in sorted(cells, key=lambda c: c["seed"]) if (c["regime"], c["arm"]) == (name, arm)
            }
            for arm in ARMS
        }
        for arm, settings in ARMS.items():
            if settings.same_as and name not in (settings.regimes or ()):
                arms[arm] = arms[settings.same_as]
        if any(arms.values()):
            results[name] = {arm: of_seed for arm, of_seed in arms.items() if of_seed}
    return results


def summaries(of_regime: Mapping[str, Mapping[int, Cell]]) -> dict[str, dict[int, Summary]]:
    """Summarize the cells of a regime, by arm and seed."""
    target = half_of_the_error([cell for cells in of_regime.values() for cell in cells.values()])
    return {arm: {seed: summarize(c, target) for seed, c in cells.items()} for arm, cells in of_regime.items()}


def paired(of_arm: Mapping[int, Summary], of_base: Mapping[int, Summary], name: str = "area") -> list[float]:
    """Return the differences between an arm and a baseline arm, for each seed that both have."""
    return [getattr(of_arm[s], name) - getattr(of_base[s], name) for s in sorted(of_arm.keys() & of_base.keys())]


def table(results: Results, regime: str) -> str:
    """
    Format the arms of a regime as a Markdown table, below a line with the initial measures.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        regime (`str`):
            Key of `REGIMES`.
    """
    of_regime = results[regime]
    numbers = summaries(of_regime)
    cells = [cell for of_seed in of_regime.values() for cell in of_seed.values()]
    start = {name: np.mean([cell["before"][name] for cell in cells]) for name in ("em", "hit", "near_miss")}
    lines = [
        f"### {REGIMES[regime].title.capitalize()}",
        "",
        f"Start: exact match {start['em']:.3f}, answer found {start['hit']:.3f}, near miss {start['near_miss']:.3f}. "
        f"{cells[0]['steps']} steps, target {half_of_the_error(cells):.2f}.",
        "",
        "| | EM after | found after | EM, mean of steps | minus GRPO | better | to target | drop | all wrong | rescued | s/step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, of_seed in numbers.items():
        values = list(of_seed.values())
        differences = paired(of_seed, numbers.get(GRPO, {}))
        reached = sorted(v.steps for v in values if v.steps is not None)
        steps = "-"
        if reached:
            all_steps = sorted(float("inf") if v.steps is None else v.steps for v in values)
            middle = median(all_steps)
            steps = f"{middle:.0f}" if middle < float("inf") else "-"
            if len(reached) < len(values):
                steps += f" ({len(reached)}/{len(values)})"
        no_baseline = arm == GRPO or not differences
        row = [
            ARMS[arm].title,
            _with_interval(mean_interval([v.em for v in values])),
            f"{np.mean([v.hit for v in values]):.3f}",
            _with_interval(mean_interval([v.area for v in values])),
            "" if no_baseline else _with_interval(mean_interval(differences), signed=True),
            "" if no_baseline else f"{sum(d > 0 for d in differences)}/{len(differences)}",
            steps,
            f"{np.mean([v.drop for v in values]):.3f}",
            f"{np.mean([v.all_wrong for v in values]):.2f}",
            _share([v.rescued for v in values]),
            f"{np.mean([v.seconds for v in values]):.2f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def choice_table(results: Results) -> str:
    """
    Compare every arm with TSPO's defaults in the mean exact match of the steps. The defaults are chosen by this table.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
    """
    numbers = {regime: summaries(of_regime) for regime, of_regime in results.items()}
    lines = [
        "| minus " + " | ".join([ARMS[TSPO].title, *(REGIMES[regime].title for regime in results), "mean"]) + " |",
        "|---" * (len(results) + 2) + "|",
    ]
    for arm in ARMS:
        if arm == TSPO:
            continue
        differences = {r: paired(n[arm], n[TSPO]) for r, n in numbers.items() if arm in n and TSPO in n}
        if not any(differences.values()):
            continue
        row = [ARMS[arm].title]
        row += [
            _with_interval(mean_interval(differences[r]), signed=True) if differences.get(r) else "" for r in results
        ]
        complete = len(differences) == len(results)
        row.append(
            _with_interval(mean_interval_of_regimes(list(differences.values())), signed=True) if complete else ""
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def markdown(results: Results) -> str:
    """Format all tables."""
    return "\n\n".join([choice_table(results), *(table(results, regime) for regime in results)]) + "\n"


def _with_interval(values: tuple[float, float, float], *, signed: bool = False) -> str:
    """Format a mean with its interval."""
    mean, low, high = values
    form = "+.3f" if signed else ".3f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _share(values: Sequence[float]) -> str:
    """Format the mean of the values that are not NaN."""
    known = [value for value in values if value == value]
    return f"{np.mean(known):.2f}" if known else "-"


def draw_curves(results: Results, path: Path) -> None:
    """
    Draw exact match and found answers against steps, as means over seeds with 95 % bootstrap intervals.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(3.4 * len(results), 6), sharey=True, squeeze=False, layout="constrained"
    )
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
                axis.set_title(REGIMES[regime].title, fontsize=10)
            else:
                axis.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(COLORS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_differences(results: Results, path: Path) -> None:
    """
    Draw the mean exact match of the steps of every arm minus GRPO: one dot per seed, the mean and its interval.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        path (`Path`):
            The image file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in ARMS if arm != GRPO and any(arm in of_regime for of_regime in results.values())]
    height = 1.6 + 0.34 * len(arms)
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(3.1 * len(results) + 1.2, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (regime, of_regime) in zip(axes[0], results.items(), strict=True):
        numbers = summaries(of_regime)
        axis.axvline(0, color="#777777", linewidth=1)
        for place, arm in enumerate(arms):
            differences = paired(numbers.get(arm, {}), numbers.get(GRPO, {}))
            if not differences:
                continue
            mean, low, high = mean_interval(differences)
            color = COLORS.get(arm, "#6f6f6f")
            axis.plot(differences, [place] * len(differences), "o", color=color, alpha=0.35, markersize=4)
            axis.plot([low, high], [place, place], color=color, linewidth=2)
            axis.plot([mean], [place], "D", color=color, markersize=6)
        axis.set(title=REGIMES[regime].title, ylim=(len(arms) - 0.5, -0.5))
        axis.title.set_fontsize(10)
        axis.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms], fontsize=9)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("mean exact match of the steps, minus GRPO", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
