"""Protocols with many kinds of tokenizers."""

import pytest

from helpers.passages import ROOMY, TAGS
from helpers.tokenizers import KINDS, make_byte_level, make_wordpiece, with_special_tags
from tspo_trl import Passage, TagProtocol

TOKENIZERS = {name: make() for name, make in KINDS.items()}
PROTOCOLS = {name: TagProtocol(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.fixture(params=list(PROTOCOLS))
def protocol(request):
    return PROTOCOLS[request.param]


def read(protocol, text):
    """The action of a turn, as the search loop reads it."""
    ids = protocol.tokenizer(text, add_special_tokens=False)["input_ids"]
    (text,) = protocol.tokenizer.batch_decode([ids], skip_special_tokens=True)
    return protocol.parse(text, ended=True)


def test_a_turn_is_read(protocol):
    assert read(protocol, "<think>one</think><search>capital of italy</search>") == ("search", "capital of italy")
    assert read(protocol, "<think>one</think><answer>italy</answer><|im_end|>") == ("answer", "italy")
    assert read(protocol, "italy<|im_end|>") == ("none", "")


def test_tags_that_are_special_tokens_are_read():
    tokenizer = with_special_tags(make_byte_level())
    protocol = TagProtocol(tokenizer)
    assert read(protocol, "<search>Rome</search>") == ("search", "Rome")
    ids = tokenizer("<search>Rome</search>")["input_ids"]
    assert len(ids) < 10
    assert protocol.tokenizer("<search>Rome</search>")["input_ids"] == ids
    assert protocol.tokenizer.decode(ids, skip_special_tokens=True) == "<search>Rome</search>"
    # other special tokens are still left out, and the tokenizer of the user is unchanged
    end = tokenizer.eos_token_id
    assert protocol.tokenizer.decode([*ids, end], skip_special_tokens=True) == "<search>Rome</search>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Rome"


def test_a_passage_does_not_become_tags_that_are_special_tokens():
    tokenizer = with_special_tags(make_byte_level())
    protocol = TagProtocol(tokenizer)
    text = "".join(TAGS) + "< search > <ANSWER>"
    observation = protocol.observe([Passage("0", "", text)], ROOMY)
    tags = tokenizer.convert_tokens_to_ids(TAGS)
    assert [i for i in observation.token_ids if i in tags] == tokenizer.convert_tokens_to_ids(
        ["<information>", "</information>"]
    )


def test_a_tokenizer_without_special_tags_is_used_as_it_is():
    tokenizer = make_byte_level()
    assert TagProtocol(tokenizer).tokenizer is tokenizer


def test_a_tokenizer_that_does_not_keep_tags_is_refused():
    with pytest.raises(ValueError, match=r"protocol='tags'.*decodes this text as '< search"):
        TagProtocol(make_wordpiece())
