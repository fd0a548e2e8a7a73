"""Metrics of a step, against values computed by hand."""

import math
from collections import Counter

import pytest
import torch

from tspo_trl import Trajectory, Turn
from tspo_trl.rollout.facts import RolloutFacts, rollout_facts
from tspo_trl.rollout.stats import RolloutStats
from tspo_trl.training.metrics import (
    add_metrics,
    chance_metrics,
    mean_logprob,
    retrieval_facts,
    retrieval_metrics,
    rollout_metrics,
)

NAN = float("nan")


def facts_of(trajectory, occurrence=None, credited=None):
    return rollout_facts(trajectory, occurrence, credited)._asdict()


def search(query, retrieval="ok"):
    return Turn(token_ids=[1], action="search", content=query, retrieval=retrieval)


def test_facts_of_a_rollout():
    trajectory = Trajectory(
        prompt_ids=[],
        turns=[
            search("Paris"),
            Turn(token_ids=[1], action="invalid"),
            search("paris"),
            search("Rome", "empty"),
            search("PARIS", "timeout"),
        ],
        status="retrieval_failed",
    )
    assert facts_of(trajectory, occurrence=2, credited=0) == {
        "turns": 5,
        "searches": 4,
        "failed": 1,
        "invalid": 1,
        "duplicate": 2,
        "truncated": 0,
        "tokens": 5,
        "occurrence": 2,
        "credited": 0,
        "answered": 0,
        "evidence": 0,
        "after_evidence": 2,
    }


def test_facts_of_a_rollout_without_passages():
    trajectory = Trajectory(prompt_ids=[], turns=[search("a", "error")], status="retrieval_failed")
    facts = facts_of(trajectory)
    assert (facts["failed"], facts["occurrence"], facts["credited"], facts["duplicate"]) == (1, -1, -1, 0)


def test_a_search_that_was_not_executed_is_not_counted():
    trajectory = Trajectory(prompt_ids=[], turns=[search("a"), search("b", None)])
    assert facts_of(trajectory)["searches"] == 1


def test_facts_about_the_evidence():
    turns = [search("a"), search("b", "empty"), search("c"), Turn(token_ids=[1], action="answer", content="x")]
    trajectory = Trajectory(prompt_ids=[], turns=turns, status="answered")
    facts = rollout_facts(trajectory, 0, None, evidence=2)
    assert (facts.answered, facts.evidence, facts.after_evidence) == (1, 2, 2)
    assert (
        rollout_facts(trajectory, 2, None).after_evidence == rollout_facts(trajectory, None, None).after_evidence == 0
    )


def test_metrics_of_chance():
    values = chance_metrics(
        torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.9]),
        torch.tensor([0.5, 1.0, 0.0]),
        torch.tensor([True, False, False, False, True, True]),
        torch.tensor([0.0, 1.0, 0.0, NAN, 0.0, NAN]),
        num_generations=2,
    )
    assert values == {
        "search/chance": pytest.approx((0.1 + 0.2 + 0.3 + 0.9) / 4),
        "search/chance_weight": pytest.approx((0.5 + 0.0) / 2),
    }


def test_facts_of_a_truncated_rollout():
    assert facts_of(Trajectory(prompt_ids=[], turns=[Turn(token_ids=[1])], status="truncated"))["truncated"] == 1
    assert facts_of(Trajectory(prompt_ids=[], turns=[Turn(token_ids=[1])], status="answered"))["truncated"] == 0


def metrics(rows, outcomes, has_signal, num_generations, success_threshold=1.0, logps=None):
    facts = torch.tensor(
        [
            [row.get(name, -1 if name in ("occurrence", "credited") else 0) for name in RolloutFacts._fields]
            for row in rows
        ]
    )
    return rollout_metrics(
        facts,
        torch.tensor(outcomes),
        torch.tensor(has_signal),
        torch.tensor(logps or [math.nan] * len(rows)),
        num_generations=num_generations,
        success_threshold=success_threshold,
    )


