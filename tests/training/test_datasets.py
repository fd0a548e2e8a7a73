"""Preparation of data sets, and errors that name data set, row and column."""

import pytest
from datasets import Dataset, IterableDataset

from tspo_trl import TagProtocol
from tspo_trl.demo import make_tokenizer
from tspo_trl.questions.check import check_columns
from tspo_trl.training.datasets import prepare_dataset

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Let me see:"},
]
GOOD = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"]}


@pytest.fixture(scope="module")
def protocol():
    return TagProtocol(make_tokenizer())


@pytest.fixture(scope="module")
def chat_protocol():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TagProtocol(tokenizer)


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture(params=["dataset", "stream", "stream with features"])
def make_dataset(request):
    if request.param == "dataset":
        return Dataset.from_list
    if request.param == "stream":
        return streamed
    return lambda rows: Dataset.from_list(rows).to_iterable_dataset()


def test_a_question_becomes_a_prompt(make_dataset, protocol):
    other = {"question": "Where is {x}?", "golden_answers": ["here"]}
    dataset = make_dataset([GOOD, other])
    rows = list(prepare_dataset(dataset, protocol))
    assert [row["question"] for row in rows] == [GOOD["question"], other["question"]]
    assert [row["golden_answers"] for row in rows] == [GOOD["golden_answers"], other["golden_answers"]]
    assert [row["prompt"] for row in rows] == [protocol.prompt(GOOD["question"]), protocol.prompt(other["question"])]


def test_a_question_becomes_a_conversation_if_there_is_a_chat_template(make_dataset, chat_protocol):
    (row,) = prepare_dataset(make_dataset([GOOD]), chat_protocol)
    assert row["prompt"] == chat_protocol.prompt(GOOD["question"])
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert GOOD["question"] in row["prompt"][0]["content"]


def test_a_prompt_is_used_unchanged(make_dataset, protocol):
    (row,) = prepare_dataset(make_dataset([{"prompt": " Q: {x}\n", "golden_answers": ["a"]}]), protocol)
    assert row == {"prompt": " Q: {x}\n", "question": " Q: {x}\n", "golden_answers": ["a"]}


def test_a_prompt_is_used_unchanged_if_there_is_a_question_too(make_dataset, protocol):
    (row,) = prepare_dataset(make_dataset([{**GOOD, "prompt": "Tell me."}]), protocol)
    assert row == {**GOOD, "prompt": "Tell me."}


def test_the_question_of_a_conversation_is_its_last_user_message(make_dataset, chat_protocol):
    (row,) = prepare_dataset(make_dataset([{"prompt": CONVERSATION, "golden_answers": ["a"]}]), chat_protocol)
    assert row["prompt"] == CONVERSATION
    assert row["question"] == "Who wrote it?"


def test_other_columns_are_kept(make_dataset, protocol):
    rows = [{**GOOD, "hops": 2, "meta": {"level": "hard"}}, {**GOOD, "hops": 3, "meta": {"level": "easy"}}]
    prepared = list(prepare_dataset(make_dataset(rows), protocol))
    assert [row["hops"] for row in prepared] == [2, 3]
    assert [row["meta"] for row in prepared] == [{"level": "hard"}, {"level": "easy"}]


def test_the_kind_of_data_set_is_kept(protocol):
    assert isinstance(prepare_dataset(Dataset.from_list([GOOD]), protocol), Dataset)
    assert isinstance(prepare_dataset(streamed([GOOD]), protocol), IterableDataset)


def test_the_given_data_set_is_not_changed(protocol):
    dataset = Dataset.from_list([GOOD])
    prepare_dataset(dataset, protocol)
    assert dataset.column_names == list(GOOD)


