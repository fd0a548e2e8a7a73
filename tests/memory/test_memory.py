"""Calculated memory, compared with the memory that small models allocate."""

import gc
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import trl.kernels.chunked_logprob as chunked
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config
from trl.trainer import utils

from helpers.layer_kinds import STATES, make_tiny
from helpers.paths import ROOT
from tspo_trl.commands import memory as command
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.memory import estimate as memory
from tspo_trl.memory import formulas
from tspo_trl.memory.estimate import (
    MemorySetting,
    advice,
    estimate,
    levers,
    load_config,
    measure_shape,
    peak,
    precision,
)
from tspo_trl.training.forward import _Head

QWEN_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMALL = {"num_attention_heads": 8, "num_key_value_heads": 2}
MODELS = {
    "llama": LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=3, vocab_size=1000, tie_word_embeddings=False, **SMALL
    ),
    "qwen2": Qwen2Config(
        hidden_size=256, intermediate_size=688, num_hidden_layers=6, vocab_size=4096, tie_word_embeddings=True, **SMALL
    ),
    "qwen3": Qwen3Config(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, vocab_size=4096, head_dim=64, **SMALL
    ),
    "qwen2-30M": Qwen2Config(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=5,
        vocab_size=16384,
        tie_word_embeddings=False,
        **SMALL,
    ),
}
BATCH, PROMPT, COMPLETION = 2, 64, 192


def allocated(function):
    """The peak and the final increase of allocated memory in bytes, and the result of the function."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    now = top = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        top = max(top, now)
    return top, now, result


@pytest.fixture
def fused(monkeypatch):
    """TRL's LM head as on a GPU, where kernels work within a tile and only the completion is scored."""

    def rowwise(fold):
        def run(tile, stride, targets, *rest, **options):
            for i in range(len(tile)):
                row = [x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in rest]
                fold(tile[i : i + 1], stride, targets[i : i + 1], *row, **options)

        return run

    def accumulate(total, left, right):  # on a GPU, matrices are not copied to fp32
        for i in range(0, left.shape[1], 8):
            total.addmm_(left[:, i : i + 8].float(), right[i : i + 8].float())

    monkeypatch.setattr(chunked, "_addmm_fp32", accumulate)
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    monkeypatch.setattr(chunked, "_forward_tile", rowwise(chunked._forward_tile))
    monkeypatch.setattr(chunked, "_backward_tile", rowwise(chunked._backward_tile))


def make(name, dtype="float32", checkpointing=True, attention="sdpa"):
    setting = MemorySetting(
        dtype=dtype,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
        attn_implementation=attention,
        per_device_train_batch_size=BATCH,
        num_generations=2,
        max_prompt_length=PROMPT,
        max_completion_length=COMPLETION,
    )
    config = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    input_ids = torch.randint(5, config.vocab_size, (BATCH, PROMPT + COMPLETION))
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    return model, setting, measure_shape(config, setting), {"input_ids": input_ids, "attention_mask": mask}


