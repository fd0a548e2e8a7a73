"""Tool calls in the format of the chat template: actions, prompts, and tokenizers that are refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import chat_template_utils as trl_templates

from helpers.chats import CALL, OTHER, PROTOCOLS, WELL, make_chat
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
        ("<tool_call>{</tool_call>" + WELL, "search", "Rome"),
        ("<tool_call>" + WELL, "search", "Rome"),
        ("</tool_call>" + WELL, "search", "Rome"),
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
        ("hm, so</think>\n\nRome", "answer", "Rome"),
        ("Rome <think>or", "answer", "Rome"),
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
        ("<think>hm", "none", ""),
        ("hm</think>\n", "none", ""),
        ("<think>a<think>b</think>c</think>", "none", ""),
        # thoughts are ignored
        (f"<think>{WELL}</think>Rome", "answer", "Rome"),
        (f"<think>maybe {OTHER}</think>\n{WELL}", "search", "Rome"),
        (f"<think>never ends {WELL}", "search", "Rome"),
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
    protocol = ToolCallProtocol(tokenizer)
    assert tokenizer.decode(protocol.hint_ids).endswith("<think>\n")
    assert protocol.parse("Rome", ended=True) == ("none", "")
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


LLAMA = (trl_templates._CHAT_TEMPLATES_DIR / "llama3_1.jinja").read_text().replace("bos_token", "''")


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
        (trl_templates.llama3_chat_template, "this one fails.*bos_token"),
        (LLAMA, "reads calls as"),
        (trl_templates.qwen3_5_nothink_chat_template, "reads calls as"),
        ("{{ raise_exception('no tools here') }}", "this one fails.*no tools here"),
        (
            trl_templates.qwen2_5_chat_template.replace("<|im_end|>", "<|end|>"),
            r"after a call.*<\|end\|>.*<\|im_end\|>",
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


def test_a_tokenizer_whose_decoding_removes_calls_is_refused():
    tokenizer = make_chat("qwen2_5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<tool_call>"]})
    with pytest.raises(ValueError, match="special tokens"):
        ToolCallProtocol(tokenizer)
