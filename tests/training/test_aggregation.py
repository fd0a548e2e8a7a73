"""`multi_objective_aggregation="normalize_then_sum"`, compared with plain Python and with TRL's own advantages."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from datasets import Dataset

from helpers.evaluate_on_ranks import evaluator, length_reward, questions
from helpers.training import prepared
from tspo_trl import read_rollouts
from tspo_trl.inspect.load import load_run
from tspo_trl.inspect.why import explain_group, explain_turn
from tspo_trl.rewards import exact_match_reward

EPS = 1e-4


def large(trajectories, **kwargs):
    """A reward of a much larger scale, which alone decides the sum."""
    return [1000.0 * (len(t.turns[0].token_ids) % 3) for t in trajectories]


def small(trajectories, **kwargs):
    return [float(sum(t.completion_ids) % 4) for t in trajectories]


def constant(trajectories, **kwargs):
    """Without variance, but its mean has a rounding error."""
    return [0.7] * len(trajectories)


def trained(policy, folder, *, rewards=None, **options):
    """The advantages of scripted rollouts of four groups, as the loss gets them, and the rollouts in the log."""
    trainer = evaluator(policy, folder, None, batch=4, generations=4, reward_funcs=rewards, **options)
    inputs, _ = prepared(trainer)
    return inputs["advantages"], list(read_rollouts(folder))


def standardized(values, among):
    known = [value for value in among if value is not None]
    if len(known) < 2 or max(known) == min(known):
        return [None if value is None else 0.0 for value in values]
    return [None if value is None else (value - mean(known)) / (stdev(known) + EPS) for value in values]


def reference(records, weights, *, alpha, baseline, level):
    """The advantages of the turns of each rollout."""
    groups = [records[i : i + 4] for i in range(0, len(records), 4)]
    sums = []
    for group in groups:
        normalized = [
            standardized(values, values) for values in zip(*(r["rewards"].values() for r in group), strict=True)
        ]
        for values in zip(*normalized, strict=True):
            known = [w * value for w, value in zip(weights, values, strict=True) if value is not None]
            sums.append(sum(known) if known else None)
    known = [value for value in sums if value is not None]
    outcome = [None if s is None else (s - mean(known)) / (stdev(known) + EPS) for s in sums]
    result = []
    for group, of_outcome in zip(groups, [outcome[i : i + 4] for i in range(0, len(outcome), 4)], strict=True):
        by_turn = level == "turn" or not any(r["outcome"] is not None and r["outcome"] >= 1.0 for r in group)
        found = [
            [float(k == r["credited_turn"] and r["outcome"] < 1.0) for k in range(len(r["trajectory"].turns))]
            if r["outcome"] is not None
            else None
            for r in group
        ]
        for row, base in zip(found, of_outcome, strict=True):
            advantages = []
            for k, value in enumerate(row or []):
                rows = [other for other in found if other is not None]
                among = [v for other in rows for v in (other[k : k + 1] if baseline == "turn" else other)]
                extra = standardized([value], among)[0] if by_turn else 0.0
                advantages.append(base + alpha * extra)
            result.append(advantages)
    return result


@pytest.mark.parametrize("level", ["turn", "stage"])
@pytest.mark.parametrize("baseline", ["turn", "group"])
def test_turn_advantages_are_those_of_trl_plus_the_normalized_turn_reward(policy_dir, tmp_path, level, baseline):
    options = {"advantage_level": level, "turn_baseline": baseline, "scale_rewards": "none"}  # TRL ignores the last one
    aggregation = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.001]}
    _, records = trained(policy_dir, tmp_path / "run", **aggregation, **options)
    expected = reference(records, [1.0, 0.001], alpha=0.5, baseline=baseline, level=level)
    correct = [record["outcome"] is not None and record["outcome"] >= 1.0 for record in records]
    assert 1 <= sum(any(correct[i : i + 4]) for i in range(0, 16, 4)) <= 3
    for record, row in zip(records, expected, strict=True):
        if record["outcome"] is None:
            assert not any(record["turn_advantages"])
        else:
            assert record["turn_advantages"] == pytest.approx(row, abs=2e-3)


@pytest.mark.parametrize("rewards", [[large, small], [exact_match_reward, length_reward], [constant, small]])
def test_without_turn_rewards_they_are_those_of_trl(policy_dir, tmp_path, rewards):
    options = {"rewards": rewards, "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 1.0]}
    by_rollout, _ = trained(policy_dir, tmp_path / "grpo", advantage_level="trajectory", **options)
    by_turn, records = trained(policy_dir, tmp_path / "turn", advantage_level="turn", folr_alpha=0.0, **options)
    assert by_rollout.any()
    for i, record in enumerate(records):
        written = torch.tensor(record["trajectory"].loss_mask, dtype=torch.bool)
        torch.testing.assert_close(
            by_turn[i, : len(written)], torch.where(written, by_rollout[i], 0.0), atol=1e-6, rtol=1e-6
        )


def never_correct(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def test_a_turn_that_rescues_a_group_has_a_positive_advantage(policy_dir, tmp_path):
    options = {"rewards": [never_correct, constant], "multi_objective_aggregation": "normalize_then_sum"}
    _, records = trained(policy_dir, tmp_path / "run", **options)
    rescued = 0
    for record in records:
        for turn, advantage in enumerate(record["turn_advantages"]):
            alone = all(r["credited_turn"] != turn for r in records if r["question"] == record["question"])
            if alone:
                assert advantage == 0  # not the residue of the mean of 0.7
            elif turn == record["credited_turn"]:
                assert advantage > 0
                rescued += 1
            else:
                assert advantage <= 0
    assert rescued
    settings = json.loads((tmp_path / "run" / "trajectories" / "settings.json").read_text())
    assert settings["multi_objective_aggregation"] == "normalize_then_sum"


def test_the_inspector_explains_the_advantages(policy_dir, tmp_path):
    options = {"rewards": [large, small], "multi_objective_aggregation": "normalize_then_sum"}
    trained(policy_dir, tmp_path / "run", success_threshold=3000.0, **options)
    run = load_run(tmp_path / "run")
    texts = [
        explain_turn(group, i, k, run.settings)[1]
        for group in run.modes["train"]
        for i, record in enumerate(group.rollouts)
        for k in range(len(record["trajectory"].turns))
    ]
    assert all(explain_group(group, run.settings) for group in run.modes["train"])
    assert any("each reward function is normalised by itself" in text for text in texts)
    assert not [text for text in texts if "does not follow" in text]


def test_an_unknown_aggregation_is_refused(policy_dir, tmp_path):
    with pytest.raises(ValueError, match=r"`multi_objective_aggregation` must be one of \['sum_then_normalize', "):
        evaluator(
            policy_dir, Path(tmp_path), Dataset.from_list(questions(1)), batch=4, multi_objective_aggregation="sum"
        )
