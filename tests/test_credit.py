"""Turn rewards and advantages, compared with a slow reference in plain Python, and degenerate cases."""

import math
from statistics import stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tspo_trl.credit import (
    eligible_golds,
    first_occurrence,
    folr_rewards,
    token_advantages,
    turn_advantages,
    uses_turn_level,
)

NAN = float("nan")
LEVELS = ["stage", "turn", "trajectory"]
BASELINES = ["turn", "group"]
SCALES = ["group", "batch", "none"]
PLACEMENTS = ["first", "up_to_first"]


# The reference: loops over rollouts and turns with Python floats; a rollout is (outcome, t*, number of turns)


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
    """Rollouts of some groups, and the size of a group."""
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


# Turn rewards


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from(PLACEMENTS), st.sampled_from([0.0, 0.3, 0.5, 2.0]), st.sampled_from([1.0, 0.5, 0.0]))
def test_turn_rewards_equal_the_reference(batch, placement, alpha, threshold):
    rollouts, _ = batch
    actual = folr_rewards(*tensors(rollouts), alpha=alpha, placement=placement, success_threshold=threshold)
    expected = reference_rewards(rollouts, alpha=alpha, placement=placement, threshold=threshold)
    same(actual, padded(expected, NAN), rtol=0, atol=0)


