"""Outcome rewards in TRL's form. They read trajectories, so that only model-written text can earn anything.

A reward function of your own may take any of these arguments, and must accept `**kwargs`:

- `trajectories` (`list[Trajectory]`): the rollouts;
- `golden_answers` (`list[list[str]]`), `question` and any other column of the data set, one value for each rollout;
- `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric`: as in TRL. `completions` are
  conversations of assistant turns and tool messages, or, for plain text prompts, the model-written text alone.
"""

from collections.abc import Sequence
from typing import Any

from .rollout.trajectory import Trajectory
from .scoring import exact_match, f1_score


def exact_match_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """
    1.0 for a rollout whose answer matches a golden answer exactly after normalisation, else 0.0.

    Args:
        trajectories (`Sequence[Trajectory]`):
            B rollouts.
        golden_answers (`Sequence[Sequence[str]]`):
            The golden answers of each.

    Returns:
        `list[float]`: B rewards.
    """
    return [exact_match(t.answer, golds) for t, golds in zip(trajectories, golden_answers, strict=True)]


def f1_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """
    The token F1 of a rollout's answer, best over its golden answers.

    Args:
        trajectories (`Sequence[Trajectory]`):
            B rollouts.
        golden_answers (`Sequence[Sequence[str]]`):
            The golden answers of each.

    Returns:
        `list[float]`: B rewards in [0, 1].
    """
    return [f1_score(t.answer, golds) for t, golds in zip(trajectories, golden_answers, strict=True)]


def format_reward(trajectories: Sequence[Trajectory], **kwargs: Any) -> list[float]:
    """
    1.0 for a rollout that ended with an answer and wrote no invalid action on its way, else 0.0.

    Args:
        trajectories (`Sequence[Trajectory]`):
            B rollouts.

    Returns:
        `list[float]`: B rewards.
    """
    return [
        float(t.status == "answered" and all(turn.action in ("search", "answer") for turn in t.turns))
        for t in trajectories
    ]
