"""Chance in the audit: the same estimate as in training, and what the verdict says of it."""

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.audits import Words, row
from tspo_trl import Passage
from tspo_trl.audit import Chance, Ranks, SampledSearches, summarize, verdict
from tspo_trl.chance import POOL_SEARCHES, PooledRollout, SearchPool
from tspo_trl.credit import eligible_golds
from tspo_trl.rollout.trajectory import Turn


@pytest.fixture
def recipe():
    """The command as a module."""
    return importlib.import_module("tspo_trl.commands.audit")


def test_chance_is_measured_on_a_sample_of_searches_and_reproducible(recipe):
    cities = [("Rome", "Italy"), ("Paris", "France"), ("Oslo", "Reykjavik")] * 200
    rows = [row(f"{city}, {i}?", [gold]) for i, (city, gold) in enumerate(cities)]
    ranks = recipe.search_all(rows, Words(), top_k=2)
    assert ranks == recipe.search_all(rows, Words(), top_k=2)
    assert {(r.plain, r.chance) for r in ranks} == {(1, Chance((0.0, 0.0)))}
    common = recipe.search_all([*rows, row("of Bergen", ["capital"])], Words(), top_k=2)[-1]
    assert common.chance == Chance((1.0, 1.0), "capital")
    two = [row("Rome?", ["France"]), row("Paris?", ["Italy"])]
    found = [(r.plain, r.chance) for r in recipe.search_all(two, Words(), top_k=2)]
    assert found == [(None, Chance((1.0, 1.0), "France")), (None, Chance((1.0, 1.0), "Italy"))]
    (alone,) = recipe.search_all([row("Rome?", ["Italy"])], Words(), top_k=2)
    assert (alone.plain, alone.chance) == (1, None)


def test_not_more_searches_are_kept_than_training_keeps(recipe, monkeypatch):
    samples = []

    class Counted(SampledSearches):
        def __init__(self, searches):
            samples.append([found["question"] for found, _ in searches])
            super().__init__(searches)

    monkeypatch.setattr(recipe, "SampledSearches", Counted)
    recipe.search_all([row(f"Rome {i}", [f"gold {i}"]) for i in range(300)], Words(), top_k=1)
    (sample,) = samples
    assert len(set(sample)) == POOL_SEARCHES
    assert sample != [f"Rome {i}" for i in range(POOL_SEARCHES)]  # not the first ones: files may be sorted


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_chance_is_that_of_training(data):
    """At every k, the audit counts what the pool of training counts in the first k passages."""
    words = st.sampled_from(["Rome", "Italy", "the Paris", "1969", "no", "", "A"])
    texts = st.lists(words, max_size=4).map(" ".join)
    passages = st.lists(st.builds(Passage, id=st.just("0"), title=texts, text=texts), max_size=3)
    golds = st.lists(texts, min_size=1, max_size=2)  # several words, which may be split over passages
    rows = st.builds(row, question=st.sampled_from(["q1", "q2", "q3"]), golds=golds)
    searches = data.draw(st.lists(st.tuples(rows, passages), max_size=6))
    question = data.draw(rows)
    found = SampledSearches(searches).chance(question, top_k=3)
    for k in (1, 2, 3):
        pool = SearchPool()
        for other, its in searches:
            text = Turn(token_ids=[], passages=its[:k]).passage_text
            pool.add([PooledRollout(other["question"], other["golden_answers"], [text])])
        wanted = question["golden_answers"]
        hits, others = pool.count(question["question"], wanted, eligible_golds(wanted, guard="chance"))
        assert (found is None) == (others == 0)
        assert found is None or found.rates[k - 1] == hits / others
    if found is not None:
        assert (found.gold in eligible_golds(question["golden_answers"])) == (found.rates[-1] > 0)


def test_the_verdict_says_what_chance_leaves_of_the_turn_reward():
    def chance_lines(rates, plain=(1, 1, None, None), **options):
        ranks = [Ranks(p, None, (), Chance((rate,), "x")) for p, rate in zip(plain, rates, strict=True)]
        rows = [row(f"q{i}", [f"gold {i}"]) for i in range(4)]
        audit = summarize(rows, ranks, top_k=1, num_passages=1, **options)
        return audit, [
            line for line in verdict(audit) if line.startswith(("Chance", "Turn rewards", "Warning: a search"))
        ]

    _, (line,) = chance_lines([0.0] * 4)
    assert (
        line == "Chance: no search for another question finds a golden answer in 1 passages: every find counts fully."
    )
    audit, (chance, turn, warning) = chance_lines([0.2] * 4, max_searches=2)
    assert audit.chance_hits == pytest.approx((0.2, 0.36))
    assert audit.chance_weights == pytest.approx(((1 - 0.2 / 0.5) ** 2, (1 - 0.36 / 0.5) ** 2))
    assert "probability of 20.0%, with 2 searches of 36.0%. TSPO as published (folr_guard='degenerate') pays" in chance
    assert (
        "with the default folr_guard='chance', a find counts 0.36 in rollouts with one search, and 0.08 with 2 searches"
        in turn
    )
    assert "as long as 50.0% of the rollouts find an answer" in turn
    assert "probability of 20.0%, more than 20% of the hit rate" in warning
    _, (chance, turn, _) = chance_lines([0.5] * 4, max_searches=1)
    assert chance.endswith(
        "with a probability of 50.0%. TSPO as published (folr_guard='degenerate') pays such finds like all others."
    )
    assert "a find counts 0.00 in rollouts with one search, as long as" in turn
    assert len(chance_lines([0.01] * 4)[1]) == 2  # the default: four searches
    assert "with 4 searches" in chance_lines([0.01] * 4)[1][1]
    assert chance_lines([0.01] * 4, plain=(None,) * 4)[0].chance_weights == (0.0,) * 4  # nothing is found but by chance
