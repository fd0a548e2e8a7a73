"""How often golden answers are found by chance, and the weights that follow."""

import random

import pytest
import torch

from tspo_trl import scoring
from tspo_trl.chance import PooledRollout, SearchPool, chance_hits, chance_weights
from tspo_trl.credit import first_occurrence, folr_rewards, folr_turns, summed_turn_advantages, turn_advantages
from tspo_trl.scoring import contains_answer

NONE = torch.zeros(8, dtype=torch.int64)


def pooled(question, golds, *texts):
    return PooledRollout(question, golds, texts)


def test_answers_are_counted_in_the_passages_of_other_questions():
    pool = SearchPool()
    pool.add(
        [
            pooled("Where is Paris?", ["France"], "Paris is in France.", "France borders Spain."),
            pooled("Who wrote Emma?", ["Austen"], "Jane Austen wrote Emma in England.", None),
            pooled("Where is Bath?", ["England", "UK"], "Bath is in England."),
        ]
    )
    assert pool.count("Where is Bath?", ["England"], ["England"]) == (1, 4)  # two of Paris, two of Emma
    assert pool.count("Where is Paris?", ["France"], ["France"]) == (0, 3)
    assert pool.count("another", ["Spain"], ["Spain"]) == (1, 5)
    assert pool.count("another", ["yes"], []) == (0, 5)


def test_questions_that_look_for_the_same_answer_are_not_others():
    pool = SearchPool()
    pool.add([pooled("Capital of France?", ["Paris", "Lutetia"], "Paris"), pooled("q", ["Rome"], "Paris and Rome")])
    assert pool.count("Where is the Louvre?", ["the paris"], ["the paris"]) == (1, 1)
    assert pool.count("q", ["Rome"], ["Rome"]) == (0, 1)


def test_a_full_pool_takes_the_first_rollouts_of_every_group():
    pool = SearchPool(4)
    pool.add([pooled("old", ["o"], "old text")])
    pool.add([pooled("a", ["x"], f"alpha {i}", f"beta {i}") for i in range(3)] + [pooled("b", ["y"], "gamma", None)])
    assert [text for _, _, text in pool.state()] == ["alpha 0", "beta 0", "gamma", ""]
    pool.add([pooled("c", ["z"], "delta")])
    assert [text for _, _, text in pool.state()] == ["beta 0", "gamma", "", "delta"]


def test_a_restored_pool_counts_the_same():
    pool, restored = SearchPool(8), SearchPool(8)
    pool.add([pooled("a", ["The Who", "!!!"], "who is the who"), pooled("b", ["Ａbba"], "Waterloo", None)])
    restored.load_state(pool.state())
    for golds in (["Who"], ["Waterloo"], ["abba"], ["!!!"]):
        assert restored.count("c", golds, golds) == pool.count("c", golds, golds)
    assert restored.state() == pool.state()
    assert SearchPool().count("a", ["x"], ["x"]) == (0, 0)


def test_a_pool_finds_what_each_of_its_texts_contains():
    rng, words = (
        random.Random(0),
        "Paris Paris-based U.S. US us bus F-16's email 北京市 서울은 km² the of !!! A".split(),
    )
    golds = ["Paris", "US", "the US", "F16", "北京", "서울", "km2", "!!!", "A", "of Paris", "is", "Mail", "Rome", ""]
    pool = SearchPool(64)
    for step in range(5):
        texts = [" ".join(rng.choices(words, k=rng.randrange(5))) for _ in range(40)]
        pool.add([pooled(f"{step}", ["Oslo"], *texts)])
        kept = [text for _, _, text in pool.state()]
        for eligible in ([], *([gold] for gold in golds), *(rng.sample(golds, 3) for _ in range(20))):
            assert pool.finds("q", ["Bern"], eligible) == [contains_answer(text, eligible) for text in kept]


def test_passages_are_prepared_once(monkeypatch):
    prepared = []
    monkeypatch.setattr(scoring, "_is_unusual", lambda text: prepared.append(text) or False)
    scoring.searched_text.cache_clear()
    texts = [f"a text about Paris {i}" for i in range(20)]
    assert first_occurrence(texts, ["Oslo", "Rome"]) is None
    pool = SearchPool()
    pool.add([pooled("q", ["Oslo"], *texts)])
    assert pool.count("other", ["text about Paris"], ["text about Paris"]) == (20, 20)
    assert sorted(text for text in prepared if text.endswith(tuple("0123456789"))) == sorted(texts)