def test_turn_rewards_by_hand():
    outcomes = torch.tensor([0.0, 0.0, 1.0, NAN, 0.2])
    occurrence = torch.tensor([1, -1, 0, 0, 2])
    num_turns = torch.tensor([3, 1, 2, 2, 3])
    same(
        folr_rewards(outcomes, occurrence, num_turns),
        torch.tensor([[0, 0.5, 0], [0, NAN, NAN], [1, 1, NAN], [NAN, NAN, NAN], [0.2, 0.2, 0.7]]),
        rtol=0,
        atol=1e-6,
    )
    same(
        folr_rewards(outcomes, occurrence, num_turns, placement="up_to_first", alpha=0.25),
        torch.tensor([[0.25, 0.25, 0], [0, NAN, NAN], [1, 1, NAN], [NAN, NAN, NAN], [0.45, 0.45, 0.45]]),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize(("outcome", "paid"), [(0.0, True), (0.69, True), (0.7, False), (1.0, False)])
def test_only_rollouts_below_the_threshold_earn_folr(outcome, paid):
    outcomes = torch.tensor([outcome], dtype=torch.float64)
    rewards = folr_rewards(outcomes, torch.tensor([0]), torch.tensor([2]), success_threshold=0.7)
    same(rewards, torch.tensor([[outcome + 0.5 * paid, outcome]], dtype=torch.float64))


def test_turn_rewards_of_no_rollouts():
    assert folr_rewards(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long()).shape == (0, 0)


def test_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement"):
        folr_rewards(torch.zeros(2), torch.zeros(2).long(), torch.ones(2).long(), placement="last")


# Advantages


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
    # 0.5 and similar numbers are exact, so that rounding makes no rollout correct or wrong
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
    # the second group alone has a standard deviation of sqrt(1/2), all six outcomes one of sqrt(0.3)
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
def test_level_stage_is_turn_level_in_groups_without_a_correct_rollout_only(batch, choices, placement):
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


def test_uses_turn_level_looks_at_the_composition_of_groups():
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
    # 0.1 and 0.7 have no exact mean: a residue of rounding must not be divided by 1e-4
    for dtype in (torch.float32, torch.float64):
        outcomes, occurrence, num_turns = tensors(rollouts)
        rewards = folr_rewards(outcomes.to(dtype), occurrence, num_turns)
        advantages = turn_advantages(
            rewards, outcomes.to(dtype), num_generations=4, level=level, baseline=baseline, scale_rewards=scale
        )
        assert not advantages.any()


def test_a_group_without_variance_has_zero_advantages_beside_one_with_variance():
    rollouts = [(0.1, None, 2)] * 3 + [(0.0, None, 1), (0.3, None, 2), (0.3, None, 2)]
    for scale in SCALES:
        advantages = advantages_of(rollouts, 3, scale_rewards=scale)
        assert not advantages[:3].any()
        assert advantages[3:, 0].all()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_one_near_miss_in_an_all_wrong_group_moves_only_its_turn(scale):
    rollouts = [(0.0, 1, 3), (0.0, None, 3), (0.0, None, 2), (0.0, None, 1)]
    advantages = advantages_of(rollouts, 4, scale_rewards=scale)
    # three rollouts have a second turn: 0.5, 0, 0, of mean 1/6 and standard deviation 0.5 / sqrt(3)
    divisor = 0.5 / math.sqrt(3) + 1e-4 if scale == "group" else 1.0
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[:3, 1] = torch.tensor([1 / 3, -1 / 6, -1 / 6]) / divisor
    same(advantages, expected, rtol=1e-6, atol=1e-6)
    assert not advantages[:, [0, 2]].any()
    assert not advantages[3].any()


def test_a_near_miss_moves_all_turns_with_the_baseline_of_the_group():
    rollouts = [(0.0, 1, 2), (0.0, None, 2)]
    advantages = advantages_of(rollouts, 2, baseline="group", scale_rewards="none")
    same(advantages, torch.tensor([[-0.125, 0.375], [-0.125, -0.125]], dtype=torch.float64))


def test_a_near_miss_earns_nothing_in_a_mixed_group_at_level_stage():
    near_miss, other = advantages_of([(0.0, 0, 2), (0.0, None, 2), (1.0, 1, 2)], 3)[:2]
    assert torch.equal(near_miss, other)
    assert near_miss.lt(0).all()
    near_miss, other = advantages_of([(0.0, 0, 2), (0.0, None, 2), (1.0, 1, 2)], 3, level="turn")[:2]
    assert near_miss[0] > other[0]
    assert near_miss[1] == other[1]


def test_the_only_kth_turn_of_a_group_has_advantage_zero():
    advantages = advantages_of([(0.0, 2, 3), (0.0, None, 1)], 2)
    assert not advantages.any()
    advantages = advantages_of([(0.0, 2, 3), (0.0, None, 1)], 2, scale_rewards="none", baseline="group")
    same(advantages, torch.tensor([[-0.125, -0.125, 0.375], [-0.125, 0, 0]], dtype=torch.float64))


def test_one_turn_and_two_rollouts():
    scale = math.sqrt(0.5) + 1e-4
    for level in LEVELS:  # with one turn and a correct rollout, every level is GRPO
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
def test_unscorable_groups_have_advantage_zero(level, baseline, scale):
    choices = {"level": level, "baseline": baseline, "scale_rewards": scale}
    assert torch.equal(
        advantages_of([(NAN, 0, 2), (NAN, None, 3)], 2, **choices), torch.zeros(2, 3, dtype=torch.float64)
    )
    beside = advantages_of([(NAN, 0, 2), (NAN, None, 2), (0.0, 0, 2), (0.3, None, 2)], 2, **choices)
    assert not beside[:2].any()
    assert beside[2:].any()
    # a single scorable rollout has nothing to be compared with
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


# First occurrence


@pytest.mark.parametrize(
    ("texts", "golds", "turn"),
    [
        ([], ["Paris"], None),
        ([None], ["Paris"], None),
        (["Rome is in Italy."], ["Paris"], None),
        (["Paris is in France."], ["Paris"], 0),
        (["Rome", "Oslo and Paris", "Paris"], ["Paris"], 1),
        ([None, "", None, "in Paris"], ["Paris"], 3),
        (["the bus", "with us"], ["us"], 1),  # whole words
        (["the PARIS!"], ["the paris"], 0),
        (["Rome", "Oslo", "Paris"], ["Paris", "Oslo"], 1),  # whichever gold comes first
        (["Paris"], [], None),
    ],
)
@pytest.mark.parametrize("guard", ["none", "degenerate", "strict"])
def test_first_occurrence_is_the_first_turn_with_a_gold(texts, golds, turn, guard):
    assert first_occurrence(texts, golds, guard=guard) == turn


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("yes it is", "yes"),
        ("No, it is not", "No."),
        ("there is noanswer here", "noanswer"),
        ("vitamin C", "C"),
        ("in 5 days", "5"),
        ("the letter é", "É"),
        ("The band The The", "The The"),
        ("a band called !!! plays", "!!!"),
        ("grade A", "a"),
    ],
)
def test_degenerate_golds_occur_only_without_a_guard(text, gold):
    assert first_occurrence(["nothing", text], [gold], guard="none") == 1
    assert first_occurrence(["nothing", text], [gold]) is None  # "degenerate" is the default
    assert first_occurrence(["nothing", text], [gold], guard="degenerate") is None
    assert first_occurrence(["nothing", text], [gold], guard="strict") is None