def near(measured, calculated, share=0.25):
    print(f"ratio {measured / calculated:.3f}")
    return measured == pytest.approx(calculated, rel=share)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_parameters_gradients_and_optimizer_states_is_exact(name, dtype):
    model, setting, shape, inputs = make(name, dtype)
    step = {k: v["optimizer step"] for k, v in estimate(shape, setting).items()}
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    model(**inputs).logits.float().mean().backward()
    top, _, _ = allocated(optimizer.step)
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert step["parameters"] == sum(p.nbytes for p in parameters)
    assert step["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert step["optimizer states"] == sum(m.nbytes for m in moments)
    assert 0 <= top - step["optimizer states"] <= 64 * len(parameters)  # only the step counters


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_activations(name, checkpointing, dtype, attention):
    model, setting, shape, inputs = make(name, dtype, checkpointing, attention)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as in the later micro batches of a step
    backbone = model.model
    _, kept, loss = allocated(lambda: backbone(**inputs, use_cache=False).last_hidden_state.sum())
    extra, _, _ = allocated(loss.backward)
    types = precision(setting)
    expected, expected_extra = formulas.activation_bytes(shape, setting, types)
    assert near(kept, expected)
    assert near(kept + extra, expected + expected_extra)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_the_lm_head(name, dtype, fused):
    model, setting, shape, inputs = make(name, dtype)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    hidden = torch.randn(*inputs["input_ids"].shape, shape.hidden, dtype=getattr(torch, dtype), requires_grad=True)
    model.base_model.forward = lambda *args, **kwargs: type("Output", (), {"last_hidden_state": hidden})
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100

    def step():
        model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum().backward()

    top, _, _ = allocated(step)
    expected = formulas.head_bytes(shape, BATCH, COMPLETION, precision(setting), trained=True)
    assert near(top, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_a_training_step(name, checkpointing, fused):
    """The peak over forward pass, backward pass and AdamW, with TRL's log-probabilities."""
    model, setting, shape, inputs = make(name, checkpointing=checkpointing)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100

    def step():
        model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum().backward()
        optimizer.step()

    step()  # creates the optimizer states; gradients are kept, as in the later micro batches of a step
    top, _, _ = allocated(step)
    fixed = 16 * sum(p.numel() for p in model.parameters())
    rows = estimate(shape, setting)
    phases = ("loss: LM head", "loss: layers", "optimizer step")
    expected = max(sum(row[p] for row in rows.values()) for p in phases)
    assert near(top + fixed, expected)
    assert near(top, expected - fixed)  # without the part that is exact


@pytest.mark.parametrize("name", ["qwen2", "qwen2-30M"])
def test_memory_of_the_compact_forward_has_an_upper_bound(name, fused):
    """Passages are read, but their hidden states do not reach the head."""
    model, setting, shape, inputs = make(name)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100
    trained = labels != -100
    trained[:, PROMPT + COMPLETION // 4 : PROMPT + 3 * COMPLETION // 4] = False
    compact = _Head(model, model.model, trained)

    def step(forward):
        forward(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum().backward()

    whole, _, _ = allocated(lambda: step(model))
    top, _, _ = allocated(lambda: step(compact))
    rows = estimate(shape, setting)
    activations = [rows["activations"][p] + rows["logits, LM head"][p] for p in ("loss: LM head", "loss: layers")]
    print(f"compact {top / max(activations):.3f}, whole {whole / max(activations):.3f}")
    assert top < whole
    assert top < 1.05 * max(activations)


GROUPS, SIZE, TURN, OBSERVATION = 2, 4, 24, 40


def roll_out(model, tokenizer, setting, cache_implementation=None):
    """Rollouts of the maximum length, by the default engine. Half of them leave early in each turn. Returns the engine."""
    config = GenerationConfig(
        do_sample=True,
        eos_token_id=1,
        suppress_tokens=[1],
        pad_token_id=0,
        disable_compile=True,
        cache_implementation=cache_implementation,
    )
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, ())
    shared = torch.randint(5, 1000, (setting.max_prompt_length - 8,)).tolist()
    prompts = [shared + torch.randint(5, 1000, (8,)).tolist() for _ in range(GROUPS)]
    contexts = [list(prompts[i // SIZE]) for i in range(GROUPS * SIZE)]
    with engine.session():
        while True:
            room = setting.length - max(map(len, contexts))
            for number, context in enumerate(contexts):
                engine.submit(number, context, min(TURN, room) if number % 2 else min(TURN, room) // 2)
            for number, turn in engine.collect(wait=True):
                contexts[number] += turn.token_ids
            width = max(map(len, contexts))
            if width == setting.length:
                return engine._kept
            for context in contexts:
                context += [7] * (width + OBSERVATION - len(context))


def of_rollouts(name, dtype, attention="sdpa", **options):
    model, setting, shape, _ = make(name, dtype, checkpointing=False, attention=attention)
    setting = replace(
        setting,
        per_device_train_batch_size=GROUPS * SIZE,
        num_generations=SIZE,
        max_completion_length=COMPLETION + TURN,
        max_observation_tokens=OBSERVATION + TURN // 2,
        **options,
    )
    rows = estimate(shape, setting)
    expected = sum(row["generation"] for name, row in rows.items() if name not in ("parameters", "optimizer states"))
    return model.eval(), setting, shape, expected


@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    [*((name, dtype, "sdpa") for name in MODELS for dtype in ("float32", "bfloat16")), ("qwen2", "float32", "eager")],
)
def test_memory_of_generation(name, dtype, attention, tokenizer):
    """The peak over all turns, with a cache that is kept between them."""
    model, setting, shape, expected = of_rollouts(name, dtype, attention)
    top, _, kept = allocated(lambda: roll_out(model, tokenizer, setting))
    assert shape.movable_cache
    held = sum(part.untyped_storage().nbytes() for block in kept.blocks for layer in block.layers for part in layer)
    cache = formulas.kv_cache_bytes(shape, setting.rollouts, setting.length, getattr(torch, dtype).itemsize)
    assert held <= 1.02 * cache  # with the padding of the rows that left early
    assert held >= (0.98 if attention == "eager" else 0.8) * cache  # eager attention shares no prefix
    assert near(top, expected)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="before PyTorch 2.9, masked attention on a CPU keeps all scores"
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_memory_of_generation_that_reads_contexts_again(name, tokenizer):
    model, setting, shape, expected = of_rollouts(name, "float32", cache_implementation="dynamic")
    top, _, _ = allocated(lambda: roll_out(model, tokenizer, setting, "dynamic"))
    assert near(top, expected)
    types = precision(setting)
    kept, again = (replace(setting, cache_implementation=option) for option in (None, "dynamic"))
    assert formulas.decoding_bytes(shape, kept, types) < formulas.decoding_bytes(shape, again, types)


def test_models_with_sliding_windows_keep_all_columns(tokenizer):
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1, **SMALL
    )
    shape = measure_shape(config, MemorySetting())
    assert formulas.keeps_cache(shape, MemorySetting())
    assert not formulas.keeps_cache(shape, MemorySetting(cache_implementation="static"))
    flash = MemorySetting(attn_implementation="flash_attention_2")
    assert not formulas.keeps_cache(shape, flash)
    assert formulas.keeps_cache(replace(shape, windows=False), flash)
    assert held_by(AutoModelForCausalLM.from_config(config).eval(), tokenizer) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "mamba2", "falcon_h1", "nemotron_h"])
def test_recurrent_layers_hold_states_of_constant_size(name, tokenizer):
    model = make_tiny(STATES[name], 1000)
    shape = measure_shape(model.config, MemorySetting())
    assert formulas.keeps_cache(shape, MemorySetting())
    assert shape.states > 0
    attention = name != "mamba2"
    assert (shape.cached_layers > 0) == attention
    assert held_by(model, tokenizer) == (1.0 if attention else 0.0, 1.0)


def held_by(model, tokenizer):
    """Keys and values, and states, that rollouts hold after a turn, as shares of what is calculated."""
    config = GenerationConfig(do_sample=False, pad_token_id=0, disable_compile=True)
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, ())
    shape = measure_shape(model.config, MemorySetting())
    with engine.session():
        for number in range(3):
            engine.submit(number, list(range(10 + number, 40 + number)), 5)
        engine.collect(wait=True)
        kept = engine._kept
        columns = [part.nbytes for block in kept.blocks for layer in block.layers for part in layer]
        states = [state.nbytes for block in kept.states for layer in block.layers for state in layer]
    cache, both = formulas.kv_cache_bytes(shape, 3, 34, 4), formulas.state_bytes(shape, 3)
    return sum(columns) / max(1, cache), 2 * sum(states) / max(1, both)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_adapters_has_an_upper_bound(checkpointing):
    """The calculation is an upper bound, because it includes activations that frozen layers do not keep."""
    from peft import LoraConfig, get_peft_model

    model, setting, _, inputs = make("qwen2", checkpointing=checkpointing)
    setting = replace(setting, use_peft=True, lora_r=8)
    shape = measure_shape(MODELS["qwen2"], setting)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.05))
    model.enable_input_require_grads()
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.base == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    backbone = model.base_model.model.model
    _, kept, loss = allocated(lambda: backbone(**inputs, use_cache=False).last_hidden_state.sum())
    extra, _, _ = allocated(loss.backward)
    expected = sum(formulas.activation_bytes(shape, setting, precision(setting)))
    print(f"ratio {(kept + extra) / expected:.3f}")
    assert 0.6 * expected < kept + extra < 1.05 * expected


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen2.5-3b", 3_085_938_688), ("qwen2.5-7b", 7_615_616_512), ("qwen3-4b", 4_022_468_096)],
)
def test_parameters_of_published_models_are_counted_without_allocating_them(name, count):
    config = load_config(str(ROOT / "docs" / "models" / name))
    top, _, shape = allocated(lambda: measure_shape(config, MemorySetting()))
    assert shape.base == shape.trainable == count
    assert top < 2**20


