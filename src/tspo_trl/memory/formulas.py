"""The formulas of `tspo_trl.memory`: pure functions of the shape of a model and the settings of training, in bytes."""

from dataclasses import dataclass, fields
from math import inf
from typing import Literal, cast, get_args

from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK_SIZE

from ..rollout.limits import SearchLimits

_Strategy = Literal["single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
_Attention = Literal["sdpa", "flash_attention_2", "eager"]
_Optimizer = Literal["adamw_torch_fused", "adamw_8bit"]
_Dtype = Literal["float32", "bfloat16"]
_Mode = Literal["colocate", "server"]
_CHOICES = {
    "strategy": _Strategy,
    "attn_implementation": _Attention,
    "optim": _Optimizer,
    "dtype": _Dtype,
    "vllm_mode": _Mode,
}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """
    The settings of training that determine memory. Names and defaults are those of [`TSPOConfig`] and
    [`~trl.ModelConfig`].

    Args:
        strategy (`str`, *optional*, defaults to `"single"`):
            `"single"`, `"ddp"`, `"zero2"`, `"zero3"`, `"zero3_offload"` (parameters and optimizer on the host), `"fsdp2"`.
        gpus (`int`, *optional*, defaults to `1`):
            Number of processes.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type that the model is loaded in, `"float32"` or `"bfloat16"`. DeepSpeed ignores it and uses `bf16`.
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            `"adamw_torch_fused"` or `"adamw_8bit"`.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether layers are computed again in the backward pass.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            `"sdpa"`, `"flash_attention_2"` or `"eager"`.
        beta (`float`, *optional*, defaults to `0.0`):
            If it is above 0 and there is no adapter, there is a reference model.
        use_peft, load_in_4bit, use_bnb_nested_quant (`bool`, *optional*, default to `False`):
            LoRA; QLoRA; whether the constants of the quantisation are quantised.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapters.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers with an adapter, or `all-linear`. Defaults to PEFT's choice for the architecture.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Number of rollouts in a forward and backward pass.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Number of these passes in an optimizer step.
        steps_per_generation (`int`, *optional*):
            Number of these passes for each generation. Their rollouts are generated at once. Defaults to
            `gradient_accumulation_steps`.
        num_generations (`int`, *optional*, defaults to `8`):
            Number of rollouts for each question.
        max_prompt_length, max_completion_length (`int`, *optional*, default to `512` and `4096`):
            Number of tokens of the longest prompt, and of the longest completion.
        max_observation_tokens (`int`, *optional*, defaults to `500`):
            Number of tokens of the longest observation, which is read at once for all rollouts.
        cache_implementation (`str`, *optional*):
            If it is set, each turn reads its context again.
        use_vllm, vllm_mode, vllm_gpu_memory_utilization, vllm_enable_sleep_mode, vllm_tensor_parallel_size (*optional*):
            Whether vLLM generates, in the training processes (`"colocate"`) or on a server, and the share of a card that
            it takes: while it generates, and without sleep mode also in training.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Whether ZeRO-3 gathers the whole model for the turns of a rollout.
        gpu_memory (`float`, *optional*, defaults to `80.0`):
            Memory of the card in GiB, for the advice.
    """

    strategy: _Strategy = "single"
    gpus: int = 1
    dtype: _Dtype = "float32"
    bf16: bool = True
    optim: _Optimizer = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    attn_implementation: _Attention = "sdpa"
    beta: float = 0.0
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: list[str] | None = None
    load_in_4bit: bool = False
    use_bnb_nested_quant: bool = False
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    num_generations: int = 8
    max_prompt_length: int = 512
    max_completion_length: int = cast(int, SearchLimits.max_completion_length)
    max_observation_tokens: int = SearchLimits.max_observation_tokens
    cache_implementation: str | None = None
    use_vllm: bool = False
    vllm_mode: _Mode = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_enable_sleep_mode: bool = False
    vllm_tensor_parallel_size: int = 1
    ds3_gather_for_generation: bool = True
    gpu_memory: float = 80.0

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")
        if self.max_completion_length is None:  # in the file of a run
            raise ValueError(
                "`max_completion_length` must be a number here, the longest completion to expect, got None."
            )
        for option in fields(self):
            value = getattr(self, option.name)
            if type(value) is int and value < 1:
                raise ValueError(f"`{option.name}` must be at least 1, got {value}.")
        if not (type(self.gpu_memory) in (int, float) and 0 < self.gpu_memory < inf):
            raise ValueError(f"`gpu_memory` must be a number of GiB above 0, got {self.gpu_memory}.")
        if not (type(self.beta) in (int, float) and 0 <= self.beta < inf):
            raise ValueError(f"`beta` must be a number of at least 0, got {self.beta}.")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"`vllm_gpu_memory_utilization` must be above 0 and at most 1, got {self.vllm_gpu_memory_utilization}."
            )
        if self.strategy == "single" and self.gpus != 1:
            raise ValueError(
                f"`gpus` must be 1 with `strategy` 'single', got {self.gpus}. For several, 'ddp' or 'zero3'."
            )
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("`load_in_4bit` works only with `use_peft`: 4-bit parameters are not trained.")
        if self.load_in_4bit and self.strategy not in ("single", "ddp"):
            raise ValueError(f"`strategy` must be 'single' or 'ddp' with `load_in_4bit`, got {self.strategy!r}.")
        if (rollouts := self.rollouts * self.gpus) % self.num_generations:
            raise ValueError(
                f"`num_generations` must divide the rollouts of a generation, `per_device_train_batch_size` × "
                f"`steps_per_generation` × `gpus` = {rollouts}, got {self.num_generations}."
            )

    @property
    def rollouts(self) -> int:
        """Rollouts that a process generates at once."""
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def vllm_bytes(self) -> float:
        """Bytes of the card that vLLM takes while it generates."""
        colocated = self.use_vllm and self.vllm_mode == "colocate"
        return colocated * self.vllm_gpu_memory_utilization * self.gpu_memory * GIB

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.max_prompt_length + self.max_completion_length


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a model. Parameters are counted on the model, built on the `meta` device."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the experts that a token goes through
    vocab: int
    query_key_norm: bool  # as in Qwen3
    base: int  # parameters without adapters; tied ones count once
    trainable: int
    head: int  # parameters of the LM head
    outside: int  # parameters outside the layers: embeddings, LM head, the last norm
    linear: int  # weights of linear layers but the LM head: what 4-bit quantisation replaces and autocast casts
    largest: int  # the largest of them
    tied: bool  # whether the LM head is the embedding
    adapter_inputs: int  # the sum of the widths that the adapters of one layer read
    movable_cache: bool  # whether the default engine can keep the cache between turns
    windows: bool  # whether some layers have a sliding window, whose cache FlashAttention cannot keep
    cached_layers: int  # layers that hold keys and values: not recurrent layers, and none that share those of others
    states: int  # elements of the states of all recurrent layers, for one rollout


