"""The arms of the study: ways to turn the same rollouts into advantages. Everything else is the same for all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tspo_trl import Trajectory, TSPOTrainer
from tspo_trl.credit import first_occurrence, turn_advantages
from tspo_trl.rewards import exact_match_reward
from tspo_trl.scoring import exact_match

NEAR_MISS = 0.5  # what a near miss earns, as `folr_alpha` by default


def near_miss_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """1.0 for a rollout whose passages contain a golden answer and whose answer is wrong, else 0.0."""
    return [
        float(not exact_match(t.answer, golds) and first_occurrence(t.passage_texts, golds) is not None)
        for t, golds in zip(trajectories, golden_answers, strict=True)
    ]


class TwoSegmentTrainer(TSPOTrainer):
    """
    Credit of two segments, after MT-GRPO (Zeng et al., 2025, arXiv 2505.11821): the first turn, up to the first result, has
    the advantage of the outcome and that of a reward of its own, whether its passages contain the answer; all turns after it
    have that of the outcome. Both are normalised over the group.
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
    A way to assign credit.

    Args:
        title (`str`):
            Its name in tables.
        settings (`dict[str, Any]`):
            Options of `TSPOConfig`.
        rewards (`tuple`, *optional*):
            Reward functions; `settings` has their weights, if there are several.
        trainer (`type`, *optional*):
            The trainer.
        regimes (`tuple[str, ...]` or `None`, *optional*):
            Where it can differ from another arm; `same_as` gives its results elsewhere.
        same_as (`str`, *optional*):
            The arm that it equals, rollout by rollout, in the other regimes.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: tuple = (exact_match_reward,)
    trainer: type[TSPOTrainer] = TSPOTrainer
    regimes: tuple[str, ...] | None = None
    same_as: str | None = None


GRPO = "grpo"
TSPO = "tspo"

#: What the study starts from: every option that decides the credit, whatever the defaults of the library are.
TSPO_SETTINGS = {
    "advantage_level": "stage",
    "folr_placement": "first",
    "folr_guard": "degenerate",
    "folr_alpha": 0.5,
    "turn_baseline": "turn",
}

#: In the order of the tables.
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
    # Only the control asks for single characters, so elsewhere the guard lets pass what it does without
    "no_guard": Arm("TSPO, guard none", {"folr_guard": "none"}, regimes=("misleading",), same_as=TSPO),
    "two_segment": Arm("two segments, after MT-GRPO", {"advantage_level": "trajectory"}, trainer=TwoSegmentTrainer),
}
