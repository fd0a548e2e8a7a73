"""The plot of a run."""

import pytest

from tspo_trl.training.curves import plot_curves

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"step": step, "reward": step / 10, "search/hit": 0.5, "search/near_miss": 0.2, "groups/all_wrong": 0.4}
    | {"groups/rescued": 0.1, "groups/mixed": 0.5, "groups/all_correct": 0.1}
    for step in range(1, 6)
]


def test_a_picture_is_written(tmp_path):
    path = tmp_path / "new" / "folder" / "curves.png"
    plot_curves(HISTORY, path, title="A run")
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000


def test_the_curves_are_in_the_picture(tmp_path):
    flat = [entry | {"reward": 0.0} for entry in HISTORY]
    plot_curves(HISTORY, tmp_path / "a.png")
    plot_curves(flat, tmp_path / "b.png")
    plot_curves([*HISTORY, {"step": 5, "eval_reward": 0.9}], str(tmp_path / "c.png"))
    plot_curves([*HISTORY, {"step": 5, "eval_reward": 0.1}], str(tmp_path / "d.png"))
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abcd"}) == 4


def test_every_evaluation_set_is_in_the_picture(tmp_path):
    near, far = {"step": 5, "eval_near_reward": 0.9, "eval_near_em": 0.3}, {"step": 5, "eval_far_reward": 0.1}
    plot_curves(HISTORY, tmp_path / "none.png")
    plot_curves([*HISTORY, near], tmp_path / "near.png")
    plot_curves([*HISTORY, near, far], tmp_path / "both.png")
    plot_curves([*HISTORY, {"step": 5, "eval_reward": 0.9}], tmp_path / "one.png")
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(set(pictures.values())) == 3
    assert pictures["near"] == pictures["one"]


def test_entries_without_a_reward_and_missing_values_are_skipped(tmp_path):
    history = [
        *HISTORY,
        {"step": 5, "train_runtime": 1.0},
        {"step": 6, "reward": 0.5},
        {"step": 7, "reward": 0.5, "search/hit": None},
    ]
    plot_curves(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_a_history_with_only_rewards_can_be_plotted(tmp_path):
    plot_curves([{"step": 1, "reward": 0.5}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.5}], [{"step": 1, "eval_reward": 0.5}]])
def test_a_history_without_rewards_is_an_error(tmp_path, history):
    with pytest.raises(ValueError, match="reward"):
        plot_curves(history, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_no_figure_stays_open(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_curves(HISTORY, tmp_path / "curves.png")
    assert plt.get_fignums() == before


def test_the_exact_match_is_drawn_beside_other_rewards(tmp_path):
    exact = [entry | {"rewards/exact_match_reward/mean": 0.1} for entry in HISTORY]
    both = [entry | {"rewards/format_reward/mean": 0.9} for entry in exact]
    dots = {"step": 5, "eval_rewards/exact_match_reward/mean": 0.3}
    for name, history in {"none": HISTORY, "exact": exact, "both": both, "dots": [*both, dots]}.items():
        plot_curves(history, tmp_path / f"{name}.png")
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures["exact"] == pictures["none"]  # it is the reward
    assert len({pictures[name] for name in ("none", "both", "dots")}) == 3
