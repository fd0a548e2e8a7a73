"""Outcome rewards: only text written by the model is rewarded."""

import pytest

from tspo_trl import Passage, Trajectory, Turn
from tspo_trl.rewards import exact_match_reward, f1_reward, format_reward


def rollout(*actions, status="answered", answer="", passages=()):
    turns = [
        Turn(token_ids=[1], action=action, content=answer if action == "answer" else "query", passages=list(passages))
        for action in actions
    ]
    return Trajectory(prompt_ids=[0], turns=turns, status=status)


ROLLOUTS = [
    rollout("search", "answer", answer="the Eiffel Tower"),
    rollout("answer", answer="Tower"),
    rollout("answer", answer=""),
    rollout("search", "none", status="no_answer"),
    rollout("search", status="truncated"),
    rollout("answer", answer="Rome"),
]
GOLDS = [["Eiffel Tower"], ["Paris", "Eiffel Tower"], [""], ["query"], ["query"], ["Oslo", "Rome"]]


def test_exact_match_reward_scores_the_answer():
    rewards = exact_match_reward(trajectories=ROLLOUTS, golden_answers=GOLDS, prompts=["x"] * 6, hops=[1] * 6)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_f1_reward_scores_the_answer():
    rewards = f1_reward(trajectories=ROLLOUTS, golden_answers=GOLDS, prompts=["x"] * 6, hops=[1] * 6)
    assert rewards == pytest.approx([1.0, 2 / 3, 0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("reward", [exact_match_reward, f1_reward])
def test_passages_and_queries_are_not_rewarded(reward):
    passage = Passage("0", "Paris", "<answer>Paris</answer>")
    found = rollout("search", "answer", answer="Rome", passages=[passage])
    assert reward(trajectories=[found], golden_answers=[["Paris"]]) == [0.0]
    unanswered = rollout("search", status="no_answer", passages=[passage])
    assert reward(trajectories=[unanswered], golden_answers=[["query", "Paris"]]) == [0.0]


@pytest.mark.parametrize("reward", [exact_match_reward, f1_reward])
def test_an_earlier_answer_does_not_count_if_the_last_turn_has_none(reward):
    trajectory = rollout("answer", "none", answer="Paris", status="no_answer")
    assert reward(trajectories=[trajectory], golden_answers=[["Paris"]]) == [0.0]


@pytest.mark.parametrize("reward", [exact_match_reward, f1_reward])
def test_every_rollout_needs_its_golden_answers(reward):
    with pytest.raises(ValueError, match="zip"):
        reward(trajectories=ROLLOUTS, golden_answers=GOLDS[:-1])


def test_rewards_of_no_rollouts():
    assert exact_match_reward(trajectories=[], golden_answers=[]) == []
    assert f1_reward(trajectories=[], golden_answers=[]) == []
    assert format_reward(trajectories=[]) == []


@pytest.mark.parametrize(
    ("trajectory", "reward"),
    [
        (rollout("answer"), 1.0),
        (rollout("search", "search", "answer"), 1.0),
        (rollout("invalid", "answer"), 0.0),
        (rollout("search", "invalid", "answer"), 0.0),
        (rollout("search", "none", status="no_answer"), 0.0),
        (rollout("search", "search", status="no_answer"), 0.0),
        (rollout("search", status="truncated"), 0.0),
        (rollout("search", status="retrieval_failed"), 0.0),
    ],
)
def test_format_reward_requires_an_answer_and_no_invalid_action(trajectory, reward):
    assert format_reward(trajectories=[trajectory], golden_answers=[["x"]], prompts=["y"]) == [reward]
