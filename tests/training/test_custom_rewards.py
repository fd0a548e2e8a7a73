"""Reward functions of one's own: their arguments, missing rewards, asynchronous functions and weights."""

import asyncio

import pytest
from datasets import Dataset

from tspo_trl import read_rollouts
from tspo_trl.rewards import exact_match_reward


def test_a_function_gets_rollouts_and_columns(make_trainer, world):
    seen = {}

    def reward(**arguments):
        seen.update(arguments)
        arguments["log_metric"]("mine", 3.0)
        return [1.0] * len(arguments["trajectories"])

    rows = [question.row() | {"hops": i} for i, question in enumerate(world.train_questions[:2])]
    trainer = make_trainer(train_dataset=Dataset.from_list(rows), reward_funcs=reward, max_steps=1)
    trainer.train()
    assert sorted(seen["hops"]) == [0] * 4 + [1] * 4
    assert seen["question"] == [rows[hops]["question"] for hops in seen["hops"]]
    assert seen["golden_answers"] == [rows[hops]["golden_answers"] for hops in seen["hops"]]
    for trajectory, completion, ids in zip(
        seen["trajectories"], seen["completions"], seen["completion_ids"], strict=True
    ):
        assert completion == "".join(turn.text for turn in trajectory.turns)  # no chat template: text without passages
        assert ids[: len(trajectory.completion_ids)] == trajectory.completion_ids
    assert seen["trainer_state"] is trainer.state
    assert next(entry for entry in trainer.state.log_history if "reward" in entry)["mine"] == 3.0


def test_none_is_no_reward(make_trainer, tmp_path):
    """The first rollout of a group has no reward at all, the second only one of the first function."""

    def first(trajectories, **kwargs):
        return [None if i % 4 == 0 else float(i % 2) for i in range(len(trajectories))]

    async def second(trajectories, **kwargs):
        await asyncio.sleep(0)
        return [None if i % 4 < 2 else 10.0 for i in range(len(trajectories))]

    make_trainer(reward_funcs=[first, second], reward_weights=[1.0, 0.1], max_steps=1).train()
    records = list(read_rollouts(tmp_path / "run" / "trajectories"))
    assert [record["outcome"] for record in records] == [None, 1.0, 1.0, 2.0] * 2
    assert [record["rewards"] for record in records][:4] == [
        {"first": None, "second": None},
        {"first": 1.0, "second": None},
        {"first": 0.0, "second": 10.0},
        {"first": 1.0, "second": 10.0},
    ]
    assert all(value == 0 for record in records[::4] for value in record["turn_advantages"])


def test_async_functions_run_at_the_same_time(make_trainer):
    met = []

    def make(name):
        async def reward(trajectories, **kwargs):
            met.append(name)
            for _ in range(1000):
                if len(met) == 2:
                    return [0.5] * len(trajectories)
                await asyncio.sleep(0.01)
            raise TimeoutError("the other function was not called")

        reward.__name__ = name
        return reward

    trainer = make_trainer(reward_funcs=[make("one"), exact_match_reward, make("two")], max_steps=1)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert log["rewards/one/mean"] == log["rewards/two/mean"] == pytest.approx(0.5)
    assert log["reward"] == pytest.approx(1.0 + log["rewards/exact_match_reward/mean"])


def test_a_wrong_number_of_rewards_is_named(make_trainer):
    def short(trajectories, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="'short' returned 1 rewards, but 8 were expected"):
        make_trainer(reward_funcs=short).train()
