"""The arms of the study: methods to convert rollouts to advantages. All other settings are the same in every arm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tspo_trl import Trajectory, TSPOTrainer
from tspo_trl.credit import first_occurrence, turn_advantages
from tspo_trl.rewards import exact_match_reward
from tspo_trl.scoring import exact_match

NEAR_MISS = 0.5  # reward of a near miss, equal to the default of `folr_alpha`


def near_miss_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """Return 1.0 for a rollout with a wrong answer whose passages contain a golden answer, else 0.0."""
    return [
        float(not exact_match(t.answer, golds) and first_occurrence(t.passage_texts, golds) is not None)
        for t, golds in zip(trajectories, golden_answers, strict=True)
    ]


class TwoSegmentTrainer(TSPOTrainer):
    """
    Trainer with credit in two segments, after MT-GRPO (Zeng et al., 2025, arXiv 2505.11821). All turns have the
    advantage of the outcome. The first turn, up to the first search result, also has the advantage of its own reward: 1
    if its passages contain the answer, else 0. Both advantages are normalised over the group.
    """

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, success_threshold):
        turn = torch.arange(int(num_turns.max()), device=outcomes.device)
        exists = turn < num_turns[:, None]
        rewards = outcomes[:, None].expand(exists.shape).masked_fill(~exists, torch.nan)
        found = (first_occurrence == 0).to(outcomes.dtype).masked_fill(outcomes.isnan(), torch.nan)
        of_outcome, of_first = (
            turn_advantages(values, by, num_generations=num_generations, level="trajectory")
            for values, by in ((rewards, outcomes), (found[:, None], found))
        )
        of_outcome[:, :1] += of_first
        rewards = torch.cat([rewards[:, :1] + found[:, None], rewards[:, 1:]], dim=1)
        return rewards, of_outcome, torch.ones_like(outcomes, dtype=torch.bool)


@dataclass(frozen=True)
class Arm:
    """
    A method of credit assignment.

    Args:
        title (`str`):
            Name of the arm in tables.
        settings (`dict[str, Any]`):
            Options of `TSPOConfig`.
        rewards (`tuple`, *optional*):
            Reward functions. If there are several, `settings` contains their weights.
        trainer (`type`, *optional*):
            The trainer class.
        regimes (`tuple[str, ...]` or `None`, *optional*):
            Regimes in which the arm can differ from `same_as`. `None` means all regimes.
        same_as (`str`, *optional*):
            The arm with exactly the same rollouts in all other regimes.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: tuple = (exact_match_reward,)
    trainer: type[TSPOTrainer] = TSPOTrainer
    regimes: tuple[str, ...] | None = None
    same_as: str | None = None


GRPO = "grpo"
TSPO = "tspo"

#: All options that affect credit, set explicitly so that the study does not depend on the library's defaults.
TSPO_SETTINGS = {
    "advantage_level": "stage",
    "folr_placement": "first",
    "folr_guard": "degenerate",
    "folr_alpha": 0.5,
    "turn_baseline": "turn",
}

#: The arms, in the order of the tables.
ARMS = {
    GRPO: Arm("GRPO", {"advantage_level": "trajectory"}),
    "merged": Arm(
        "GRPO, near miss in the outcome",
        {"advantage_level": "trajectory", "reward_weights": [1.0, NEAR_MISS]},
        rewards=(exact_match_reward, near_miss_reward),
    ),
    TSPO: Arm("TSPO (stage, first)"),
    "turn": Arm("turn level always", {"advantage_level": "turn"}),
    "up_to_first": Arm("TSPO, up to first", {"folr_placement": "up_to_first"}),
    "group": Arm("TSPO, group baseline", {"turn_baseline": "group"}),
    "strict": Arm("TSPO, guard strict", {"folr_guard": "strict"}),
    # Only the control has single-character answers, so in all other regimes the guard has no effect
    "no_guard": Arm("TSPO, guard none", {"folr_guard": "none"}, regimes=("misleading",), same_as=TSPO),
    "two_segment": Arm("two segments, after MT-GRPO", {"advantage_level": "trajectory"}, trainer=TwoSegmentTrainer),
}