@pytest.fixture(scope="module")
def qwen():
    """The configuration and the shape of Qwen2.5-3B."""
    config = Qwen2Config(**QWEN_3B)
    return config, measure_shape(config, MemorySetting())


def test_zero_states_equal_those_of_the_paper(qwen):
    """Figure 1 of the ZeRO paper: 16.6 GB and 1.9 GB for 7.5B parameters of 2 + 2 + 12 bytes on 64 GPUs."""
    paper = replace(qwen[1], base=7_500_000_000, trainable=7_500_000_000)
    totals = {}
    for strategy in ("zero2", "zero3"):
        setting = MemorySetting(strategy=strategy, gpus=64)
        rows = estimate(paper, setting)
        states = [rows[name]["loss: layers"] for name in ("parameters", "gradients", "optimizer states")]
        totals[strategy] = sum(states) / 1e9
    assert totals == {"zero2": pytest.approx(16.6, abs=0.1), "zero3": pytest.approx(1.9, abs=0.05)}


def test_memory_depends_on_strategies_and_options(qwen):
    _, shape = qwen
    setting = MemorySetting(gpus=8, strategy="ddp", dtype="bfloat16", beta=0.1)
    ddp = estimate(shape, setting)
    assert ddp["reference model"]["generation"] == 2 * shape.base
    assert ddp["buckets, fp32 gradients"]["generation"] == ddp["gradients"]["loss: layers"] == 2 * shape.base
    assert estimate(shape, replace(setting, dtype="float32"))["whole copies of parameters"]["loss: layers"] > 0
    zero3 = estimate(shape, replace(setting, strategy="zero3"))
    assert zero3["whole copies of parameters"]["generation"] == 2 * shape.base
    assert zero3["reference model"]["generation"] == shape.base / 4
    apart = estimate(shape, replace(setting, strategy="zero3", ds3_gather_for_generation=False))
    assert apart["whole copies of parameters"]["generation"] == 2 * memory.LIVE
    offloaded = estimate(shape, replace(setting, strategy="zero3_offload"))
    assert not {"parameters", "gradients", "optimizer states"} & set(offloaded)
    fsdp = estimate(shape, replace(setting, strategy="fsdp2"))
    assert fsdp["optimizer states"]["generation"] == shape.base
    assert fsdp["parameters"]["generation"] == shape.base / 2
    eight_bit = estimate(shape, replace(setting, optim="adamw_8bit"))
    assert eight_bit["optimizer states"]["generation"] == pytest.approx(2.03 * shape.base, rel=0.001)
    flash = estimate(shape, replace(setting, attn_implementation="flash_attention_2"))
    assert peak(flash) < peak(ddp)
    fewer = estimate(shape, replace(setting, gradient_accumulation_steps=4, steps_per_generation=2))
    assert "gradients" in fewer
    assert fewer["gradients"]["generation"] > 0  # generation happens within a step


