"""Training on the chat template's own tool calls."""

import pytest
from transformers import Qwen2ForCausalLM

from benchmarks.architectures import make_model
from helpers.chats import encode, make_chat, render
from helpers.families import FAMILIES, end_ids, make_family_tokenizer
from helpers.training import assert_logprobs_agree, prepared, prompted_to_search, varied_reward
from tspo_trl.rewards import exact_match_reward, format_reward
from tspo_trl.rollout.tool_call import HINT


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_training_and_sampling_logprobs_agree(make_chat_trainer, temperature):
    trainer = make_chat_trainer(temperature=temperature)
    prompted_to_search(trainer)
    inputs, trajectories = prepared(trainer)
    assert any(turn.passages for t in trajectories for turn in t.turns)
    assert any(turn.action == "invalid" and turn.observation_ids for t in trajectories for turn in t.turns)
    assert_logprobs_agree(trainer, inputs, trajectories)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen2_5", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3_instruct_2507", "qwen3_moe"),
        ("qwen3_5_nothink", "qwen3_5_moe"),
        ("qwen3_6", "qwen3_5"),
        ("qwen3_8", "qwen3_next"),
        ("nemotron_3_5_lightning", "nemotron_h"),
        ("glm4moe", "glm4_moe"),
        ("llama3_2", "llama"),
        ("gptoss", "gpt_oss"),
        ("gemma4_v5", "gemma4"),
        ("gemma4_v2", "gemma4"),
    ],
)
def test_every_family_trains(make_chat_trainer, name, architecture):
    tokenizer = make_family_tokenizer(name)
    model = make_model(architecture, len(tokenizer))
    model.generation_config.eos_token_id = end_ids(tokenizer, name)
    options = {"processing_class": tokenizer, "max_steps": 1, "router_aux_loss_coef": 0.0}
    trainer = make_chat_trainer(model=model, **options)
    prompted_to_search(trainer)
    inputs, trajectories = prepared(trainer)
    turns = [turn for t in trajectories for turn in t.turns]
    assert any(turn.passages for turn in turns)
    protocol = trainer.search_loop.protocol
    hints = [turn.observation_ids for turn in turns if turn.action == "invalid" and turn.observation_ids]
    assert hints
    assert {protocol.observation_text(ids) for ids in hints} == {HINT}
    assert_logprobs_agree(trainer, inputs, trajectories)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert any((before[k] != v).any() for k, v in trainer.model.state_dict().items())


def test_the_families_that_train_are_all():
    (marks,) = [mark for mark in test_every_family_trains.pytestmark if mark.name == "parametrize"]
    trained = {name for name, _ in marks.args[1]}
    assert all(trained & set(family.templates) for family in FAMILIES)


def test_two_training_steps(make_chat_trainer):
    seen = []

    def spy(prompts, completions, trajectories, **kwargs):
        seen.extend(zip(prompts, completions, trajectories, strict=True))
        return varied_reward(trajectories)

    trainer = make_chat_trainer(reward_funcs=[spy, exact_match_reward, format_reward], num_generations_eval=4)
    read = prompted_to_search(trainer)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any((before[k] != v).any() for k, v in trainer.model.state_dict().items())
    assert len(seen) == 16
    assert {action for action, _ in read} <= {"invalid", "answer", "none"}
    tokenizer = trainer.processing_class
    for prompt, completion, t in seen:
        assert t.prompt_ids == render(tokenizer, prompt, generate=True)
        assert '"name": "search"' in tokenizer.decode(t.prompt_ids)
        assert [m["content"] for m in completion if m["role"] == "assistant"] == [turn.text for turn in t.turns]
        responses = [m for m in completion if m["role"] == "tool"]
        assert len(responses) == sum(bool(turn.observation_ids) for turn in t.turns)
        assert all(m["name"] == "search" and "<" not in m["content"] for m in responses)
        assert all(m["content"] == HINT or m["content"].startswith("Doc 1") for m in responses)
    metrics = trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert "eval_reward" in metrics
    assert not any(key.startswith(("tools/", "eval_tools/")) for e in trainer.state.log_history for key in e)


def test_chat_template_kwargs_apply_to_prompts_and_observations(make_chat_trainer, tmp_path, chat_dir):
    trainer = make_chat_trainer(
        model=Qwen2ForCausalLM.from_pretrained(chat_dir, dtype="float32"),
        processing_class=make_chat("qwen3_training"),
        chat_template_kwargs={"enable_thinking": False},
    )
    trainer.model.resize_token_embeddings(len(trainer.processing_class))
    _, trajectories = prepared(trainer)
    ending = encode(trainer.search_loop.protocol, "<think>\n\n</think>\n\n")
    contexts = [t.prompt_ids for t in trajectories]
    contexts += [turn.observation_ids for t in trajectories for turn in t.turns if turn.observation_ids]
    assert all(ids[-len(ending) :] == ending for ids in contexts)


def test_a_tokenizer_without_a_chat_template_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`protocol='tool_call'` needs a chat template, but the tokenizer has none"):
        make_trainer(protocol="tool_call")


def test_a_too_small_observation_budget_is_refused(make_chat_trainer):
    with pytest.raises(ValueError, match="`max_observation_tokens` must be at least"):
        make_chat_trainer(max_observation_tokens=5)
