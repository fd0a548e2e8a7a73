"""QLoRA with the real bitsandbytes, which `make test-quantization` installs."""

from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tspo_trl.rewards import exact_match_reward, format_reward


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: `make test-quantization`")
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about CPUs
def test_an_adapter_of_a_4_bit_model_is_trained_and_resumed(make_trainer, tmp_path):
    def make(folder, **options):
        trainer = make_trainer(
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            output_dir=str(tmp_path / folder),
            max_steps=4,
            lr_scheduler_type="constant",
            reward_funcs=[exact_match_reward, format_reward],
            **options,
        )
        assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
        return trainer

    def weights(trainer, kind):
        return {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if ("lora_" in n) == (kind == "adapter")
        }

    whole = make("whole", save_strategy="steps", save_steps=2)
    base, adapter = weights(whole, "base"), weights(whole, "adapter")
    whole.train()
    assert all(torch.equal(p, base[n]) for n, p in weights(whole, "base").items())
    assert any(not torch.equal(p, adapter[n]) for n, p in weights(whole, "adapter").items())
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, param in weights(resumed, "adapter").items():
        torch.testing.assert_close(param, weights(whole, "adapter")[name], atol=1e-6, rtol=0)