def test_memory_of_qlora(qwen):
    config, full = qwen
    setting = MemorySetting(dtype="bfloat16", use_peft=True, load_in_4bit=True)
    shape = measure_shape(config, setting)
    rows = estimate(shape, setting)
    rest = shape.base - shape.linear
    expected = 2 * rest + shape.linear * (0.5 + 4 / 64) + 2 * shape.trainable
    assert rows["parameters"]["generation"] == expected
    assert rest == pytest.approx(full.head, rel=0.01)  # embeddings, biases and norms
    assert "reference model" not in estimate(shape, replace(setting, beta=0.1))
    nested = estimate(shape, replace(setting, use_bnb_nested_quant=True))
    assert nested["parameters"]["generation"] < expected
    everything = measure_shape(config, replace(setting, lora_target_modules=["all-linear"]))
    assert everything.trainable > shape.trainable


def test_memory_of_vllm_is_its_share_of_the_card(qwen):
    config, shape = qwen
    setting = MemorySetting(use_vllm=True, vllm_gpu_memory_utilization=0.4, dtype="bfloat16", gpus=8, strategy="zero3")
    rows = estimate(shape, setting)
    assert set(rows["vLLM"].values()) == {0.4 * 80 * 2**30}
    assert "key-value cache" not in rows
    assert rows["activations"]["generation"] == rows["logits, LM head"]["generation"] == 0
    # TRL gathers one parameter at a time, but merges adapters in the whole model
    assert rows["whole copies of parameters"]["generation"] == 2 * shape.head
    with_adapters = replace(setting, use_peft=True)
    adapted = measure_shape(config, with_adapters)
    copies = estimate(adapted, with_adapters)["whole copies of parameters"]["generation"]
    assert copies == 2 * (adapted.base + adapted.trainable)

    asleep = estimate(shape, replace(setting, vllm_enable_sleep_mode=True))["vLLM"]
    assert asleep == {"generation": 0.4 * 80 * 2**30} | dict.fromkeys(memory.PHASES[1:], 0)
    server = estimate(shape, replace(setting, vllm_mode="server"))
    assert not {"vLLM", "key-value cache"} & set(server)


