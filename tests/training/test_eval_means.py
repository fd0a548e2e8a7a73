"""Metrics of an evaluation are over the questions of the set: each counts once, whatever the batches and processes."""

import json
import math
import os
import re
import subprocess
import sys
from statistics import mean, stdev

import pandas as pd
import pytest
import torch
from datasets import Dataset

from helpers.evaluate_on_ranks import as_stream, evaluator, questions
from helpers.paths import HELPERS
from tspo_trl import TSPOTrainer, read_rollouts
from tspo_trl.inspect.load import load_run

#: Metrics of parts of a set: of a batch, of the tokens of a batch, or of the machine.
OF_BATCHES = re.compile(
    r"eval_(\w+_)?(loss|entropy|kl|num_tokens|runtime|\w+_per_second|model_preparation_time"
    r"|(clip_ratio|time|retrieval|sampling)/.*)|epoch"
)


def of_questions(metrics):
    return {name: value for name, value in metrics.items() if not OF_BATCHES.fullmatch(name)}


def rollouts_of(output):
    return list(read_rollouts(output))


def test_a_small_last_batch_counts_no_more_than_its_questions(make_trainer, dataset):
    def first_only(prompts, question, **_):
        return [float(q == dataset[0]["question"]) for q in question]

    trainer = make_trainer(
        eval_dataset=dataset.select(range(3)),
        reward_funcs=first_only,
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(1 / 3)
    assert trainer.evaluate()["eval_rewards/first_only/mean"] == pytest.approx(1 / 3)


def test_metrics_are_those_of_the_logged_rollouts(policy_dir, tmp_path):
    trainer = evaluator(policy_dir, tmp_path / "run", Dataset.from_list(questions(5)), batch=4, generations=2)
    metrics = trainer.evaluate()
    records = rollouts_of(tmp_path / "run")
    assert len(records) == 10
    outcomes = [record["outcome"] for record in records]
    turns = [len(record["trajectory"].turns) for record in records]
    tokens = [sum(record["trajectory"].loss_mask) for record in records]
    groups = [outcomes[i : i + 2] for i in range(0, 10, 2)]
    expected = {
        "eval_reward": mean(outcomes),
        "eval_reward_std": stdev(outcomes),
        "eval_rewards/exact_match_reward/mean": mean(r["rewards"]["exact_match_reward"] for r in records),
        "eval_search/hit": mean(r["first_occurrence"] is not None for r in records),
        "eval_turns/mean": mean(turns),
        "eval_turns/truncated": mean(r["trajectory"].status == "truncated" for r in records),
        "eval_completions/mean_length": mean(tokens),
        "eval_completions/max_length": max(tokens),
        "eval_groups/all_wrong": mean(max(group) < 1 for group in groups),
        "eval_frac_reward_zero_std": mean(max(group) == min(group) for group in groups),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("generations", [1, 2])
def test_in_one_batch_the_metrics_are_those_of_trl(policy_dir, tmp_path, generations):
    """So the mean over questions has the same meaning as TRL's mean over the rollouts of a batch."""
    by_batch = {}

    class Spy(TSPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            by_batch.update({f"eval_{name}": values[0] for name, values in self._metrics["eval"].items()})
            return output

    rows = Dataset.from_list(questions(6))
    whole = evaluator(policy_dir, tmp_path / "whole", rows, batch=12, generations=generations)
    whole.__class__ = Spy
    metrics = of_questions(whole.evaluate())
    expected = {name: None if math.isnan(value) else value for name, value in of_questions(by_batch).items()}
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert {"eval_reward", "eval_rewards/length_reward/std", "eval_completions/min_terminated_length"} <= metrics.keys()
    parts = evaluator(policy_dir, tmp_path / "parts", rows, batch=4, generations=generations)
    assert of_questions(parts.evaluate()) == pytest.approx(metrics, abs=1e-6)


def test_an_evaluation_does_not_count_the_rollouts_of_earlier_ones(policy_dir, tmp_path):
    trainer = evaluator(policy_dir, tmp_path / "run", Dataset.from_list(questions(3)), batch=2)
    first = trainer.evaluate()
    trainer.predict(Dataset.from_list(questions(4, first=3)))
    again = trainer.evaluate()
    assert again["eval_entropy"] == pytest.approx(first["eval_entropy"])
    assert of_questions(again) == pytest.approx(of_questions(first))


def run_on_two_ranks(policy, folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(HELPERS / "evaluate_on_ranks.py"), policy, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (json.loads((folder / f"results_{rank}.json").read_text()) for rank in (0, 1))
    assert first["num_processes"] == 2
    assert of_questions(first["rows"]) == of_questions(second["rows"])
    return first


@pytest.mark.slow
def test_rows_that_fill_the_last_batch_of_several_processes_do_not_count(policy_dir, tmp_path):
    rows = questions(5)  # two processes with batches of 2 evaluate 8 rows, three of them again
    (tmp_path / "two").mkdir()
    two = run_on_two_ranks(policy_dir, tmp_path / "two")
    sets = {"five": Dataset.from_list(rows), "one": Dataset.from_list(rows[:1]), "three": Dataset.from_list(rows[1:4])}
    for name, data, generations in (
        ("rows", Dataset.from_list(rows), 1),
        ("stream", as_stream(rows), 1),
        ("groups", Dataset.from_list(rows), 4),
        ("sets", sets, 2),
    ):
        one = evaluator(policy_dir, tmp_path / "one" / name, data, batch=4, generations=generations).evaluate()
        assert of_questions(two[name]) == pytest.approx(of_questions(one), abs=1e-6), name
        assert len(of_questions(one)) > 25

        # The log has each rollout once, and every group is of one question
        def key(record):
            return record["question"], record["trajectory"].completion_ids, record["outcome"]

        spread, single = (sorted(map(key, rollouts_of(tmp_path / n / name))) for n in ("two", "one"))
        assert spread == single
        for group in load_run(tmp_path / "two" / name).modes["eval"]:
            assert len(group.rollouts) == generations
            assert {record["question"] for record in group.rollouts} == {group.question}

    # The table of `log_completions` has no repeated row either
    (table,) = (tmp_path / "two" / "rows" / "completions").glob("*.parquet")
    prompts = list(pd.read_parquet(table)["prompt"])
    assert len(prompts) == len(set(prompts))
    assert torch.distributed.is_initialized() is False
