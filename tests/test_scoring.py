"""Scores of text answers: normalisation, exact match, token F1, containment, answer tags."""

import json
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import HOTPOTQA
from tspo_trl import Passage, Turn
from tspo_trl.inspect.spans import find_answers
from tspo_trl.scoring import (
    BREAK,
    contains_answer,
    exact_match,
    extract_answer,
    f1_score,
    normalize_answer,
    searched_answer,
    searched_text,
    triviaqa_exact_match,
)

# Letters, articles, punctuation, whitespace and some difficult characters (final sigma, dotted I, combining accent)
TEXTS = st.text(alphabet=string.ascii_letters + string.punctuation + " \t\n0123éßΣİ\u0301\u00a0日", max_size=30)
ANSWERS = st.lists(
    st.sampled_from("the The a an Eiffel tower tower! paris, 1887 - yes no noanswer !!!".split()), max_size=6
)
PHRASES = ANSWERS.map(" ".join)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("", ""),
        ("Paris", "paris"),
        ("The  Eiffel Tower!", "eiffel tower"),
        ("  a\tcat \n and an  owl ", "cat and owl"),
        ("The The", ""),
        ("a", ""),
        ("!!!", ""),
        ("Theatre and Analysis", "theatre and analysis"),  # articles are removed only as whole words
        ("U.S.A.", "usa"),
        ("state-of-the-art", "stateoftheart"),  # punctuation is removed first, so no article is left
        ("rock 'n' roll", "rock n roll"),
        ("O'Neill's", "oneills"),
        ("$1,000.50", "100050"),
        ("a.k.a. the Boss", "aka boss"),
        (string.punctuation, ""),
        ("“Curly” quotes — dash", "“curly” quotes — dash"),  # only ASCII punctuation, as in SQuAD
        ("ÉCOLE", "école"),
        ("東京", "東京"),
        ("non\u00a0breaking", "non breaking"),
    ],
)
def test_normalize_answer_follows_squad(text, normalized):
    assert normalize_answer(text) == normalized


@settings(deadline=None, max_examples=200)
@given(st.one_of(TEXTS, st.text(max_size=20)))
def test_normalizing_twice_changes_nothing(text):
    once = normalize_answer(text)
    assert normalize_answer(once) == once


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("Paris", ["Paris"], 1.0),
        (" the PARIS. ", ["Paris"], 1.0),
        ("Paris", ["Rome", "paris!"], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("Pari", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        (None, ["Paris"], 0.0),
        ("Paris", [], 0.0),
        (None, [], 0.0),
        # a golden answer that normalises to the empty string is compared without normalisation
        ("The The", ["The The"], 1.0),
        (" the the\n", ["The The"], 1.0),
        ("the", ["The The"], 0.0),
        ("a", ["The The"], 0.0),
        ("!!!", ["The The"], 0.0),
        ("!!!", ["!!!"], 1.0),
        (" !!! ", ["!!!"], 1.0),
        ("!!", ["!!!"], 0.0),
        ("", ["!!!"], 0.0),
        (None, ["!!!"], 0.0),
        ("", [""], 0.0),
        (" ", [""], 0.0),
        (" ", [" "], 0.0),
        (" ", ["Paris"], 0.0),
        ("...", ["Paris"], 0.0),
        ("The The", ["Paris", "The The"], 1.0),
    ],
)
def test_exact_match(prediction, golds, score):
    result = exact_match(prediction, golds)
    assert isinstance(result, float)
    assert result == score


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("Eiffel Tower", ["the Eiffel Tower"], 1.0),
        ("tower eiffel", ["Eiffel Tower"], 1.0),  # order does not count
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # 2/3
        ("Tower", ["Eiffel Tower"], 2 * 1 * 0.5 / 1.5),  # 2/3
        ("Paris Paris", ["Paris"], 2 * 0.5 * 1 / 1.5),  # a repeated token is counted once
        ("Paris Paris", ["Paris Paris Texas"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # 0.8
        ("John Adams", ["Quincy Adams Smith"], 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),  # 0.4
        ("Rome", ["Paris"], 0.0),
        ("Tower", ["Paris", "Eiffel Tower", "the tower"], 1.0),  # the best golden answer counts
        ("", ["Paris"], 0.0),
        (None, ["Paris"], 0.0),
        ("the", ["Paris"], 0.0),
        ("Paris", [], 0.0),
        # yes, no and noanswer are right or wrong
        ("Yes.", ["yes"], 1.0),
        ("no", ["no"], 1.0),
        ("noanswer", ["noanswer"], 1.0),
        ("yes it is", ["yes"], 0.0),
        ("yes", ["yes it is"], 0.0),
        ("no", ["no man's land"], 0.0),
        ("noanswer here", ["noanswer"], 0.0),
        ("yes", ["no", "yes"], 1.0),
        ("nobody", ["nobody knows"], 2 * 1 * 0.5 / 1.5),
        # a golden answer without tokens has no token F1
        ("The The", ["The The"], 1.0),
        ("the", ["The The"], 0.0),
        ("!!!", ["!!!"], 1.0),
    ],
)
def test_f1_score(prediction, golds, score):
    result = f1_score(prediction, golds)
    assert isinstance(result, float)
    assert result == pytest.approx(score)


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.none(), PHRASES, TEXTS), st.lists(st.one_of(PHRASES, TEXTS), max_size=3))
def test_f1_is_between_0_and_1_and_never_below_exact_match(prediction, golds):
    f1, match = f1_score(prediction, golds), exact_match(prediction, golds)
    assert 0.0 <= f1 <= 1.0
    assert match in (0.0, 1.0)
    if match == 1.0 and any(normalize_answer(gold) for gold in golds):
        assert f1 == 1.0