def test_rollouts_that_fit_into_vllm(qwen):
    _, shape = qwen
    setting = MemorySetting(use_vllm=True, gpu_memory=10, vllm_gpu_memory_utilization=0.9)
    rollout = formulas.kv_cache_bytes(shape, 1, 4608, 2)
    count = formulas.vllm_rollouts(shape, setting)
    assert count * rollout <= 9 * 2**30 - 2 * shape.base < (count + 1) * rollout
    # Several processes share one model
    together = formulas.vllm_rollouts(shape, replace(setting, vllm_tensor_parallel_size=2))
    assert together * rollout <= 18 * 2**30 - 2 * shape.base < (together + 1) * rollout
    with pytest.raises(
        ValueError, match=r"`vllm_gpu_memory_utilization` × `gpu_memory` = 4\.0 GiB must hold .* 5\.9 GiB"
    ):
        estimate(shape, replace(setting, vllm_gpu_memory_utilization=0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_gpu_memory_utilization": 1.5}, "`vllm_gpu_memory_utilization` must be above 0 and at most 1, got 1.5"),
        ({"vllm_mode": "remote"}, r"`vllm_mode` must be one of \['colocate', 'server'\], got 'remote'"),
        ({"strategy": "zero5"}, r"`strategy` must be one of \['single', .*got 'zero5'"),
        ({"gpus": 4}, "`gpus` must be 1 with `strategy` 'single', got 4"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, r"`num_generations` must divide .* = 6, got 4"),
        ({"gpu_memory": -3.0}, "`gpu_memory` must be a number of GiB above 0, got -3.0"),
        ({"gpu_memory": float("nan")}, "`gpu_memory` must be a number of GiB above 0, got nan"),
        ({"beta": -1.0}, "`beta` must be a number of at least 0, got -1.0"),
        ({"load_in_4bit": True}, "`load_in_4bit` works only with `use_peft`"),
        ({"max_completion_length": None}, "`max_completion_length` must be a number here, .* got None"),
        (
            {"load_in_4bit": True, "use_peft": True, "strategy": "zero3", "gpus": 2},
            "`strategy` must be .* with `load_in_4bit`, got 'zero3'",
        ),
    ],
)
def test_invalid_settings_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        MemorySetting(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "either `model` or the numbers .* got neither"),
        ({"model": "a", "hidden_size": 8}, r"got 'a' and \['hidden_size'\]"),
        ({"model": "nowhere/at-all"}, "`model` must be a folder .* got 'nowhere/at-all'"),
        ({"model": None, "model_type": "gpt9", "hidden_size": 8}, "`model_type` must be .* got 'gpt9'"),
        ({"model": None, "hiden_size": 8}, r"got \['hiden_size'\]"),
        ({"model": None, "hidden_size": "abc"}, "`hidden_size` must be a whole number of at least 1, got 'abc'"),
        ({"model": None, "vocab_size": 0}, "`vocab_size` must be a whole number of at least 1, got 0"),
        (
            {"model": None, "num_hidden_layers": 2.5},
            "`num_hidden_layers` must be a whole number of at least 1, got 2.5",
        ),
        (
            {"model": None, "hidden_size": 64, "num_attention_heads": 7},
            "(?s)'llama' allows no model with .*multiple of",
        ),
        ({"model": None, "hidden_act": 3}, "'llama' allows no model with {'hidden_act': 3}"),
    ],
)
def test_invalid_models_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_config(**arguments)


