"""First occurrences of golden answers, and turn rewards compared with a slow reference in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.credit_reference import NAN, PLACEMENTS, batches, padded, reference_rewards, same, tensors
from tspo_trl.credit import eligible_golds, first_occurrence, folr_rewards

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
        (["Rome", "Oslo", "Paris"], ["Paris", "Oslo"], 1),  # the golden answer that occurs first
        (["Paris"], [], None),
    ],
)
@pytest.mark.parametrize("guard", ["none", "degenerate", "strict"])
def test_first_occurrence_is_the_first_turn_with_a_golden_answer(texts, golds, turn, guard):
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
def test_degenerate_golden_answers_occur_only_without_a_guard(text, gold):
    assert first_occurrence(["nothing", text], [gold], guard="none") == 1
    assert first_occurrence(["nothing", text], [gold]) is None  # "degenerate" is the default
    assert first_occurrence(["nothing", text], [gold], guard="degenerate") is None
    assert first_occurrence(["nothing", text], [gold], guard="strict") is None


def test_degenerate_golden_answers_do_not_hide_the_others():
    assert first_occurrence(["yes and no", "Paris"], ["yes", "Paris"]) == 1
    assert first_occurrence(["yes and no", "Paris"], ["yes", "Paris"], guard="none") == 0


@pytest.mark.parametrize("gold", ["yes man", "no.1", "ab", "42", "東京", "the yes album"])
def test_short_or_similar_golden_answers_are_not_degenerate(gold):
    assert eligible_golds([gold]) == [gold]


def test_an_empty_golden_answer_never_occurs():
    for guard in ("none", "degenerate", "strict"):
        assert first_occurrence(["", "anything", None], ["", "  "], guard=guard) is None


def test_guard_strict_excludes_golden_answers_that_the_question_contains():
    texts, golds = ["Rome", "Oslo"], ["Rome", "Oslo"]
    question = "Which is larger, Rome or Bern?"
    assert first_occurrence(texts, golds, question=question, guard="strict") == 1
    assert first_occurrence(texts, golds, question=question, guard="degenerate") == 0
    assert first_occurrence(texts, ["Rome"], question=question, guard="strict") is None
    assert first_occurrence(texts, ["Rom"], question=question, guard="strict") is None
    # as whole words: "us" is not in the question "Which bus?"
    assert first_occurrence(["with us"], ["us"], question="Which bus?", guard="strict") == 0


def test_guard_strict_ignores_turns_whose_query_contains_the_golden_answer():
    texts = ["Paris", "Paris", "Paris"]
    queries = ["paris france", "the Paris", "capital of France"]
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="strict") == 2
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="degenerate") == 0
    assert first_occurrence(texts, ["Paris"], queries=queries, guard="none") == 0
    assert first_occurrence(texts[:2], ["Paris"], queries=queries[:2], guard="strict") is None
    # queries of other turns are ignored, as are queries that contain the golden answer within a word
    assert first_occurrence(["Paris", "Rome"], ["Paris"], queries=["capital", "paris"], guard="strict") == 0
    assert first_occurrence(["Paris"], ["Paris"], queries=["Parisian life"], guard="strict") == 0


def test_guard_strict_checks_each_golden_answer_separately():
    # the query contains one golden answer, the passages contain the other
    assert first_occurrence(["Lutetia"], ["Paris", "Lutetia"], queries=["Paris"], guard="strict") == 0
    assert first_occurrence(["Paris"], ["Paris", "Lutetia"], queries=["Paris"], guard="strict") is None


def test_guard_strict_accepts_missing_queries():
    assert first_occurrence(["Rome", "Paris"], ["Paris"], queries=["x"], guard="strict") == 1
    assert first_occurrence([None, "Paris"], ["Paris"], queries=["Paris", ""], guard="strict") == 1


def test_unknown_guard_is_refused():
    with pytest.raises(ValueError, match="guard"):
        first_occurrence(["Paris"], ["Paris"], guard="paranoid")


# Turn rewards


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from(PLACEMENTS), st.sampled_from([0.0, 0.3, 0.5, 2.0]), st.sampled_from([1.0, 0.5, 0.0]))
def test_turn_rewards_equal_the_reference(batch, placement, alpha, threshold):
    rollouts, _ = batch
    actual = folr_rewards(*tensors(rollouts), alpha=alpha, placement=placement, success_threshold=threshold)
    expected = reference_rewards(rollouts, alpha=alpha, placement=placement, threshold=threshold)
    same(actual, padded(expected, NAN), rtol=0, atol=0)


def test_turn_rewards_equal_values_computed_by_hand():
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
def test_only_rollouts_below_the_threshold_receive_folr(outcome, paid):
    outcomes = torch.tensor([outcome], dtype=torch.float64)
    rewards = folr_rewards(outcomes, torch.tensor([0]), torch.tensor([2]), success_threshold=0.7)
    same(rewards, torch.tensor([[outcome + 0.5 * paid, outcome]], dtype=torch.float64))


def test_turn_rewards_of_no_rollouts():
    assert folr_rewards(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long()).shape == (0, 0)


def test_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement"):
        folr_rewards(torch.zeros(2), torch.zeros(2).long(), torch.ones(2).long(), placement="last")
