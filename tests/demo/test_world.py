"""The fictional encyclopedia depends on its seed, answers all questions, and separates held-out entities."""

import pytest

from tspo_trl import BM25Retriever
from tspo_trl.demo import make_tokenizer, make_world

SIZES = [(0, {}), (7, {}), (1, {"train_books": 12, "heldout_books": 6}), (2, {"train_books": 31, "heldout_books": 13})]


@pytest.fixture(params=SIZES, ids=lambda size: f"seed{size[0]}-{len(size[1])}")
def any_world(request):
    seed, size = request.param
    return make_world(seed, **size)


def entities(questions):
    """The entities in queries and answers, except languages, which both splits use."""
    return {name for q in questions for name in (*q.queries, *([] if q.kind == "language" else [q.answer]))}


def test_worlds_with_the_same_seed_are_equal():
    assert make_world(3) == make_world(3)


def test_worlds_with_different_seeds_differ():
    first, second = make_world(3), make_world(4)
    assert first.names["person"] != second.names["person"]
    assert first.train_questions != second.train_questions


def test_names_are_unique(any_world):
    names = [name for kind in any_world.names.values() for name in kind]
    assert len(names) == len(set(names))


def test_every_entity_has_one_passage(any_world):
    titles = [passage.title for passage in any_world.passages]
    assert len(titles) == len(set(titles))
    assert set(titles) == {name for kind, names in any_world.names.items() if kind != "language" for name in names}
    assert len({passage.id for passage in any_world.passages}) == len(any_world.passages)


def test_worlds_have_the_requested_size():
    names = make_world(0, train_books=12, heldout_books=6).names
    assert {kind: len(names[kind]) for kind in ("book", "person", "city", "country")} == {
        "book": 18,
        "person": 18,
        "city": 9,
        "country": 3,
    }


def test_held_out_questions_share_no_entity_with_training_questions(any_world):
    assert any_world.train_questions
    assert any_world.heldout_questions
    assert not entities(any_world.train_questions) & entities(any_world.heldout_questions)


def test_held_out_passages_do_not_mention_training_entities(any_world):
    needed = entities(any_world.train_questions)
    for passage in any_world.passages:
        if passage.title in entities(any_world.heldout_questions):
            assert not any(name in passage.text for name in needed)


def test_every_question_is_answered_by_following_its_queries(any_world):
    passages = {passage.title: passage for passage in any_world.passages}
    for question in any_world.train_questions + any_world.heldout_questions:
        chain = [passages[query].text for query in question.queries]
        for text, following in zip(chain, [*question.queries[1:], question.answer], strict=True):
            assert following in text
        # the question contains only the first of these names
        assert question.queries[0] in question.text
        assert not any(name in question.text for name in (*question.queries[1:], question.answer))
        assert not any(question.answer in text for text in chain[:-1])


def test_every_query_finds_its_passage(any_world):
    retriever = BM25Retriever(any_world.passages)
    queries = sorted({query for q in any_world.train_questions + any_world.heldout_questions for query in q.queries})
    for query, found in zip(queries, retriever.search(queries, 1), strict=True):
        assert found[0].title == query


def test_questions_are_unique_and_have_one_to_three_hops(any_world):
    questions = any_world.train_questions + any_world.heldout_questions
    assert len({question.text for question in questions}) == len(questions)
    assert {question.hops for question in questions} == {1, 2, 3}
    for question in questions:
        assert question.answer in any_world.names[question.kind]


def test_a_row_has_the_columns_of_the_trainer():
    question = make_world(0).train_questions[0]
    row = question.row()
    assert row["question"] == question.text
    assert row["golden_answers"] == [question.answer]
    assert row["hops"] == len(question.queries)
    assert question.text in row["prompt"]


def test_the_demo_tokenizer_knows_every_word_of_a_world():
    tokenizer = make_tokenizer()
    world = make_world(5)
    texts = [f"{passage.title} {passage.text}" for passage in world.passages]
    texts += [question.row()["prompt"] for question in world.train_questions + world.heldout_questions]
    texts += [f"<answer> {question.answer} </answer>" for question in world.train_questions]
    for ids in tokenizer(texts)["input_ids"]:
        assert tokenizer.unk_token_id not in ids
