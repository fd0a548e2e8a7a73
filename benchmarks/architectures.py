"""Small models with random weights, of many architectures. Every kind of layer of an architecture is in its model."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

#: Sliding windows have this many tokens, fewer than any context.
WINDOW = 8
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "initializer_range": 0.1,  # chunks of the delta rule enlarge rounding errors
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: The options of each architecture beyond the sizes of `make_config`, by model type.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {**SLIDING, "logit_scale": 0.5},
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    "ernie4_5": {},
    "exaone4": {**SLIDING, "sliding_window_pattern": 2},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma4": {
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
        **{"sliding_window": WINDOW, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 3.0},
        **{"global_head_dim": 16},
    },
    "glm4": {},
    "glm4_moe": {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granitemoehybrid": {
        **{**MAMBA2, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"logits_scaling": 4.0, "shared_intermediate_size": 16},
    },
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
        **{"mamba_dt_rank": 4, "mamba_d_state": 8},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "llama": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "ministral": SLIDING,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        **{**ROUTED, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
        **{"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        **{
            "moe_shared_expert_intermediate_size": 16,
            "initializer_range": 0.1,
        },  # squared ReLUs enlarge rounding errors
    },
    "olmo2": {},
    "olmo3": SLIDING,
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5": DELTA,
    "qwen3_5_moe": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": WINDOW},
}
#: Model types of the text part, where the architecture's own is the multimodal one.
TEXT_TYPES = {name: f"{name}_text" for name in ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe")}


def make_config(architecture: str, vocab_size: int, hidden_size: int = 32, **options: Any) -> PreTrainedConfig:
    """
    Make the configuration of a small model of four layers.

    Args:
        architecture (`str`):
            A key of `ARCHITECTURES`.
        vocab_size (`int`):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to `32`):
            Hidden size, a multiple of 8 (attention heads have an even size).
        options (`Any`):
            Further fields of the configuration.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 8192,
        # Larger than usual, so that the tokens of a small model depend on their contexts
        "initializer_range": 0.2,
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    }
    if architecture == "gemma4":
        sizes["vocab_size_per_layer_input"] = vocab_size
    kind = TEXT_TYPES.get(architecture, architecture)
    return AutoConfig.for_model(kind, **{**sizes, **ARCHITECTURES[architecture], **options})


def make_model(architecture: str, vocab_size: int, seed: int = 0, **options: Any) -> PreTrainedModel:
    """
    Make a small model with random weights.

    Args:
        architecture (`str`):
            A key of `ARCHITECTURES`.
        vocab_size (`int`):
            Number of tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        options (`Any`):
            Further arguments of `make_config`.
    """
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config(architecture, vocab_size, **options)).float()
