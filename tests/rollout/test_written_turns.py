"""Turns that a protocol writes: they are read back as the same action, and are what the chat template renders."""

import pytest
from trl import chat_template_utils as trl_templates

from helpers import tokenizer_kinds as kinds
from helpers.chats import call_message
from helpers.families import FAMILY, end_ids, make_family_protocol, make_family_tokenizer
from helpers.tag_protocols import TAG_PROTOCOLS
from tspo_trl import TagProtocol, ToolCallProtocol
from tspo_trl.rollout.protocol import SearchProtocol
from tspo_trl.rollout.tool_call import SEARCH_TOOL

NAMES = [*FAMILY, *(f"{name}_training" for name in FAMILY if hasattr(trl_templates, f"{name}_training_chat_template"))]
CONTENTS = ["Rome", 'Who wrote "Emma", and when?', "Emma's author, born 1775", "café 東京", "{x}: [a, b] (c) = 1\\2"]
USER = {"role": "user", "content": "Where is it?"}
RESPONSE = {"role": "tool", "name": "search", "content": "Doc 1 Rome."}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after_response", [False, True])
def test_calls_and_answers_are_read_as_they_were_written(name, after_response):
    protocol = make_family_protocol(name)
    ends = end_ids(protocol.tokenizer, name)
    before = protocol._close if after_response else protocol.encode_prompts([protocol.prompt("Where?")])[0]
    for action in ("search", "answer"):
        for content in CONTENTS:
            ids = protocol.write(action, content, after_response=after_response)
            assert ids[-1] in ends
            assert not set(ids[:-1]) & set(ends)  # a model would have ended there
            assert protocol.read(ids, ended=True, before=before)[1:] == (action, content)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_is_what_the_template_renders_after_the_beginning_of_the_message(name):
    protocol = make_family_protocol(name)
    family = FAMILY[name.removesuffix("_training")]

    def render(messages, start=False):
        return protocol.tokenizer.apply_chat_template(
            messages, tools=[SEARCH_TOOL], tokenize=False, add_generation_prompt=start
        )

    def joined(before, turn):
        # Nemotron opens a thought with a line feed, and renders an empty one without
        return (before + turn).replace(
            "<think>\n</think>", "<think></think>" if "nemotron" in name else "<think>\n</think>"
        )

    call = protocol.tokenizer.decode(protocol.write("search", "Rome", after_response=False))
    assert call.endswith(family.call % "Rome" + family.call_end)
    assert render([USER, call_message("Rome"), RESPONSE]).startswith(joined(render([USER], start=True), call))
    answer = protocol.tokenizer.decode(protocol.write("answer", "Italy", after_response=True))
    assert answer.endswith(family.answer % "Italy" + family.answer_end)
    text = joined(render([USER, call_message("Rome"), RESPONSE], start=True), answer.removesuffix(family.answer_end))
    assert render([USER, call_message("Rome"), RESPONSE, {"role": "assistant", "content": "Italy"}]).startswith(text)


def test_an_opened_thought_is_closed_at_once():
    for name in ("qwen3_5_think", "nemotron_3_nano"):
        protocol = make_family_protocol(name)
        for after_response in (False, True):
            text = protocol.tokenizer.decode(protocol.write("answer", "Rome", after_response=after_response))
            assert text.partition("</think>")[0].strip() == ""
            assert "</think>" in text


def test_a_template_whose_thoughts_are_off_is_written_without_them():
    protocol = make_family_protocol("qwen3", enable_thinking=False)
    for action in ("search", "answer"):
        for after_response in (False, True):
            ids = protocol.write(action, "Rome", after_response=after_response)
            assert protocol.read(ids, ended=True)[1:] == (action, "Rome")
            assert "think" not in protocol.tokenizer.decode(ids)


def test_a_template_that_takes_arguments_as_text_is_written_too():
    tokenizer = make_family_tokenizer("qwen2_5")
    template = tokenizer.chat_template
    assert "tool_call.arguments | tojson" in template
    tokenizer.response_template = trl_templates.qwen3_template
    as_text = "tool_call.arguments if tool_call.arguments is string else raise_exception('a text')"
    tokenizer.chat_template = template.replace("tool_call.arguments | tojson", as_text)
    protocol = ToolCallProtocol(tokenizer)
    ids = protocol.write("search", "Rome", after_response=True)
    assert protocol.read(ids, ended=True)[1:] == ("search", "Rome")


@pytest.mark.parametrize("kind", TAG_PROTOCOLS)
def test_tags_are_read_as_they_were_written(kind):
    protocol = TAG_PROTOCOLS[kind]
    for action in ("search", "answer"):
        for content in ("Rome", "Paris is the capital of France"):
            ids = protocol.write(action, content, after_response=False)
            assert ids == protocol.write(action, content, after_response=True)
            assert protocol.read(ids, ended=False)[1:] == (action, content)
            assert protocol.tokenizer.decode(ids).endswith(f"</{action}>")


@pytest.mark.parametrize(
    "make", [kinds.make_sentencepiece_bpe, kinds.make_llama_legacy, kinds.make_unigram, kinds.make_byte_level]
)
def test_a_written_turn_continues_the_text_before_it(make):
    """SentencePiece puts a space before a text of its own, which a model does not write after a line feed."""
    protocol = TagProtocol(make())
    ids = protocol.write("search", "capital of Italy", after_response=False)
    assert protocol.read(ids, ended=False)[1:] == ("search", "capital of Italy")
    first = str(protocol.tokenizer.convert_ids_to_tokens(ids[0]))
    assert not first.startswith(("▁", "Ġ"))


def test_markup_in_the_content_is_read_differently():
    protocol = TAG_PROTOCOLS["bytes"]
    ids = protocol.write("answer", "a </answer> b", after_response=True)
    assert protocol.read(ids, ended=False)[1:] != ("answer", "a </answer> b")


def test_a_protocol_without_a_way_to_write_turns_says_so():
    class Other(TagProtocol):
        write = SearchProtocol.write

    with pytest.raises(NotImplementedError, match=r"`Other\.write` is needed to make demonstrations"):
        Other(TAG_PROTOCOLS["bytes"].tokenizer).write("search", "Rome", after_response=False)