@settings(deadline=None, max_examples=200)
@given(st.one_of(PHRASES, TEXTS), st.one_of(PHRASES, TEXTS))
def test_an_exact_match_contains_the_answer_and_f1_is_symmetric(prediction, gold):
    if exact_match(prediction, [gold]):
        assert contains_answer(prediction, [gold])
    if normalize_answer(prediction) and normalize_answer(gold):
        assert f1_score(prediction, [gold]) == pytest.approx(f1_score(gold, [prediction]))


@pytest.mark.parametrize(
    ("text", "golds", "found"),
    [
        ("Paris is the capital of France.", ["Paris"], True),
        ("The capital is PARIS.", ["paris"], True),
        ("The capital is Paris", ["the paris"], True),
        ("He took the bus.", ["us"], False),
        ("Give it to us!", ["us"], True),
        ("Give us it.", ["us"], True),
        ("Parisian life", ["Paris"], False),
        ("It stands in New\n York City.", ["New York"], True),
        ("New Jersey, York", ["New York"], False),
        ("New York", ["New York City"], False),
        ("the University of the Arts", ["University of Arts"], True),
        ("J.R.R. Tolkien", ["JRR Tolkien"], True),
        ("born in 1999", ["199"], False),
        ("born in 1999", ["Rome", "1999"], True),
        ("Paris", [], False),
        ("", ["Paris"], False),
        (None, ["Paris"], False),
        ("Paris", [""], False),
        ("Paris", [" "], False),
        # a golden answer that normalises to the empty string is searched for without normalisation
        ("The band The The was founded in 1979.", ["The The"], True),
        ("the band was the best", ["The The"], False),
        ("bathe the cat", ["The The"], False),
        ("a band called !!! (chk chk chk)", ["!!!"], True),
        ("What!", ["!!!"], False),
        ("no punctuation", ["!!!"], False),
        ("a tale of a tub", ["a"], True),
        ("tale of tub", ["a"], False),
        ("1 + 1 = 2", ["+"], True),  # regular expression characters are literal
        ("1 and 1", ["."], False),
    ],
)
def test_contains_answer_finds_whole_words(text, golds, found):
    assert contains_answer(text, golds) is found


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Jane Austen's novel", "Jane Austen"),
        ("the world’s largest", "world"),
        ("a Paris-based company", "Paris"),
        ("Paris/London", "London"),
        ("in Paris[1]", "Paris"),
        ("in Paris²", "Paris"),
        ("“Paris”", "Paris"),
        ("Paris…", "Paris"),
        ("the season 1969–70", "1969"),
        ("the season 1969–70", "1969-70"),
        ("until 1981.It was", "1981"),
        ("a 9-year-old", "9"),
        ("Martha’s Vineyard", "Martha's Vineyard"),
        ("Rock ’n’ Roll", "Rock 'n' Roll"),
        ("l’Orient-Express", "Orient"),
        ("Beyonce\u0301 sang", "Beyoncé"),
        ("ＰＡＲＩＳ", "Paris"),
        ("Pa\u00adris-based", "Paris"),
        ("in der Hauptstraße", "HAUPTSTRASSE"),
        ("a U.S.-based company", "US"),
        ("a U.S.-based company", "U.S."),
        ("a The Hague-based court", "The Hague"),
        ("J. R. R. Tolkien's books", "J.R.R. Tolkien"),
        ("J.R.R. Tolkien’s books", "J. R. R. Tolkien"),
        ("a Spider Man/Hulk comic", "Spider-Man"),
        ("AT&T-owned", "AT&T"),
        ("12,000-strong", "12,000"),
        # scripts without spaces between words
        ("他住在北京市", "北京"),
        ("東京は日本の首都です", "日本"),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ"),
        ("生于2008年", "2008"),
        # acronyms in answers of several words
        ("a Washington, D.C.-based group", "Washington, DC"),
        ("the U.S. Navy's", "US Navy"),
        ("J.R.R. Tolkien's", "JRR Tolkien"),
        ("J. R. R. Tolkien", "JRR Tolkien"),
        ("George H. W. Bush's", "George HW Bush"),
        # apostrophes
        ("the 1990’s", "1990s"),
        ("McDonald’s", "McDonalds"),
        ("5’10”", "5'10\""),
        ("12’000", "12'000"),
        ("Hawaiʻi", "Hawai'i"),
        ("Qurʼan", "Qur'an"),
        # hyphens
        ("F-16's", "F16"),
        ("an F-16/F-18 fleet", "F16"),
        ("e‑mail’s", "email"),
        ("Spider-Man's", "Spiderman"),
        ("X Men's", "X-Men"),
        ("Jay Z's", "Jay-Z"),
        # characters that are written small, and marks
        ("10 km²", "10 km2"),
        ("m2", "m²"),
        ("Emma™", "Emma"),
        ("Emmaª", "Emma"),
        ("Москва\u0301", "Москва"),
        ("مُحَمَّد", "محمد"),
        ("İstanbul-based", "istanbul"),
        # Korean particles
        ("서울은", "서울"),
        ("1945년", "1945"),
        ("BTS는", "BTS"),
    ],
)
def test_punctuation_separates_words(text, gold):
    assert contains_answer(text, [gold])
    assert not contains_answer(text, [f"{gold}x"])
    assert find_answers(text, [gold])


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("a random word", "A"),
        ("12,000 people", "12"),
        ("12,000 people", "000"),
        ("3.5 million", "5"),
        ("at 12:30", "30"),
        ("the 1990s", "1990"),
        ("in 1969 70 people came", "1969-70"),
        ("Austen's", "S"),
        ("don't", "T"),
        ("she arrived at T-Mobile", "AT&T"),
        ("a Parisian-style café", "Paris"),
        ("Beyoncé", "Beyonce"),
        ("生于12008年", "2008"),
        ("the U.S.S.R. fell", "US"),
        ("the U.S.S.R. fell", "U.S."),
        ("The Man from U.N.C.L.E.", "UN"),
        ("N.A.S.A.", "NA"),
        ("the A.C.L.U.", "AC"),
        ("J.F.K.", "FK"),
        ("World War I. I went", "World War II"),
        ("a team of three", "A-Team"),
        ("Austen's team", "S-Team"),
        ("in 1-2-3/4 steps", "123"),
        ("Paris²", "2"),
        ("10²", "102"),
        ("구서울", "서울"),
        ("12만", "12"),
    ],
)
def test_parts_of_words_and_numbers_are_not_found(text, gold):
    assert not contains_answer(text, [gold])


