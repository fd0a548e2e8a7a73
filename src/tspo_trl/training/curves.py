"""A plot of the metrics of a run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXACT_MATCH = "rewards/exact_match_reward/mean"
_CURVES = (
    ("search/hit", "golden answer found", "#3a9d5d"),
    ("reward", "reward", "#1b6ca8"),
    (EXACT_MATCH, "exact match", "#7a4fa3"),
    ("search/near_miss", "near miss: found, but answered wrong", "#e0a030"),
)
_GROUPS = (
    ("all wrong, not rescued", "#c0504d"),
    ("all wrong, rescued by turn rewards", "#e8b04a"),
    ("mixed", "#8d80c4"),
    ("all correct", "#4fae74"),
)


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> None:
    """
    Draw reward, hit rate and near misses against steps, and the composition of the groups. With several reward functions, the
    exact match is drawn too.

    Thin lines show the logged values, thick lines their running mean over nine values. Dots show the results on the
    evaluation sets.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`, with a `step` in each entry.
        path (`str` or `Path`):
            Path of the picture, for instance a PNG. Its folder is created.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        `ValueError`: If there is no step with a reward.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [entry for entry in log_history if "reward" in entry]
    if not steps:
        raise ValueError("`log_history` has no entry with a 'reward': no step was trained or logged.")
    evaluated = False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")

    functions = {key for entry in steps for key in entry if re.fullmatch("rewards/.+/mean", key)}
    for key, label, color in _CURVES:
        if key == EXACT_MATCH and functions <= {EXACT_MATCH}:
            continue  # it is the reward
        points = [(entry["step"], entry[key]) for entry in steps if entry.get(key) is not None]
        if points:
            at, values = zip(*points, strict=True)
            left.plot(at, values, color=color, linewidth=0.8, alpha=0.35)
            left.plot(at, _smooth(values), label=label, color=color, linewidth=2.2)
        name_of_dots = re.compile(rf"eval_(.+_)?{key}")  # with the name of the set, if there are several
        dots = [
            (entry["step"], value)
            for entry in log_history
            for name, value in entry.items()
            if name_of_dots.fullmatch(name) and value is not None
        ]
        if dots:
            evaluated = True
            left.plot(*zip(*dots, strict=True), "o", color=color, markersize=7, markeredgecolor="white", clip_on=False)
    left.set(title="Rollouts" + (" (dots: held-out questions)" if evaluated else ""), ylabel="share of rollouts")
    left.grid(alpha=0.25)

    logged = [entry["step"] for entry in steps]
    shares = {
        name: _smooth([entry.get(f"groups/{name}") or 0.0 for entry in steps])
        for name in ("all_wrong", "rescued", "mixed", "all_correct")
    }
    lost = [wrong - rescued for wrong, rescued in zip(shares["all_wrong"], shares["rescued"], strict=True)]
    layers = (lost, shares["rescued"], shares["mixed"], shares["all_correct"])
    names, colors = zip(*_GROUPS, strict=True)
    right.stackplot(logged, *layers, labels=names, colors=colors, alpha=0.9)
    right.set(title="Groups of rollouts of one question (running mean)", ylabel="share of groups")
    right.margins(x=0, y=0)

    for axis in (left, right):
        axis.set(xlabel="step", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False, fontsize=9)
    left.set_xlim(0, logged[-1])
    figure.suptitle(title, fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """The running mean over a centred window, shorter at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
