"""Tiny multimodal models with random weights, whose text part is that of `benchmarks.architectures`."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.architectures import make_config

SIZES = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
#: Options of the configuration beside the text part
VISION: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "vision_config": {**SIZES, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    },
    "gemma3": {
        "vision_config": {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "vision_config": {
            **{**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
            "position_embedding_size": 16,
        },
        "audio_config": None,
    },
}


def make_multimodal(name: str, tokenizer: Any) -> Any:
    """A model of the multimodal class of an architecture, for this tokenizer."""
    text = make_config(name, len(tokenizer), pad_token_id=tokenizer.pad_token_id).to_dict()
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, text_config=text, **VISION[name])).float()