# Five groups of two: all wrong with a signal, all wrong without, mixed, all correct (one without outcome), no outcomes
ROWS = [
    {"turns": 3, "searches": 2, "duplicate": 1, "occurrence": 1, "credited": 1, "evidence": 1, "answered": 1},
    {"turns": 2, "searches": 1, "answered": 1},
    {"turns": 1, "invalid": 1},
    {"turns": 5, "searches": 3, "failed": 0, "invalid": 1, "truncated": 1},
    {"turns": 3, "searches": 2, "occurrence": 0, "credited": -1, "evidence": 2, "after_evidence": 1, "answered": 1},
    {"turns": 2, "searches": 1, "occurrence": 0, "credited": 0, "evidence": 1, "answered": 1},
    {"turns": 2, "searches": 1, "answered": 1},
    {"turns": 2, "searches": 1, "failed": 1},
    {"turns": 1, "searches": 1, "failed": 1},
    {"turns": 4, "searches": 4, "failed": 1},
]
OUTCOMES = [0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 1.0, NAN, NAN, NAN]
SIGNAL = [True, True, False, False, True, True, False, False, False, False]
EXPECTED = {
    "groups/all_wrong": 2 / 4,
    "groups/mixed": 1 / 4,
    "groups/all_correct": 1 / 4,
    "groups/rescued": 0 / 4,  # the outcomes of the first group differ, so it has a signal without turn rewards
    "groups/no_signal": 2 / 4,
    "reward_max": 1.0,
    "logps/correct": (-0.5 - 1.5) / 2,
    "search/calls": 16 / 10,
    "search/none": 1 / 10,
    "search/invalid": 2 / 25,
    "search/duplicate": 1 / 16,
    "search/failed": 3 / 16,
    "search/hit": 3 / 7,
    "search/near_miss": 2 / 7,
    "search/first_turn": (2 + 1 + 1) / 3,
    "search/evidence": 4 / 16,
    "search/after_evidence": 1 / 3,
    "answers/none": 2 / 7,
    "answers/from_memory": 1 / 2,
    "answers/unsupported": 2 / 4,
    "turns/mean": 25 / 10,
    "turns/truncated": 1 / 10,
}


def test_metrics_by_hand():
    logps = [-9.0, -9.0, -9.0, -9.0, -0.5, -9.0, -1.5, -9.0, -9.0, -9.0]
    assert metrics(ROWS, OUTCOMES, SIGNAL, 2, logps=logps) == pytest.approx(EXPECTED)


def test_metrics_are_python_floats():
    assert all(type(value) is float for value in metrics(ROWS, OUTCOMES, SIGNAL, 2).values())


def test_shares_of_groups_add_up_to_one():
    values = metrics(ROWS, OUTCOMES, SIGNAL, 2)
    assert values["groups/all_wrong"] + values["groups/mixed"] + values["groups/all_correct"] == pytest.approx(1)


def test_metrics_depend_on_the_group_size_and_the_threshold():
    values = metrics(ROWS, OUTCOMES, SIGNAL, 5, success_threshold=0.5)
    # outcomes 0, 0.5, 0, 0, 1 | 0, 1, NaN, NaN, NaN
    assert values["groups/mixed"] == 1.0
    assert values["groups/all_wrong"] == values["groups/rescued"] == values["groups/all_correct"] == 0.0
    assert values["search/near_miss"] == pytest.approx(2 / 7)
    assert metrics(ROWS, OUTCOMES, SIGNAL, 2, success_threshold=0.5)["groups/all_wrong"] == pytest.approx(1 / 4)


def test_only_all_wrong_groups_are_rescued():
    rows = [{"turns": 1}] * 4
    values = metrics(rows, [0.0, 1.0, 0.0, 0.0], [True, True, False, True], 2)
    assert values["groups/rescued"] == 0.5
    assert metrics(rows, [0.0, 1.0, 0.0, 0.0], [True, True, False, False], 2)["groups/rescued"] == 0.0


def test_a_group_whose_outcomes_differ_needs_no_rescue():
    """As with a reward model, whose values never reach the threshold."""
    rows = [{"turns": 1}] * 6
    values = metrics(rows, [-3.0, 0.25, -1.0, -1.0, -1.0, NAN], [True] * 6, 2)
    shares = [values[f"groups/{name}"] for name in ("all_wrong", "rescued", "no_signal")]
    assert shares == pytest.approx([1.0, 2 / 3, 0.0])
    assert values["reward_max"] == 0.25
    assert math.isnan(metrics(rows, [NAN] * 6, [False] * 6, 2)["reward_max"])


def test_the_largest_outcome_of_several_phases_is_logged():
    logged = {"turns/mean": [4.0]}
    for largest in (0.5, math.nan, -1.0):
        add_metrics(logged, {"reward_max": largest, "turns/mean": 2.0})
    assert logged == {"turns/mean": [4.0, 2.0, 2.0, 2.0], "reward_max": [0.5]}


def test_correct_rollouts_are_not_near_misses():
    rows = [{"turns": 2, "searches": 1, "occurrence": 0}] * 4
    values = metrics(rows, [1.0, 1.0, 0.0, 1.5], [False] * 4, 4)
    assert values["search/hit"] == 1.0
    assert values["search/near_miss"] == 0.25


