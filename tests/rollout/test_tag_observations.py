"""The tags protocol: observations keep their budget and show passages as recorded."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.passages import PASSAGES, ROOMY, WORDS
from helpers.tag_protocols import TAG_PROTOCOLS, encode, inside, neutralized
from tspo_trl import Passage
from tspo_trl.rollout.protocol import NOTHING_FOUND


@pytest.fixture(params=list(TAG_PROTOCOLS))
def protocol(request):
    return TAG_PROTOCOLS[request.param]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(TAG_PROTOCOLS)), PASSAGES, st.integers(0, 150))
@example("bytes", [Passage(str(number), "", "long " * 30) for number in range(5)], 2)
def test_an_observation_stays_within_its_budget_and_its_tags(name, passages, extra):
    protocol = TAG_PROTOCOLS[name]
    budget = protocol.min_observation_tokens + extra
    observation = protocol.observe(passages, budget)
    assert len(observation.token_ids) <= budget
    assert inside(protocol, observation.token_ids)
    shown = {passage.id: passage.text for passage in observation.passages}
    assert list(shown) == [passage.id for passage in passages if passage.id in shown]
    whole = [neutralized(protocol, passage.text) for passage in passages]
    assert all(whole[int(number)].startswith(text) for number, text in shown.items())
    # text is cut only if the budget is used up
    if passages and len(observation.token_ids) < budget:
        assert list(shown.values()) == whole


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(TAG_PROTOCOLS)), PASSAGES)
def test_an_observation_with_room_shows_everything(name, passages):
    protocol = TAG_PROTOCOLS[name]
    observation = protocol.observe(passages, ROOMY)
    assert [passage.id for passage in observation.passages] == [passage.id for passage in passages]
    for before, after in zip(passages, observation.passages, strict=True):
        assert after.score == before.score
        if not set(before.text) & set("<\x00") and before.text.isprintable():
            assert after.text == before.text


def test_minimum_number_of_tokens_of_an_observation(protocol):
    tags = len(encode(protocol, "\n\n<information>")) + len(encode(protocol, "</information>\n\n"))
    fewest = protocol.min_observation_tokens
    assert fewest == tags + 1
    for passages in ([], [Passage("0", "", "Paris")], [Passage(str(i), "Rome", "Paris") for i in range(3)]):
        assert len(protocol.observe(passages, fewest).token_ids) == fewest
        for budget in (fewest - 1, 0, -1):
            with pytest.raises(ValueError, match=f"`max_tokens` is {budget}.*{fewest}"):
                protocol.observe(passages, budget)


def test_long_passages_use_the_room_that_short_ones_leave(words):
    short = Passage("short", "", "Paris")
    long = [Passage(str(number), "", WORDS * 10) for number in range(2)]
    budget = 100
    observation = words.observe([long[0], short, long[1]], budget)
    assert len(observation.token_ids) == budget
    first, middle, last = observation.passages
    assert middle is short
    # two thirds of the budget are about 31 words for each long passage; the short one leaves room for more
    lengths = [len(passage.text.split()) for passage in (first, last)]
    assert min(lengths) > 38
    assert abs(lengths[0] - lengths[1]) <= 1


def test_long_passages_get_equal_shares(words):
    passages = [Passage(str(number), "", "long " * (100 + number)) for number in range(4)]
    observation = words.observe(passages, words.min_observation_tokens - 1 + 4 * 20)
    assert [len(passage.text.split()) for passage in observation.passages] == [18] * 4  # without "Doc" and "1"


def test_a_passage_is_cut_at_its_end(words):
    passage = Passage("0", "Rome", WORDS)
    for budget in range(words.min_observation_tokens, 60):
        observation = words.observe([passage], budget)
        decoded = words.tokenizer.decode(inside(words, observation.token_ids))
        assert decoded.split()[:1] == ["Doc"]
        for shown in observation.passages:
            assert WORDS.startswith(shown.text)
            assert " ".join(shown.text.split()) in " ".join(decoded.split())
    assert observation.passages == [passage]


def test_passages_shown_unchanged_are_the_same_objects(protocol):
    passages = [Passage("0", "Rome", "Rome is the capital of Italy .", 2.5), Passage("1", "", "Paris", 1.5)]
    observation = protocol.observe(passages, 300)
    assert all(after is before for after, before in zip(observation.passages, passages, strict=True))


def test_passages_are_shown_with_numbers_and_titles(bpe):
    passages = [
        Passage("7", "Rome", "Rome is the capital."),
        Passage("8", "", "Paris is one."),
        Passage("9", "Oslo", ""),
    ]
    decoded = bpe.tokenizer.decode(bpe.observe(passages, 300).token_ids)
    assert decoded == (
        "\n\n<information>Doc 1 (Title: Rome) Rome is the capital.\nDoc 2 Paris is one.\nDoc 3 (Title: Oslo) \n"
        "</information>\n\n"
    )


def test_the_observation_says_that_nothing_was_found(protocol):
    observation = protocol.observe([], 300)
    assert observation.passages == []
    assert inside(protocol, observation.token_ids) == encode(protocol, NOTHING_FOUND)


def test_observations_of_the_same_passages_are_equal_and_independent(protocol):
    passages = [Passage("0", "Rome", WORDS)]
    first = protocol.observe(passages, 30)
    again = list(first.token_ids)
    first.token_ids.clear()
    assert protocol.observe(passages, 30).token_ids == again
    # an older observation is not reused for another score or position
    scored = protocol.observe([Passage("0", "Rome", WORDS, 9.0)], 30)
    assert scored.passages[0].score == 9.0
    assert "Doc 2" in protocol.tokenizer.decode(protocol.observe([Passage("1", "", "Paris"), *passages], 60).token_ids)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.text("abc <>/[]\n", max_size=40), min_size=1, max_size=3), st.integers(0, 60))
def test_recorded_text_was_shown(texts, extra):
    protocol = TAG_PROTOCOLS["bytes"]
    passages = [Passage(str(number), "", text) for number, text in enumerate(texts)]
    observation = protocol.observe(passages, protocol.min_observation_tokens + extra)
    decoded = protocol.tokenizer.decode(observation.token_ids)
    for passage in observation.passages:
        assert passage.text in decoded


def test_an_incomplete_character_does_not_count_as_shown(bpe):
    for extra in range(30):  # a budget may end between the three bytes of a character
        observation = bpe.observe([Passage("0", "", "日本語")], bpe.min_observation_tokens + extra)
        assert observation.passages[0].text in bpe.tokenizer.decode(observation.token_ids)


def test_a_title_that_was_not_shown_does_not_count_as_shown(bpe):
    # a golden answer in such a title would be rewarded although the model never saw it
    title = "one two three four five six seven eight nine ten"
    for extra in range(60):
        observation = bpe.observe([Passage("0", title, "Paris")], bpe.min_observation_tokens + extra)
        assert all(passage.title in bpe.tokenizer.decode(observation.token_ids) for passage in observation.passages)
    assert observation.passages[0].title == title
