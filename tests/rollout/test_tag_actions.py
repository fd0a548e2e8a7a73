"""The tags protocol: prompts, the action of a turn, and queries."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.passages import TAGS
from helpers.tag_protocols import TAG_PROTOCOLS, encode, make_bytes, make_words
from tspo_trl import TagProtocol
from tspo_trl.rollout.tags import HINT

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(params=list(TAG_PROTOCOLS))
def protocol(request):
    return TAG_PROTOCOLS[request.param]


# Prompts


@pytest.mark.parametrize(
    "question", ["Who wrote it?", "What is {x} in {question} or {max_searches}, {}, {{0}}?", "%s \\1"]
)
def test_a_prompt_is_a_text_without_a_chat_template(question):
    prompt = TagProtocol(make_words(), max_searches=7).prompt(question)
    assert isinstance(prompt, str)
    assert question in prompt
    assert "at most 7 times" in prompt
    for tag in ("<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>"):
        assert tag in prompt
    assert prompt.replace(question, "").count("{") == 0


@pytest.mark.parametrize("question", ["Who wrote it?", "What is {x} in {question} or {max_searches}, {}, {{0}}?"])
def test_a_prompt_is_a_conversation_with_a_chat_template(question):
    tokenizer = make_bytes()
    text = TagProtocol(tokenizer).prompt(question)
    tokenizer.chat_template = TEMPLATE
    assert TagProtocol(tokenizer).prompt(question) == [{"role": "user", "content": text}]
    assert question in text
    assert "at most 4 times" in text


# Actions


@pytest.mark.parametrize(
    ("text", "action", "content"),
    [
        ("<search>capital of Italy</search>", "search", "capital of Italy"),
        ("<answer>Rome</answer>", "answer", "Rome"),
        ("<think>hm</think>\n<search> Italy </search>", "search", "Italy"),
        ("Well, <answer>\nRome\n</answer>", "answer", "Rome"),
        ("<search>two\nlines\n\nof it</search>", "search", "two\nlines\n\nof it"),
        # the first well-formed pair counts
        ("<search>a</search><search>b</search>", "search", "a"),
        ("<search>a</search> <answer>b</answer>", "search", "a"),
        ("<answer>b</answer> <search>a</search>", "answer", "b"),
        ("<search>cut <answer>Rome</answer>", "answer", "Rome"),
        ("</search> <search>a</search>", "search", "a"),
        ("<search>a</answer> <answer>b</answer>", "answer", "b"),
        # nested tags: the inner pair is the first that is well-formed
        ("<search>a <search>b</search></search>", "search", "b"),
        ("<answer>a <search>b</search> c</answer>", "search", "b"),
        ("<search>a <information>b</information> c</search>", "invalid", ""),
        ("<answer>a </information> c</answer>", "invalid", ""),
        # other tags within the content are part of it
        ("<search><b>bold</b> <think>x</think></search>", "search", "<b>bold</b> <think>x</think>"),
        ("<answer>1 < 2 > 0</answer>", "answer", "1 < 2 > 0"),
        # empty
        ("<search></search>", "invalid", ""),
        ("<search> \n\t</search>", "invalid", ""),
        ("<search></search><answer>Rome</answer>", "invalid", ""),
        ("<answer></answer>", "answer", ""),
        ("<answer> \n</answer>", "answer", ""),
        # malformed
        ("<search>a", "invalid", ""),
        ("a</search>", "invalid", ""),
        ("</search>a<search>", "invalid", ""),
        ("<search>a</answer>", "invalid", ""),
        ("<answer>a</search>", "invalid", ""),
        ("<SEARCH>a</SEARCH>", "invalid", ""),
        ("<Answer>a</Answer>", "invalid", ""),
        ("<search>a</SEARCH>", "invalid", ""),
        ("< search>a</ search>", "invalid", ""),
        ("<search query='a'>b</search>", "invalid", ""),
        ("<information>a</information>", "invalid", ""),
        ("Rome", "invalid", ""),
        ("", "invalid", ""),
    ],
)
def test_the_action_of_a_turn(words, text, action, content):
    assert words.parse(text) == (action, content)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("", "none"),
        ("I do not know.", "none"),
        ("<think>hm</think>", "none"),
        ("<information>x</information>", "none"),
        ("<SEARCH>a</SEARCH>", "none"),
        ("<search>a", "invalid"),
        ("a</answer>", "invalid"),
        ("<search></search>", "invalid"),
        ("<search>a</answer>", "invalid"),
        ("<search>a</search>", "search"),
        ("<answer>a</answer>", "answer"),
    ],
)
def test_a_finished_message_without_an_attempt_has_no_action(words, text, action):
    assert words.parse(text, ended=True)[0] == action
    assert words.parse(text, ended=False)[0] == ("invalid" if action == "none" else action)


def test_an_action_ends_with_a_stop_string(words):
    for stop in words.stop_strings:
        assert words.parse(f"<{stop[2:]}x{stop}")[0] in ("search", "answer")
    assert len(words.stop_strings) == 2


def reference_parse(text, ended):
    """Parse by iterating over tags: an opening tag and the closing tag right after it are a well-formed pair."""
    tags = list(re.finditer("</?(?:search|answer|information)>", text))
    for opening, closing in pairwise(tags):
        name = opening[0][1:-1]
        if name in ("search", "answer") and closing[0] == f"</{name}>":
            content = text[opening.end() : closing.start()].strip()
            return ("invalid", "") if name == "search" and not content else (name, content)
    attempted = any("information" not in tag[0] for tag in tags)
    return ("none" if ended and not attempted else "invalid"), ""


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*TAGS, "a", " ", "\n", "<", ">", "<b>"]), max_size=12).map("".join), st.booleans())
def test_actions_equal_the_reference(text, ended):
    assert TAG_PROTOCOLS["words"].parse(text, ended=ended) == reference_parse(text, ended)


@pytest.mark.parametrize("text", ["<search>" * 50_000, "<answer>" + "x" * 1_000_000, "<search>" + "<" * 500_000])
def test_very_long_turns_are_parsed(words, text):
    assert words.parse(text) == ("invalid", "")


def test_a_hint_is_given_after_an_invalid_action(protocol):
    assert HINT.split()[0] in protocol.tokenizer.decode(protocol.hint_ids)
    protocol.hint_ids.append(0)
    assert protocol.hint_ids == encode(protocol, f"\n\n{HINT}\n\n")


def test_the_hint_is_shown_word_for_word(bpe):
    assert bpe.tokenizer.decode(bpe.hint_ids).strip() == HINT


# Queries


def test_a_query_within_its_budget_is_not_changed(protocol):
    for query in ("capital of Italy", "Zoë  {x}", ""):
        assert protocol.cut_query(query, 50) == query


def test_a_longer_query_is_cut_at_its_end(words, bpe):
    assert words.cut_query("capital of Italy and France", 3) == "capital of Italy"
    assert words.cut_query("capital of Italy and", 3) == "capital of Italy"
    query = "capital of Italy and France " * 2000
    for limit in (1, 5, 64):
        cut = bpe.cut_query(query, limit)
        assert cut
        assert query.startswith(cut)
        assert len(encode(bpe, cut)) <= limit
