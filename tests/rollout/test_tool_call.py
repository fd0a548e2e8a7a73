"""Tool calls in the format of the chat template: actions, prompts, and tokenizers that are refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import chat_template_utils as trl_templates

from helpers.chats import CALL, OTHER, PROTOCOLS, WELL, make_chat
from helpers.families import UNREADABLE, WRONG, make_family_tokenizer, template_text
from tspo_trl import ToolCallProtocol
from tspo_trl.training.datasets import prepare_dataset


@pytest.mark.parametrize(
    ("text", "action", "content"),
    [
        (WELL, "search", "Rome"),
        (f"Let me look.\n{WELL}\nSo.", "search", "Rome"),
        ('<tool_call>{"arguments": {"query": " Rome \\n"}, "name": "search"}</tool_call>', "search", "Rome"),
        (
            '<tool_call>{"name": "search", "arguments": {"query": "Rome", "k": 3}, "id": 1}</tool_call>',
            "search",
            "Rome",
        ),
        ('<tool_call>{"name": "search", "arguments": {"query": "caf\\u00e9 {x}"}}</tool_call>', "search", "café {x}"),
        # characters that cannot be encoded or sent are removed from the query
        (
            '<tool_call>{"name": "search", "arguments": {"query": "a\\ud800\\u0000\\u202eb"}}</tool_call>',
            "search",
            "ab",
        ),
        ('<tool_call>{"name": "search", "arguments": {"query": "\\ud800"}}</tool_call>', "invalid", ""),
        # the first well-formed call counts
        (CALL % "a" + "\n" + CALL % "b", "search", "a"),
        (OTHER + WELL, "search", "Rome"),
        ("</tool_call>" + WELL, "search", "Rome"),
        # a message that cannot be parsed is invalid as a whole
        ("<tool_call>{</tool_call>" + WELL, "invalid", ""),
        ("<tool_call>" + WELL, "invalid", ""),
        # no well-formed call
        (OTHER, "invalid", ""),
        ('<tool_call>{"name": "Search", "arguments": {"query": "x"}}</tool_call>', "invalid", ""),
        ('<tool_call>{"arguments": {"query": "x"}}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search"}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": "x"}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": ["query", "x"]}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": {"q": "x"}}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": {"query": 7}}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": {"query": null}}</tool_call>', "invalid", ""),
        ('<tool_call>{"name": "search", "arguments": {"query": ["x"]}}</tool_call>', "invalid", ""),
        (CALL % "", "invalid", ""),
        (CALL % " ", "invalid", ""),
        ("<tool_call>Rome</tool_call>", "invalid", ""),
        ('<tool_call>["search"]</tool_call>', "invalid", ""),
        ("<tool_call>7</tool_call>", "invalid", ""),
        ("<tool_call></tool_call>", "invalid", ""),
        (WELL.removesuffix("</tool_call>"), "invalid", ""),
        (WELL.replace("}}", "}"), "invalid", ""),
        ("Rome</tool_call>", "invalid", ""),
        ("Rome <tool_call>", "invalid", ""),
        (CALL % "a</tool_call>b", "invalid", ""),
        ("<tool_call>" + "[" * 20_000 + "</tool_call>", "invalid", ""),
        ("<tool_call>" + "9" * 20_000 + "</tool_call>", "invalid", ""),
        # answers
        ("Rome", "answer", "Rome"),
        ("\n Rome,\nItaly \n", "answer", "Rome,\nItaly"),
        ("<think>hm</think>\n\nRome", "answer", "Rome"),
        ("<think>a</think> Rome <think>b</think>", "answer", "Rome"),
        ("hm, so</think>\n\nRome", "answer", "hm, so</think>\n\nRome"),
        ("<answer>Rome</answer>", "answer", "<answer>Rome</answer>"),
        (
            '{"name": "search", "arguments": {"query": "x"}}',
            "answer",
            '{"name": "search", "arguments": {"query": "x"}}',
        ),
        ("<TOOL_CALL>", "answer", "<TOOL_CALL>"),
        # empty messages
        ("", "none", ""),
        (" \n", "none", ""),
        ("<think>hm</think>", "none", ""),
        # thoughts are ignored
        (f"<think>{WELL}</think>Rome", "answer", "Rome"),
        (f"<think>maybe {OTHER}</think>\n{WELL}", "search", "Rome"),
        # a message that ends inside a thought is invalid, whatever it has before
        ("<think>hm", "invalid", ""),
        ("Rome <think>or", "invalid", ""),
        (f"<think>never ends {WELL}", "invalid", ""),
        (f"{WELL}<think>hm", "invalid", ""),
        (f"half a thought</think>{WELL}", "search", "Rome"),
    ],
)
def test_the_action_of_a_message(qwen, text, action, content):
    assert qwen.parse(text, ended=True) == (action, content)
    assert qwen.parse(text, ended=False) == ("invalid", "")


@pytest.mark.parametrize(
    "text",
    ["<tool_call>" * 50_000, "<think>" * 50_000, "<tool_call>" + "x" * 1_000_000, "<think>" + "<" * 500_000],
)
def test_very_long_messages_are_parsed(qwen, text):
    assert qwen.parse(text, ended=True)[0] in ("invalid", "none")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_any_query_is_parsed_unchanged(query):
    protocol = PROTOCOLS["qwen2_5"]
    for ensure_ascii in (True, False):
        call = json.dumps({"name": "search", "arguments": {"query": query}}, ensure_ascii=ensure_ascii)
        action, content = protocol.parse(f"<tool_call>{call}</tool_call>", ended=True)
        if action == "search":
            assert content in query or any(not c.isprintable() for c in query)
            assert protocol.cut_query(content, 8) is not None
            content.encode()
        else:
            assert not "".join(c for c in query if c.isprintable()).strip()


def test_a_template_may_open_the_thought(qwen):
    tokenizer = make_chat("qwen3_instruct_2507")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\\n' }}\n{%- endif", "assistant\\n<think>\\n' }}\n{%- endif"
    )
    tokenizer.response_template = trl_templates.qwen3_template
    protocol = ToolCallProtocol(tokenizer)
    assert tokenizer.decode(protocol.hint_ids).endswith("<think>\n")
    assert protocol.parse("Rome", ended=True) == ("invalid", "")
    assert protocol.parse("hm</think>Rome", ended=True) == ("answer", "Rome")
    assert protocol.parse(f"{CALL % 'a'}</think>{CALL % 'b'}", ended=True) == ("search", "b")
    assert qwen.parse("Rome", ended=True) == ("answer", "Rome")


def test_a_prompt_is_a_conversation(qwen):
    question = "What is {x} in {question} or {max_searches}, {}, {{0}}?"
    (message,) = ToolCallProtocol(qwen.tokenizer, max_searches=7).prompt(question)
    assert message["role"] == "user"
    assert question in message["content"]
    assert "at most 7 times" in message["content"]


def test_prompts_of_a_data_set_are_conversations(qwen):
    from datasets import Dataset

    row = {"golden_answers": ["a"], "question": "Where?"}
    (prepared_row,) = prepare_dataset(Dataset.from_list([row]), qwen)
    assert prepared_row["prompt"] == qwen.prompt("Where?")
    with pytest.raises(
        ValueError, match=r"row 0: with `protocol='tool_call'`, 'prompt' must be a conversation.*'Where\?'"
    ):
        prepare_dataset(Dataset.from_list([{**row, "prompt": "Where?"}]), qwen)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a chat template, but the tokenizer has none"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
            "leaves out the tools and the calls",
        ),
        (
            "{{ tools }}{% for m in messages if m.role != 'tool' %}{{ m }}<|im_end|>{% endfor %}",
            "leaves out the responses",
        ),
        (trl_templates.llama3_chat_template, r"this one \(TRL's 'llama3'\) fails.*bos_token"),
        (trl_templates.cohere2_chat_template, r"TRL's 'cohere2'.*fails|leaves out"),
        (trl_templates.gemma4_v5_chat_template, r"'<\|turn>'.*no such tokens.*another family"),
        (trl_templates.glm4moe_chat_template, r"'<\|assistant\|>'.*no such tokens.*another family"),
        ("{{ raise_exception('no tools here') }}", "this one fails.*no tools here"),
        (
            trl_templates.qwen2_5_chat_template.replace("<|im_end|>", "<|end|>"),
            r"does not know the template.*'qwen2_5' is the most similar: it shares 7.%.*qwen2_5_chat_template`.*"
            r"tokenizer.response_template = trl.chat_template_utils.qwen3_template`",
        ),
    ],
)
def test_a_tokenizer_without_usable_tool_calls_is_refused(template, message):
    tokenizer = make_chat("qwen2_5")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        ToolCallProtocol(tokenizer)
    assert "protocol='tool_call'" in str(error.value)
    assert "tokenizer." in str(error.value)


def test_a_template_that_ends_messages_otherwise_than_generation_is_refused():
    tokenizer = make_chat("qwen2_5")
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(
        ValueError, match=r"after a call.*<\|im_end\|>.*ends only at \['<\|endoftext\|>'\].*Set `tokenizer"
    ):
        ToolCallProtocol(tokenizer)


def test_a_template_whose_answers_have_another_end_is_refused():
    tokenizer = make_family_tokenizer("gptoss")
    ends = tokenizer.convert_tokens_to_ids(["<|call|>", "<|endoftext|>"])
    with pytest.raises(ValueError, match=r"after an answer.*ends only at \['<\|call\|>', '<\|endoftext\|>'\]"):
        ToolCallProtocol(tokenizer, eos_token_ids=ends)


def test_a_changed_template_with_a_response_template_is_used():
    tokenizer = make_chat("qwen2_5")
    tokenizer.chat_template = "{# changed #}" + tokenizer.chat_template
    tokenizer.response_template = trl_templates.qwen3_template
    protocol = ToolCallProtocol(tokenizer)
    assert protocol.parse(WELL, ended=True) == ("search", "Rome")
    assert tokenizer.response_template is trl_templates.qwen3_template


def test_the_tokenizer_of_the_user_is_not_changed(qwen):
    assert getattr(qwen.tokenizer, "response_template", None) is None


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_template_without_a_response_template_is_refused_by_name(name):
    tokenizer = make_chat("qwen2_5")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = template_text(name)
    with pytest.raises(ValueError, match=f"TRL's '{name}'.*(has no response template|leaves out the tools)"):
        ToolCallProtocol(tokenizer)


@pytest.mark.parametrize("name", WRONG)
def test_a_template_whose_response_template_is_wrong_is_refused_by_name(name):
    """LFM2's response template ends a query at `'` and takes `, word(` for a call."""
    tokenizer = make_chat("qwen2_5")
    marks = [f"<|tool_{kind}_{edge}|>" for kind in ("call", "response", "list") for edge in ("start", "end")]
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<|im_start|>", *marks]})
    tokenizer.chat_template = template_text(name)
    with pytest.raises(ValueError, match=f"TRL's '{name}'.*Emma's author.*is read as.*response template.*wrong"):
        ToolCallProtocol(tokenizer)


def test_calls_are_read_if_their_tags_are_special_tokens():
    tokenizer = make_chat("qwen2_5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<tool_call>", "</tool_call>"]})
    protocol = ToolCallProtocol(tokenizer)
    ids = tokenizer(WELL + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert protocol.read(ids, ended=True) == (WELL, "search", "Rome")
