"""A tiny model with the chat template of Qwen2.5, and a trainer of its tool calls."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from helpers.chats import make_chat
from helpers.training import varied_reward


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_chat("qwen2_5")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_chat_trainer(make_trainer, dataset, chat_dir):
    def make(**options):
        return make_trainer(
            **{
                "model": chat_dir,
                "protocol": "tool_call",
                "train_dataset": dataset.select_columns(["question", "golden_answers"]),
                "reward_funcs": varied_reward,
                "advantage_level": "turn",
                "max_completion_length": 400,
                "max_observation_tokens": 80,
                **options,
            }
        )

    return make
