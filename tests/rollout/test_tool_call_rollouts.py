"""Complete rollouts with tool calls equal the conversations rendered by the template."""

import pytest

from helpers.chats import CALL, END, FEW, OTHER, PROTOCOLS, ROME, TOKENIZERS, call_message, encode, render
from helpers.scripted import RecordingRetriever, ScriptedEngine
from tspo_trl import SearchLoop, ToolCallProtocol
from tspo_trl.rewards import exact_match_reward, format_reward
from tspo_trl.rollout.limits import SearchLimits
from tspo_trl.rollout.tool_call import HINT


def roll(protocol, *scripts, retriever=None, prompts=None, **options):
    tokenizer = protocol.tokenizer
    retriever = retriever or RecordingRetriever(ROME)
    questions = [protocol.prompt(f"Where is it, {i}?") for i in range(len(scripts))]
    prompts = prompts or [render(tokenizer, question, generate=True) for question in questions]
    engine = ScriptedEngine(tokenizer, {tuple(p): list(s) for p, s in zip(prompts, scripts, strict=True)})
    options = {"max_searches": 2, "max_turn_tokens": 100, "max_observation_tokens": 200, **options}
    loop = SearchLoop(
        engine, retriever, protocol, eos_token_ids=[tokenizer.eos_token_id], limits=SearchLimits(**options)
    )
    trajectories, _ = loop.run(prompts)
    return trajectories, engine, retriever, questions


def conversation(protocol, trajectory, question, queries):
    """The messages of a rollout that consists of searches and an answer."""
    messages = list(question)
    for turn, query in zip(trajectory.turns, queries, strict=False):
        content = protocol.observation_text(turn.observation_ids)
        messages += [call_message(query), {"role": "tool", "name": "search", "content": content}]
    return messages


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "qwen3_instruct_2507"])
def test_a_rollout_equals_the_rendered_conversation(name):
    protocol = PROTOCOLS[name]
    (t,), engine, retriever, (question,) = roll(
        protocol, [CALL % "Rome" + END, CALL % "Italy" + END, "Paris, France" + END]
    )
    assert t.status == "answered"
    assert t.answer == "Paris, France"
    assert retriever.calls == [["Rome"], ["Italy"]]
    messages = conversation(protocol, t, question, ["Rome", "Italy"])
    whole = render(protocol.tokenizer, [*messages, {"role": "assistant", "content": "Paris, France"}])
    assert t.prompt_ids + t.completion_ids + encode(protocol, "\n") == whole
    assert engine.calls[-1][0] == render(protocol.tokenizer, messages, generate=True)


def test_a_rollout_of_qwen3_without_thoughts_equals_the_rendered_conversation():
    """The template adds an empty thought to the last message only, so contexts are compared instead."""
    protocol = PROTOCOLS["qwen3"]
    (t,), engine, _, (question,) = roll(protocol, [CALL % "Rome" + END, CALL % "Italy" + END, "Paris" + END])
    for k, (context,) in enumerate(engine.calls):
        messages = conversation(protocol, t, question, ["Rome", "Italy"][:k])
        assert context == render(protocol.tokenizer, messages, generate=True)


def test_a_rollout_of_qwen3_with_empty_thoughts_equals_the_rendered_conversation():
    """TRL's training template keeps the thoughts of all messages."""
    protocol = ToolCallProtocol(TOKENIZERS["qwen3_training"], chat_template_kwargs={"enable_thinking": False})
    question = protocol.prompt("Where is it?")
    prompt = render(protocol.tokenizer, question, generate=True, enable_thinking=False)
    (t,), *_ = roll(protocol, [CALL % "Rome" + END, "Paris" + END], prompts=[prompt])
    messages = [*conversation(protocol, t, question, ["Rome"]), {"role": "assistant", "content": "Paris"}]
    whole = render(protocol.tokenizer, messages, enable_thinking=False)
    assert t.prompt_ids + t.completion_ids + encode(protocol, "\n") == whole


def test_thoughts_remain_in_the_context():
    protocol = PROTOCOLS["qwen3"]
    thought = "<think>\nRome is in Italy.\n</think>\n\n"
    (t,), engine, _, _ = roll(protocol, [thought + CALL % "Rome" + END, thought + "Paris" + END])
    assert (t.status, t.answer) == ("answered", "Paris")
    assert engine.calls[1][0] == t.prompt_ids + t.turns[0].token_ids + t.turns[0].observation_ids
    assert "Rome is in Italy." in protocol.tokenizer.decode(engine.calls[1][0])
    assert format_reward([t]) == exact_match_reward([t], [["paris"]]) == [1.0]


