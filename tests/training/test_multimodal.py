"""Checkpoints of multimodal models: their text part is trained, and agents load it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from helpers.multimodal import VISION, make_multimodal
from helpers.training import prompted_to_search, varied_reward
from tspo_trl import SearchAgent
from tspo_trl.training.multimodal import freeze_other_parts

#: The class that is trained: `transformers` reads only the first checkpoint as a model of text
TRAINED = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
}


@pytest.fixture
def checkpoint(tokenizer, tmp_path, request):
    folder = tmp_path / request.param
    make_multimodal(request.param, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(make_trainer):
    def make(folder, **options):
        options = {"reward_funcs": varied_reward, "advantage_level": "turn", "max_steps": 1, **options}
        trainer = make_trainer(model=str(folder), **options)
        prompted_to_search(trainer)
        return trainer

    return make


def trained_parts(trainer):
    """Names of the parameters that got a gradient, by whether they are of the text part."""
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    other = [name for name in trained if "vision" in name or "visual" in name or "projector" in name]
    return [name for name in trained if name not in other], other


@pytest.mark.parametrize("checkpoint", VISION, indirect=True)
def test_the_text_part_is_trained_saved_and_loaded_by_an_agent(checkpoint, make_run, retriever, tokenizer, tmp_path):
    trainer = make_run(checkpoint, ddp_find_unused_parameters=False)
    assert type(trainer.model).__name__ == TRAINED[checkpoint.name]
    text, other = trained_parts(trainer)
    assert len(text) > 30
    assert other == []
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["grad_norm"] > 0
    after = dict(trainer.model.named_parameters())
    assert {name for name in before if not before[name].equal(after[name])} == set(text)

    trainer.save_model(tmp_path / "saved")
    agent = SearchAgent.from_pretrained(tmp_path / "saved", retriever=retriever, max_turn_tokens=8)
    trajectory = agent("Who wrote Silent Harbor?")
    ids = torch.tensor([trajectory.prompt_ids + trajectory.turns[0].token_ids])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits[0, len(trajectory.prompt_ids) - 1 : -1]
    assert logits.argmax(dim=-1).tolist() == trajectory.turns[0].token_ids


@pytest.mark.parametrize("checkpoint", ["qwen3_5"], indirect=True)
def test_the_reference_model_is_the_same_part(checkpoint, make_run):
    trainer = make_run(checkpoint, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1)
    assert type(trainer.ref_model) is type(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("checkpoint", ["qwen3_5"], indirect=True)
def test_the_weights_of_a_text_part_are_loaded_from_a_checkpoint(checkpoint, make_run, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make_run(checkpoint, **save)
    whole.train()
    resumed = make_run(checkpoint, **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("checkpoint", ["qwen3_5", "gemma4"], indirect=True)
def test_an_agent_loads_an_adapter_of_the_text_part_or_of_the_whole_model(
    checkpoint, make_run, retriever, tmp_path, whole
):
    """With vLLM, the whole model is trained, whose weights have other names."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    if whole:
        tuned = get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), lora)
        freeze_other_parts(tuned)
    else:
        tuned = make_run(checkpoint, peft_config=lora).model
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(trained) > 20
    assert not any("vision" in name or "visual" in name for name in trained)
    tuned.save_pretrained(tmp_path / "adapter")
    agent = SearchAgent.from_pretrained(tmp_path / "adapter", retriever=retriever, base_model=checkpoint)
    ids = torch.tensor([[20, 21, 22, 23, 24, 25]])
    with torch.no_grad(), agent.search_loop.engine.session():
        found = agent.search_loop.engine._model(input_ids=ids).logits
        expected = tuned.eval()(input_ids=ids).logits
        with tuned.disable_adapter():
            base = tuned(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert (expected - base).abs().max() > 1e-2
