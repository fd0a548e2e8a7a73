"""Checks of a trainer's model, tokenizer and batches, which come before anything large is loaded."""

import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tspo_trl import SearchConfig, TSPOTrainer
from tspo_trl.demo import make_tokenizer
from tspo_trl.support.paths import check_model_path, suggest_path


def rows(count):
    return Dataset.from_list([{"question": f"Question {i}?", "golden_answers": [str(i)]} for i in range(count)])


@pytest.fixture
def unloaded(monkeypatch):
    """A model that must not be loaded."""

    def fail(*_, **__):
        raise AssertionError("the model is loaded before the check")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", fail)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, 2), ({"gradient_accumulation_steps": 3}, 6), ({"generation_batch_size": 32}, 8), ({"num_generations": 2}, 4)],
)
def test_a_run_that_would_train_nothing_is_refused(make_trainer, unloaded, streamed, options, needed):
    dataset = rows(needed - 1)
    count = "1 question" if needed == 2 else f"{needed - 1} questions"
    with pytest.raises(
        ValueError, match=f"Nothing would be trained: .* has {count}, but a batch of rollouts needs {needed}"
    ):
        make_trainer(train_dataset=dataset.to_iterable_dataset() if streamed else dataset, **options)


def test_a_stream_needs_a_number_of_steps(make_trainer, unloaded):
    with pytest.raises(ValueError, match="`max_steps` must be at least 1 with a streamed `train_dataset`"):
        make_trainer(train_dataset=rows(4).to_iterable_dataset(), max_steps=-1)


def test_an_evaluation_needs_questions(make_trainer, unloaded):
    with pytest.raises(ValueError, match="`eval_strategy` is 'epoch', but there is no `eval_dataset`"):
        make_trainer(eval_strategy="epoch")


@pytest.mark.parametrize("listed", [False, True])
def test_the_name_of_a_reward_function_is_no_reward_model(make_trainer, unloaded, listed):
    name = "exact_match_reward"
    with pytest.raises(TypeError, match=r"Pass the function: `from tspo_trl.rewards import exact_match_reward`"):
        make_trainer(reward_funcs=[name] if listed else name)


def test_a_model_is_named_by_a_path_too(make_trainer, policy_dir):
    assert make_trainer(model=Path(policy_dir)).model.name_or_path == str(policy_dir)


def test_a_kernel_that_is_not_installed_is_named(make_trainer, unloaded, monkeypatch):
    monkeypatch.setattr("tspo_trl.training.checks.is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        make_trainer(use_liger_kernel=True)


def test_the_smallest_data_set_is_trained(make_trainer):
    trainer = make_trainer(train_dataset=rows(2), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.parametrize(
    ("count", "options", "left"),
    [
        (7, {"max_steps": -1}, 1),
        (7, {"max_steps": 3}, 1),
        (7, {"max_steps": 2}, None),  # less than an epoch
        (8, {"max_steps": -1}, None),
        (7, {"max_steps": 5, "num_iterations": 2}, None),
        (7, {"max_steps": 6, "num_iterations": 2}, 1),
        (11, {"max_steps": -1, "gradient_accumulation_steps": 2}, 3),
    ],
)
def test_questions_left_out_of_an_epoch_are_reported_once(make_trainer, caplog, count, options, left):
    with caplog.at_level(logging.WARNING, "tspo_trl"):
        make_trainer(train_dataset=rows(count), **options)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == (left is not None)
    if said:
        assert f"has {count} questions" in said[0]
        assert f"the last {left} do not fill a batch" in said[0]


@pytest.mark.parametrize("name", ["num_generations", "num_generations_eval"])
def test_batches_of_evaluation_must_hold_whole_groups(make_trainer, unloaded, name):
    group = 4 if name == "num_generations" else 3
    options = {"per_device_eval_batch_size": 6 if name == "num_generations" else 8, name: group}
    with pytest.raises(ValueError, match=f"must be a multiple of `{name}`, got . × 1 = . and {group}"):
        make_trainer(eval_dataset=rows(3), **options)


def test_batches_of_a_later_evaluation_are_checked_too(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="must be a multiple of `num_generations`, got 6 × 1 = 6 and 4"):
        trainer.evaluate(rows(3))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (None, ValueError, "`model` is required"),
        ("./nowhere", FileNotFoundError, "there is no folder './nowhere'"),
        ("FOLDER/chekpoint-1", FileNotFoundError, "no folder '.*chekpoint-1'. Did you mean '.*checkpoint-1'"),
        ("FOLDER", FileNotFoundError, r"has no model \(no config.json\). Its folders \['checkpoint-1'\] have one"),
        ("FOLDER/file", FileNotFoundError, "is a file"),
        ("someone/no-such-model", FileNotFoundError, "'someone/no-such-model' cannot be loaded"),
    ],
)
def test_a_missing_model_is_named(make_trainer, unloaded, tmp_path, model, error, message):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        make_trainer(model=model and model.replace("FOLDER", str(tmp_path)))


def test_a_model_is_required_without_a_configuration_too(dataset, retriever):
    with pytest.raises(ValueError, match="`model` is required"):
        TSPOTrainer(model=None, train_dataset=dataset, retriever=retriever)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
@pytest.mark.parametrize("wrapped", [False, True])
def test_virtual_tokens_are_refused(make_trainer, policy_dir, kind, wrapped):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {"peft_config": config}
    if wrapped:
        options = {"model": get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), config)}
    with pytest.raises(ValueError, match=f"`peft_config` cannot be `{kind.__name__}`: its virtual tokens"):
        make_trainer(**options)


@pytest.mark.parametrize("saved", [False, True])
def test_a_tokenizer_without_an_end_is_refused(make_trainer, unloaded, tmp_path, policy_dir, saved):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    options = {"processing_class": tokenizer}
    if saved:
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
        options = {"model": str(tmp_path / "model")}
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        make_trainer(**options)


def test_a_question_that_is_too_long_names_its_row(make_trainer, dataset):
    longest = make_trainer()._max_context_length()
    long = {"question": "Who wrote Silent Harbor? " * longest, "golden_answers": ["x"]}
    with pytest.raises(ValueError, match="`train_dataset`, row 3: the prompt has"):
        make_trainer(train_dataset=Dataset.from_list([*dataset.select(range(3)), long]).select_columns(list(long)))


def test_a_name_of_two_parts_may_be_on_the_hub(tmp_path, monkeypatch):
    """A folder of the name of the owner does not hide the models of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    check_model_path("runs/other")
    assert suggest_path("runs/min") == " Did you mean 'runs/mine'?"
    assert suggest_path("runs/other") == suggest_path("nowhere/min") == ""
    for path in ("./runs/other", "/runs", "~/runs", "runs/a/b", "other/"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder '{path}'"):
            check_model_path(path)


def test_a_model_of_another_protocol_is_reported(make_trainer, policy_dir, tmp_path, caplog):
    folder = shutil.copytree(policy_dir, tmp_path / "cold")
    SearchConfig(protocol="tags").save(folder)
    make_trainer(model=str(folder))
    assert "does not know its format" not in caplog.text
    SearchConfig(protocol="tool_call").save(folder)
    make_trainer(model=str(folder))
    assert "was trained with `protocol='tool_call'`, and this run has `protocol='tags'`" in caplog.text
