"""Layers with sliding windows and recurrent layers keep their cache: rollouts are those of a model that reads them alone."""

from contextlib import nullcontext
from copy import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from helpers.forwards import counted
from helpers.layer_kinds import STATES, WINDOW, WINDOWS, make_tiny
from tspo_trl.engines.static import TransformersEngine

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}
#: Tokens of contexts, some of which are equal. All are longer than a sliding window
LENGTHS = [23, 12, 12, 31, 17, 12, 9]
#: Maximum tokens of a turn, for each turn of each rollout
BUDGETS = [[2, 9, 3, 1, 12, 2, 5], [5, 1, 11, 3, 2, 2, 9], [1, 8, 2, 2, 3, 10, 4]]
#: Tokens of an observation, for each rollout. A rollout without one ends
OBSERVATIONS = [[5, 1, 13, 2, 7, 5, 1], [3, 4, 0, 9, 4, 11, 0]]


#: Their layers are those of `mamba2`, on a CPU without fast kernels
SLOW = ("bamba", "falcon_h1", "granitemoehybrid")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.exhaustive if name in SLOW else ()) for name in (*WINDOWS, *STATES)],
)
def model(request, tokenizer):
    return make_tiny({**WINDOWS, **STATES}[request.param], len(tokenizer))


def make_engine(model, tokenizer, **options):
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(disable_compile=True, **tokens, **options)
    return TransformersEngine(lambda: nullcontext(model), tokenizer, config, ())


def converse(engine, model, tokenizer):
    """Rollouts of several turns: contexts, turns, and the shapes that the model read in each turn."""
    first = [
        torch.randint(10, len(tokenizer), (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in LENGTHS
    ]
    contexts, going, turns, read = dict(enumerate(first)), list(range(len(first))), [], []
    torch.manual_seed(0)
    with engine.session():
        for turn_number, budgets in enumerate(BUDGETS):
            for number in going:
                engine.submit(number, contexts[number], budgets[number])
            with counted(model) as shapes:
                written = dict(engine.collect(wait=True))
            read.append(shapes)
            turns += [(contexts[number], turn) for number, turn in written.items()]
            if turn_number < len(OBSERVATIONS):
                lengths = OBSERVATIONS[turn_number]
                going = [number for number in going if lengths[number]]
                for number in going:
                    observation = [20 + number] * lengths[number]
                    contexts[number] = contexts[number] + written[number].token_ids + observation
    return turns, read


@torch.no_grad()
def test_log_probabilities_are_those_of_a_full_forward(model, tokenizer):
    turns, read = converse(make_engine(model, tokenizer, **SAMPLED), model, tokenizer)
    assert len({tuple(turn.token_ids) for _, turn in turns}) > 12
    for context, turn in turns:
        logits = model(input_ids=torch.tensor([context + turn.token_ids])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)
    # Later turns read what is new: observations, and the last token of a turn
    for shapes, lengths in zip(read[1:], OBSERVATIONS, strict=True):
        assert max(columns for _, columns in shapes) <= max(lengths) + 1


def test_greedy_tokens_are_those_of_generate(model, tokenizer):
    engine = make_engine(model, tokenizer, do_sample=False)
    turns, _ = converse(engine, model, tokenizer)
    assert len(turns) > 15
    for context, turn in turns:
        ids = torch.tensor([context])
        config = copy(engine._generation_config)
        config.max_new_tokens = len(turn.token_ids)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert turn.token_ids == output[0, len(context) :].tolist()


@torch.no_grad()
def test_adapters_and_half_precision_keep_states_too(tokenizer):
    base = make_tiny(STATES["qwen3_5"], len(tokenizer))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    turns, read = converse(make_engine(model, tokenizer, **SAMPLED), base, tokenizer)
    assert max(columns for _, columns in read[1]) <= max(OBSERVATIONS[0]) + 1
    for context, turn in turns:
        logits = model(input_ids=torch.tensor([context + turn.token_ids])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        turns, read = converse(make_engine(base, tokenizer, **SAMPLED), base, tokenizer)
    assert max(columns for _, columns in read[1]) <= max(OBSERVATIONS[0]) + 1


def test_attention_with_a_window_gets_few_columns_while_it_writes(tokenizer):
    model = make_tiny(WINDOWS["mistral"], len(tokenizer))
    engine, columns = make_engine(model, tokenizer, do_sample=False), []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["attention_mask"].shape[-2:]), with_kwargs=True
    )
    with engine.session():
        for _ in range(2):  # the first time, the model is measured too
            columns.clear()
            engine.generate([list(range(20, 60)), list(range(30, 65))], [12, 12])
    hook.remove()
    assert columns[0] == (40, 40)
    assert columns[1:] == [(1, WINDOW)] * 11