@dataclass(frozen=True)
class Precision:
    """
    Bytes of an element, by its use.

    DeepSpeed trains in bf16 with an fp32 master copy of the trained parameters. FSDP2 keeps trained parameters in
    fp32 and computes in bf16. Otherwise parameters stay as loaded, and AdamW has their type. TRL gives adapters fp32,
    those of a 4-bit model bf16.
    """

    frozen: int
    trained: int
    gradient: int
    compute: int  # what linear layers return, and cached keys and values
    stream: int  # hidden states between layers
    states: float  # of the optimizer, for each trained parameter, the master copy included


def precision(setting: MemorySetting) -> Precision:
    """
    The types of a setting.

    AdamW has m and v, after ZeRO (Rajbhandari et al. 2020, section 3.1): 2 + 2 bytes for parameter and gradient and
    12 for the master copy, m and v. 8-bit AdamW (Dettmers et al. 2022) has one byte and a constant of 4 bytes for each
    256 elements, twice; that small tensors stay in 32 bits is neglected.
    """
    low = 2 if setting.bf16 else 4
    loaded = 2 if setting.dtype == "bfloat16" else 4
    eight_bit = 2 * (1 + 4 / 256) if setting.optim == "adamw_8bit" else None
    if setting.strategy.startswith("zero"):
        return Precision(low, low, low, low, low, 4 + (eight_bit or 8))
    if setting.strategy == "fsdp2":
        trained = 4 if setting.bf16 else loaded
        return Precision(loaded, trained, trained, min(low, loaded), min(low, loaded), eight_bit or 2 * trained)
    trained = 2 if setting.load_in_4bit else 4 if setting.use_peft else loaded
    return Precision(loaded, trained, trained, min(low, loaded), loaded, eight_bit or 2 * trained)