@pytest.mark.parametrize("target", ["query", "lm_head"])
def test_unknown_adapter_targets_are_reported(target):
    setting = MemorySetting(use_peft=True, lora_target_modules=["q_proj", target])
    with pytest.raises(ValueError, match=rf"`lora_target_modules` must name .*'q_proj'.* got \['{target}'\]"):
        measure_shape(MODELS["qwen2"], setting)


def test_advice_lowers_the_memory(qwen):
    config, _ = qwen
    setting = MemorySetting(strategy="zero2", gpus=8, dtype="bfloat16")
    assert advice(config, setting) is None
    line = advice(config, replace(setting, gpu_memory=24))
    before, after = (float(x) for x in re.search(r"([\d.]+) → ([\d.]+) GiB", line).groups())
    assert before > after
    assert "gradient_checkpointing" in advice(config, replace(setting, gradient_checkpointing=False, gpu_memory=60))


def test_advice_prefers_the_cheapest_change_that_fits(qwen):
    config, shape = qwen
    setting = MemorySetting(dtype="bfloat16", gradient_accumulation_steps=32)
    flash = "use attn_implementation flash_attention_2"
    shared = f"{flash} (each rollout then stores and reads the common beginning of all prompts)"
    phases = "reduce steps_per_generation to 16 (twice as many generation phases, each about as long)"
    # Fewer rollouts at once save more than FlashAttention, but cost time. They change training less than adapters
    assert shared in advice(config, replace(setting, gpu_memory=90))
    assert phases in advice(config, replace(setting, gpu_memory=80))
    # An engine that shares no prefix loses none
    for options in ({"attn_implementation": "eager"}, {"cache_implementation": "static"}, {"use_vllm": True}):
        texts = {text for _, text, _ in levers(shape, replace(setting, **options))}
        assert flash in texts
        assert (phases in texts) == ("use_vllm" not in options)
    with_vllm = replace(setting, use_vllm=True, vllm_gpu_memory_utilization=0.58, gpu_memory=110)
    assert "turn on vllm_enable_sleep_mode" in advice(config, with_vllm)
    asleep = replace(with_vllm, vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.8)
    assert "reduce vllm_gpu_memory_utilization to 0.4" in advice(config, asleep)


