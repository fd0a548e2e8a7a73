"""Retrievers joined by reciprocal rank fusion."""

import pytest

from tspo_trl.retrieval import BM25Retriever, CachedRetriever, Passage, RetrievalError
from tspo_trl.retrieval.hybrid import HybridRetriever
from tspo_trl.retrieval.results import search_each

PASSAGES = {name: Passage(name, "", f"text {name}", 1.0) for name in "abcdef"}


class Ranked:
    """Returns the passages of a given order. Remembers for how many it was asked."""

    def __init__(self, order):
        self.order, self.fingerprint, self.asked = order, f"ranked {order}", []

    def search(self, queries, k):
        self.asked.append(k)
        return [[PASSAGES[name] for name in self.order[:k]] for _ in queries]


def test_scores_are_those_of_the_formula():
    (found,) = HybridRetriever([Ranked("abc"), Ranked("cad")]).search(["q"], 4)
    expected = {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    assert {p.id: p.score for p in found} == pytest.approx(expected)
    assert [p.id for p in found] == ["a", "c", "b", "d"]
    assert found[0].text == "text a"


def test_weights_constant_and_depth():
    (found,) = HybridRetriever([Ranked("ab"), Ranked("ba")], weights=[1, 3], rank_constant=1).search(["q"], 2)
    assert {p.id: p.score for p in found} == pytest.approx({"a": 1 / 2 + 3 / 3, "b": 1 / 3 + 3 / 2})
    retrievers = [Ranked("abcdef"), Ranked("fedcba")]
    (found,) = HybridRetriever(retrievers, depth=2).search(["q"], 1)
    assert [retriever.asked for retriever in retrievers] == [[2], [2]]
    assert [p.id for p in found] == ["a"]  # equal scores: the first retriever counts
    HybridRetriever(retrievers, depth=2).search(["q"], 5)
    assert retrievers[0].asked == [2, 5]


def test_passages_without_ids_are_the_same_if_their_titles_and_texts_are():
    class Texts(Ranked):
        def search(self, queries, k):
            return [[*self.order] for _ in queries]

    (found,) = HybridRetriever([Texts(["one", "two"]), Texts(["two", "A\ntwo"])]).search(["q"], 5)
    assert [(p.id, p.title, p.text) for p in found] == [("", "", "two"), ("", "", "one"), ("", "A", "two")]


def test_a_failed_query_fails_alone():
    class Malformed(Ranked):
        def search(self, queries, k):
            return [None if query == "bad" else [PASSAGES["b"]] for query in queries]

    good, bad = search_each(HybridRetriever([Ranked("ab"), Malformed("")]), ["good", "bad"], 2)
    assert [p.id for p in good] == ["b", "a"]
    assert isinstance(bad, RetrievalError)


def test_a_retriever_that_fails_fails_the_search():
    class Down:
        def search(self, queries, k):
            raise TimeoutError("too slow")

    with pytest.raises(TimeoutError, match="too slow"):
        HybridRetriever([Ranked("ab"), Down()]).search(["q"], 2)


def test_the_fingerprint_needs_those_of_all(tmp_path):
    class Nameless:
        def search(self, queries, k):
            return [[] for _ in queries]

    assert HybridRetriever([Ranked("ab"), Nameless()]).fingerprint is None
    both = HybridRetriever([Ranked("ab"), Ranked("ba")])
    assert "ranked ab" in both.fingerprint
    assert both.fingerprint != HybridRetriever([Ranked("ab"), Ranked("ba")], depth=3).fingerprint
    assert CachedRetriever(both).search(["q"], 1) == both.search(["q"], 1)


@pytest.mark.parametrize(
    ("retrievers", "options", "message"),
    [
        (Ranked("ab"), {}, "`retrievers` must be a list of retrievers, got `Ranked`"),
        ([Ranked("ab")], {}, "at least two retrievers, got 1"),
        ([Ranked("ab"), "bm25"], {}, "must be an object with a method"),
        ([Ranked("ab"), Ranked("ab")], {"weights": [1]}, "for each of 2 retrievers"),
        ([Ranked("ab"), Ranked("ab")], {"weights": [1, 0]}, "`weights` must have a positive number"),
        ([Ranked("ab"), Ranked("ab")], {"weights": [1, float("nan")]}, "`weights` must have a positive number"),
        ([Ranked("ab"), Ranked("ab")], {"weights": [1, "2"]}, "`weights` must have a positive number"),
        ([Ranked("ab"), Ranked("ab")], {"rank_constant": "60"}, "`rank_constant` must be at least 1, got '60'"),
        ([Ranked("ab"), Ranked("ab")], {"depth": 5.5}, "`depth` must be an integer of at least 1, got 5.5"),
        ([Ranked("ab"), Ranked("ab")], {"rank_constant": 0}, "`rank_constant` must be at least 1, got 0"),
        ([Ranked("ab"), Ranked("ab")], {"depth": 0}, "`depth` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options_are_errors(retrievers, options, message):
    with pytest.raises(ValueError, match=message):
        HybridRetriever(retrievers, **options)


def test_bm25_can_be_a_part():
    bm25 = BM25Retriever([Passage("a", "Paris", "capital of France"), Passage("b", "Rome", "capital of Italy")])
    (found,) = HybridRetriever([bm25, Ranked("ab")]).search(["Italy"], 2)
    assert [p.id for p in found] == ["b", "a"]
