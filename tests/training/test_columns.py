"""Columns that clash with arguments of reward functions, and columns of images."""

import inspect
import re

import pytest
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from tspo_trl.training.datasets import RESERVED

GOOD = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}
PICTURE = "picture.png"


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture(params=["dataset", "stream", "stream with features"])
def make_dataset(request):
    if request.param == "dataset":
        return Dataset.from_list
    if request.param == "stream":
        return streamed
    return lambda rows: Dataset.from_list(rows).to_iterable_dataset()


@pytest.fixture
def unloaded(monkeypatch):
    """A model that must not be loaded."""

    def fail(*_, **__):
        raise AssertionError("the model is loaded before the check")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", fail)


def test_every_name_that_is_passed_to_reward_functions_is_reserved():
    code = inspect.getsource(GRPOTrainer._calculate_rewards)
    passed = {
        *re.findall(r'(?<!row_)reward_kwargs\["(\w+)"\]', code),
        *re.findall(r"\b(\w+)=(?:prompts|completions|\w+_list)\b", code),
    }
    assert {"prompts", "log_extra", "environments"} <= passed
    assert set(RESERVED) == passed | {"trajectory", "trajectories"}


@pytest.mark.parametrize("column", RESERVED)
def test_a_column_with_the_name_of_another_argument_is_refused(make_trainer, unloaded, make_dataset, column):
    rows = [{**GOOD, column: "x"} for _ in range(4)]
    with pytest.raises(ValueError, match=rf"`train_dataset` has columns .*: \['{column}'\]. .*'my_{column}'"):
        make_trainer(train_dataset=make_dataset(rows))


def test_such_a_column_of_an_evaluation_set_is_refused(make_trainer, unloaded, make_dataset, dataset):
    sets = {"good": make_dataset([GOOD]), "bad": make_dataset([{**GOOD, "log_metric": 1, "prompts": "x"}])}
    with pytest.raises(ValueError, match=r"`eval_dataset\['bad'\]` has columns .*: \['log_metric', 'prompts'\]"):
        make_trainer(eval_dataset=sets)


def test_such_a_column_of_a_later_evaluation_is_refused(make_trainer, make_dataset):
    with pytest.raises(ValueError, match=r"`eval_dataset` has columns .*: \['trajectories'\]"):
        make_trainer().evaluate(make_dataset([{**GOOD, "trajectories": 1}]))


def test_the_advice_is_right(make_trainer, dataset):
    seen = []

    def reward(my_completions, **kwargs):
        seen.extend(my_completions)
        return [0.0] * len(my_completions)

    bad = dataset.add_column("completions", [f"text {i}" for i in range(len(dataset))])
    trainer = make_trainer(train_dataset=bad.rename_column("completions", "my_completions"), reward_funcs=reward)
    trainer.train()
    assert len(seen) == 16
    assert set(seen) <= set(bad["completions"])
    make_trainer(train_dataset=bad.remove_columns(["completions"]))


@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_the_trainer_removes_do_not_clash(make_trainer, dataset, stream):
    rows = dataset.add_column("completions", ["text"] * len(dataset))
    trainer = make_trainer(
        train_dataset=rows.to_iterable_dataset() if stream else rows,
        eval_dataset=rows.select(range(2)),
        remove_unused_columns=True,
    )
    trainer.train()
    assert "eval_reward" in trainer.evaluate()


@pytest.mark.parametrize(
    ("column", "empty", "prompt"), [("image", None, "messages"), ("images", [], "text"), ("images", [None], "messages")]
)
def test_empty_columns_of_images_are_left_out(
    make_trainer, make_chat_trainer, make_dataset, dataset, column, empty, prompt
):
    rows = [{"question": row["question"], "golden_answers": row["golden_answers"], column: empty} for row in dataset]
    make = make_trainer if prompt == "text" else make_chat_trainer
    trainer = make(train_dataset=make_dataset(rows), eval_dataset={"a": make_dataset(rows[:2])}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "eval_a_reward" in trainer.evaluate()


@pytest.mark.parametrize(("column", "value"), [("image", PICTURE), ("images", [PICTURE]), ("images", [None, PICTURE])])
def test_images_are_refused_before_the_model_is_loaded(make_trainer, unloaded, make_dataset, column, value):
    message = rf"row 0: '{column}' must be empty, found .*picture.png.*: .*`dataset.remove_columns\('{column}'\)`"
    with pytest.raises(ValueError, match=f"`train_dataset`, {message}"):
        make_trainer(train_dataset=make_dataset([{**GOOD, column: value}] * 4))
    with pytest.raises(ValueError, match=rf"`eval_dataset\['b'\]`, {message}"):
        make_trainer(eval_dataset={"b": make_dataset([{**GOOD, column: value}])})


def test_a_later_row_with_an_image_is_refused(make_trainer, make_dataset, dataset):
    rows = [{**GOOD, "images": []}] * 3 + [{**GOOD, "images": [PICTURE]}]
    with pytest.raises(ValueError, match="`train_dataset`, row 3: 'images' must be empty"):
        make_trainer(train_dataset=make_dataset(rows)).train()


def test_a_prompt_with_an_image_is_refused(make_chat_trainer, make_dataset):
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Who wrote it?"}]
    rows = [{"prompt": [{"role": "user", "content": content}], "golden_answers": ["Jane Austen"]}] * 4
    with pytest.raises(ValueError, match=r"`train_dataset`, row 0: 'prompt' has content of the type \['image'\]"):
        make_chat_trainer(train_dataset=make_dataset(rows)).train()


def test_without_these_columns_nothing_is_removed(make_trainer, dataset):
    trainer = make_trainer(train_dataset=dataset.add_column("image_name", ["x"] * len(dataset)))
    assert set(trainer.train_dataset.column_names) == {*dataset.column_names, "image_name"}


def test_rows_without_a_prompt_can_be_predicted(make_trainer, dataset):
    rows = dataset.select(range(2)).select_columns(["question", "golden_answers"])
    metrics = make_trainer().predict(rows.add_column("images", [[], []])).metrics
    assert metrics["test_loss"] == pytest.approx(0, abs=1e-6)


def test_rows_to_predict_are_checked(make_trainer, dataset):
    trainer = make_trainer(per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="`per_device_eval_batch_size` × processes must be a multiple of"):
        trainer.predict(dataset)
    with pytest.raises(ValueError, match=r"`test_dataset` has columns .*: \['prompts'\]"):
        make_trainer().predict(Dataset.from_list([{**GOOD, "prompts": "x"}]))
    with pytest.raises(TypeError, match="`test_dataset` must be a `Dataset`, got `IterableDataset`"):
        make_trainer().predict(dataset.to_iterable_dataset())
