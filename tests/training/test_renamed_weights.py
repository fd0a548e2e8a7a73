"""Models whose weights are saved under other names than those in memory: a run is resumed with all of its weights."""

import pytest
import torch

from benchmarks.architectures import make_model
from helpers.training import varied_reward
from tspo_trl.training.weights import load_renamed

RENAMED = ["qwen3_moe", "nemotron_h"]  # experts that are saved one by one; other names for all weights
SAVE = {"save_strategy": "steps", "save_steps": 1, "reward_funcs": varied_reward, "router_aux_loss_coef": 0.0}


@pytest.fixture
def make_run(make_trainer, tokenizer, tmp_path):
    def make(name, **options):
        folder = tmp_path / name
        if not folder.exists():
            make_model(name, len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return make_trainer(model=str(folder), **SAVE, **options)

    return make


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("name", RENAMED)
def test_a_resumed_run_equals_one_without_interruption(make_run, tmp_path, name, caplog):
    whole = make_run(name, max_steps=3)
    before = weights(whole)
    whole.train()
    resumed = make_run(name, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "All of them were loaded" in caplog.text
    for ours, theirs, old in zip(weights(resumed), weights(whole), before, strict=True):
        assert not theirs.equal(old)
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", RENAMED)
def test_the_best_model_is_loaded_at_the_end(make_run, dataset, tmp_path, name):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True}
    trainer = make_run(
        name, max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=dataset.select([0, 1]), **best
    )
    trainer.train()
    saved = weights(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer._load_best_model()
    assert all(ours.equal(theirs) for ours, theirs in zip(weights(trainer), saved, strict=True))


def test_a_model_with_the_names_of_its_checkpoint_is_not_loaded_again(tokenizer, tmp_path):
    for name in ("llama", "gemma3"):  # the head of the second is tied to the embeddings
        model = make_model(name, len(tokenizer))
        model.save_pretrained(tmp_path / name)
        assert not load_renamed(model, tmp_path / name)
    assert not load_renamed(model, tmp_path)  # no weights of a model, as in the folder of an adapter