def test_a_hit_counts_whether_or_not_it_is_credited():
    rows = [{"turns": 2, "searches": 1, "occurrence": 0, "credited": -1}, {"turns": 1}]
    assert metrics(rows, [0.0, 0.0], [False] * 2, 2)["search/hit"] == 0.5


def test_rollouts_without_an_outcome_count_as_neither_hit_nor_near_miss():
    rows = [{"turns": 2, "searches": 2, "failed": 1, "occurrence": 0}, {"turns": 1}, {"turns": 1}, {"turns": 1}]
    values = metrics(rows, [NAN, 0.0, 0.0, 1.0], [False] * 4, 4)
    assert values["search/hit"] == values["search/near_miss"] == 0.0


def test_shares_of_searches_are_nan_without_searches():
    values = metrics([{"turns": 1}, {"turns": 3, "invalid": 1}], [0.0, 1.0], [True, True], 2)
    for name in ("search/duplicate", "search/failed", "search/first_turn"):
        assert math.isnan(values[name])
    assert values["search/calls"] == values["search/hit"] == values["search/near_miss"] == 0.0
    assert values["search/invalid"] == pytest.approx(1 / 4)


def test_groups_without_an_outcome_are_excluded_from_shares_of_groups():
    scored = metrics(ROWS[:4], OUTCOMES[:4], SIGNAL[:4], 2)
    with_unscorable = metrics(ROWS[:4] + ROWS[8:], OUTCOMES[:4] + OUTCOMES[8:], SIGNAL[:4] + SIGNAL[8:], 2)
    for name in ("groups/all_wrong", "groups/mixed", "groups/all_correct", "groups/rescued", "search/hit"):
        assert with_unscorable[name] == scored[name]


def test_shares_of_groups_are_nan_without_an_outcome():
    values = metrics(ROWS[8:], OUTCOMES[8:], SIGNAL[8:], 2)
    for name in ("groups/all_wrong", "groups/mixed", "groups/all_correct", "groups/rescued", "search/hit"):
        assert math.isnan(values[name])
    assert values["search/failed"] == pytest.approx(2 / 5)


# Retrieval


def test_retrieval_metrics_are_computed_from_sums_over_ranks():
    busy = RolloutStats(
        generate_seconds=2.0,
        searches=8,
        queries=6,
        failed_searches=Counter({"timeout": 2, "reply": 1}),
        latencies=[1.0, 3.0, 0.5],
    )
    idle = RolloutStats(generate_seconds=5.0, searches=2, queries=2, latencies=[2.0])
    facts = torch.tensor(
        [
            retrieval_facts(busy, cached=3, retries=4, max_calls=4),
            retrieval_facts(idle, cached=1, retries=0, max_calls=4),
            retrieval_facts(RolloutStats(), cached=0, retries=0, max_calls=4),
        ]
    )
    metrics = retrieval_metrics(facts)
    assert metrics == pytest.approx(
        {
            "time/generate": 5.0,
            "time/search": 4.5,
            "retrieval/searches": 10,
            "retrieval/calls": 4,
            "retrieval/unique": 0.8,
            "retrieval/cached": 0.5,
            "retrieval/retries": 4,
            "retrieval/failed_timeout": 2,
            "retrieval/failed_connection": 0,
            "retrieval/failed_status": 0,
            "retrieval/failed_reply": 1,
            "retrieval/failed_other": 0,
            "retrieval/latency_p50": 1.5,
            "retrieval/latency_p95": 2.85,
        }
    )


@pytest.mark.parametrize("max_searches", [0, 3])
def test_retrieval_metrics_without_searches(max_searches):
    metrics = retrieval_metrics(
        torch.tensor([retrieval_facts(RolloutStats(), cached=0, retries=0, max_calls=max_searches)] * 2)
    )
    assert metrics["retrieval/calls"] == metrics["time/search"] == 0
    for name in ("retrieval/unique", "retrieval/cached", "retrieval/latency_p50", "retrieval/latency_p95"):
        assert math.isnan(metrics[name])


def test_the_mean_logprob_excludes_observations():
    turns = [
        Turn(token_ids=[1, 2], logprobs=[-1.0, -2.0], observation_ids=[5, 6, 7]),
        Turn(token_ids=[3], logprobs=[-6.0]),
    ]
    assert mean_logprob(Trajectory(prompt_ids=[], turns=turns)) == -3.0
    turns[1].logprobs = None
    assert math.isnan(mean_logprob(Trajectory(prompt_ids=[], turns=turns)))
    assert math.isnan(mean_logprob(Trajectory(prompt_ids=[])))