@pytest.mark.parametrize(
    ("end", "start"),
    [("by Jane", "Austen"), ("the Spider", "Man"), ("in 1969", "70"), ("J.", "Rowling"), ("Ada", "B.")],
)
def test_no_answer_reaches_across_the_titles_and_texts_of_passages(end, start):
    gold = " ".join(f"{end} {start}".split()[-2:])
    for answer in (gold, gold.replace(" ", "-")):
        assert contains_answer(f"{end} {start}", [gold])
        assert not contains_answer(f"{end}\n{BREAK}\n{start}", [answer])
    assert f"\n{BREAK}\n" in Turn(token_ids=[], passages=[Passage("0", end, start)]).passage_text
    assert contains_answer("a pilcrow ¶ in the text", ["pilcrow ¶ in"])


@settings(deadline=None, max_examples=300)
@given(*[st.text("aAtTeEnNsU.,'’- 129²ßé日서\u0301‑", max_size=25)] * 2, st.integers(0, 20), st.integers(1, 6))
def test_what_is_seen_before_the_expressions_changes_no_result(text, other, start, size):
    for gold in (other[:size], text[start : start + size]):
        answer, searched = searched_answer(gold), searched_text(text)
        plain = any(True for _ in answer.finditer(searched.folded if answer.joined else text))
        straight = normalize_answer(text.replace("’", "'").replace("‑", "-"))
        joined = answer.joined and f" {answer.joined} " in f" {straight} "
        assert contains_answer(text, [gold]) == bool(plain or joined)


