from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

import tspo_trl.engines.kv_cache
from helpers.batching import SMALL_CACHE
from tspo_trl.engines.continuous import ContinuousBatchingEngine
from tspo_trl.engines.kv_cache import new_cache
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.tags import TagProtocol


@pytest.fixture(scope="module")
def policy(policy_dir):
    return AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()


@pytest.fixture
def make_engine(policy, tokenizer):
    def make(**options):
        opened = []

        @contextmanager
        def model_context():
            opened.append(True)
            yield policy
            opened.append(False)

        config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, disable_compile=True, **options
        )
        engine = TransformersEngine(model_context, tokenizer, config, TagProtocol.stop_strings)
        engine.opened = opened
        return engine

    return make


def prompts(tokenizer, world, count):
    return [tokenizer(str(q.row()["prompt"]))["input_ids"] for q in world.train_questions[:count]]


def logits_of(policy, ids):
    return policy(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def test_greedy_turns_consist_of_the_most_probable_tokens_of_a_full_forward(make_engine, policy, tokenizer, world):
    contexts = prompts(tokenizer, world, 6)
    assert len({len(c) for c in contexts}) > 1  # so that padding matters
    engine = make_engine(do_sample=False)
    with engine.session():
        generations = engine.generate(contexts, [8] * 6)
    for context, generation in zip(contexts, generations, strict=True):
        logits = logits_of(policy, context + generation.token_ids)
        assert logits[len(context) - 1 : -1].argmax(dim=-1).tolist() == generation.token_ids


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_a_full_forward(make_engine, policy, tokenizer, world, temperature):
    torch.manual_seed(0)
    contexts = prompts(tokenizer, world, 8)
    engine = make_engine(do_sample=True, temperature=temperature, top_k=0)
    with engine.session():
        generations = engine.generate(contexts, [12] * 8)
    for context, generation in zip(contexts, generations, strict=True):
        logits = logits_of(policy, context + generation.token_ids)[len(context) - 1 : -1] / temperature
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_turn_ends_at_a_closing_tag_or_at_its_own_budget(make_engine, tokenizer, world):
    torch.manual_seed(0)
    contexts = prompts(tokenizer, world, 16)
    budgets = [1, 2, 3, 12] * 4
    engine = make_engine(do_sample=True, temperature=1.0, top_k=0)
    with engine.session():
        generations = engine.generate(contexts, budgets)
    closed = 0
    for generation, budget in zip(generations, budgets, strict=True):
        text = tokenizer.decode(generation.token_ids)
        stops = sum(text.count(stop) for stop in TagProtocol.stop_strings) + text.count("<eos>")
        assert len(generation.logprobs) == len(generation.token_ids)
        if stops:
            closed += 1
            assert stops == 1
            assert text.endswith((*TagProtocol.stop_strings, "<eos>"))
            assert len(generation.token_ids) <= budget
        else:
            assert len(generation.token_ids) == budget
    assert closed >= 3


def test_stop_string_of_several_tokens_ends_the_turn(policy):
    """Byte-level tokenizers encode tags as several tokens, and the last one may carry more text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<", "/", "search", ">", ">\n", "answer", "x", " ", "\n", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    config = GenerationConfig(eos_token_id=9, pad_token_id=9)
    stop = TransformersEngine(lambda: None, fast, config, TagProtocol.stop_strings)._stop
    ids = {p: i for i, p in enumerate(pieces)}

    def ends(*tokens):
        return [stop([ids[t] for t in tokens[: n + 1]]) for n in range(len(tokens))]

    assert ends("<", "search", ">", "x", "<", "/", "search", ">") == [False] * 7 + [True]
    assert ends("x", "<", "/", "answer", ">\n") == [False] * 4 + [True]
    assert ends("x", ">", "<", "/", "x", ">") == [False] * 6
    assert ends("x", "<eos>") == [False, True]


def test_model_is_opened_once_per_session(make_engine, tokenizer, world):
    engine = make_engine(do_sample=False)
    contexts = prompts(tokenizer, world, 2)
    with engine.session():
        for _ in range(3):
            engine.generate(contexts, [2, 2])
    assert engine.opened == [True, False]
    with pytest.raises(RuntimeError, match="session"):
        engine.generate(contexts, [2, 2])


def test_without_stop_strings_a_turn_ends_with_an_eos_token_or_at_its_budget(policy, tokenizer, world):
    config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, disable_compile=True
    )
    engine = TransformersEngine(lambda: nullcontext(policy), tokenizer, config, ())
    with engine.session():
        generations = engine.generate(prompts(tokenizer, world, 4), [9, 20, 20, 20])
    assert len(generations[0].token_ids) == 9
    for generation in generations[1:]:  # it continues after an action
        assert len(generation.token_ids) == 20 or generation.token_ids[-1] == tokenizer.eos_token_id
        assert any(stop in tokenizer.decode(generation.token_ids[:-1]) for stop in TagProtocol.stop_strings)


@pytest.fixture
def make_continuous(policy, tokenizer):
    def make(model_context=None, **options):
        config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, disable_compile=True, **options
        )
        return ContinuousBatchingEngine(
            model_context or (lambda: nullcontext(policy)),
            tokenizer,
            config,
            ContinuousBatchingConfig(**SMALL_CACHE),
            TagProtocol.stop_strings,
        )

    return make


def collect_all(engine, contexts, budgets):
    """All turns of a session, in the order of the contexts."""
    turns = {}
    with engine.session():
        for number, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
            engine.submit(number, context, budget)
        while len(turns) < len(contexts):
            turns.update(engine.collect(wait=True))
    return [turns[number] for number in range(len(contexts))]


def test_continuous_batching_generates_the_turns_of_static_batching(make_engine, make_continuous, tokenizer, world):
    contexts, budgets = prompts(tokenizer, world, 24), [1, 2, 3, 12] * 6
    static = make_engine(do_sample=False)
    with static.session():
        expected = static.generate(contexts, budgets)
    ours = collect_all(make_continuous(do_sample=False), contexts, budgets)
    assert [turn.token_ids for turn in ours] == [turn.token_ids for turn in expected]
    assert any(tokenizer.decode(turn.token_ids).endswith(TagProtocol.stop_strings) for turn in ours)
    for turn, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.tensor(turn.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


@torch.no_grad()
def test_sampled_logprobs_of_continuous_batching_equal_those_of_a_full_forward(
    make_continuous, policy, tokenizer, world
):
    torch.manual_seed(0)
    contexts = prompts(tokenizer, world, 16)
    turns = collect_all(make_continuous(do_sample=True, temperature=0.7, top_k=0), contexts, [12] * 16)
    assert len({tuple(turn.token_ids) for turn in turns}) > 8
    for context, turn in zip(contexts, turns, strict=True):
        logits = logits_of(policy, context + turn.token_ids)[len(context) - 1 : -1] / 0.7
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)


def fail_in_session(engine, contexts):
    with engine.session():
        for number, context in enumerate(contexts):
            engine.submit(number, context, 40)
        raise KeyError("mine")


def test_continuous_batching_restores_the_model_after_an_error(make_continuous, policy, tokenizer, world):
    engine = make_continuous(do_sample=False)
    attention = policy.config._attn_implementation
    policy.train()
    try:
        with pytest.raises(KeyError, match="mine"):
            fail_in_session(engine, prompts(tokenizer, world, 8))
        assert policy.training
    finally:
        policy.eval()
    assert policy.config._attn_implementation == attention
    (turn,) = collect_all(engine, prompts(tokenizer, world, 1), [12])  # the unfinished turns were dropped
    assert turn.token_ids


def test_error_of_a_too_small_cache_names_the_option(make_continuous, tokenizer, world):
    engine = make_continuous(do_sample=False)
    engine._batching_config.num_blocks = 1
    with pytest.raises(RuntimeError, match="transformers_continuous_batching_config"):
        collect_all(engine, [prompts(tokenizer, world, 1)[0] * 4] * 4, [40] * 4)


def test_submit_outside_a_session_is_an_error(make_continuous):
    with pytest.raises(RuntimeError, match="session"):
        make_continuous().submit(0, [1], 1)


def converse(engine, contexts, observations, budgets):
    """The turns of several rounds. Before each round but the first, some rollouts receive an observation and continue."""
    turns = {number: [] for number in range(len(contexts))}
    contexts = [list(context) for context in contexts]
    going = list(turns)
    with engine.session():
        for turn_number, budget in enumerate(budgets):
            if turn_number:
                observation = observations[turn_number - 1]
                going = [number for number in going if observation(number)]
                for number in going:
                    contexts[number] += turns[number][-1].token_ids + observation(number)
            for number in going:
                engine.submit(number, contexts[number], budget + number % 3)
            for number, turn in engine.collect(wait=True):
                turns[number].append(turn)
    return turns


#: Observations of different lengths. A rollout with an empty one ends
OBSERVATIONS = [lambda n: [20 + n] * (1 + n % 5), lambda n: [40 + n] * (7 - n % 6) if n % 3 else [], lambda n: [60]]


@pytest.mark.parametrize("sampled", [False, True])
def test_kept_cache_avoids_reading_contexts_again_without_changing_turns(
    make_engine, policy, tokenizer, world, sampled
):
    contexts = prompts(tokenizer, world, 12)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sampled else {"do_sample": False}
    results, read = [], []
    for keeps in (True, False):
        engine = make_engine(**options)
        if not keeps:
            engine._generate_round = lambda numbers, *turns, engine=engine: engine.generate(*turns)
        sizes = []
        hook = policy.model.register_forward_pre_hook(
            lambda *args, sizes=sizes: sizes.append(args[-1]["input_ids"].shape[1]), with_kwargs=True
        )
        torch.manual_seed(0)
        results.append(converse(engine, contexts, OBSERVATIONS, [6, 6, 3, 9]))
        hook.remove()
        read.append([size for size in sizes if size > 1])
    ours, expected = results
    for number, turns in expected.items():
        assert [turn.token_ids for turn in ours[number]] == [turn.token_ids for turn in turns]
        for turn, other in zip(ours[number], turns, strict=True):
            torch.testing.assert_close(torch.tensor(turn.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
    assert {len(turns) for turns in ours.values()} == {2, 4}
    assert read[0][0] == read[1][0] == max(map(len, contexts))
    assert max(read[0][1:]) <= 8  # an observation and the last token of a turn
    assert min(read[1][1:]) > 20


def test_context_that_does_not_continue_the_kept_one_is_read_completely(make_engine, policy, tokenizer, world):
    first, second = prompts(tokenizer, world, 2)
    engine, fresh = make_engine(do_sample=False), make_engine(do_sample=False)
    with engine.session(), fresh.session():
        engine.submit(0, first, 4)
        engine.collect(wait=True)
        engine.submit(0, [*second, 30], 6)
        ((_, turn),) = engine.collect(wait=True)
        (expected,) = fresh.generate([[*second, 30]], [6])
    assert turn.token_ids == expected.token_ids


def test_model_whose_cache_cannot_be_kept_reads_whole_contexts_and_says_so_once(tokenizer, world, monkeypatch, caplog):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    assert new_cache(model) is not None
    monkeypatch.setattr(tspo_trl.engines.kv_cache, "SUPPORTED", ("eager",))
    assert new_cache(model) is None
    generation = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, disable_compile=True
    )
    contexts = prompts(tokenizer, world, 6)
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, generation, TagProtocol.stop_strings)
    turns = converse(engine, contexts, OBSERVATIONS, [6, 6, 3, 9])
    for number, context in enumerate(contexts):
        ids = list(context)
        for turn, observation in zip(turns[number], OBSERVATIONS, strict=False):
            with torch.no_grad():
                logits = logits_of(model, ids + turn.token_ids)
            assert logits[len(ids) - 1 : -1].argmax(dim=-1).tolist() == turn.token_ids
            ids += turn.token_ids + observation(number)
    (record,) = [record for record in caplog.records if "not kept" in record.message]
    assert "attention of the type sdpa takes no masks for sliding windows; eager do" in record.message
