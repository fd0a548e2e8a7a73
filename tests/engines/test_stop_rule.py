"""The end of a turn with many kinds of tokenizers."""

import pytest
from transformers import GenerationConfig

from helpers.tokenizer_kinds import KINDS, make_byte_level, with_gaps
from tspo_trl.engines.stopping import StopRule

STOPS = ("</search>", "</answer>")


def turn_length(tokenizer, text, **options):
    """Number of tokens of a turn that the rule lets the model write, and of the text."""
    rule = StopRule(tokenizer, STOPS, GenerationConfig(**options))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((n for n in range(1, len(ids) + 1) if rule(ids[:n])), None), len(ids)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("stop", STOPS)
def test_a_turn_ends_with_its_closing_tag(name, stop):
    end, length = turn_length(KINDS[name](), f"<think>one</think><search>capital of italy{stop}")
    assert end == length


@pytest.mark.parametrize("name", list(KINDS))
def test_a_turn_ends_with_each_token_that_ends_generation(name):
    tokenizer = KINDS[name]()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    for token in ("<|im_end|>", "</s>"):
        end, length = turn_length(tokenizer, f"Rome > Paris{token}", eos_token_id=ends)
        assert end == length
    assert turn_length(tokenizer, "Rome > Paris </b>", eos_token_id=ends)[0] is None


def test_a_closing_tag_after_a_gap_in_the_ids_ends_a_turn():
    tokenizer = with_gaps(make_byte_level(), "</search>")
    assert tokenizer.convert_tokens_to_ids("</search>") > len(tokenizer)
    end, length = turn_length(tokenizer, "<search>Rome</search>")
    assert end == length
