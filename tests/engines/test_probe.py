"""Models that cannot continue from a kept cache are found by measuring. Their contexts are read from the beginning."""

from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.mistral import modeling_mistral

from helpers.forwards import counted, without_cache
from helpers.layer_kinds import FORGETFUL, STATES, WINDOWS, make_tiny
from tspo_trl.engines.probe import why_inexact
from tspo_trl.engines.static import TransformersEngine


def make_engine(model, tokenizer, config=None):
    config = config or GenerationConfig(do_sample=False, pad_token_id=0, disable_compile=True)
    return TransformersEngine(lambda: nullcontext(model), tokenizer, config, ())


def reason(model, tokenizer):
    return why_inexact(model, lambda config: make_engine(model, tokenizer, config))


def read_twice(engine):
    """Generate two turns of two rollouts, with an observation between them."""
    contexts = {0: list(range(20, 40)), 1: list(range(60, 72))}
    with engine.session():
        for _ in range(2):
            for number, context in contexts.items():
                engine.submit(number, context, 3)
            turns = dict(engine.collect(wait=True))
            before = dict(contexts)
            contexts = {number: contexts[number] + turn.token_ids + [5, 6] for number, turn in turns.items()}
    return before, turns


@torch.no_grad()
@pytest.mark.parametrize("name", FORGETFUL)
def test_models_that_forget_their_states_read_contexts_again_and_say_so(name, tokenizer, caplog):
    model = make_tiny(FORGETFUL[name], len(tokenizer))
    engine = make_engine(model, tokenizer)
    with counted(model) as shapes:
        contexts, turns = read_twice(engine)
        read_twice(engine)
    assert shapes.count((2, max(map(len, contexts.values())))) == 2
    (record,) = [record for record in caplog.records if "not kept" in record.message]
    assert "several tokens" in record.message if name == "jamba" else "the model fails with it" in record.message
    for number, context in contexts.items():  # as exact as without a cache
        ids = torch.tensor([context + turns[number].token_ids])
        logprobs = model(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
        expected = logprobs.gather(1, ids[0, len(context) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turns[number].logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "mamba2", "jamba"])
def test_half_precision_does_not_look_like_forgetting(name, scale, tokenizer):
    model_type, options = {**STATES, **FORGETFUL}[name]
    model = make_tiny((model_type, {**options, "initializer_range": scale}), len(tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        assert (reason(model, tokenizer) is None) == (name != "jamba")


def test_a_model_is_measured_once_without_a_trace(tokenizer):
    model = make_tiny(STATES["qwen3_5"], len(tokenizer)).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    own = model.generation_config
    torch.manual_seed(0)
    with counted(model) as shapes:
        assert reason(model, tokenizer) is None
        read = len(shapes)
        assert read > 8
        assert reason(model, tokenizer) is None
    assert len(shapes) == read
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    number = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(number, torch.rand(()))


def test_models_that_ignore_masks_or_caches_are_found(tokenizer, monkeypatch):
    model = make_tiny(WINDOWS["mistral"], len(tokenizer))
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask)
    assert "does not make masks of sliding windows" in reason(model, tokenizer)
    model = make_tiny(STATES["qwen3_5"], len(tokenizer))
    with without_cache(model):
        assert "does not write into its key-value cache" in reason(model, tokenizer)