def kv_cache_bytes(shape: ModelShape, batch: int, length: int, itemsize: int) -> int:
    """
    Keys and values of the layers that have some: 2 · layers · kv_heads · head_dim · batch · length · itemsize. The default
    engine keeps all columns of a sliding window too; for other engines this is an upper bound.
    """
    return 2 * shape.cached_layers * shape.kv_heads * shape.head_dim * batch * length * itemsize


def state_bytes(shape: ModelShape, batch: int) -> int:
    """
    States of recurrent layers, which do not grow with the length: those of the batch, and those stored at the ends of turns.
    Counted in fp32, in which most models have them.
    """
    return 2 * shape.states * batch * 4


def attention_bytes(shape: ModelShape, batch: int, length: int, itemsize: int, attention: _Attention) -> int:
    """
    The bytes of one layer that grow with the square of the length.

    FlashAttention: nothing. SDPA of padded batches: the mask, b·s² of `itemsize`. Eager, after Korthikanti et al. 2022
    (section 4.1; 5·a·s²·b there, with dropout): the probabilities of the heads, in fp32 and in the type of compute.
    """
    square = batch * length**2
    if attention == "flash_attention_2":
        return 0
    if attention == "sdpa":
        return square * itemsize
    return square * (itemsize + shape.heads * (4 if itemsize == 4 else 4 + itemsize))


def layer_bytes(shape: ModelShape, batch: int, length: int, types: Precision, attention: _Attention) -> int:
    """
    The bytes that one layer keeps for its backward pass, approximate.

    Korthikanti et al. 2022 (section 4.1) count s·b·h·(34 + 5·a·s/h) bytes for GPT. With RMSNorm, SwiGLU, grouped-query
    attention and no dropout, as `transformers` computes them, a token has, with q = heads · head_dim:

    - each of two norms: its input in fp32, the normalised input in the stream's type, its output: (4 + r + c)·h
    - queries, keys, values (repeated for the heads, unless FlashAttention) and the attention's output: 4·q·c
    - gate, its activation, up, their product: 4·f·c
    - the norms of queries and keys, where there are any: (4 + r)·(q + k)
    - adapters: the dropout's mask and result of what each reads: (1 + c)·width

    With frozen parameters less is kept: an upper bound.
    """
    r, c = types.stream, types.compute
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    repeated = 2 * keys if attention == "flash_attention_2" else 2 * queries
    token = 2 * (4 + r + c) * shape.hidden + (2 * queries + repeated + 4 * shape.intermediate) * c
    token += (4 + r) * (queries + keys) * shape.query_key_norm + (1 + c) * shape.adapter_inputs
    return batch * length * token + attention_bytes(shape, batch, length, c, attention)


def activation_bytes(shape: ModelShape, setting: MemorySetting, types: Precision) -> tuple[int, int]:
    """
    The bytes kept for the backward pass of a micro batch when the LM head is reached, and the bytes that the backward pass
    of a layer adds. Approximate.

    Without gradient checkpointing, all layers are kept; with it, their inputs (full recomputation in Korthikanti et al.
    2022, section 5: 2·s·b·h·L bytes), and a layer is kept while it is computed again. Beside them: the last norm,
    the shared mask of one byte an element, and in the backward pass the gradients of an MLP's and a layer's input.
    """
    batch, length = setting.per_device_train_batch_size, setting.length
    tokens = batch * length
    layer = layer_bytes(shape, batch, length, types, setting.attn_implementation)
    kept = tokens * shape.hidden * (4 + types.stream + types.compute)
    kept += batch * length**2 * (setting.attn_implementation != "flash_attention_2")
    extra = tokens * (shape.intermediate + shape.hidden) * types.compute
    if setting.attn_implementation == "eager":  # the gradient of the scores, in fp32
        extra = max(extra, batch * length**2 * shape.heads * 4)
    extra += shape.largest * types.compute * setting.load_in_4bit  # the matrix that is dequantised
    if setting.gradient_checkpointing:
        return kept + shape.layers * tokens * shape.hidden * types.stream, layer + extra
    return kept + shape.layers * layer, extra


def head_bytes(shape: ModelShape, batch: int, completion: int, types: Precision, *, trained: bool) -> int:
    """
    The bytes of the log-probabilities of a micro batch, in the backward pass.

    TRL computes them in tiles of 4096 tokens × 32768 words, and never has the logits (batch × completion × vocabulary).
    Beside a tile there are the hidden states of the completion, their gradient in fp32, and, if the LM head is trained,
    its gradient in fp32, both copied to their own type at the end. (`trl.kernels.ChunkedLogProbFunction`)
    """
    tokens, c = batch * completion, types.compute
    tile = min(tokens, TOKEN_CHUNK_SIZE) * VOCABULARY_CHUNK_SIZE * c
    hidden = tokens * shape.hidden * (types.stream + _with_cast(types.stream))
    return tile + hidden + shape.head * _with_cast(types.trained) * trained