def test_command_prints_the_estimate_and_reports_errors(tmp_path, capsys):
    MODELS["qwen2"].save_pretrained(tmp_path)
    recipe = ROOT / "recipes" / "configs" / "qwen2.5_3b_nq_hotpotqa.yaml"
    memory.main(["--config", str(recipe), "--model", str(tmp_path), "--strategy", "zero3", "--gpus", "8"])
    shown = capsys.readouterr().out
    assert "40 rollouts at once" in shown
    assert "| reference model " in shown
    with pytest.raises(SystemExit) as stop:
        memory.main(["--model", str(tmp_path), "--num_generations", "3"])
    assert stop.value.code == 2
    assert "`num_generations` must divide" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory.main(["--strategy", "zero5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config FILE", "unknown option `num_generation`. Did you mean num_generations?"),
        ("--model MODEL --gpu 8 --strategy ddp", "Unknown option --gpu. Did you mean --gpus?"),
        ("--model MODEL --num-generation 8", "Unknown option --num-generation. Did you mean --num_generations?"),
        ("--model MODEL --hidden_size 8", "either `model` or the numbers"),
        ("--hiden_size 8", "Unknown option --hiden_size. Did you mean --hidden_size?"),
        ("--hidden_size 8 --num_generation 8", "--num_generation. Did you mean --num_generations?"),
        ("--model_type gpt9 --hidden_size 8", "`model_type` must be"),
        ("--hidden_size -5", "`hidden_size` must be a whole number of at least 1, got -5"),
        ("--hidden_size 64 --hidden_act nothing", "can make no model of this configuration of 'llama'. ('nothing')"),
        ("--hidden_size [", "--hidden_size must be a number or another value of YAML, got '['"),
        ("--model ./tinny", "`model`: there is no folder './tinny'."),
        ("--config BROKEN", "broken.yaml"),
    ],
)
def test_unknown_options_are_refused(tmp_path, capsys, arguments, message):
    MODELS["qwen2"].save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text("model_name_or_path: a\nnum_generation: 4\n")
    (tmp_path / "broken.yaml").write_text("num_generations: [4")
    arguments = (
        arguments.replace("BROKEN", str(tmp_path / "broken.yaml"))
        .replace("FILE", str(tmp_path / "run.yaml"))
        .replace("MODEL", str(tmp_path))
    )
    with pytest.raises(SystemExit) as stop:
        command.main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_options_of_a_run_are_accepted(tmp_path, capsys):
    MODELS["qwen2"].save_pretrained(tmp_path)
    for config in (ROOT / "recipes" / "configs").glob("*.yaml"):
        command.main(["--config", str(config), "--model", str(tmp_path), "--per_device_train_batch_size", "40"])
        assert "Peak: " in capsys.readouterr().out
    text = "max_searches: 2\ndataset: a.jsonl\nfolr-alpha: 0.1\ncorpus: b.jsonl\nnum_generations: 4\n"
    (tmp_path / "run.yaml").write_text(f"{text}model: {tmp_path}\n")
    command.main(["--config", str(tmp_path / "run.yaml")])
    assert "8 rollouts at once" in capsys.readouterr().out


def test_tables_of_the_documentation_equal_the_output_of_the_command(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "memory.md").read_text()
    examples = re.findall(r"    (tspo memory [^\n]*)\n\n([\d,]+ parameters.*?Fits [^\n]*)\n", page, re.DOTALL)
    assert len(examples) == page.count("\n## ")
    for example, shown in examples:
        command.main(shlex.split(example)[2:])
        assert capsys.readouterr().out.strip() == shown.strip()


def test_the_module_is_executable():
    command = [sys.executable, "-m", "tspo_trl.memory", "--model_type", "qwen2", "--hidden_size", "64"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Peak: " in result.stdout


@pytest.mark.parametrize(("bf16", "itemsize"), [(False, 4), (True, 2)])
def test_autocast_halves_the_cache(bf16, itemsize):
    _, setting, shape, _ = make("qwen2", "float32", checkpointing=False)
    rows = estimate(shape, replace(setting, bf16=bf16))
    expected = formulas.kv_cache_bytes(shape, setting.rollouts, setting.length, itemsize)
    assert rows["key-value cache"]["generation"] == expected


def test_leaving_rows_copy_one_layer_at_a_time(tokenizer):
    """Rows that leave are copied out of the cache. Their copy and the whole cache are never in memory together."""
    config = Qwen2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=24, vocab_size=1000, head_dim=64, **SMALL
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shape = measure_shape(config, MemorySetting())
    options = {"eos_token_id": 1, "suppress_tokens": [1], "pad_token_id": 0, "disable_compile": True}
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, GenerationConfig(**options), ())
    rows, length, budget = 32, 200, 4
    contexts = torch.randint(5, 1000, (rows, length)).tolist()

    def turn(budgets):
        with engine.session():
            for number, context in enumerate(contexts):
                engine.submit(number, context, budgets[number])
            engine.collect(wait=True)

    together, _, _ = allocated(lambda: turn([budget] * rows))
    apart, _, _ = allocated(lambda: turn([budget] * (rows // 2) + [2] * (rows // 2)))
    cache = formulas.kv_cache_bytes(shape, rows, length + budget - 1, 4)
    assert together > cache
    assert apart < together + cache / 8