@pytest.mark.parametrize(
    ("bad", "column", "found"),
    [
        ({"golden_answers": [], "question": "q"}, "golden_answers", "[]"),
        ({"golden_answers": None, "question": "q"}, "golden_answers", "None"),
        ({"golden_answers": ["a", None], "question": "q"}, "golden_answers", "None"),
        ({"golden_answers": ["a"], "question": None}, "question", "None"),
        ({"golden_answers": ["a"], "question": ""}, "question", "''"),
        ({"golden_answers": ["a"], "question": " \n"}, "question", r"' \n'"),
    ],
)
def test_the_error_for_a_bad_value_names_data_set_row_and_column(make_dataset, protocol, bad, column, found):
    dataset = make_dataset([GOOD, GOOD, bad, GOOD])
    with pytest.raises(ValueError, match=f"`eval_dataset`, row 2.*'{column}'") as error:
        list(prepare_dataset(dataset, protocol, name="eval_dataset"))
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("row", "column", "found"),
    [
        ({"golden_answers": "Paris", "question": "q"}, "golden_answers", "'Paris'"),
        ({"golden_answers": [1, 2], "question": "q"}, "golden_answers", "[1, 2]"),
        ({"golden_answers": 5, "question": "q"}, "golden_answers", "5"),
        ({"golden_answers": ["a"], "question": 5}, "question", "5"),
        ({"golden_answers": ["a"], "question": ["q"]}, "question", "['q']"),
        ({"golden_answers": ["a"], "question": 5, "prompt": "p"}, "question", "5"),
        ({"golden_answers": ["a"], "prompt": ""}, "prompt", "''"),
        ({"golden_answers": ["a"], "prompt": 5}, "prompt", "5"),
        ({"golden_answers": ["a"], "prompt": []}, "prompt", "[]"),
        ({"golden_answers": ["a"], "prompt": ["p"]}, "prompt", "['p']"),
        ({"golden_answers": ["a"], "prompt": [{"role": "user"}]}, "prompt", "role"),
        ({"golden_answers": ["a"], "prompt": None}, "question", "None"),
    ],
)
def test_the_error_for_a_wrong_type_names_the_column(make_dataset, chat_protocol, row, column, found):
    with pytest.raises(ValueError, match=f"`train_dataset`, row 0.*'{column}'") as error:
        list(prepare_dataset(make_dataset([row]), chat_protocol))
    assert found in str(error.value)


def test_a_conversation_without_a_chat_template_is_an_error(make_dataset, protocol):
    dataset = make_dataset([{"prompt": CONVERSATION, "golden_answers": ["a"]}])
    with pytest.raises(ValueError, match=r"`train_dataset`, row 0.*'prompt'.*chat template"):
        list(prepare_dataset(dataset, protocol))


@pytest.mark.parametrize(
    ("template", "message", "said"),
    [
        (
            TEMPLATE.replace("message['content']", "'' + message['content']"),
            {"content": [{"type": "text", "text": "x"}]},
            "str",
        ),
        ("{{ raise_exception('System role not supported') }}", {"content": "x"}, "System role not supported"),
    ],
)
def test_an_error_of_the_chat_template_names_the_row(make_dataset, template, message, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    dataset = make_dataset([{"prompt": [{"role": "user", **message}], "golden_answers": ["a"]}])
    with pytest.raises(ValueError, match=rf"`train_dataset`, row 0: the chat template .* 'prompt' \[.*: .*{said}.*\.$"):
        list(prepare_dataset(dataset, TagProtocol(tokenizer), max_context_length=10**6))


def test_rows_of_a_stream_are_checked_when_they_are_read(protocol):
    prepared = iter(prepare_dataset(streamed([GOOD, {**GOOD, "golden_answers": []}]), protocol))
    assert next(prepared)["question"] == GOOD["question"]
    with pytest.raises(ValueError, match="row 1"):
        next(prepared)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_the_error_for_missing_columns_names_them(make_dataset, protocol, name):
    with pytest.raises(ValueError, match=f"`{name}`.*'golden_answers'.*'answer', 'question'"):
        prepare_dataset(make_dataset([{"question": "q", "answer": "a"}]), protocol, name)
    with pytest.raises(ValueError, match=f"`{name}`.*'question'.*'prompt'.*'golden_answers', 'query'"):
        prepare_dataset(make_dataset([{"query": "q", "golden_answers": ["a"]}]), protocol, name)


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([]),
        Dataset.from_dict({"question": [], "golden_answers": []}),
        IterableDataset.from_generator(lambda: iter(())),
    ],
    ids=["no columns", "no rows", "stream"],
)
def test_an_empty_data_set_is_an_error(protocol, dataset):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        prepare_dataset(dataset, protocol)


@pytest.mark.parametrize("dataset", [[GOOD], None, {"train": [GOOD]}])
def test_other_types_are_refused(dataset):
    with pytest.raises(TypeError, match="`eval_dataset`"):
        check_columns(dataset, "eval_dataset")


def test_checking_the_columns_of_a_stream_consumes_no_rows(protocol):
    dataset = streamed([GOOD, GOOD])
    check_columns(dataset)
    assert len(list(prepare_dataset(dataset, protocol))) == 2


@pytest.mark.parametrize("prompt", ["text", "conversation"])
def test_a_prompt_without_room_for_a_completion_names_its_row(make_dataset, protocol, chat_protocol, prompt):
    protocol = protocol if prompt == "text" else chat_protocol
    long = {**GOOD, "question": "Who wrote Emma? " * 40}
    length = len(protocol.encode_prompts([protocol.prompt(long["question"])])[0])
    rows = [GOOD, long, GOOD]
    assert len(list(prepare_dataset(make_dataset(rows), protocol, max_context_length=length + 1))) == 3
    with pytest.raises(
        ValueError, match=f"`train_dataset`, row 1: the prompt has {length} tokens, .* at most {length} "
    ):
        list(prepare_dataset(make_dataset(rows), protocol, max_context_length=length))