def test_an_article_in_upper_case_is_found_in_upper_case():
    assert contains_answer("the grade A", ["A"])
    assert contains_answer("a", ["A"])  # the whole text, as for the exact match
    assert not contains_answer("the grade a", ["A"])


@settings(deadline=None, max_examples=300)
@given(TEXTS, TEXTS)
def test_separating_words_loses_nothing_that_joining_them_finds(text, gold):
    for answer in (gold, text[len(text) // 3 : 2 * len(text) // 3]):
        joined = normalize_answer(answer)
        if joined and f" {joined} " in f" {normalize_answer(text)} ":
            assert contains_answer(text, [answer])


def test_answers_in_real_passages():
    """Names and years of the sample: every spelling that a reader sees as separate words is found."""
    missed = []
    found_by_both = 0
    for line in (HOTPOTQA / "passages.jsonl").read_text(encoding="utf-8").splitlines():
        passage = json.loads(line)
        for gold in set(re.findall(r"\b(?:[A-Z][a-z]{3,}(?: [A-Z][a-z]{3,})+|(?:1[5-9]|20)\d\d)\b", passage["text"])):
            found_by_both += 1
            if not contains_answer(passage["text"], [gold]):
                missed.append((gold, passage["id"]))
    assert found_by_both > 2000
    assert missed == []


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from("north south lake town".split()), max_size=4),
    st.lists(st.sampled_from("north south lake town".split()), min_size=1, max_size=2),
)
def test_contains_answer_needs_consecutive_words(words, gold):
    found = any(words[i : i + len(gold)] == gold for i in range(len(words)))
    assert contains_answer(" ".join(words), [" ".join(gold)]) is found


@pytest.mark.parametrize(
    ("prediction", "gold", "squad", "triviaqa"),
    [
        ("Spider Man", "Spider-Man", 0.0, 1.0),
        ("USA", "U.S.A.", 1.0, 0.0),
        ("Martha s Vineyard", "Martha’s Vineyard", 0.0, 1.0),
        ("the snake_case", "Snake Case", 0.0, 1.0),
        ("“Emma”", "Emma", 0.0, 0.0),  # both read ASCII quotes only, and TriviaQA the single ones
        ("The", "The The", 0.0, 0.0),
        (None, "Emma", 0.0, 0.0),
    ],
)
def test_triviaqa_treats_punctuation_as_spaces(prediction, gold, squad, triviaqa):
    assert exact_match(prediction, [gold]) == squad
    assert triviaqa_exact_match(prediction, ["other", gold]) == triviaqa


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("I think <answer> Paris </answer> is right", "Paris"),
        ("<answer>Rome</answer> no, <answer>Paris</answer>", "Paris"),  # the last one
        ("<answer>Paris</answer> or <answer>Rome", "Paris"),  # the last well-formed one
        ("<answer>Rome <answer>Paris</answer>", "Paris"),
        ("<answer>Rome <answer>Paris</answer> Oslo</answer>", "Paris"),
        ("<answer>New\nYork\n</answer>", "New\nYork"),
        ("<answer></answer>", ""),
        ("<answer>Paris</answer><answer> </answer>", ""),
        ("<answer>Paris", None),
        ("Paris</answer>", None),
        ("</answer>Paris<answer>", None),
        ("<answer>Paris</search>", None),
        ("<ANSWER>Paris</ANSWER>", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_extract_answer_takes_the_last_well_formed_tag(text, answer):
    assert extract_answer(text) == answer