def test_degenerate_golds_do_not_hide_the_others():
    assert first_occurrence(["yes and no", "Paris"], ["yes", "Paris"]) == 1
    assert first_occurrence(["yes and no", "Paris"], ["yes", "Paris"], guard="none") == 0


@pytest.mark.parametrize("gold", ["yes man", "no.1", "ab", "42", "東京", "the yes album"])
def test_short_or_similar_golds_are_not_degenerate(gold):
    assert eligible_golds([gold]) == [gold]


def test_an_empty_gold_never_occurs():
    for guard in ("none", "degenerate", "strict"):
        assert first_occurrence(["", "anything", None], ["", "  "], guard=guard) is None


def test_guard_strict_excludes_golds_that_the_question_contains():
    texts, golds = ["Rome", "Oslo"], ["Rome", "Oslo"]
    question = "Which is larger, Rome or Bern?"
    assert first_occurrence(texts, golds, question=question, guard="strict") == 1
    assert first_occurrence(texts, golds, question=question, guard="degenerate") == 0
    assert first_occurrence(texts, ["Rome"], question=question, guard="strict") is None
    assert first_occurrence(texts, ["Rom"], question=question, guard="strict") is None
    # as whole words: "us" is not in the question "Which bus?"
    assert first_occurrence(["with us"], ["us"], question="Which bus?", guard="strict") == 0


def test_guard_strict_ignores_turns_whose_own_query_names_the_gold():
    texts = ["Paris", "Paris", "Paris"]
    queries = ["paris france", "the Paris", "capital of France"]
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="strict") == 2
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="degenerate") == 0
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="none") == 0
    assert first_occurrence(texts[:2], ["Paris"], queries=queries[:2], guard="strict") is None
    # a query of another turn does not matter, nor does one that contains the gold within a word
    assert first_occurrence(["Paris", "Rome"], ["Paris"], queries=["capital", "paris"], guard="strict") == 0
    assert first_occurrence(["Paris"], ["Paris"], queries=["Parisian life"], guard="strict") == 0


def test_guard_strict_checks_each_gold_separately():
    # the query contains one golden answer, the passages contain the other
    assert first_occurrence(["Lutetia"], ["Paris", "Lutetia"], queries=["Paris"], guard="strict") == 0
    assert first_occurrence(["Paris"], ["Paris", "Lutetia"], queries=["Paris"], guard="strict") is None


def test_guard_strict_accepts_missing_queries():
    assert first_occurrence(["Rome", "Paris"], ["Paris"], queries=["x"], guard="strict") == 1
    assert first_occurrence([None, "Paris"], ["Paris"], queries=["Paris", ""], guard="strict") == 1


def test_unknown_guard_is_refused():
    with pytest.raises(ValueError, match="guard"):
        first_occurrence(["Paris"], ["Paris"], guard="paranoid")


# Tokens


def test_tokens_have_the_advantage_of_their_turn():
    advantages = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 0.0]])
    turn_index = torch.tensor([[0, 0, -1, 1, -1, 2], [0, -1, 1, 1, -1, -1]])
    expected = torch.tensor([[1.0, 1, 0, 2, 0, 3], [-4.0, 0, 5, 5, 0, 0]])
    assert torch.equal(token_advantages(advantages, turn_index), expected)


def test_tokens_of_no_turn_have_advantage_zero():
    assert torch.equal(token_advantages(torch.ones(2, 3), torch.full((2, 4), -1)), torch.zeros(2, 4))
