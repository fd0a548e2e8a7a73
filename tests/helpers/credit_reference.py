"""A slow reference of turn rewards and advantages in plain Python, and random batches of rollouts to compare with it."""

import math
from statistics import stdev

import torch
from hypothesis import strategies as st

from tspo_trl.credit import folr_rewards, turn_advantages

NAN = float("nan")
LEVELS = ["stage", "turn", "trajectory"]
BASELINES = ["turn", "group"]
SCALES = ["group", "batch", "none"]
PLACEMENTS = ["first", "up_to_first"]


# The reference loops over rollouts and turns with Python floats. A rollout is (outcome, t*, number of turns)


def reference_rewards(rollouts, *, alpha, placement, threshold):
    rewards = []
    for outcome, occurrence, num_turns in rollouts:
        row = []
        for turn in range(num_turns):
            reward = outcome
            if outcome < threshold and occurrence is not None:
                if placement == "first" and turn == occurrence:
                    reward += alpha
                if placement == "up_to_first" and turn <= occurrence:
                    reward += alpha
            row.append(reward)
        rewards.append(row)
    return rewards


def reference_standardize(value, values, everything, scale):
    if len(values) < 2 or max(values) == min(values):
        return 0.0
    centered = value - math.fsum(values) / len(values)
    if scale == "none":
        return centered
    return centered / (stdev(everything if scale == "batch" else values) + 1e-4)


def reference_advantages(rewards, outcomes, *, group_size, level, baseline, scale, threshold):
    all_outcomes = [outcome for outcome in outcomes if not math.isnan(outcome)]
    all_rewards = [r for row, outcome in zip(rewards, outcomes, strict=True) if not math.isnan(outcome) for r in row]
    advantages = []
    for start in range(0, len(outcomes), group_size):
        group = range(start, start + group_size)
        scorable = [i for i in group if not math.isnan(outcomes[i])]
        solved = any(outcomes[i] >= threshold for i in scorable)
        by_turn = level == "turn" or (level == "stage" and not solved)
        for i in group:
            row = []
            for k in range(len(rewards[i])):
                if i not in scorable:
                    row.append(0.0)
                elif not by_turn:
                    values = [outcomes[j] for j in scorable]
                    row.append(reference_standardize(outcomes[i], values, all_outcomes, scale))
                else:
                    if baseline == "turn":
                        values = [rewards[j][k] for j in scorable if len(rewards[j]) > k]
                    else:
                        values = [reward for j in scorable for reward in rewards[j]]
                    row.append(reference_standardize(rewards[i][k], values, all_rewards, scale))
            advantages.append(row)
    return advantages


def tensors(rollouts):
    outcomes = torch.tensor([r[0] for r in rollouts], dtype=torch.float64)
    occurrence = torch.tensor([-1 if r[1] is None else r[1] for r in rollouts])
    return outcomes, occurrence, torch.tensor([r[2] for r in rollouts])


def padded(rows, fill):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, equal_nan=True, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


OUTCOMES = st.one_of(
    st.sampled_from([0.0, 0.0, 0.0, 1.0, NAN]),
    st.sampled_from([0.1, 0.5, 0.9, 1.2, -1.0]),
    st.integers(-20, 20).map(lambda n: n / 10),
)


@st.composite
def a_rollout(draw, outcomes=OUTCOMES):
    num_turns = draw(st.integers(1, 5))
    return draw(outcomes), draw(st.one_of(st.none(), st.integers(0, num_turns - 1))), num_turns


@st.composite
def batches(draw, outcomes=OUTCOMES, max_groups=3):
    """The rollouts of one or more groups, and the size of a group."""
    group_size = draw(st.integers(2, 6))
    size = group_size * draw(st.integers(1, max_groups))
    return draw(st.lists(a_rollout(outcomes), min_size=size, max_size=size)), group_size


@st.composite
def options(draw):
    return {
        "level": draw(st.sampled_from(LEVELS)),
        "baseline": draw(st.sampled_from(BASELINES)),
        "scale_rewards": draw(st.sampled_from(SCALES)),
        "success_threshold": draw(st.sampled_from([1.0, 0.5])),
    }


def advantages_of(rollouts, group_size, *, placement="first", alpha=0.5, **choices):
    outcomes, occurrence, num_turns = tensors(rollouts)
    threshold = choices.get("success_threshold", 1.0)
    rewards = folr_rewards(
        outcomes, occurrence, num_turns, alpha=alpha, placement=placement, success_threshold=threshold
    )
    return turn_advantages(rewards, outcomes, num_generations=group_size, **choices)
