"""Training steps of tiny models of many architectures, with TRL's loss."""

import pytest
import torch
from peft import LoraConfig

from benchmarks.architectures import ARCHITECTURES, make_model
from helpers.training import assert_logprobs_agree, prepared, prompted_to_search, varied_reward

#: Those whose forward differs most: the others are slow only because they are many
FAST = """cohere2 gemma2 gemma3 gemma4 glm4 gpt_oss granite lfm2 llama mistral nemotron_h olmo3 phi3 qwen3_5 qwen3_moe""".split()
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
CASES = [
    *(
        pytest.param(name, None, marks=() if name in FAST else pytest.mark.exhaustive, id=name)
        for name in ARCHITECTURES
    ),
    *(pytest.param(name, LORA, id=f"{name}, LoRA") for name in ("gpt_oss", "qwen3_5")),
]


@pytest.fixture
def make_run(make_trainer, tokenizer, tmp_path):
    """A function that creates a trainer of an architecture. It trains without the loss of routers, unless asked to."""

    def make(name, protocol="tags", **options):
        folder = tmp_path / name
        if not folder.exists():
            make_model(name, len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        options = {"advantage_level": "turn", "router_aux_loss_coef": 0.0, "max_steps": 1, **options}
        options["reward_funcs"] = varied_reward
        trainer = make_trainer(model=str(folder), protocol=protocol, **options)
        prompted_to_search(trainer)
        return trainer

    return make


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "peft_config"), CASES)
def test_the_compact_forward_has_the_loss_and_the_gradients_of_trl(make_run, name, peft_config):
    whole, compact = (make_run(name, compact_forward=value, peft_config=peft_config) for value in (False, True))
    (expected, trajectories), (inputs, others) = prepared(whole), prepared(compact)
    assert [t.completion_ids for t in trajectories] == [t.completion_ids for t in others]
    assert any(turn.passages for t in trajectories for turn in t.turns)
    for trainer in (whole, compact):
        assert_logprobs_agree(trainer, expected, trajectories)
    assert compact._compact
    (loss, gradient), (compact_loss, compact_gradient) = gradients(whole, expected), gradients(compact, inputs)
    assert compact_loss == pytest.approx(loss, abs=1e-5)
    assert len(gradient) > 10
    scale = max(float(values.abs().max()) for values in gradient.values())
    assert scale > 1e-4
    for parameter, values in gradient.items():
        torch.testing.assert_close(compact_gradient[parameter], values, atol=1e-4 * scale, rtol=1e-3)
    # A step changes the weights
    before = {name: p.detach().clone() for name, p in compact.model.named_parameters()}
    compact.train()
    (entry, *_) = compact.state.log_history
    assert torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all()
    assert entry["grad_norm"] > 0
    changed = {name for name, p in compact.model.named_parameters() if not p.equal(before[name])}
    assert changed <= set(gradient)
    assert len(changed) > 10


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_the_loss_of_routers_is_that_of_trl(make_run, name):
    """It is a mean over all tokens, so the forward is not compact."""
    trainer = make_run(name, router_aux_loss_coef=0.5, compact_forward=True)
    assert not trainer._compact
    inputs, _ = prepared(trainer)
    with_routers, _ = gradients(trainer, inputs)
    trainer.router_aux_loss_coef = trainer.aux_loss_enabled = 0.0
    assert with_routers > gradients(trainer, inputs)[0] + 0.1


def test_a_mixture_of_experts_whose_number_trl_does_not_find_is_refused(make_run):
    with pytest.raises(ValueError, match=r"`GraniteMoeHybridConfig`.*`router_aux_loss_coef=0.0`.*got 0.001"):
        make_run("granitemoehybrid", router_aux_loss_coef=None)


def test_dropout_of_the_configuration_is_reported(make_trainer, policy_dir, caplog):
    make_trainer(model_init_kwargs={"attention_dropout": 0.1})
    assert "dropout (attention_dropout 0.1)" in caplog.text
    assert "`model_init_kwargs={'attention_dropout': 0.0}`" in caplog.text
    caplog.clear()
    make_trainer(model_init_kwargs={"attention_dropout": 0.0})
    assert "dropout" not in caplog.text
