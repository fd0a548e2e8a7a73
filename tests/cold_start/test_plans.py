"""What demonstrations search for, with searches of which the results are given."""

import random

from tspo_trl import Passage
from tspo_trl.cold_start.plans import Plan, add_failed_searches, find_plans

EMMA = Passage("0", "Emma (novel)", "Emma is a novel by Jane Austen.")
AUSTEN = Passage("1", "Jane Austen", "She was born in Steventon.")
OTHER = Passage("2", "Rome", "Rome is the capital of Italy.")
BORN = {
    "question": "Where was the author of Emma born?",
    "golden_answers": ["Steventon, Hampshire", "Steventon"],
    "supporting_titles": ["Jane Austen", "Emma (novel)"],
}


class Search:
    """Searches of which the results are given; others find a passage without evidence."""

    def __init__(self, results):
        self.results, self.calls = results, []

    def __call__(self, queries):
        self.calls.append(list(queries))
        return [self.results.get(query, [OTHER]) for query in queries]


def test_a_title_is_searched_for_when_it_is_known():
    search = Search({"Emma": [EMMA], "Jane Austen": [OTHER, AUSTEN]})
    (plan,) = find_plans([BORN], search, 4)
    assert plan == Plan(("Emma", "Jane Austen"), "Steventon", by_titles=True)


def test_a_passage_that_was_read_is_not_searched_for():
    (plan,) = find_plans([BORN], Search({"Emma": [EMMA, AUSTEN]}), 4)
    assert plan == Plan(("Emma",), "Steventon", by_titles=True)


def test_without_a_known_title_the_question_comes_first():
    row = {**BORN, "question": "Where was the author of a famous novel born?"}
    (plan,) = find_plans([row], Search({row["question"]: [EMMA], "Jane Austen": [AUSTEN]}), 4)
    assert plan == Plan((row["question"], "Jane Austen"), "Steventon", by_titles=True)


def test_titles_of_a_comparison_are_searched_for_in_their_order():
    row = {
        "question": "Are Emma and Rome both novels?",
        "golden_answers": ["no"],
        "supporting_titles": ["Rome", "Emma (novel)"],
    }
    (plan,) = find_plans([row], Search({"Emma": [EMMA], "Rome": [OTHER]}), 4)
    assert plan == Plan(("Emma", "Rome"), "no", by_titles=True)
    # an answer that occurs anywhere is no evidence without the titles
    assert find_plans([{**row, "supporting_titles": None}], Search({row["question"]: [EMMA, OTHER]}), 4) == [None]


def test_if_titles_are_not_found_the_question_must_find_the_answer():
    found = {BORN["question"]: [AUSTEN], "Emma": [OTHER]}
    assert find_plans([BORN], Search(found), 4) == [Plan((BORN["question"],), "Steventon", by_titles=False)]
    assert find_plans([BORN], Search({}), 4) == [None]
    # two titles need two searches
    assert find_plans([BORN], Search({"Emma": [EMMA], "Jane Austen": [AUSTEN]}), 1) == [None]


def test_without_titles_the_question_is_searched_for():
    rows = [{"question": " Who? ", "golden_answers": ["Jane Austen"]}, {"question": "What?", "golden_answers": ["x y"]}]
    search = Search({"Who?": [EMMA]})
    assert find_plans(rows, search, 4) == [Plan(("Who?",), "Jane Austen", by_titles=False), None]
    assert search.calls == [["Who?", "What?"]]  # at once


def test_a_failed_search_finds_no_evidence():
    found = {"Emma": [EMMA], "Jane Austen": [AUSTEN]}
    rows = [BORN] * 8
    plans = find_plans(rows, Search(found), 4)
    changed = add_failed_searches(plans, rows, Search(found), 4, count=3, rng=random.Random(0))
    assert sum(plan.num_failed for plan in changed) == 3
    for before, after in zip(plans, changed, strict=True):
        assert after.queries[after.num_failed :] == before.queries
        if after.num_failed:
            assert after.queries[0] == BORN["question"]
    # the question finds it: a part of the question is searched for
    found = {BORN["question"]: [AUSTEN]}
    plans = find_plans([BORN], Search(found), 4)
    (plan,) = add_failed_searches(plans, [BORN], Search(found), 4, count=1, rng=random.Random(0))
    assert plan.num_failed == 1
    assert plan.queries[0] in BORN["question"]
    assert plan.queries[0] != plan.queries[1]


def test_a_failed_search_needs_room_and_a_query_that_fails():
    found = {"Emma": [EMMA], "Jane Austen": [AUSTEN]}
    plans = find_plans([BORN], Search(found), 4)
    assert add_failed_searches(plans, [BORN], Search(found), 2, count=1, rng=random.Random(0)) == plans

    def finds_everything(queries):
        return [[AUSTEN] for _ in queries]

    assert add_failed_searches(plans, [BORN], finds_everything, 4, count=1, rng=random.Random(0)) == plans
