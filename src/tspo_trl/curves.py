"""The curves of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Answers and evidence",
        (
            ("reward", "reward (exact match)", "#1b6ca8"),
            ("search/hit", "gold answer found", "#3a9d5d"),
            ("search/near_miss", "near miss: found, answered wrong", "#e0a030"),
        ),
    ),
    (
        "Groups",
        (
            ("groups/all_wrong", "all wrong", "#c0504d"),
            ("groups/rescued", "all wrong, but with a signal", "#e0a030"),
            ("groups/mixed", "mixed", "#7f6bb3"),
            ("groups/all_correct", "all correct", "#3a9d5d"),
        ),
    ),
)


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> None:
    """
    Draw reward, hit rate, near misses and group composition against steps, and held-out results as dots.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            The picture to write, for instance a PNG; its folder is made.
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
        raise ValueError("`log_history` has no entry with a 'reward': nothing was trained, or nothing was logged.")
    evaluations = [entry for entry in log_history if "eval_reward" in entry]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(11, 4), sharex=True, layout="constrained")
    for axis, (name, curves) in zip(axes, _PANELS, strict=True):
        for key, label, color in curves:
            points = [(entry["step"], entry[key]) for entry in steps if entry.get(key) is not None]
            axis.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.8)
            dots = [(e["step"], e[f"eval_{key}"]) for e in evaluations if e.get(f"eval_{key}") is not None]
            if dots:
                axis.plot(*zip(*dots, strict=True), "o", color=color, markersize=6, markeredgecolor="white")
        axis.set(title=name, xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="best")
    axes[0].set_ylabel("share of rollouts")
    axes[1].set_ylabel("share of groups")
    figure.suptitle(title + (" (dots: held-out questions)" if evaluations else ""), fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
