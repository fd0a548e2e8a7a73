"""Rollouts of many architectures: the log-probabilities of the engine are those of a full forward of each rollout alone."""

from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.architectures import ARCHITECTURES, WINDOW, make_model
from helpers.limits import LIMITS
from helpers.multimodal import VISION, make_multimodal
from tspo_trl import SearchLoop, TagProtocol
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.limits import SearchLimits

NAMED = """qwen2 qwen3 qwen3_moe qwen3_5 qwen3_5_moe qwen3_next llama mistral mixtral ministral gemma2 gemma3 gemma4 phi3
olmo2 olmo3 gpt_oss deepseek_v2 deepseek_v3 granite granitemoehybrid smollm3 glm4 glm4_moe cohere cohere2 exaone4 ernie4_5
lfm2 falcon_h1 nemotron_h bamba jamba mamba2 seed_oss starcoder2""".split()


class ByLength(TagProtocol):
    """Reads a turn as a query of its own words, an answer or an invalid action: random models write no tags."""

    def parse(self, text, *, ended=False):
        super().parse(text, ended=ended)
        return {0: ("answer", text), 1: ("invalid", "")}.get(len(text) % 5, ("search", text))


@pytest.fixture(scope="module")
def roll(tokenizer, world, retriever):
    """A function that rolls out 6 questions of different lengths, two of them twice, with a model."""

    def roll(model, **options):
        protocol = ByLength(tokenizer)
        # Many tokens end a turn, so that the turns of a batch have different lengths
        ends = [tokenizer.eos_token_id, *range(100, len(tokenizer), 9)]
        config = GenerationConfig(
            **{"do_sample": True, "temperature": 1.0, "top_k": 0, "disable_compile": True, **options},
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, protocol.stop_strings)
        loop = SearchLoop(engine, retriever, protocol, eos_token_ids=ends, limits=SearchLimits(**LIMITS))
        questions = [str(question.row()["prompt"]) for question in world.train_questions[1:7]]
        prompts = protocol.encode_prompts([protocol.prompt(question) for question in questions])
        torch.manual_seed(0)
        trajectories, _ = loop.run([*prompts, *prompts[:2]])
        return trajectories

    return roll


@torch.no_grad()
def full_logps(model, ids):
    """The log-probability of each token but the first, by a forward of these tokens alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_all_named_architectures_are_in_the_table():
    assert set(NAMED) == set(ARCHITECTURES)


def check_logprobs(model, trajectories):
    """The log-probabilities of the sampled tokens are those of a forward of each rollout alone."""
    for t in trajectories:
        sampled = torch.tensor(t.loss_mask) == 1
        expected = full_logps(model, t.prompt_ids + t.completion_ids)[len(t.prompt_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(t.logprobs)[sampled], expected[sampled], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_of_rollouts_equal_those_of_a_full_forward(roll, tokenizer, name):
    model = make_model(name, len(tokenizer)).eval()
    trajectories = roll(model)
    turns = [turn for t in trajectories for turn in t.turns]
    assert len({len(t.turns) for t in trajectories}) > 1
    assert max(len(t.turns) for t in trajectories) == 4
    assert len({len(turn.token_ids) for turn in turns}) > 4
    assert len({len(turn.observation_ids) for turn in turns}) > 3
    assert min(len(t.prompt_ids) for t in trajectories) > WINDOW
    check_logprobs(model, trajectories)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_that_is_not_masked_would_change_logprobs(tokenizer, name):
    """So the test above can fail: no architecture forgets tokens that it should not have read."""
    model = make_model(name, len(tokenizer)).eval()
    ids = list(range(20, 50))
    padded = full_logps(model, [tokenizer.pad_token_id] * 5 + ids)[5:]
    assert (padded - full_logps(model, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("name", VISION)
def test_logprobs_of_whole_multimodal_models_equal_those_of_a_full_forward(roll, tokenizer, name):
    model = make_multimodal(name, tokenizer).eval()
    check_logprobs(model, roll(model))