def _with_cast(itemsize: int) -> int:
    """Bytes of an fp32 element and its copy in a type; in fp32 there is no copy."""
    return 4 if itemsize == 4 else 4 + itemsize


def decoding_bytes(shape: ModelShape, setting: MemorySetting, types: Precision) -> tuple[int, int]:
    """
    The bytes of a generation in addition to parameters and cache: the largest prefill, and the scores of a step.

    The default engine keeps the cache of all rollouts from turn to turn. The first turn reads each prompt once for its
    group, later turns read only observations. A layer is in memory twice while its buffers grow. Without a cache that is
    kept, each turn reads its context again, so the last prefill has almost all tokens of all rollouts. The scores of a
    step are kept as logits and as four fp32 copies (scores, tempered, sorted, probabilities). Approximate.
    """
    batch, length = setting.rollouts, setting.length
    if keeps_cache(shape, setting):
        prompts = -(-batch // setting.num_generations)
        first = prefill_bytes(shape, setting, types, prompts, setting.max_prompt_length, setting.max_prompt_length)
        later = prefill_bytes(shape, setting, types, batch, min(setting.max_observation_tokens, length), length)
        growth = kv_cache_bytes(shape, batch, length, types.compute) // max(1, shape.cached_layers)
        prefill = growth + max(first, later)
    else:
        prefill = prefill_bytes(shape, setting, types, batch, length, length)
    return prefill, batch * shape.vocab * (types.compute + 16)


def keeps_cache(shape: ModelShape, setting: MemorySetting) -> bool:
    """Whether the default engine keeps the key-value cache from turn to turn, so that it reads no context again."""
    masked = setting.attn_implementation != "flash_attention_2" or not shape.windows
    return shape.movable_cache and masked and setting.cache_implementation is None


def vllm_rollouts(shape: ModelShape, setting: MemorySetting) -> int:
    """
    The rollouts of the maximum length whose keys and values fit into vLLM's share of a card, beside its own copy of the
    model, both in two bytes. An upper bound: vLLM's activations are not counted.

    Raises:
        `ValueError`: If the share has no room for the model and one rollout.
    """
    four_bits = 0.5 + 4 / 64
    model = 2 * shape.base - (2 - four_bits) * shape.linear * setting.load_in_4bit
    rollout = kv_cache_bytes(shape, 1, setting.length, 2) + state_bytes(shape, 1)
    parts = setting.vllm_tensor_parallel_size
    if setting.vllm_bytes * parts < model + rollout:
        raise ValueError(
            f"`vllm_gpu_memory_utilization` × `gpu_memory` = {setting.vllm_bytes / GIB:.1f} GiB must hold vLLM's copy of "
            f"the model and a rollout of the maximum length, {(model + rollout) / parts / GIB:.1f} GiB."
        )
    return int((setting.vllm_bytes * parts - model) // rollout)


def prefill_bytes(
    shape: ModelShape, setting: MemorySetting, types: Precision, rows: int, new: int, columns: int
) -> int:
    """
    The bytes of one layer that reads `new` tokens for each row, and attends to `columns` of them. Approximate.

    An MLP has 3·f + 4·h for each new token. An attention has queries and output, 2·q + 2·h, and copies of keys and
    values of all columns: for each head (SDPA with a mask, eager) or without padding (FlashAttention), and, where the
    cache is kept, after the shared prefix. To these add the mask and, in eager attention, the scores.
    """
    c, attention = types.compute, setting.attn_implementation
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tokens = rows * new
    square = 0 if attention == "flash_attention_2" else tokens * columns
    copied = keys if attention == "flash_attention_2" else queries
    copied += keys * (attention == "sdpa" and keeps_cache(shape, setting))
    mlp = tokens * (3 * shape.intermediate + 4 * shape.hidden) * c + square
    attended = tokens * 2 * (queries + shape.hidden) * c + rows * columns * 2 * copied * c + square * (1 + c)
    if attention == "eager":
        attended += square * shape.heads * (8 if c == 4 else 8 + c)
    return max(mlp, attended)
