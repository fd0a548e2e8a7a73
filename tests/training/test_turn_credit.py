"""Turn credit in the trainer: chance-corrected advantages, what the hook gets, and what it may return."""

import json

import pytest
import torch

from helpers.training import prepared, varied_reward
from tspo_trl import TSPOTrainer
from tspo_trl.rollout.log import read_rollouts
from tspo_trl.scoring import contains_answer

GOLDS = [["novel"], ["writer"], ["city", "town"], ["born"]]


def wrong_reward(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def with_common_golds(dataset):
    """Answers that occur in many passages, different ones for neighbouring questions."""
    return dataset.map(lambda row, i: {"golden_answers": GOLDS[i % len(GOLDS)]}, with_indices=True)


@pytest.fixture
def options(dataset):
    return {
        "train_dataset": with_common_golds(dataset),
        "reward_funcs": wrong_reward,
        "per_device_train_batch_size": 16,
        "shuffle_dataset": False,
    }


def expected_weights(trajectories, golds, size):
    """The weights of groups, computed directly from all passages of the step."""
    groups = [trajectories[i : i + size] for i in range(0, len(trajectories), size)]
    weights = []
    for group, wanted in zip(groups, golds, strict=True):
        others = [
            turn.passage_text
            for other, its in zip(groups, golds, strict=True)
            if other is not group and not set(its) & set(wanted)
            for trajectory in other
            for turn in trajectory.turns
            if turn.retrieval in ("ok", "empty")
        ]
        p = sum(contains_answer(text, wanted) for text in others) / len(others)
        searches = [sum(t.retrieval in ("ok", "empty") for t in trajectory.turns) for trajectory in group]
        by_chance = sum(1 - (1 - p) ** n for n in searches) / size
        found = sum(any(contains_answer(text, wanted) for text in t.passage_texts) for t in group) / size
        weights.append(1.0 if by_chance == 0 else max(0.0, 1 - by_chance / found) ** 2 if found else 0.0)
    return weights


def test_turn_advantages_count_as_much_as_finds_exceed_chance(make_trainer, options):
    plain, _ = prepared(make_trainer(**options, folr_guard="degenerate"))
    trainer = make_trainer(**options, folr_guard="chance")
    corrected, trajectories = prepared(trainer)
    assert torch.equal(plain["completion_ids"], corrected["completion_ids"])
    weights = expected_weights(trajectories, GOLDS, 4)
    assert any(0 < weight < 1 for weight in weights)
    expected = plain["advantages"] * torch.tensor(weights).repeat_interleave(4)[:, None]
    torch.testing.assert_close(corrected["advantages"], expected, atol=1e-6, rtol=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["search/chance_weight"] == [pytest.approx(sum(weights) / 4, abs=1e-6)]
    assert 0 < metrics["search/chance"][0] < 1


def test_chance_is_measured_whatever_the_guard(make_trainer, options):
    trainer = make_trainer(**options, advantage_level="trajectory")
    prepared(trainer)
    assert 0 < trainer._metrics["train"]["search/chance"][0] < 1


def test_rollouts_are_logged_with_chance_and_weight(make_trainer, options, tmp_path):
    trainer = make_trainer(**options, folr_guard="chance", eval_dataset=options["train_dataset"].select(range(4)))
    _, trajectories = prepared(trainer)
    records = list(read_rollouts(tmp_path / "run"))
    weights = expected_weights(trajectories, GOLDS, 4)
    assert [record["turn_weight"] for record in records[::4]] == pytest.approx(weights, abs=1e-6)
    assert all(0 <= record["chance"] <= 1 for record in records)
    assert json.loads((tmp_path / "run" / "trajectories" / "settings.json").read_text())["folr_guard"] == "chance"
    metrics = trainer.evaluate()
    assert "eval_search/chance" not in metrics
    evaluated = list(read_rollouts(tmp_path / "run" / "trajectories" / "eval-rank000.jsonl"))
    assert {(record["chance"], record["turn_weight"]) for record in evaluated} == {(None, 1.0)}


def test_one_question_per_step_is_compared_with_those_of_earlier_steps(make_trainer, options):
    trainer = make_trainer(**options | {"per_device_train_batch_size": 4, "folr_guard": "chance", "max_steps": 4})
    trainer.train()
    chance = [entry["search/chance"] for entry in trainer.state.log_history if "search/chance" in entry]
    assert chance[0] == 0.0  # there is nothing to compare with
    assert max(chance[1:]) > 0


def test_a_resumed_run_continues_with_the_same_searches(make_trainer, options, tmp_path):
    options |= {
        "per_device_train_batch_size": 4,
        "folr_guard": "chance",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    make_trainer(**options, output_dir=str(tmp_path / "whole")).train()
    make_trainer(**options | {"max_steps": 2}, output_dir=str(tmp_path / "resumed")).train()
    make_trainer(**options, output_dir=str(tmp_path / "resumed")).train(resume_from_checkpoint=True)
    whole, resumed = (
        [(r["chance"], r["turn_advantages"]) for r in read_rollouts(tmp_path / name)] for name in ("whole", "resumed")
    )
    assert len(whole) == 16
    assert any(chance for chance, _ in whole[8:])
    assert whole == resumed


class ByLength(TSPOTrainer):
    """Credit that reads the rollouts: the advantage of a turn is its number of tokens."""

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, rows, **kwargs):
        advantages = torch.zeros(len(outcomes), int(num_turns.max()))
        for i, row in enumerate(rows):
            for k, turn in enumerate(row["trajectory"].turns):
                advantages[i, k] = len(turn.token_ids)
        return advantages.clone(), advantages, torch.ones_like(outcomes, dtype=torch.bool)


def test_credit_can_read_the_rollouts(make_trainer):
    inputs, trajectories = prepared(make_trainer(trainer_class=ByLength, reward_funcs=varied_reward))
    for row, trajectory in enumerate(trajectories):
        for position, turn in enumerate(trajectory.turn_index):
            expected = len(trajectory.turns[turn].token_ids) if turn >= 0 else 0
            assert inputs["advantages"][row, position] == expected
