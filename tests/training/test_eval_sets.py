"""Evaluation during training on a dict of data sets: every set has its own metrics, and one can select the best model."""

from pathlib import Path
from statistics import mean

import pytest
import torch
from datasets import DatasetDict
from transformers import AutoModelForCausalLM

from tspo_trl import read_rollouts
from tspo_trl.rewards import exact_match_reward

SCRIPT = {"near": [0.0, 0.25, 1.0, 0.5], "far": [0.0, 0.75, 0.125, 0.5]}


def scripted_reward(trajectories, part, trainer_state, **_):
    """In an evaluation, the reward in `SCRIPT` for the set and the step; in training, a reward that varies."""
    return [
        SCRIPT[name][trainer_state.global_step] if name in SCRIPT else (i % 4) / 3
        for i, (_, name) in enumerate(zip(trajectories, part, strict=True))
    ]


def parts(dataset):
    def part(name, rows):
        return dataset.select(rows).map(lambda _: {"part": name})

    return part("train", range(8)), {"near": part("near", range(8, 10)), "far": part("far", range(10, 14))}


def rollouts_of(trainer, mode, questions, step=None):
    rows = read_rollouts(Path(trainer.args.output_dir) / "trajectories" / f"{mode}-rank000.jsonl")
    return [r for r in rows if r["question"] in questions and step in (None, r["step"])]


def test_every_set_has_its_own_metrics(make_trainer, dataset):
    train, sets = parts(dataset)
    trainer = make_trainer(train_dataset=train, eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    trainer.train()
    history = trainer.state.log_history
    evaluations = {name: [e for e in history if f"eval_{name}_reward" in e] for name in sets}
    for name, entries in evaluations.items():
        questions = set(sets[name]["question"])
        assert [e["step"] for e in entries] == [1, 2]
        for entry in entries:
            rollouts = rollouts_of(trainer, "eval", questions, entry["step"])
            assert len(rollouts) == 4 * len(questions)
            # Computed again from the log
            right = mean(r["rewards"]["exact_match_reward"] for r in rollouts)
            found = mean(r["first_occurrence"] is not None for r in rollouts)
            calls = mean(sum(turn.retrieval is not None for turn in r["trajectory"].turns) for r in rollouts)
            for key in ("reward", "em", "rewards/exact_match_reward/mean"):
                assert entry[f"eval_{name}_{key}"] == pytest.approx(right)
            for key in ("hit", "search/hit"):
                assert entry[f"eval_{name}_{key}"] == pytest.approx(found)
            assert entry[f"eval_{name}_search/calls"] == pytest.approx(calls)
            assert {
                f"eval_{name}_loss",
                f"eval_{name}_groups/all_wrong",
                f"eval_{name}_retrieval/searches",
            } <= entry.keys()
            keys = entry.keys() - {"epoch", "step"}
            assert all(key.startswith(f"eval_{name}_") for key in keys), keys
    assert (
        len(trainer.evaluate().keys() & {"eval_near_reward", "eval_far_reward", "eval_near_hit", "eval_far_hit"}) == 4
    )

    steps = [e for e in history if "reward" in e]
    assert len(steps) == 2
    for step, entry in enumerate(steps):
        rollouts = rollouts_of(trainer, "train", set(train["question"]), step)
        assert entry["reward"] == pytest.approx(mean(r["outcome"] for r in rollouts))
        assert entry["search/hit"] == pytest.approx(mean(r["first_occurrence"] is not None for r in rollouts))
        assert not [key for key in entry if key.startswith(("eval", "near", "far")) or key in ("em", "hit")]


def test_metrics_of_a_single_set_have_the_names_of_trl(make_trainer, dataset):
    trainer = make_trainer(eval_dataset=dataset.select(range(4)))
    names = {key.removeprefix("eval_") for key in trainer.evaluate()}
    assert {"reward", "rewards/exact_match_reward/mean", "search/hit", "groups/all_wrong", "loss"} <= names
    assert not names & {"em", "hit"}
    given = trainer.evaluate({"given": dataset.select(range(4, 6))})
    assert {f"eval_given_{name}" for name in (*names, "em", "hit")} >= given.keys() - {"epoch"}
    assert {"eval_given_reward", "eval_given_em", "eval_given_hit"} <= given.keys()


@pytest.mark.parametrize(("metric", "best"), [("eval_near_reward", 2), ("far_reward", 1)])
def test_the_best_model_is_selected_by_the_metric_of_one_set(make_trainer, dataset, tmp_path, metric, best):
    train, sets = parts(dataset)
    trainer = make_trainer(
        train_dataset=train,
        eval_dataset=DatasetDict(sets),
        reward_funcs=[scripted_reward, exact_match_reward],
        reward_weights=[1.0, 0.0],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    for name, rewards in SCRIPT.items():
        logged = [e[f"eval_{name}_reward"] for e in trainer.state.log_history if f"eval_{name}_reward" in e]
        assert logged == pytest.approx(rewards[1:])
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == pytest.approx(SCRIPT["near" if "near" in metric else "far"][best])
    saved = {
        step: AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}").state_dict()
        for step in (1, 2, 3)
    }
    same = [
        step
        for step, weights in saved.items()
        if all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    ]
    assert same == [best]


@pytest.mark.parametrize("metric", ["eval_reward", "loss", "eval_nearer_reward"])
def test_a_metric_that_belongs_to_no_set_is_refused(make_trainer, dataset, metric):
    _, sets = parts(dataset)
    message = rf"`metric_for_best_model` is '{metric}'.*\['eval_near_', 'eval_far_'\].*'eval_near_reward'"
    with pytest.raises(ValueError, match=message):
        make_trainer(eval_dataset=sets, metric_for_best_model=metric)
