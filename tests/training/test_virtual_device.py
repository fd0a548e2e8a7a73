"""Whole training steps on virtual CUDA devices: without mix-ups of devices, deterministic, and resumed exactly."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

import tspo_trl.training.generation
import tspo_trl.training.sharding
import tspo_trl.training.turn_credit
from helpers.training import varied_reward
from helpers.virtual_device import VirtualCuda, VirtualTensor

ON_DEVICE = {"use_cpu": False, "bf16": False, "reward_funcs": varied_reward}
SETTINGS = {
    "plain": {"max_steps": 1},
    "kl": {"beta": 0.01, "num_iterations": 2, "steps_per_generation": 2, "gradient_checkpointing": True},
    "bf16": {"bf16": True, "max_steps": 1, "gradient_checkpointing": True},
    "lora": {"bf16": True, "max_steps": 1, "peft_config": LoraConfig(r=4, target_modules="all-linear"), "beta": 0.01},
}


@pytest.fixture
def on_device_only(monkeypatch):
    """Gathers take tensors on a device alone, as NCCL does. Returns the number of gathers in a list."""
    calls = [0]

    def check(gather, place):
        def checked(*args, **kwargs):
            assert isinstance(args[place], VirtualTensor), "gather of a CPU tensor"
            calls[0] += 1
            return gather(*args, **kwargs)

        return checked

    for module in (tspo_trl.training.generation, tspo_trl.training.sharding, tspo_trl.training.turn_credit):
        monkeypatch.setattr(module, "gather", check(module.gather, 0))
    monkeypatch.setattr(Accelerator, "gather", check(Accelerator.gather, 1))
    return calls


def held(trainer):
    """Copies of the trained parameters."""
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_steps(make_trainer, dataset, on_device_only, name):
    with VirtualCuda():
        trainer = make_trainer(**{**ON_DEVICE, **SETTINGS[name]}, eval_dataset=dataset.select(range(4)))
        before = held(trainer)
        trainer.train()
        after = held(trainer)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert all(value.isfinite().all() for value in after.values())
        assert "eval_reward" in trainer.evaluate()
        assert on_device_only[0]


def test_training_with_deterministic_algorithms_only(make_trainer):
    try:
        with VirtualCuda():
            trainer = make_trainer(**ON_DEVICE, full_determinism=True, max_steps=1, top_p=0.9)
            before = held(trainer)
            trainer.train()
            assert torch.are_deterministic_algorithms_enabled()
            assert any(not torch.equal(before[name], value) for name, value in held(trainer).items())
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_on_two_devices_is_resumed_exactly(make_trainer, tmp_path):
    """Rollouts, and dropout on each device, use random numbers of their device."""
    options = {
        **ON_DEVICE,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 3,  # rollouts remain for another step
        "max_steps": 5,
        "model_init_kwargs": {"attention_dropout": 0.1},
        "disable_dropout": False,
    }
    with VirtualCuda(2) as cuda:
        whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
        assert {parameter.device.index for parameter in whole.model.parameters()} == {0, 1}
        whole.train()
        shutil.copytree(tmp_path / "whole", tmp_path / "part")
        shutil.rmtree(tmp_path / "part" / "checkpoint-5", ignore_errors=True)
        for generator in cuda.generators:  # as in a new process
            generator.manual_seed(999)
        part = make_trainer(**options, output_dir=str(tmp_path / "part"))
        part.train(resume_from_checkpoint=True)
        ours, theirs = held(part), held(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
