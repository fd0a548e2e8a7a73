"""The words by which BM25 finds passages: one character, languages, scripts without spaces."""

import json
import logging
import re

import pytest

from tspo_trl import BM25Retriever, Passage, open_retriever
from tspo_trl.retrieval.base import TRIAL_QUERY
from tspo_trl.retrieval.words import WORDS_VERSION, index_words, split_words


def passages(**texts):
    return [Passage(id=name, title="", text=text) for name, text in texts.items()]


def best(retriever, query):
    (found,) = retriever.search([query], 1)
    return found[0].id if found else None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("R is a language.", ["R", "is", "a", "language"]),
        ("Apollo 9, not 8", ["Apollo", "9", "not", "8"]),
        ("Austen's novel; don't, O'Brien", ["Austen", "novel", "don", "O", "Brien"]),
        ("Austen’s café", ["Austen", "café"]),
        ("cafe\u0301 ＰＡＲＩＳ", ["café", "PARIS"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("北京大学", ["北京", "京大", "大学"]),
        ("日", ["日"]),
        ("東京2008年に", ["東京", "2008", "年に"]),
        ("서울은 수도", ["서울", "울은", "수도"]),
        ("", []),
        ("!?", []),
    ],
)
def test_words_of_a_text(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
def test_words_of_one_character_are_searched(backend):
    languages = passages(c="The C programming language", r="The R programming language", j="The J programming language")
    missions = passages(a8="Apollo 8 went to the moon", a9="Apollo 9 stayed near the earth", a7="Apollo 7 flew")
    assert [best(BM25Retriever(languages, backend), f"{name} programming language") for name in "CRJ"] == [
        "c",
        "r",
        "j",
    ]
    assert [best(BM25Retriever(missions, backend), f"Apollo {number}") for number in "789"] == ["a7", "a8", "a9"]


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
@pytest.mark.parametrize(
    ("query", "found"),
    [("北京的大学", "zh"), ("東京タワー", "ja"), ("กรุงเทพอยู่ที่ไหน", "th"), ("capital of France", "en")],
)
def test_scripts_without_spaces_are_searched(backend, query, found):
    corpus = passages(
        zh="北京大学位于北京市海淀区。",
        ja="東京タワーは東京都港区にある。",
        th="กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
        en="Paris is the capital of France.",
    )
    assert best(BM25Retriever(corpus, backend), query) == found


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
@pytest.mark.parametrize(
    ("query", "found"), [("猫", "zh"), ("日", "ja"), ("서울", "ko"), ("부산", "ko"), ("물", "ko"), ("istanbul", "tr")]
)
def test_a_character_and_a_word_without_its_particle_are_searched(backend, query, found):
    corpus = passages(
        zh="我的猫很大。",
        ja="日本の首都",
        ko="서울은 수도이고 부산은 물가에 있다",
        tr="İstanbul büyük bir şehir",
        en="Paris is big",
    )
    language = {"language": "turkish"} if backend == "bm25s" and found == "tr" else {}
    assert best(BM25Retriever(corpus, backend, **language), query) == found


def test_an_index_of_another_rule_for_words_is_reported(tmp_path, caplog):
    BM25Retriever(passages(a="Emma")).save(tmp_path)
    present = BM25Retriever.load(tmp_path).fingerprint
    assert "rule for words" not in caplog.text
    about = json.loads((tmp_path / "index.json").read_text())
    assert about["words"] == WORDS_VERSION
    del about["words"]
    (tmp_path / "index.json").write_text(json.dumps(about))
    old = BM25Retriever.load(tmp_path)
    assert f"version 2 of the rule for words, the present one is {WORDS_VERSION}. Index the corpus" in caplog.text
    assert best(old, "Emma") == "a"
    assert old.fingerprint != present


def test_the_language_selects_stop_words_and_stemmer():
    corpus = passages(a="Die Häuser der Stadt", b="Die Katzen und der Hund", c="Die Bücher")
    assert best(BM25Retriever(corpus, language="german"), "Katze") == "b"
    assert best(BM25Retriever(corpus, language="english"), "Katze") is None
    assert index_words(["Die Katzen und der Hund"], "german") == [["katz", "hund"]]
    assert index_words(["Running and the cats"], None) == [["running", "and", "the", "cats"]]
    assert BM25Retriever(corpus).fingerprint != BM25Retriever(corpus, language=None).fingerprint


def test_a_saved_index_keeps_its_language(tmp_path):
    corpus = passages(a="Die Häuser der Stadt", b="Die Katzen und der Hund")
    retriever = BM25Retriever(corpus, language="german")
    retriever.save(tmp_path / "index")
    loaded = BM25Retriever.load(tmp_path / "index")
    assert (loaded.language, loaded.fingerprint) == ("german", retriever.fingerprint)
    assert best(loaded, "Katze") == "b"


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"`language` must be None .*german.*got 'klingon'"):
        BM25Retriever(passages(a="text"), language="klingon")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("that is it", "all its words are stop words of the language 'english'"),
        ("unknown words", r"none of its words \['unknown', 'word'\] is in the corpus"),
        ("?!", "it has no letters or digits"),
    ],
)
def test_queries_that_find_nothing_are_reported_once(caplog, query, reason):
    retriever = BM25Retriever(passages(a="Emma is a novel"))
    with caplog.at_level(logging.WARNING):
        assert retriever.search([query, query], 1) == [[], []]
        retriever.search([query] * 20, 1)
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.getMessage().startswith(f"The query {query!r} finds no passage: ")
    assert re.search(reason, record.getMessage())


def test_a_single_query_that_finds_nothing_is_not_reported_later(caplog):
    retriever = BM25Retriever(passages(a="Emma is a novel"))
    retriever.search(["Emma", "nothing"], 1)
    retriever.search(["nothing"], 1)
    assert "finds no passage" not in caplog.text
    retriever.search(["北京在哪里"] * 8, 1)  # another language
    assert "'北京在哪里' finds no passage: none of its words" in caplog.text


def test_a_trial_search_is_not_reported_and_leaves_the_report_to_others(caplog):
    retriever = BM25Retriever(passages(a="Emma is a novel"))
    retriever.search([TRIAL_QUERY], 1)
    retriever.search([TRIAL_QUERY] * 20, 1)
    assert "finds no passage" not in caplog.text
    retriever.search(["北京在哪里"], 1)
    assert "'北京在哪里' finds no passage" in caplog.text


def test_passages_without_words_are_reported(caplog):
    BM25Retriever(passages(a="Emma", b="the", c="…"))
    assert "2 of 3 passages have no words, so they are never found. The first is 'b'." in caplog.text


def test_the_language_of_a_corpus_and_of_an_index(tmp_path):
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text('{"id": "a", "title": "", "text": "Die Katzen und der Hund"}\n', encoding="utf-8")
    assert [open_retriever(corpus=corpus, language=name).language for name in (None, "german", "none")] == [
        "english",
        "german",
        None,
    ]
    open_retriever(corpus=corpus, language="german").save(tmp_path / "index")
    assert open_retriever(index=tmp_path / "index").language == "german"
    assert open_retriever(index=tmp_path / "index", language="german").language == "german"
    with pytest.raises(ValueError, match="has the language 'german', not 'english': index the corpus again"):
        open_retriever(index=tmp_path / "index", language="english")
    for options in ({"url": "http://localhost:1"}, {"corpus": corpus, "backend": "rank_bm25"}):
        with pytest.raises(ValueError, match="only for the backends 'bm25' and 'hybrid'"):
            open_retriever(**options, language="german")
