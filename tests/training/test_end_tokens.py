"""Tokenizers whose padding is the end token, and models with several end tokens: the tokens that are trained on."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.training import prepared, prompted_to_search, varied_reward


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_all_sampled_tokens_are_trained_on_and_nothing_else(make_trainer, policy_dir, tokenizer, pad_is_eos):
    tokenizer = copy.deepcopy(tokenizer)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    others = list(range(100, 110))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *others]
    trainer = make_trainer(model=model, processing_class=tokenizer, reward_funcs=varied_reward, temperature=1.5)
    assert trainer.processing_class.pad_token_id == trainer.model.config.pad_token_id == tokenizer.pad_token_id
    prompted_to_search(trainer)
    inputs, trajectories = prepared(trainer)
    ends = {turn.token_ids[-1] for t in trajectories for turn in t.turns}
    assert ends & set(others)
    assert all(
        not set(turn.token_ids[:-1]) & {*others, tokenizer.eos_token_id} for t in trajectories for turn in t.turns
    )
    assert len({len(t.completion_ids) for t in trajectories}) > 1  # so that there is padding
    masks = inputs["completion_mask"] * inputs["tool_mask"]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
    for row, t in enumerate(trajectories):
        length = len(t.completion_ids)
        assert inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1].tolist() == t.prompt_ids
        assert inputs["completion_ids"][row, :length].tolist() == t.completion_ids
        assert masks[row, :length].tolist() == t.loss_mask
        assert not masks[row, length:].any()
        sampled = torch.tensor(t.loss_mask) == 1
        expected = torch.tensor(t.logprobs)[sampled]
        torch.testing.assert_close(logps[row, :length][sampled], expected, atol=1e-4, rtol=0)
