"""Dynamic sampling: groups without a signal are replaced, within bounds, the same in every process and after a resume."""

import json

import pytest
import torch
from datasets import Dataset

from helpers.training import prepared
from tspo_trl.rollout.log import read_rollouts
from tspo_trl.training.rounds import further_questions, replace_groups


def some_questions(trajectories, golden_answers, question, **kwargs):
    """Rollouts of a question whose length is even differ in their outcomes. The others are all wrong."""
    return [float(len(q) % 2 == 0 and i % 4 == 1) for i, q in enumerate(question)]


def questions(count, lengths):
    return Dataset.from_list([{"question": "x" * (10 + lengths(i)), "golden_answers": [str(i)]} for i in range(count)])


def signal(inputs):
    return inputs["advantages"].reshape(len(inputs["advantages"]), -1).ne(0).any(dim=1).view(-1, 4).any(dim=1).tolist()


OPTIONS = {
    "reward_funcs": some_questions,
    "folr_alpha": 0.0,
    "dynamic_sampling": True,
    "per_device_train_batch_size": 16,
}


def test_groups_without_a_signal_are_replaced(make_trainer):
    dataset = questions(64, lambda i: i % 2)
    without, _ = prepared(make_trainer(**{**OPTIONS, "dynamic_sampling": False}, train_dataset=dataset))
    trainer = make_trainer(**OPTIONS, train_dataset=dataset, max_sampling_rounds=20)
    inputs, _ = prepared(trainer)
    assert 0 < sum(signal(without)) < 4
    assert signal(inputs) == [True] * 4
    kept = [i for i, found in enumerate(signal(without)) if found]
    width = without["completion_ids"].size(1)
    for group in kept:  # groups that have a signal stay where they are
        rows = slice(4 * group, 4 * group + 4)
        assert torch.equal(inputs["completion_ids"][rows, :width], without["completion_ids"][rows])
        assert not inputs["completion_mask"][rows, width:].any()
    trained = inputs["completion_mask"] * inputs["tool_mask"]
    assert inputs["num_items_in_batch"] == trained.sum()
    metrics = trainer._metrics["train"]
    assert metrics["sampling/replaced_groups"] == [4 - len(kept)]
    assert metrics["sampling/no_signal"] == [0.0]
    assert metrics["sampling/further_groups"][0] >= 4 - len(kept)
    assert metrics["reward"] == [pytest.approx(len(kept) / 16)]  # of the first round


def test_rounds_are_bounded(make_trainer, tmp_path):
    trainer = make_trainer(**OPTIONS, train_dataset=questions(64, lambda i: 1), max_sampling_rounds=2)
    inputs, _ = prepared(trainer)
    assert signal(inputs) == [False] * 4
    metrics = trainer._metrics["train"]
    assert (metrics["sampling/rounds"], metrics["sampling/further_groups"]) == ([2.0], [8.0])
    records = [json.loads(line) for line in next((tmp_path / "run" / "trajectories").glob("*.jsonl")).open()]
    assert sorted({record["group"] for record in records}) == list(range(12))


def test_rescued_groups_are_kept(make_trainer, dataset):
    dataset = dataset.map(lambda row: {"golden_answers": ["novel"]})  # in some passages
    options = {**OPTIONS, "reward_funcs": lambda trajectories, **kwargs: [0.0] * len(trajectories), "folr_alpha": 0.5}
    trainer = make_trainer(**options, max_sampling_rounds=1, train_dataset=dataset)
    prepared(trainer)
    rescued = trainer._metrics["train"]["groups/rescued"][0]
    assert rescued > 0
    assert trainer._metrics["train"]["sampling/further_groups"] == [4 - 4 * rescued]


def test_a_full_batch_samples_no_further_round(make_trainer):
    trainer = make_trainer(**OPTIONS, train_dataset=questions(64, lambda i: 0))
    prepared(trainer)
    assert trainer._metrics["train"]["sampling/rounds"] == [0.0]


def test_evaluation_does_not_sample_further(make_trainer):
    trainer = make_trainer(**OPTIONS, eval_dataset=questions(4, lambda i: 1), per_device_eval_batch_size=16)
    assert not any(name.startswith("eval_sampling/") for name in trainer.evaluate())


def test_a_resumed_run_samples_the_same(make_trainer, tmp_path):
    dataset = questions(64, lambda i: i % 2)
    options = {**OPTIONS, "train_dataset": dataset, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["lr_scheduler_type"] = "constant"
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    make_trainer(**options, output_dir=whole).train()
    make_trainer(**{**options, "max_steps": 2}, output_dir=resumed).train()
    trainer = make_trainer(**options, output_dir=resumed)
    trainer.train(resume_from_checkpoint=True)
    rollouts = [
        [[turn.token_ids for turn in record["trajectory"].turns] for record in read_rollouts(folder)]
        for folder in (whole, resumed)
    ]
    assert rollouts[0] == rollouts[1]
    assert len(rollouts[0]) > 4 * 16


def test_questions_depend_on_the_step_alone_and_repeat_late():
    options = {"num_generations": 4, "num_processes": 8, "seed": 3}
    first = further_questions(3, 50, **options, step=7, drawn=0)
    assert len(first) == 4  # 16 rollouts on 8 processes
    assert first == further_questions(3, 50, **options, step=7, drawn=0)
    assert first != further_questions(3, 50, **options, step=8, drawn=0)
    drawn = [q for round in range(13) for q in further_questions(4, 50, **options, step=7, drawn=4 * round)]
    assert sorted(drawn[:50]) == list(range(50))


def test_replaced_groups_of_other_widths():
    def batch(advantages, width):
        rows = len(advantages)
        ids = torch.arange(rows * width).view(rows, width) + 1
        return {
            "prompt_ids": ids,
            "prompt_mask": torch.ones_like(ids),
            "completion_ids": ids,
            "completion_mask": torch.ones_like(ids),
            "advantages": torch.tensor(advantages),
            "num_items_in_batch": torch.tensor(5.0),
        }

    rows, further = batch([0.0, 0.0, 1.0, -1.0, 0.0, 0.0], 2), batch([0.0, 0.0, 2.0, -2.0], 3)
    result = replace_groups(rows, further, num_generations=2)
    assert result["advantages"].tolist() == [2.0, -2.0, 1.0, -1.0, 0.0, 0.0]
    assert result["completion_ids"].tolist() == [[7, 8, 9], [10, 11, 12], [5, 6, 0], [7, 8, 0], [9, 10, 0], [11, 12, 0]]
    assert result["prompt_ids"].tolist()[2] == [0, 5, 6]
    assert result["completion_mask"].tolist()[2] == [1, 1, 0]


def test_streams_are_refused(make_trainer):
    stream = questions(64, lambda i: 1).to_iterable_dataset()
    with pytest.raises(ValueError, match="`dynamic_sampling` needs a `train_dataset` with a length"):
        make_trainer(**OPTIONS, train_dataset=stream)