def test_a_rollout_with_more_searches_has_more_chances():
    hits = chance_hits(torch.tensor([0.5, 0.0]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), num_generations=4)
    assert torch.allclose(hits, torch.tensor([0.0, 0.5, 0.75, 0.875, 0, 0, 0, 0]))


def weights(found, by_chance, scored=None):
    found, by_chance = torch.tensor(found), torch.tensor(by_chance)
    scored = torch.ones_like(found) if scored is None else torch.tensor(scored)
    return chance_weights(found.bool(), by_chance, scored.bool(), num_generations=4)


def test_weights_are_the_squared_share_of_finds_that_chance_does_not_explain():
    found = [1, 1, 0, 0] * 4
    by_chance = [0.0] * 4 + [0.25] * 4 + [0.5] * 4 + [0.9] * 4
    assert weights(found, by_chance).tolist() == [1.0, 0.25, 0.0, 0.0]


def test_weights_of_groups_without_finds_or_outcomes():
    assert weights([0] * 8, [0.0] * 4 + [0.3] * 4).tolist() == [1.0, 0.0]  # nothing to weigh in both
    assert weights([1, 1, 0, 0], [0.25, 0.25, 0.9, 0.9], [1, 1, 0, 0]).tolist() == [0.5625]  # unscored do not count
    assert weights([1, 1, 1, 1], [0.2] * 4, [0, 0, 0, 0]).isfinite().all()


@pytest.mark.parametrize("level", ["stage", "turn"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_weight_1_is_tspo_as_published_and_weight_0_is_grpo(level, scale):
    outcomes = torch.tensor([0.0, 0, 0, 0, 0.2, 0, 0.1, 0, 1, 0, 0, 0])
    first, turns = torch.tensor([0, 1, -1, -1] * 3), torch.tensor([2, 3, 1, 2] * 3)
    rewards = folr_rewards(outcomes, first, turns)
    options = {"num_generations": 4, "scale_rewards": scale}
    published = turn_advantages(rewards, outcomes, level=level, **options)
    grpo = turn_advantages(rewards, outcomes, level="trajectory", **options)
    weighted = turn_advantages(rewards, outcomes, level=level, turn_weights=torch.tensor([1.0, 0.0, 0.0]), **options)
    assert torch.equal(weighted[:4], published[:4])
    assert torch.equal(weighted[4:], grpo[4:])
    half = turn_advantages(rewards, outcomes, level=level, turn_weights=torch.full((3,), 0.5), **options)
    assert torch.allclose(half, (published + grpo) / 2)
    assert not torch.equal(published, grpo)


def test_weights_apply_to_turn_rewards_that_are_normalised_by_themselves():
    outcomes, first, turns = torch.zeros(8), torch.tensor([0, 1, -1, -1] * 2), torch.tensor([2, 2, 2, 2] * 2)
    trajectory = torch.linspace(-1, 1, 8)
    paid = folr_turns(outcomes, first, turns)
    one = summed_turn_advantages(paid, outcomes, trajectory, num_generations=4)
    half = summed_turn_advantages(paid, outcomes, trajectory, num_generations=4, turn_weights=torch.tensor([0.5, 0.0]))
    assert torch.allclose(half[:4], trajectory[:4, None] + (one[:4] - trajectory[:4, None]) / 2)
    assert torch.equal(half[4:], trajectory[4:, None].expand(4, 2))


def test_the_weight_is_the_share_of_earned_finds_times_what_finds_tell_about_them():
    earned, chance = 0.3, 0.2  # independent probabilities
    found = 1 - (1 - earned) * (1 - chance)
    share = 1 - chance / found
    covariance = earned - earned * found
    squared_correlation = covariance**2 / (earned * (1 - earned) * found * (1 - found))
    assert squared_correlation == pytest.approx(share)
    rollouts = round(found * 100)
    found_by_100 = torch.arange(100) < rollouts
    weight = chance_weights(
        found_by_100, torch.full((100,), chance), torch.ones(100, dtype=torch.bool), num_generations=100
    )
    assert weight.item() == pytest.approx(share * squared_correlation)
