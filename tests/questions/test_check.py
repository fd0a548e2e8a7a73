"""The check of a row: training, evaluation and the audit refuse the same rows with the same message."""

import datetime

import pytest
from datasets import Dataset

from tspo_trl import SearchAgent, TagProtocol, evaluate, load_questions
from tspo_trl.commands.audit import read_row
from tspo_trl.demo import make_tokenizer
from tspo_trl.questions.check import check_columns, check_row
from tspo_trl.training.datasets import prepare_dataset

AS_TEXT = " `load_questions(dataset)` reads numbers, dates and single answers as text."
GOOD = {"question": "Where?", "golden_answers": ["Rome"]}


@pytest.mark.parametrize("golden_answers", [["Rome"], ("Rome", "Roma"), ["!!!"], ["Rome", ""]])
def test_good_rows_pass(golden_answers):
    check_row({**GOOD, "golden_answers": golden_answers}, "row")
    check_row({"golden_answers": golden_answers}, "row", needs_question=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"golden_answers": []}, "row: 'golden_answers' must be a non-empty list of strings, found []."),
        (
            {"golden_answers": "Rome"},
            "row: 'golden_answers' must be a non-empty list of strings, found 'Rome'." + AS_TEXT,
        ),
        ({"golden_answers": [7]}, "row: 'golden_answers' must be a non-empty list of strings, found [7]." + AS_TEXT),
        (
            {"golden_answers": ["a", None]},
            "row: 'golden_answers' must be a non-empty list of strings, found ['a', None].",
        ),
        (
            {"golden_answers": ["", " "]},
            "row: 'golden_answers' must have at least one answer that is not blank ('noanswer' if the question has none), "
            "found ['', ' '].",
        ),
        ({"question": {"text": "q"}}, "row: 'question' must be a non-empty string, found {'text': 'q'}."),
        ({"golden_answers": None}, "row: 'golden_answers' must be a non-empty list of strings, found None."),
        ({"question": None}, "row: 'question' must be a non-empty string, found None."),
        ({"question": " \n"}, "row: 'question' must be a non-empty string, found ' \\n'."),
        ({"question": 7}, "row: 'question' must be a non-empty string, found 7." + AS_TEXT),
    ],
)
def test_bad_rows_are_reported(change, message):
    with pytest.raises(ValueError, match=r"^row: ") as error:
        check_row({**GOOD, **change}, "row")
    assert str(error.value) == message


@pytest.mark.parametrize("golden_answers", ["Rome", 7, [7], datetime.date(1952, 3, 4), [True]])
@pytest.mark.parametrize("question", ["Where?", 7, datetime.date(1952, 3, 4)])
def test_refused_rows_can_be_loaded_as_the_message_says(question, golden_answers):
    row = {"question": question, "golden_answers": golden_answers}
    with pytest.raises(ValueError, match=r"`load_questions\(dataset\)` reads"):
        check_row(row, "row")
    (loaded,) = load_questions(Dataset.from_list([row]))
    check_row(loaded, "row")


@pytest.mark.parametrize(
    "change", [{"golden_answers": ["a", None]}, {"golden_answers": [""]}, {"question": {"text": "q"}}]
)
def test_rows_that_cannot_be_loaded_are_not_said_to_be(change):
    row = {**GOOD, **change}
    with pytest.raises(ValueError, match="row") as error:
        check_row(row, "row")
    assert AS_TEXT not in str(error.value)
    with pytest.raises(ValueError, match="expected"):
        load_questions(Dataset.from_list([row]))


def test_a_question_with_a_prompt_must_be_a_string():
    check_row({**GOOD, "question": " "}, "row", needs_question=False)
    with pytest.raises(ValueError, match="row: 'question' must be a string, found 7"):
        check_row({**GOOD, "question": 7}, "row", needs_question=False)


@pytest.mark.parametrize(
    ("row", "call"),
    [
        ({"query": "q", "answers": ["a"]}, "columns={'question': 'query', 'golden_answers': 'answers'}"),
        ({"question": "q", "answers": {"text": ["a"]}}, "columns={'golden_answers': 'answers.text'}"),
        ({"query": "q", "golden_answers": ["a"]}, "columns={'question': 'query'}"),
        ({"question": "q", "answer": "a", "answer_aliases": ["b"]}, ""),
        ({"question": "q", "possible_answers": '["a", "b"]'}, ""),
    ],
)
def test_the_suggested_call_loads_a_data_set_with_other_columns(row, call):
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match="Load it with `") as error:
        check_columns(dataset, "mine")
    expected = f"load_questions(dataset, {call})" if call else "load_questions(dataset)"
    assert f"Load it with `{expected}`." in str(error.value)
    check_columns(eval(expected, {"load_questions": load_questions, "dataset": dataset}))


@pytest.mark.parametrize("change", [{"golden_answers": []}, {"golden_answers": [""]}, {"question": " "}])
def test_training_evaluation_and_audit_report_the_same_message(change, tmp_path, policy_dir, retriever):
    rows = [GOOD, {**GOOD, **change}]
    with pytest.raises(ValueError, match="row") as expected:
        check_row(rows[1], "`mine`, row 1")
    dataset = Dataset.from_list(rows)
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever)
    for check in (
        lambda: prepare_dataset(dataset, TagProtocol(make_tokenizer()), "mine"),
        lambda: evaluate(agent, {"mine": dataset}, tmp_path, progress=False),
        lambda: read_row(rows[1], "`mine`, row 1"),
    ):
        with pytest.raises(ValueError, match="row 1") as error:
            check()
        assert str(error.value) == str(expected.value)
