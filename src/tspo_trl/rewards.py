"""Outcome rewards as TRL's reward functions. They read trajectories, so that only model-written text is rewarded.

A custom reward function can take any of these arguments, and must accept `**kwargs`:

- `trajectories` (`list[Trajectory]`): the rollouts;
- `golden_answers` (`list[list[str]]`), `question` and any other column of the data set: one value for each rollout;
- `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric`: as in TRL. `completions` are
  conversations of assistant turns and tool messages, or only the model-written text if the prompts are plain text.
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
            The trajectories of B rollouts.
        golden_answers (`Sequence[Sequence[str]]`):
            The golden answers of each rollout.

    Returns:
        `list[float]`: B rewards.
    """
    return [exact_match(t.answer, golds) for t, golds in zip(trajectories, golden_answers, strict=True)]


def f1_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """
    The token F1 of the answer of a rollout, the maximum over its golden answers.

    Args:
        trajectories (`Sequence[Trajectory]`):
            The trajectories of B rollouts.
        golden_answers (`Sequence[Sequence[str]]`):
            The golden answers of each rollout.

    Returns:
        `list[float]`: B rewards in [0, 1].
    """
    return [f1_score(t.answer, golds) for t, golds in zip(trajectories, golden_answers, strict=True)]


def format_reward(trajectories: Sequence[Trajectory], **kwargs: Any) -> list[float]:
    """
    1.0 for a rollout that ended with an answer and has no invalid action, else 0.0.

    Args:
        trajectories (`Sequence[Trajectory]`):
            The trajectories of B rollouts.

    Returns:
        `list[float]`: B rewards.
    """
    return [
        float(t.status == "answered" and all(turn.action in ("search", "answer") for turn in t.turns))
        for t in trajectories
    ]
