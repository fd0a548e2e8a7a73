"""Advantages of turns and tokens, compared with a slow reference in plain Python, and degenerate cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.credit_reference import (
    BASELINES,
    LEVELS,
    NAN,
    OUTCOMES,
    PLACEMENTS,
    SCALES,
    a_rollout,
    advantages_of,
    batches,
    options,
    padded,
    reference_advantages,
    reference_rewards,
    same,
    tensors,
)
from tspo_trl.credit import folr_rewards, token_advantages, turn_advantages, uses_turn_level


@settings(deadline=None, max_examples=400)
@given(batches(), options(), st.sampled_from(PLACEMENTS), st.sampled_from([0.0, 0.3, 0.5]))
def test_advantages_equal_the_reference(batch, choices, placement, alpha):
    rollouts, group_size = batch
    threshold = choices["success_threshold"]
    expected = reference_advantages(
        reference_rewards(rollouts, alpha=alpha, placement=placement, threshold=threshold),
        [r[0] for r in rollouts],
        group_size=group_size,
        level=choices["level"],
        baseline=choices["baseline"],
        scale=choices["scale_rewards"],
        threshold=threshold,
    )
    same(advantages_of(rollouts, group_size, placement=placement, alpha=alpha, **choices), padded(expected, 0.0))


@settings(deadline=None, max_examples=150)
@given(batches(), options(), st.sampled_from(PLACEMENTS))
def test_advantages_in_float32_are_finite_and_close_to_float64(batch, choices, placement):
    rollouts, group_size = batch
    outcomes, occurrence, num_turns = tensors(rollouts)
    threshold = choices["success_threshold"]
    outcomes32 = outcomes.float()
    # the thresholds are exact in float32, so that rounding makes no rollout correct or wrong
    rewards = folr_rewards(outcomes32, occurrence, num_turns, placement=placement, success_threshold=threshold)
    advantages = turn_advantages(rewards, outcomes32, num_generations=group_size, **choices)
    assert advantages.dtype == torch.float32
    assert advantages.isfinite().all()
    expected = advantages_of(rollouts, group_size, placement=placement, **choices)
    same(advantages.double(), expected, rtol=5e-3, atol=5e-3)


@settings(deadline=None, max_examples=100)
@given(batches(), options(), st.sampled_from(PLACEMENTS))
def test_advantages_are_zero_for_missing_turns_and_unscorable_rollouts(batch, choices, placement):
    rollouts, group_size = batch
    advantages = advantages_of(rollouts, group_size, placement=placement, **choices)
    assert advantages.shape == (len(rollouts), max(r[2] for r in rollouts))
    for row, (outcome, _, num_turns) in zip(advantages.tolist(), rollouts, strict=True):
        assert row[num_turns:] == [0.0] * (len(row) - num_turns)
        if math.isnan(outcome):
            assert row == [0.0] * len(row)


@settings(deadline=None, max_examples=100)
@given(batches(st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN]), max_groups=2), st.sampled_from([-4.0, 0.5, 8.0]))
def test_adding_a_constant_does_not_change_trajectory_advantages(batch, constant):
    rollouts, group_size = batch
    shifted = [(outcome + constant, occurrence, turns) for outcome, occurrence, turns in rollouts]
    same(
        advantages_of(shifted, group_size, level="trajectory", success_threshold=1.0 + constant),
        advantages_of(rollouts, group_size, level="trajectory"),
    )


@settings(deadline=None, max_examples=150)
@given(st.data(), batches(), options(), st.sampled_from(PLACEMENTS))
def test_permuting_the_rollouts_of_a_group_permutes_their_advantages(data, batch, choices, placement):
    rollouts, group_size = batch
    order = []
    for start in range(0, len(rollouts), group_size):
        order += data.draw(st.permutations(range(start, start + group_size)))
    same(
        advantages_of([rollouts[i] for i in order], group_size, placement=placement, **choices),
        advantages_of(rollouts, group_size, placement=placement, **choices)[order],
    )


@settings(deadline=None, max_examples=100)
@given(st.data(), options(), st.sampled_from(PLACEMENTS))
def test_groups_are_independent_unless_the_scale_is_that_of_the_batch(data, choices, placement):
    choices["scale_rewards"] = data.draw(st.sampled_from(["group", "none"]))
    group_size = data.draw(st.integers(2, 4))
    groups = [data.draw(st.lists(a_rollout(), min_size=group_size, max_size=group_size)) for _ in range(3)]
    together = advantages_of(
        [rollout for group in groups for rollout in group], group_size, placement=placement, **choices
    )
    for number, group in enumerate(groups):
        alone = advantages_of(group, group_size, placement=placement, **choices)
        rows = together[number * group_size : (number + 1) * group_size]
        same(rows[:, : alone.size(1)], alone)
        assert not rows[:, alone.size(1) :].any()


def test_all_groups_share_the_scale_of_the_batch():
    # the standard deviation is sqrt(1/2) in the second group alone and sqrt(4/15) over all six outcomes
    rollouts = [(0.0, None, 1), (0.0, None, 1), (0.0, None, 1), (1.0, None, 1), (0.0, None, 1), (1.0, None, 1)]
    advantages = advantages_of(rollouts, 2, scale_rewards="batch")
    scale = math.sqrt(8 / 6 / 5) + 1e-4
    same(advantages[:, 0], torch.tensor([0, 0, -0.5, 0.5, -0.5, 0.5], dtype=torch.float64) / scale)


@settings(deadline=None, max_examples=100)
@given(batches(OUTCOMES.filter(lambda outcome: not math.isnan(outcome))))
def test_level_trajectory_is_grpo(batch):
    rollouts, group_size = batch
    outcomes, _, num_turns = tensors(rollouts)
    grouped = outcomes.view(-1, group_size)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    advantages = advantages_of(rollouts, group_size, level="trajectory")
    for row, value, turns in zip(advantages, expected.flatten(), num_turns.tolist(), strict=True):
        same(row[:turns], value.expand(turns))


@settings(deadline=None, max_examples=150)
@given(batches(), options(), st.sampled_from(PLACEMENTS))
def test_level_stage_is_turn_level_only_in_groups_without_a_correct_rollout(batch, choices, placement):
    rollouts, group_size = batch
    by_level = {
        level: advantages_of(rollouts, group_size, placement=placement, **(choices | {"level": level}))
        for level in LEVELS
    }
    threshold = choices["success_threshold"]
    for start in range(0, len(rollouts), group_size):
        group = slice(start, start + group_size)
        solved = any(outcome >= threshold for outcome, _, _ in rollouts[group])
        assert torch.equal(by_level["stage"][group], by_level["trajectory" if solved else "turn"][group])


def test_uses_turn_level_depends_on_the_outcomes_of_the_group():
    outcomes = torch.tensor([0, 1.0, 0, 0.9, 1.0, NAN, 0, NAN, NAN, NAN])
    expected = [False, False, True, True, False, False, True, True, True, True]
    assert uses_turn_level(outcomes, num_generations=2).tolist() == expected
    assert uses_turn_level(outcomes, num_generations=2, success_threshold=0.9).tolist() == [
        False, False, False, False, False, False, True, True, True, True,
    ]  # fmt: skip
    assert uses_turn_level(outcomes, num_generations=2, level="turn").all()
    assert not uses_turn_level(outcomes, num_generations=2, level="trajectory").any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("outcome", [0.0, 0.1, 1.0, 0.7])
def test_groups_without_variance_have_exactly_zero_advantages(level, baseline, scale, outcome):
    rollouts = [(outcome, None, turns) for turns in (1, 3, 2, 3)] * 2
    # the means of 0.1 and 0.7 are inexact: a rounding error must not be divided by 1e-4
    for dtype in (torch.float32, torch.float64):
        outcomes, occurrence, num_turns = tensors(rollouts)
        rewards = folr_rewards(outcomes.to(dtype), occurrence, num_turns)
        advantages = turn_advantages(
            rewards, outcomes.to(dtype), num_generations=4, level=level, baseline=baseline, scale_rewards=scale
        )
        assert not advantages.any()


def test_a_group_without_variance_has_zero_advantages_next_to_one_with_variance():
    rollouts = [(0.1, None, 2)] * 3 + [(0.0, None, 1), (0.3, None, 2), (0.3, None, 2)]
    for scale in SCALES:
        advantages = advantages_of(rollouts, 3, scale_rewards=scale)
        assert not advantages[:3].any()
        assert advantages[3:, 0].all()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_near_miss_in_an_incorrect_group_changes_only_its_turn(scale):
    rollouts = [(0.0, 1, 3), (0.0, None, 3), (0.0, None, 2), (0.0, None, 1)]
    advantages = advantages_of(rollouts, 4, scale_rewards=scale)
    # three rollouts have a second turn: 0.5, 0 and 0, with mean 1/6 and standard deviation 0.5 / sqrt(3)
    divisor = 0.5 / math.sqrt(3) + 1e-4 if scale == "group" else 1.0
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[:3, 1] = torch.tensor([1 / 3, -1 / 6, -1 / 6]) / divisor
    same(advantages, expected, rtol=1e-6, atol=1e-6)
    assert not advantages[:, [0, 2]].any()
    assert not advantages[3].any()


def test_near_miss_changes_all_turns_with_the_group_baseline():
    rollouts = [(0.0, 1, 2), (0.0, None, 2)]
    advantages = advantages_of(rollouts, 2, baseline="group", scale_rewards="none")
    same(advantages, torch.tensor([[-0.125, 0.375], [-0.125, -0.125]], dtype=torch.float64))


def test_near_miss_is_not_rewarded_in_a_mixed_group_at_level_stage():
    near_miss, other = advantages_of([(0.0, 0, 2), (0.0, None, 2), (1.0, 1, 2)], 3)[:2]
    assert torch.equal(near_miss, other)
    assert near_miss.lt(0).all()
    near_miss, other = advantages_of([(0.0, 0, 2), (0.0, None, 2), (1.0, 1, 2)], 3, level="turn")[:2]
    assert near_miss[0] > other[0]
    assert near_miss[1] == other[1]


def test_the_only_kth_turn_of_a_group_has_zero_advantage():
    advantages = advantages_of([(0.0, 2, 3), (0.0, None, 1)], 2)
    assert not advantages.any()
    advantages = advantages_of([(0.0, 2, 3), (0.0, None, 1)], 2, scale_rewards="none", baseline="group")
    same(advantages, torch.tensor([[-0.125, -0.125, 0.375], [-0.125, 0, 0]], dtype=torch.float64))


def test_one_turn_and_two_rollouts():
    scale = math.sqrt(0.5) + 1e-4
    for level in LEVELS:  # with one turn and a correct rollout, every level equals GRPO
        advantages = advantages_of([(1.0, 0, 1), (0.0, None, 1)], 2, level=level)
        same(advantages, torch.tensor([[0.5], [-0.5]], dtype=torch.float64) / scale)
    near_miss = advantages_of([(0.0, 0, 1), (0.0, None, 1)], 2)
    same(near_miss, torch.tensor([[0.25], [-0.25]], dtype=torch.float64) / (math.sqrt(0.125) + 1e-4))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("level", LEVELS)
def test_unscorable_rollouts_do_not_change_the_others(level, baseline, scale):
    group = [(0.0, 0, 2), (0.0, None, 3), (0.4, 1, 2)]
    with_unscorable = [group[0], (NAN, 0, 4), group[1], (NAN, None, 1), group[2]]
    choices = {"level": level, "baseline": baseline, "scale_rewards": scale}
    advantages = advantages_of(with_unscorable, 5, **choices)
    assert not advantages[[1, 3]].any()
    alone = advantages_of(group, 3, **choices)
    assert alone.any()
    same(advantages[[0, 2, 4], :3], alone)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("level", LEVELS)
def test_unscorable_groups_have_zero_advantages(level, baseline, scale):
    choices = {"level": level, "baseline": baseline, "scale_rewards": scale}
    assert torch.equal(
        advantages_of([(NAN, 0, 2), (NAN, None, 3)], 2, **choices), torch.zeros(2, 3, dtype=torch.float64)
    )
    beside = advantages_of([(NAN, 0, 2), (NAN, None, 2), (0.0, 0, 2), (0.3, None, 2)], 2, **choices)
    assert not beside[:2].any()
    assert beside[2:].any()
    # a single scorable rollout has no other rollout to be compared with
    assert not advantages_of([(NAN, 0, 2), (0.5, None, 3)], 2, level=level, scale_rewards=scale).any()


def test_unscorable_outcomes_mask_given_turn_rewards():
    outcomes = torch.tensor([0.0, 0.0, NAN])
    turn_rewards = torch.tensor([[0.5, 0.0], [0.0, 0.0], [7.0, 7.0]])
    advantages = turn_advantages(turn_rewards, outcomes, num_generations=3, scale_rewards="none")
    same(advantages, torch.tensor([[0.25, 0], [-0.25, 0], [0, 0]]), rtol=0, atol=1e-6)


def test_turn_advantages_do_not_change_their_arguments():
    outcomes, rewards = torch.tensor([0.0, NAN]), torch.tensor([[0.5, NAN], [1.0, 2.0]])
    before = outcomes.clone(), rewards.clone()
    turn_advantages(rewards, outcomes, num_generations=2)
    same((outcomes, rewards), before, rtol=0, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_incomplete_groups_are_refused(level):
    with pytest.raises(ValueError, match="num_generations"):
        turn_advantages(torch.zeros(5, 2), torch.zeros(5), num_generations=2, level=level)


@pytest.mark.parametrize("option", ["level", "baseline", "scale_rewards"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"`{option}`.*'nonsense'"):
        turn_advantages(torch.zeros(4, 2), torch.zeros(4), num_generations=2, **{option: "nonsense"})


# Tokens


def test_tokens_have_the_advantage_of_their_turn():
    advantages = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 0.0]])
    turn_index = torch.tensor([[0, 0, -1, 1, -1, 2], [0, -1, 1, 1, -1, -1]])
    expected = torch.tensor([[1.0, 1, 0, 2, 0, 3], [-4.0, 0, 5, 5, 0, 0]])
    assert torch.equal(token_advantages(advantages, turn_index), expected)


def test_tokens_outside_turns_have_zero_advantage():
    assert torch.equal(token_advantages(torch.ones(2, 3), torch.full((2, 4), -1)), torch.zeros(2, 4))
