"""A prefix that all contexts share is read and stored once, and turns are the same as without sharing."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tspo_trl.engines.shared_prefix
from helpers.forwards import counted, without_cache
from tspo_trl.engines.kv_cache import new_cache
from tspo_trl.engines.shared_prefix import SHORTEST, attend, attending_to, shared_length
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.tags import TagProtocol

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0}
PENALTY = {"do_sample": False, "repetition_penalty": 1.4}
LENGTH = 50


@pytest.fixture(scope="module")
def policy(policy_dir):
    return AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def instructions(tokenizer, world):
    """A text that the policy was trained on, as a prefix."""
    texts = [str(question.row()["prompt"]) for question in world.train_questions[-20:]]
    return tokenizer("".join(texts))["input_ids"][:LENGTH]


@pytest.fixture(scope="module")
def contexts(tokenizer, world, instructions):
    """Nine contexts of several lengths; the first two are equal."""
    questions = [world.train_questions[max(i, 1)] for i in range(9)]
    return [instructions + tokenizer(str(question.row()["prompt"]))["input_ids"] for question in questions]


def make_engine(model, tokenizer, **options):
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(**{"disable_compile": True, **tokens, **options})
    return TransformersEngine(lambda: nullcontext(model), tokenizer, config, TagProtocol.stop_strings)


def converse(engine, contexts):
    """Three turns of rollouts with different budgets and observations. After each turn, one rollout ends."""
    going, turns = dict(enumerate(contexts)), []
    torch.manual_seed(0)
    with engine.session():
        for turn_number in range(3):
            for number, context in going.items():
                engine.submit(number, context, [2, 14, 3, 1, 14, 2, 7, 2, 3][number - turn_number])
            written = dict(engine.collect(wait=True))
            turns.append(written)
            for number, turn in written.items():
                going[number] = going[number] + turn.token_ids + [20 + number] * (1 + number % 6)
            del going[turn_number]
        kept = engine._kept
    return turns, kept


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALTY], ids=["greedy", "sampled", "repetition_penalty"])
def test_turns_with_a_shared_prefix_equal_those_with_whole_contexts(policy, tokenizer, contexts, monkeypatch, options):
    with counted(policy) as shapes:
        turns, kept = converse(make_engine(policy, tokenizer, **options), contexts)
    common = shared_length(policy, contexts)
    assert common >= LENGTH
    longest = max(map(len, contexts))
    assert shapes[0] == (1, common)
    assert shapes[1] == (8, longest - common)  # two contexts are equal
    assert shapes[2] == (9, 1)
    assert sum(columns > 8 for _, columns in shapes) == 2  # contexts are not read again in later turns
    assert {keys.shape[:3:2] for keys, _ in kept.prefix} == {(1, common)}
    most = max(len(ids) for ids in kept.contexts) - common
    assert all(keys.shape[2] <= most + 16 for block in kept.blocks for keys, _ in block.layers)

    monkeypatch.setattr(tspo_trl.engines.shared_prefix, "SHORTEST", 10**6)
    expected, whole = converse(make_engine(policy, tokenizer, **options), contexts)
    assert whole.prefix == []
    assert len({tuple(turn.token_ids) for turn in expected[1].values()}) > 3
    for written, others in zip(turns, expected, strict=True):
        assert written.keys() == others.keys()
        for number, turn in written.items():
            assert turn.token_ids == others[number].token_ids
            torch.testing.assert_close(
                torch.tensor(turn.logprobs), torch.tensor(others[number].logprobs), atol=1e-4, rtol=0
            )


def test_contexts_that_do_not_continue_the_kept_ones_share_a_new_prefix(policy, tokenizer, contexts, instructions):
    engine, fresh = make_engine(policy, tokenizer, **GREEDY), make_engine(policy, tokenizer, **GREEDY)
    others = [ids[5:] for ids in contexts[:4]]
    with engine.session(), fresh.session():
        for batch in (contexts[:4], others):
            for number, context in enumerate(batch):
                engine.submit(number, context, 6)
            turns = [turn for _, turn in engine.collect(wait=True)]
        assert engine._kept.prefix_length == shared_length(policy, others) == shared_length(policy, contexts[:4]) - 5
        expected = fresh.generate(others, [6] * 4)
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_that_to_concatenated_keys(dtype, padded, monkeypatch):
    monkeypatch.setattr(tspo_trl.engines.shared_prefix, "_CHUNK", 500)  # two rows at a time
    torch.manual_seed(0)
    rows, heads, groups, shared, own, size = 5, 6, 2, 40, 7, 16
    query = torch.randn(rows, heads, 1, size, dtype=dtype)
    prefix = torch.randn(2, 1, groups, shared, size, dtype=dtype).unbind()
    key, value = torch.randn(2, rows, groups, own, size, dtype=dtype).unbind()
    mask = torch.arange(own) >= torch.arange(rows)[:, None, None, None] if padded else None
    whole = [
        torch.cat([part.expand(rows, -1, -1, -1), mine], 2) for part, mine in zip(prefix, (key, value), strict=True)
    ]
    whole = [part.repeat_interleave(heads // groups, dim=1).double() for part in whole]
    of_both = None if mask is None else torch.cat([mask.new_ones(rows, 1, 1, shared), mask], dim=-1)
    expected = scaled_dot_product_attention(query.double(), *whole, attn_mask=of_both, scale=0.3)
    hidden = None if mask is None else ~mask
    result = attend(query, prefix, key, value, hidden, 0.3)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), expected.transpose(1, 2), atol=tolerance, rtol=0)


def test_shared_length_leaves_at_least_one_token_of_each_context(policy, contexts):
    short = list(range(SHORTEST))
    assert shared_length(policy, [[*short, 1, 2], [*short, 1, 3], [*short, 1, 2, 4]]) == SHORTEST + 1
    assert shared_length(policy, [[*short, 1], [*short, 1]]) == SHORTEST
    assert shared_length(policy, [short, [*short, 1]]) == 0  # the prefix would be one token shorter than the minimum
    assert shared_length(policy, [[*short, 1]]) == 0
    assert shared_length(policy, [[*short, 1], [9, *short]]) == 0


def test_models_whose_attention_cannot_be_replaced_store_whole_contexts(policy_dir, tokenizer, contexts, monkeypatch):
    eager = AutoModelForCausalLM.from_pretrained(policy_dir, attn_implementation="eager").eval()
    of_its_own = AutoModelForCausalLM.from_pretrained(policy_dir).eval()
    monkeypatch.setattr(type(of_its_own), "_supports_attention_backend", False)
    for model in (eager, of_its_own):
        assert shared_length(model, contexts) == 0
        with counted(model) as shapes, (engine := make_engine(model, tokenizer, **GREEDY)).session():
            engine.generate(contexts, [3] * len(contexts))
        assert shapes[0] == (8, max(map(len, contexts)))


def test_attention_is_restored_after_an_error(policy):
    inside = []

    def fail():
        with attending_to(new_cache(policy), policy):
            inside.append(policy.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [tspo_trl.engines.shared_prefix.NAME]
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not DiffLlamaForCausalLM._supports_attention_backend, reason="needs transformers 5.13 or newer")
def test_models_that_transform_cached_keys_store_whole_contexts(tokenizer, contexts, monkeypatch):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64}
    config = DiffLlamaConfig(**sizes, **heads, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = DiffLlamaForCausalLM(config).eval()
    assert shared_length(model, contexts) >= LENGTH
    turns, kept = converse(make_engine(model, tokenizer, **GREEDY), contexts)
    assert kept.prefix == []
    monkeypatch.setattr(tspo_trl.engines.shared_prefix, "SHORTEST", 10**6)
    expected, _ = converse(make_engine(model, tokenizer, **GREEDY), contexts)
    assert [{n: turn.token_ids for n, turn in t.items()} for t in turns] == [
        {n: turn.token_ids for n, turn in t.items()} for t in expected
    ]


def test_unused_cache_is_an_error(policy_dir, tokenizer, contexts):
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    with without_cache(model), pytest.raises(RuntimeError, match="Is gradient checkpointing on during generation"):
        tokens_of(model, tokenizer, contexts, **GREEDY)


def tokens_of(model, tokenizer, contexts, **options):
    engine = make_engine(model, tokenizer, **options)
    torch.manual_seed(0)
    with engine.session():
        return [turn.token_ids for turn in engine.generate(contexts, [12] * len(contexts))]


@pytest.mark.parametrize("family", ["gpt2", "grouped heads", "dropout", "lora"])
def test_turns_of_other_models_equal_those_without_sharing(policy_dir, tokenizer, contexts, monkeypatch, family):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": None, "bos_token_id": None}
    if family == "gpt2":  # absolute positions
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=2, n_positions=256)).eval()
    elif family == "grouped heads":
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, hidden_size=48, intermediate_size=64)).eval()
    elif family == "dropout":
        model = AutoModelForCausalLM.from_pretrained(policy_dir, attention_dropout=0.1).train()
    else:
        base = AutoModelForCausalLM.from_pretrained(policy_dir)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, lora).eval()
    assert shared_length(model, contexts) >= LENGTH
    turns = tokens_of(model, tokenizer, contexts, **GREEDY)
    assert model.config._attn_implementation == "sdpa"
    if family == "dropout":  # PyTorch draws other numbers for other shapes
        assert turns != tokens_of(model.eval(), tokenizer, contexts, **GREEDY)
        return
    monkeypatch.setattr(tspo_trl.engines.shared_prefix, "SHORTEST", 10**6)
    assert turns == tokens_of(model, tokenizer, contexts, **GREEDY)


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0])
def test_autocast_rounds_no_more_than_pytorch_does(scale):
    """Scores in half precision would be wrong by far more: those of real models are large."""
    torch.manual_seed(0)
    rows, heads, groups, shared, own, size = 6, 4, 2, 200, 40, 32
    query = torch.randn(rows, heads, 1, size) * scale
    prefix = torch.randn(2, 1, groups, shared, size).unbind()
    key, value = torch.randn(2, rows, groups, own, size).unbind()
    whole = [
        torch.cat([part.expand(rows, -1, -1, -1), mine], 2) for part, mine in zip(prefix, (key, value), strict=True)
    ]
    exact = [part.bfloat16().double() for part in (query, *whole)]  # autocast rounds what attention reads
    expected = scaled_dot_product_attention(*exact, enable_gqa=True).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(query, prefix, key, value, None, size**-0.5)
        theirs = scaled_dot_product_attention(query, *whole, enable_gqa=True).transpose(1, 2)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    error, rounding = ((result.double() - expected).abs().mean() for result in (ours, theirs))
    assert error <= rounding
