"""Tiny random models whose layers keep different things: all keys and values, those of a sliding window, or states."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

#: Shorter than the contexts of the tests
WINDOW = 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {
    **{"sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2},
    **{"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
}

#: Architectures whose attention is local in some layers: model type and configuration
WINDOWS = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**MIXED, "query_pre_attn_scalar": 8}),
    "gemma2 eager": ("gemma2", {**MIXED, "attn_implementation": "eager"}),
    "gemma3": ("gemma3_text", {**MIXED, "query_pre_attn_scalar": 8}),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4 shared": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}),
    "gpt_oss": ("gpt_oss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("olmo3", MIXED),
    "cohere2": ("cohere2", MIXED),
    "llama4": (
        "llama4_text",
        {
            **{"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW},
            **{"intermediate_size_mlp": 32, "layer_types": ["chunked_attention", "full_attention"]},
        },
    ),
}

LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}

#: Architectures with recurrent layers
STATES = {
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "qwen3_next": (
        "qwen3_next",
        {
            **LINEAR,
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_bias": True, "block_multiple_of": 8}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 16}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "nemotron_h",
        {
            **{"layers_block_type": ["mamba", "moe", "attention", "mamba"], "num_hidden_layers": 4},
            **{"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 16},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1},
            "time_step_min": 1e-9,  # `transformers` applies this minimum when it reads several tokens, not when it reads one
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 16},
    ),
}

#: Architectures that cannot read several tokens from a state
FORGETFUL = {
    "jamba": (
        "jamba",
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
            **{"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts_per_tok": 1},
        },
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4, "expand": 2}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 4, "expand": 2}),
}


def make_tiny(kind: tuple[str, dict], vocab_size: int) -> PreTrainedModel:
    """A random model of an architecture, in float32."""
    model_type, options = kind
    options = dict(options)
    attention = options.pop("attn_implementation", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