def test_a_truncated_turn_is_invalid_and_its_context_is_well_formed(qwen):
    script = ["Let me think about Rome and Italy and France", CALL % "Rome" + END, "Paris" + END]
    (t,), engine, _, (question,) = roll(qwen, script, max_turn_tokens=30)
    cut, search, _ = t.turns
    assert [turn.action for turn in t.turns] == ["invalid", "search", "answer"]
    end = qwen.tokenizer.eos_token_id
    assert cut.token_ids[-1] != end
    assert cut.observation_ids == [end, *qwen.hint_ids]
    assert search.observation_ids[0] != end
    length = len(cut.token_ids)
    assert t.loss_mask[: length + 1] == [1] * length + [0]
    messages = [*question, {"role": "assistant", "content": cut.text}, {"role": "tool", "content": HINT}]
    assert engine.calls[1][0] == render(qwen.tokenizer, messages, generate=True)
    assert format_reward([t]) == [0.0]


def test_a_turn_that_ends_with_another_token_gets_the_end_of_its_message():
    tokenizer = TOKENIZERS["qwen2_5"]
    ids = tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
    protocol = ToolCallProtocol(tokenizer, eos_token_ids=ids)
    prompt = render(tokenizer, protocol.prompt("Where?"), generate=True)
    engine = ScriptedEngine(tokenizer, {tuple(prompt): [CALL % "Rome" + "<|endoftext|>", "Paris<|endoftext|>"]})
    fewest = protocol.min_observation_tokens
    loop = SearchLoop(
        engine,
        RecordingRetriever(ROME),
        protocol,
        eos_token_ids=ids,
        limits=SearchLimits(max_observation_tokens=fewest),
    )
    ((t,), _) = loop.run([prompt])
    assert t.answer == "Paris"
    assert t.turns[0].observation_ids[0] == tokenizer.eos_token_id
    assert len(t.turns[0].observation_ids) == fewest


@pytest.mark.parametrize(
    "invalid",
    [OTHER, "<tool_call>{</tool_call>", CALL % "", '<tool_call>{"name": "search"}</tool_call>', "Paris " * 50],
)
def test_an_invalid_action_gets_a_hint_and_costs_a_turn(qwen, invalid):
    (t,), _, retriever, _ = roll(qwen, [invalid + END] * 2 + [CALL % "Rome" + END], max_turn_tokens=30)
    assert [turn.action for turn in t.turns] == ["invalid", "invalid", "search"]
    assert t.status == "no_answer"
    assert HINT in qwen.tokenizer.decode(t.turns[0].observation_ids)
    assert retriever.calls == []


def test_the_turn_after_the_last_search_is_final(qwen):
    (t,), _, _, _ = roll(qwen, [CALL % "Rome" + END] * 3)
    assert [turn.retrieval for turn in t.turns] == ["ok", "ok", None]
    assert (t.status, t.answer) == ("no_answer", None)


def test_an_empty_message_is_not_an_answer(qwen):
    (t,), _, _, _ = roll(qwen, ["<think>hm</think>" + END])
    assert (t.status, t.turns[0].action, t.answer) == ("no_answer", "none", None)


def test_a_round_makes_one_retrieval_call(qwen):
    trajectories, _, retriever, _ = roll(
        qwen,
        [CALL % "a" + END, CALL % "b" + END, "x" + END],
        [CALL % "a" + END + "", "x" + END],
        [CALL % "c" + CALL % "a" + END, "x" + END],
        ["x" + END],
    )
    assert retriever.calls == [["a", "c"], ["b"]]
    assert [t.status for t in trajectories] == ["answered"] * 4


@pytest.mark.parametrize("limit", [*range(1, 60, 3), *range(60, 260, 9)])
def test_the_completion_never_exceeds_its_budget(qwen, limit):
    script = [CALL % "Rome" + END, OTHER + END, "Rome " * 40, CALL % "Italy" + END, "Paris" + END]
    options = {"max_searches": 4, "max_turn_tokens": 50, "max_observation_tokens": 60}
    (t,), _, _, _ = roll(qwen, script, max_completion_length=limit, **options)
    assert 1 <= len(t.completion_ids) <= limit
    assert t.turns[-1].observation_ids == []
    assert all(len(turn.observation_ids) <= 60 for turn in t.turns if turn.action == "search")
    if t.status == "truncated":
        assert t.answer is None


@pytest.mark.parametrize("name", FEW)
def test_an_observation_budget_that_is_too_small_is_refused(name):
    protocol = PROTOCOLS[name]
    fewest = protocol.min_observation_tokens
    with pytest.raises(ValueError, match=f"`max_observation_tokens` must be at least {fewest}, got {fewest - 1}"):
        roll(protocol, ["x" + END], max_observation_tokens=fewest - 1)
    roll(protocol, ["x" + END], max_observation_tokens=fewest)
    roll(protocol, ["x" + END], max_observation_tokens=1, max_searches=0)
