"""The decode loop: it generates the same turns as `generate`, with fewer and smaller forward passes."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TopPLogitsWarper,
)

import tspo_trl.engines.decoding
from helpers.forwards import counted, without_cache
from tspo_trl.engines.kv_cache import new_cache
from tspo_trl.engines.layers import SPARE, GrowingLayer
from tspo_trl.engines.sampling import _DeterministicSums, deterministic_sums, sample
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.tags import TagProtocol


@pytest.fixture(scope="module")
def policy(policy_dir):
    return AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()


def make_engine(model, tokenizer, **options):
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    stop_strings = options.pop("stop_strings", TagProtocol.stop_strings)
    config = GenerationConfig(**{"do_sample": False, "disable_compile": True, **tokens, **options})
    return TransformersEngine(lambda: nullcontext(model), tokenizer, config, stop_strings)


def generate(model, tokenizer, contexts, budgets, **options):
    engine = make_engine(model, tokenizer, **options)
    with engine.session():
        return engine.generate(contexts, budgets)


def generate_plainly(model, tokenizer, contexts, budgets, **options):
    """The tokens of `generate` of `transformers` with its own loop, each row cut at the end of its turn."""
    engine = make_engine(model, tokenizer, **options)
    width = max(map(len, contexts))
    output = model.generate(
        input_ids=torch.tensor([[tokenizer.pad_token_id] * (width - len(c)) + c for c in contexts]),
        attention_mask=torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts]),
        generation_config=engine._generation_config,
        max_new_tokens=max(budgets),
    )
    turns = []
    for row, budget in zip(output[:, width:].tolist(), budgets, strict=True):
        end = next((n for n in range(1, budget) if engine._stop(row[:n])), budget)
        turns.append(row[:end])
    return turns


def prompts(tokenizer, world, count):
    return [tokenizer(str(q.row()["prompt"]))["input_ids"] for q in world.train_questions[:count]]


@torch.no_grad()
def expected_logprobs(model, context, turn):
    logits = model(input_ids=torch.tensor([context + turn.token_ids])).logits[0, len(context) - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]


def assert_greedy(model, contexts, turns):
    """Each token is the most probable one of a forward pass over the whole sequence, and has its log-probability."""
    for context, turn in zip(contexts, turns, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + turn.token_ids])).logits[0, len(context) - 1 : -1]
        assert turn.token_ids == logits.argmax(dim=-1).tolist()
        torch.testing.assert_close(
            torch.tensor(turn.logprobs), expected_logprobs(model, context, turn), atol=1e-4, rtol=0
        )


OPTIONS = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 9.0)},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    # These leave only the most probable token, so that results can be compared
    "top_k": {"do_sample": True, "top_k": 1},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 1e-6},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 1.0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 1e-4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_equal_those_of_generate(policy, tokenizer, world, name):
    contexts = [*prompts(tokenizer, world, 10), *prompts(tokenizer, world, 4)]
    budgets = [2, 3, 4, 2, 1, 16, 1] * 2
    expected = generate_plainly(policy, tokenizer, contexts, budgets, **OPTIONS[name])
    with counted(policy) as shapes:
        turns = generate(policy, tokenizer, contexts, budgets, **OPTIONS[name])
    assert [turn.token_ids for turn in turns] == expected
    left = "repetition_penalty" not in name  # whose processor identifies rows by their index
    assert (shapes[-1][0] < len(contexts)) == left
    if name != "greedy" and "do_sample" not in OPTIONS[name]:
        assert expected != generate_plainly(policy, tokenizer, contexts, budgets)


def test_equal_contexts_are_read_once(policy, tokenizer, world):
    first, second = prompts(tokenizer, world, 2)
    contexts = [first, second, first, first, second, first]
    with counted(policy) as shapes:
        turns = generate(policy, tokenizer, contexts, [1, 6, 6, 6, 6, 6])
    assert shapes[0] == (2, max(len(first), len(second)))
    assert shapes[1] == (6, 1)
    assert_greedy(policy, contexts, turns)
    assert turns[2] == turns[3] == turns[5]
    assert turns[0].token_ids == turns[2].token_ids[:1]


def test_rollouts_of_a_group_are_sampled_independently(policy, tokenizer, world):
    torch.manual_seed(0)
    contexts = prompts(tokenizer, world, 1) * 16
    turns = generate(policy, tokenizer, contexts, [12] * 16, do_sample=True, temperature=1.0, top_k=0)
    assert len({tuple(turn.token_ids) for turn in turns}) > 8
    for context, turn in zip(contexts, turns, strict=True):
        expected = expected_logprobs(policy, context, turn)
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)


def test_ended_rows_leave_the_batch_when_they_are_half_of_it(policy, tokenizer, world):
    contexts = prompts(tokenizer, world, 8)
    budgets = [3, 3, 3, 9, 3, 9, 3, 3]
    with counted(policy) as shapes:  # only budgets end turns
        turns = generate(policy, tokenizer, contexts, budgets, stop_strings=(), min_new_tokens=9)
    assert [len(turn.token_ids) for turn in turns] == budgets
    assert [rows for rows, _ in shapes] == [8] * 3 + [2] * 6


@pytest.mark.parametrize("name", ["greedy", "repetition_penalty", "sampled"])
def test_rows_that_left_early_continue_from_their_cache(policy, tokenizer, world, name):
    contexts = dict(enumerate(prompts(tokenizer, world, 9)))
    budgets = [2, 14, 3, 1, 14, 2, 7, 2, 3]
    options = OPTIONS.get(name, {"do_sample": True, "temperature": 1.0, "top_k": 0})
    # The pad token is a meaningful token: padding must not count as generated
    options = {**options, "pad_token_id": tokenizer.eos_token_id}
    engine = make_engine(policy, tokenizer, **options)
    torch.manual_seed(0)
    left = 0
    with engine.session():
        for turn_number in range(3):
            for number, context in contexts.items():
                engine.submit(number, context, budgets[number - turn_number])
            with counted(policy) as shapes:
                turns = dict(engine.collect(wait=True))
            assert shapes[0][0] == len(contexts)
            assert turn_number == 0 or shapes[0][1] <= 8  # only observations and the last token of a turn
            left += shapes[-1][0] < len(contexts)
            if name == "sampled":
                for number, turn in turns.items():
                    expected = expected_logprobs(policy, contexts[number], turn)
                    torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)
            else:
                limits = [budgets[number - turn_number] for number in contexts]
                expected = generate_plainly(policy, tokenizer, list(contexts.values()), limits, **options)
                assert [turn.token_ids for turn in turns.values()] == expected
                fresh = generate(policy, tokenizer, list(contexts.values()), limits, **options)
                for turn, other in zip(turns.values(), fresh, strict=True):
                    logprobs = torch.tensor(turn.logprobs), torch.tensor(other.logprobs)
                    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)
            for number, turn in turns.items():
                contexts[number] = contexts[number] + turn.token_ids + [20 + number] * (1 + number % 6)
            del contexts[turn_number]
    assert bool(left) == (name != "repetition_penalty")


def test_sampling_of_a_row_does_not_depend_on_rows_that_left(policy, tokenizer, world, monkeypatch):
    contexts = prompts(tokenizer, world, 12)
    results = []
    for bound in ((), (object,)):
        monkeypatch.setattr(tspo_trl.engines.decoding, "BOUND_TO_ROWS", bound)
        torch.manual_seed(0)
        with counted(policy) as shapes:
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0}
            results.append(generate(policy, tokenizer, contexts, [2, 3, 4, 12] * 3, **options))
        assert (shapes[-1][0] < 12) == (not bound)
    assert [turn.token_ids for turn in results[0]] == [turn.token_ids for turn in results[1]]


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 16},
        {"max_time": 1000.0},
    ],
    ids=str,
)
def test_generate_handles_the_options_that_the_loop_does_not_support(policy, tokenizer, world, options, monkeypatch):
    contexts, budgets = prompts(tokenizer, world, 8), [4, 9] * 4
    expected = generate(policy, tokenizer, contexts, budgets)
    monkeypatch.setattr(tspo_trl.engines.decoding.TurnDecoder, "__call__", None)
    turns = generate(policy, tokenizer, contexts, budgets, **options)
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
    for turn, other in zip(turns, expected, strict=True):
        torch.testing.assert_close(torch.tensor(turn.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


def test_ended_row_does_not_exceed_the_positions_of_the_model(tokenizer, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tspo_trl.engines.decoding, "BOUND_TO_ROWS", (object,))  # so that ended rows stay
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    contexts = [list(range(20, 48)), [20, 21], [30]]
    turns = generate(model, tokenizer, contexts, [4, 30, 30], stop_strings=(), eos_token_id=len(tokenizer) + 1)
    assert [len(turn.token_ids) for turn in turns] == [4, 30, 30]
    assert_greedy(model, contexts, turns)


def test_lora_adapter_is_used(policy_dir, tokenizer, world):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    contexts, budgets = prompts(tokenizer, world, 3) * 2, [3, 12, 12, 12, 12, 12]
    with counted(base) as shapes:
        turns = generate(model, tokenizer, contexts, budgets)
    assert shapes[0][0] == 3
    assert [turn.token_ids for turn in turns] == generate_plainly(model, tokenizer, contexts, budgets)
    with model.disable_adapter():
        assert [turn.token_ids for turn in turns] != generate_plainly(model, tokenizer, contexts, budgets)


def test_prompt_tuning_keeps_no_cache(policy_dir):
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert new_cache(base) is not None
    assert new_cache(get_peft_model(base, tuning)) is None


def test_logprobs_in_bfloat16(policy_dir, tokenizer, world):
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.bfloat16).eval()
    contexts = prompts(tokenizer, world, 6)
    turns = generate(model, tokenizer, contexts, [2, 8] * 3, do_sample=True, temperature=1.0, top_k=0)
    for context, turn in zip(contexts, turns, strict=True):
        expected = expected_logprobs(model, context, turn)
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=0.2, rtol=0)


def test_unused_cache_and_nan_logits_are_errors(policy_dir, tokenizer, world):
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    contexts = prompts(tokenizer, world, 2)
    match = r"does not write into its key-value cache. Is gradient checkpointing on"
    with without_cache(model), pytest.raises(RuntimeError, match=match):
        generate(model, tokenizer, contexts, [4, 4])
    model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(RuntimeError, match="logits are not numbers"):
        generate(model, tokenizer, contexts, [4, 4], do_sample=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_are_sampled_in_proportion_to_their_probabilities(dtype):
    scores = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -30.0, -torch.inf]])
    count = 20_000
    uniform = ((torch.arange(count) + 0.5) / count).to(dtype)
    drawn = sample(scores.expand(count, -1), uniform).bincount(minlength=7) / count
    torch.testing.assert_close(drawn, scores[0].softmax(dim=0), atol=1.0 / count, rtol=0)
    edges = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    least = 5 if dtype == torch.float64 else 4  # the probability of token 5 is 1e-14
    assert sample(scores.expand(2, -1), edges).tolist() == [1, least]


def test_a_token_without_probability_is_never_sampled():
    """As after `top_k`: the random number may fall on the edge of any token, or next to it."""
    torch.manual_seed(0)
    scores = torch.full((1, 4000), -torch.inf)
    kept = torch.randperm(4000)[:40].sort().values
    scores[0, kept] = torch.randn(40)
    edges = scores.softmax(dim=-1).double().cumsum(dim=-1)[0, kept]
    near = torch.cat([edges / edges[-1] * (1 + ulps * 2**-53) for ulps in range(-4, 5)]).clamp(0, 1 - 2**-53)
    tokens = sample(scores.expand(len(near), -1), near)
    assert set(tokens.tolist()) == set(kept.tolist())


def test_cumulative_sums_are_deterministic_when_asked_for():
    torch.manual_seed(0)
    scores = 3 * torch.randn(4, 1000)
    warp = TopPLogitsWarper(0.9)
    with _DeterministicSums():
        kept = warp(None, scores)
        sums = scores.cumsum(dim=0), torch.cumsum(scores, dim=-1, dtype=torch.float64)
        assert torch.arange(5).cumsum(0).tolist() == [0, 1, 3, 6, 10]
    assert torch.equal(kept, warp(None, scores))
    torch.testing.assert_close(sums, (scores.cumsum(dim=0), scores.cumsum(dim=-1, dtype=torch.float64)))
    assert isinstance(deterministic_sums(torch.device("cuda")), nullcontext)
    torch.use_deterministic_algorithms(True)
    try:
        assert isinstance(deterministic_sums(torch.device("cuda")), _DeterministicSums)
        assert isinstance(deterministic_sums(torch.device("cpu")), nullcontext)
    finally:
        torch.use_deterministic_algorithms(False)


def append_and_compare(growing, expected, length, rows=3):
    states = torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4)
    for ours, theirs in zip(growing.update(*states), expected.update(*states), strict=True):
        assert torch.equal(ours, theirs)
    assert growing.get_seq_length() == expected.get_seq_length()


def test_appending_a_token_does_not_copy_earlier_tokens():
    torch.manual_seed(0)
    growing, expected = GrowingLayer(), DynamicCache().layer_class_to_replicate()
    places = []
    for length in (7, *[1] * (SPARE + 3), 5):
        append_and_compare(growing, expected, length)
        places.append(growing.keys.data_ptr())
    assert len(set(places[: SPARE + 1])) == 1
    assert len(set(places)) == 2
    rows = torch.tensor([2, 0, 2])
    growing.batch_select_indices(rows)
    expected.batch_select_indices(rows)
    place = growing.keys.data_ptr()
    append_and_compare(growing, expected, 1)
    assert growing.keys.data_ptr() == place  # selecting rows leaves spare columns too


def columns_of(layer):
    """Number of columns that are allocated."""
    size, heads, _, width = layer.keys.shape
    return layer.keys.untyped_storage().nbytes() // (size * heads * width * layer.keys.itemsize)


def test_a_layer_allocates_what_a_turn_may_need():
    short, long = GrowingLayer(), GrowingLayer()
    expected = DynamicCache().layer_class_to_replicate(), DynamicCache().layer_class_to_replicate()
    short.limit, long.limit = 30 + 19, 2000 + 1999
    sizes = {30 + 19: (short, 30, 20), 2000 + 1999: (long, 2000, 2000)}
    for (limit, (layer, length, budget)), other in zip(sizes.items(), expected, strict=True):
        allocated = set()
        append_and_compare(layer, other, length)
        for _ in range(budget - 1):
            append_and_compare(layer, other, 1)
            allocated.add(columns_of(layer))
            assert columns_of(layer) <= max(1.25 * layer.get_seq_length(), layer.get_seq_length() + SPARE)
        assert max(allocated) == limit
        assert len(allocated) == (1 if layer is short else 4)
        assert layer.get_seq_length() == limit
        append_and_compare(layer, other, 3)  # a later turn


def test_autocast_stores_what_attention_reads():
    layer = GrowingLayer()
    states = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        keys, values = layer.update(*states)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys, states[0].bfloat16())
