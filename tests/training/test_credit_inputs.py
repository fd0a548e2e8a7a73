"""Unusual steps and wrong overrides: the credit is defined, with the default guard and with that of chance."""

import math

import pytest
import torch

from helpers.training import prepared
from tspo_trl import TSPOTrainer
from tspo_trl.credit import turn_advantages
from tspo_trl.rollout.log import read_rollouts

GUARDS = pytest.mark.parametrize("guard", ["degenerate", "chance"])
GOLDS = [["novel"], ["writer"], ["city", "town"], ["born"]]  # occur in many passages


def wrong(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def every_second(trajectories, **kwargs):
    return [None if i % 2 else 0.0 for i in range(len(trajectories))]


def second_group_only(trajectories, **kwargs):
    return [None if i < len(trajectories) // 2 else 0.0 for i in range(len(trajectories))]


def no_outcome(trajectories, **kwargs):
    return [None] * len(trajectories)


class Nothing:
    """A retriever that finds nothing."""

    def search(self, queries, k):
        return [[] for _ in queries]


@pytest.fixture
def step(make_trainer, dataset, tmp_path):
    """A function that makes one step, and returns its metrics and the records of its rollouts."""

    def make(guard, golds=GOLDS, **options):
        rows = dataset.map(lambda row, i: {"golden_answers": golds[i % len(golds)]}, with_indices=True)
        options = {"train_dataset": rows, "reward_funcs": wrong, "shuffle_dataset": False, **options}
        trainer = make_trainer(folr_guard=guard, **options)
        inputs, _ = prepared(trainer)
        assert inputs["advantages"].isfinite().all()
        records = list(read_rollouts(tmp_path / "run"))
        assert_advantages_follow(records, trainer.num_generations)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return metrics, records

    return make


def assert_advantages_follow(records, size):
    """The logged advantages are those of the logged turn rewards, outcomes and weights."""
    turns = [len(record["turn_rewards"]) for record in records]
    rewards = torch.full((len(records), max(turns)), math.nan)
    for row, record in zip(rewards, records, strict=True):
        row[: len(record["turn_rewards"])] = torch.tensor(
            [math.nan if r is None else r for r in record["turn_rewards"]]
        )
    outcomes = torch.tensor([math.nan if r["outcome"] is None else r["outcome"] for r in records])
    weights = torch.tensor([record["turn_weight"] for record in records[::size]])
    expected = turn_advantages(rewards, outcomes, num_generations=size, turn_weights=weights)
    for i, record in enumerate(records):
        torch.testing.assert_close(torch.tensor(record["turn_advantages"]), expected[i, : turns[i]], atol=1e-5, rtol=0)


@GUARDS
def test_one_group_in_a_step(step, guard):
    metrics, records = step(guard, per_device_train_batch_size=4)
    assert len(records) == 4
    # There are no other questions yet, so that nothing can be said of chance
    assert {(record["chance"], record["turn_weight"]) for record in records} == {(0.0, 1.0)}
    assert metrics["search/chance"] == 0.0
    assert any(a != 0 for record in records for a in record["turn_advantages"])


@GUARDS
def test_groups_of_two(step, guard):
    metrics, records = step(guard, num_generations=2)
    assert len(records) == 8
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert (first["question"], first["chance"]) == (second["question"], second["chance"])
        for a, b in zip(first["turn_advantages"], second["turn_advantages"], strict=False):
            assert a == pytest.approx(-b, abs=1e-5)  # of turns that both have; a turn that one has alone gets 0
    assert 0 < metrics["search/chance"] < 1
    assert {record["turn_weight"] for record in records} != {1.0} or guard == "degenerate"


@GUARDS
def test_all_golden_answers_are_ineligible(step, guard):
    metrics, records = step(guard, golds=[["yes"], ["no", "!!!"], ["a"], ["noanswer"]])
    assert {record["credited_turn"] for record in records} == {None}
    assert all(a == 0 for record in records for a in record["turn_advantages"])
    assert (metrics["search/hit"], metrics["search/chance"], metrics["groups/no_signal"]) == (0.0, 0.0, 1.0)
    assert {record["turn_weight"] for record in records} == {1.0}
    assert math.isnan(metrics["search/chance_weight"])  # there is no find to weigh; TRL does not log NaN


@GUARDS
def test_no_search_finds_a_passage(step, guard):
    metrics, records = step(guard, retriever=Nothing())
    assert any(turn.retrieval == "empty" for record in records for turn in record["trajectory"].turns)
    assert {(record["first_occurrence"], record["chance"], record["turn_weight"]) for record in records} == {
        (None, 0.0, 1.0)
    }
    assert all(a == 0 for record in records for a in record["turn_advantages"])
    assert metrics["search/hit"] == metrics["search/evidence"] == 0.0


@GUARDS
def test_no_rollout_searches(step, guard):
    metrics, records = step(guard, max_searches=0)
    assert metrics["search/none"] == 1.0
    assert {(record["chance"], record["turn_weight"]) for record in records} == {(0.0, 1.0)}
    assert math.isnan(metrics["search/evidence"])


@GUARDS
@pytest.mark.parametrize(("reward", "scored"), [(every_second, 4), (second_group_only, 4), (no_outcome, 0)])
def test_outcomes_are_missing(step, guard, reward, scored):
    metrics, records = step(guard, reward_funcs=reward)
    missing = [record for record in records if record["outcome"] is None]
    assert len(records) - len(missing) == scored
    assert all(a == 0 for record in missing for a in record["turn_advantages"])
    assert all(0 <= record["turn_weight"] <= 1 for record in records)
    for name in ("search/chance", "search/hit", "groups/no_signal"):
        assert math.isnan(metrics[name]) == (scored == 0), name


class ByTurn(TSPOTrainer):
    """An override with valid credit: the number of the turn."""

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, **kwargs):
        turns = torch.arange(int(num_turns.max())).expand(len(outcomes), -1).float()
        return turns.clone(), turns, torch.ones_like(outcomes, dtype=torch.bool)


@GUARDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r, a, u: (r, a),
            r"must return a tuple of turn rewards of shape \(8, \d\).*; got \[\(8, \d\), \(8, \d\)\]",
        ),
        (lambda r, a, u: (r, a[:, :1], u), r"got \[\(8, \d\), \(8, 1\), \(8,\)\]"),
        (lambda r, a, u: (r, a[:4], u), r"got \[\(8, \d\), \(4, \d\), \(8,\)\]"),
        (lambda r, a, u: (r[:, 0], a, u), r"got \[\(8,\), \(8, \d\), \(8,\)\]"),
        (lambda r, a, u: (r, a, u[:4]), r"rollouts that use them of shape \(8,\)"),
        (lambda r, a, u: (r, a, u[:, None]), r"got \[\(8, \d\), \(8, \d\), \(8, 1\)\]"),
        (lambda r, a, u: (r, a, None), r"got \[\(8, \d\), \(8, \d\), 'NoneType'\]"),
        (lambda r, a, u: (r, a.tolist(), u), r"got \[\(8, \d\), 'list', \(8,\)\]"),
        (lambda r, a, u: [r, a, u], r"must return a tuple of .*; got list\."),
        (lambda r, a, u: a, r"must return a tuple of .*; got \(8, \d\)\."),
        (lambda r, a, u: None, r"must return a tuple of .*; got NoneType\."),
        (lambda r, a, u: (r, a, u.float()), r"must return booleans for the rollouts .*, got torch.float32"),
        (lambda r, a, u: (r, a + torch.nan, u), "NaN or infinite"),
        (lambda r, a, u: (r, a + torch.inf, u), "NaN or infinite"),
    ],
)
def test_wrong_results_of_an_override_are_an_error(make_trainer, guard, change, message):
    class Wrong(ByTurn):
        def compute_turn_advantages(self, *args, **kwargs):
            return change(*super().compute_turn_advantages(*args, **kwargs))

    with pytest.raises(ValueError, match=message):
        prepared(make_trainer(trainer_class=Wrong, folr_guard=guard))
