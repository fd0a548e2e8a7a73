"""Errors of questions name file, row and column, and suggest a correction."""

import ast
import gzip
import importlib
import json
import logging
import re
import shlex

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from helpers.paths import ROOT
from helpers.question_files import GOOD, SQUAD, write_jsonl
from tspo_trl import load_benchmark, load_questions
from tspo_trl.questions.hints import in_flags


@pytest.mark.parametrize(
    ("bad", "column", "found"),
    [
        ({"question": "q", "golden_answers": []}, "golden_answers", "[]"),
        ({"question": "q", "golden_answers": None}, "golden_answers", "None"),
        ({"question": "q", "golden_answers": ["", " "]}, "golden_answers", "['', ' ']"),
        ({"question": "q", "golden_answers": ["a", None]}, "golden_answers", "['a', None]"),
        ({"question": "", "golden_answers": ["a"]}, "question", "''"),
        ({"question": None, "golden_answers": ["a"]}, "question", "None"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_error_of_a_bad_value_names_line_and_column(tmp_path, bad, column, found, streaming):
    file = write_jsonl(tmp_path / "mine.jsonl", [GOOD, bad, GOOD])
    file.write_text("\n" + file.read_text())  # blank lines count as lines
    with pytest.raises(ValueError, match=f"mine.jsonl, line 3, column '{column}': expected") as error:
        list(load_questions("mine.jsonl", streaming=streaming))
    assert f"found {found}" in str(error.value)


def test_error_in_a_slice_of_a_file_names_the_row_of_the_slice(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [GOOD, GOOD, {**GOOD, "golden_answers": []}])
    with pytest.raises(ValueError, match=r"a\.jsonl \(train\[1:\]\), row 1 \(from 0\), column"):
        load_questions("a.jsonl", split="train[1:]")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_error_of_a_list_or_objects_over_several_lines_names_the_row(tmp_path, name, indent):
    rows = [GOOD, {**GOOD, "golden_answers": []}]
    for text in (json.dumps(rows, indent=indent), "\n".join(json.dumps(row, indent=indent or 2) for row in rows)):
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(ValueError, match=rf"{name}, row 1 \(from 0\), column 'golden_answers'"):
            load_questions(name)


@pytest.mark.parametrize(
    ("bad", "column", "found"),
    [
        ({"query": ["q"]}, "query", r"\['q'\]"),
        ({"query": {"text": "q"}}, "query", r"\{'text': 'q'\}"),
        ({"answers": {"text": [["a"], ["b"]]}}, "answers.text", r"\[\['a'\], \['b'\]\]"),
        ({"answers": {"text": [float("nan")]}}, "answers.text", r"\[nan\]"),
        ({"answers": {"text": [b"\xff"]}}, "answers.text", r"\[b'\\xff'\]"),
        ({"qid": [1]}, "qid", r"\[1\]"),
        ({"data_source": ["a"]}, "data_source", r"\['a'\]"),
    ],
)
def test_error_of_a_wrong_type_names_row_and_column(bad, column, found):
    rows = Dataset.from_list([{"qid": 1, "query": "q", "answers": {"text": ["a"]}, **bad}])
    columns = {"id": "qid", "question": "query", "golden_answers": "answers.text"}
    with pytest.raises(
        ValueError, match=rf"`source`, row 0 \(from 0\), column '{column}': expected .*, found {found}\."
    ):
        load_questions(rows, columns=columns)
    with pytest.raises(ValueError, match=r"`source\[1\]`, row 0"):
        load_questions([Dataset.from_list([{**SQUAD[0], "id": "a"}]), rows], columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", "a.jsonl has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.csv", "question,golden_answers\n", "a.csv has no rows"),
        (
            "a.jsonl",
            '{"question": "q", "golden_answers": "a"}\n\n{"question": oops}\n',
            "a.jsonl, line 3: not valid JSON",
        ),
        ("a.json", '[{"question": "q"},\n {"question": }]', "a.json, line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"question": "q", "golden_answers": "a"}\n["q"]\n',
            "a.jsonl, line 2: expected an object.*found ['q']",
        ),
        (
            "a.json",
            '[{"question": "q", "golden_answers": "a"}, 5]',
            "a.json, row 1 (from 0): expected an object.*found 5",
        ),
        (
            "a.jsonl",
            '{"question": "q", "golden_answers": ["a"]}\n\n{"question": {"text": "q"}, "golden_answers": ["a"]}\n',
            "a.jsonl, line 3, column 'question': expected a non-empty string, found {'text': 'q'}",
        ),
        (
            "a.csv",
            "question,golden_answers\na,b\nc,d,e\n",
            "a.csv, row 1 (from 0): expected 2 columns ['question', 'golden_answers'], found 3: ['c', 'd', 'e']",
        ),
        (
            "a.csv",
            "question,golden_answers\na,\"['b', 'c']\"\n",
            "a.csv, row 0 (from 0), column 'golden_answers'.*a list as JSON",
        ),
        (
            "a.json",
            '{"question": {"0": "q"}, "golden_answers": {"0": "a"}}',
            "line 1, column 'question': expected a non-",
        ),
        (
            "a.json",
            json.dumps({f"id {i}": {"question": "q", "answer": "a"} for i in range(1000)}),
            "no column 'question'. Found the columns ['id 0', .*, 'id 29', and 970 more]. Map",
        ),
        ("a.jsonl.gz", "no", "a.jsonl.gz"),
        ("a.parquet", "no", "a.parquet cannot be read as parquet"),
        ("a.txt", "no", "a.txt: a file of questions ends in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_error_of_an_unreadable_file_names_the_problem(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        load_questions(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_error_of_an_incomplete_file_names_the_file(tmp_path, streaming):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz.*end-of-stream"):
        load_questions("a.jsonl.gz", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "change",
    [{"golden_answers": ["Paris\ud83d", "x"]}, {"question": "\udc00"}, {"more": {"texts": ["a", "\ud83d"]}}],
)
def test_a_lone_surrogate_is_an_error_that_names_line_and_column(tmp_path, change, streaming):
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "more": {"texts": ["\U0001f600"]}}, {**GOOD, **change}])
    message = rf"^a\.jsonl, line 2, column '{next(iter(change))}': found a lone surrogate"
    with pytest.raises(ValueError, match=message):
        list(load_questions("a.jsonl", streaming=streaming))


def test_error_of_another_encoding_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "Où?", "golden_answers": "ici"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl.*UTF-?8"):
        load_questions("a.jsonl")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            r"`source` has no column 'question'.*\['qid', 'query', 'answers', 'all'\].*"
            r"Map yours with `columns=\{'question': 'query', 'golden_answers': 'answers.text'\}`",
        ),
        (
            {"id": "qid", "question": "query"},
            r"no column 'golden_answers'.*"
            r"columns=\{'id': 'qid', 'question': 'query', 'golden_answers': 'answers.text'\}",
        ),
        ({"question": "quory"}, "no column 'quory', from which 'question' is to be read.*Did you mean 'query'"),
        ({"question": "query", "golden_answers": "answers.txt"}, "no field 'txt' in 'answers'.*Did you mean 'text'"),
        ({"question": "query", "golden_answers": "all.nam"}, "no field 'nam' in 'all'.*Did you mean 'name'"),
        ({"query": "question"}, r"got the key 'query'. Did you mean `columns=\{'question': 'query'\}`\?"),
        (
            {"question": "query", "golden_answer": "answers.text"},
            r"got the key 'golden_answer'. Did you mean `columns=\{'question': 'query', 'golden_answers': 'answers.text'\}`",
        ),
        ({"question": None}, r"`columns\['question'\]` must be the name of a column, got None"),
    ],
)
def test_error_of_an_unknown_column_suggests_the_nearest(columns, message):
    with pytest.raises(ValueError, match=message):
        load_questions(Dataset.from_list(SQUAD), columns=columns)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "answers": {"answer_start": [1], "text": ["a"]}},
        {"questions": "q", "answer": {"value": "a", "aliases": ["a", "b"]}},
        {"problem": "q", "target": "a", "answers_id": 3},
        {"input": "q", "answer": "a"},
        {"qid": "x", "question": "q", "answers": [{"answer_id": 1, "text": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "extra_info": {"index": 1, "question": "q", "answer": "a"}},
        {"query": "q", "extra_info": {"answer": "a"}},
    ],
)
@pytest.mark.parametrize("given", [{}, {"data_source": "kind"}])
def test_suggested_mappings_work(row, given):
    """The mapping in the message is complete and reads the data."""
    row = {**row, "kind": "mine"}
    for source in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        with pytest.raises(ValueError, match=r"Map yours with `columns=\{.*\}`\.$") as error:
            load_questions(source, columns=given)
        columns = ast.literal_eval(re.search(r"`columns=(.*)`", str(error.value))[1])
        (read,) = load_questions(source, columns=columns)
        assert (read["question"], read["golden_answers"][0]) == ("q", "a")
        assert (read["data_source"] == "mine") is bool(given)


@pytest.mark.parametrize("row", [{"": "q", "x": "a"}, {"question": "q", "x": 1}, {"query": 5, "answers": ["a"]}])
def test_a_mapping_that_would_not_work_is_not_suggested(row):
    with pytest.raises(ValueError, match=r"Found the columns \[.*\]\. Map yours with `columns`\.$"):
        load_questions(Dataset.from_list([row]))


def test_hints_are_in_the_words_of_a_command():
    flags = {"source": "--dataset", "columns": "--columns", "split": "--split", "load_benchmark": "--dataset"}
    messages = {
        "Map yours with `columns={'question': 'query', 'golden_answers': 'all answers.text'}`.": (
            "Map yours with `--columns question=query 'golden_answers=all answers.text'`."
        ),
        "`columns` maps one of ['id']": "`--columns` maps one of ['id']",
        "`columns['question']` must be the name": "`--columns` must be the name",
        "`source[1]`: there is no file 'a.jsonl'.": "`--dataset`: there is no file 'a.jsonl'.",
        "say which one with `split`, one of ['a']": "say which one with `--split`, one of ['a']",
        "but `split` is 'test'": "but `--split` is 'test'",
        "The benchmark is `load_benchmark('hotpotqa')`.": "The benchmark is `--dataset hotpotqa`.",
        "`other` and `max_questions`": "`other` and `max_questions`",
    }
    assert {message: in_flags(message, flags) for message in messages} == messages
    as_json = in_flags("`columns={'question': 'query'}`", {"columns": "--dataset_columns=JSON"})
    assert as_json == """`--dataset_columns '{"question": "query"}'`"""


@pytest.mark.parametrize("command", ["audit", "evaluate", "train"])
def test_commands_suggest_flags_that_work(tmp_path, command):
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "answers": {"text": ["a"]}}])
    module = importlib.import_module(f"tspo_trl.commands.{command}")

    def load(*columns):
        if command == "train":
            options = ["--dataset_name", "a.jsonl", "--output_dir", "out", "--corpus", "none.jsonl", *columns]
            return module.load_datasets(module.parse_arguments([*options, "--model_name_or_path", "none"])[0])
        options = ["--dataset", "a.jsonl", "--corpus", "none.jsonl", *columns]
        if command == "evaluate":
            return module.load_datasets(module.parse_arguments([*options, "--model", "none"]))
        return module.load_rows(module.parse_arguments(options))

    with pytest.raises(ValueError, match="Map yours with `--") as error:
        load()
    columns = shlex.split(re.search(r"Map yours with `(.*)`", str(error.value))[1])
    load(*columns)


def test_warning_counts_golden_answers_that_normalise_to_the_empty_string(caplog):
    golds = [["Austen"], ["The The"], ["!!!", "a"], ["The The", "Matt Johnson"]]
    rows = Dataset.from_list([{**GOOD, "golden_answers": gold} for gold in golds])
    with caplog.at_level(logging.WARNING, "tspo_trl"):
        dataset = load_questions(rows)
    assert [row["golden_answers"] for row in dataset] == golds  # "The The" is a band
    (message,) = caplog.messages
    assert "`source`: in 2 of 4 rows every golden answer normalises to the empty string" in message
    assert "`source`, row 1 (from 0): ['The The']" in message


def test_invalid_sources_are_errors():
    with pytest.raises(FileNotFoundError, match=r"`source`: there is no file 'nowhere\.jsonl'"):
        load_questions("nowhere.jsonl")
    with pytest.raises(
        FileNotFoundError, match="'no/where' is neither a file nor a folder here, and was not found on the Hub"
    ):
        load_questions("no/where")
    with pytest.raises(FileNotFoundError, match=r"The benchmark is `load_benchmark\('hotpotqa'\)`"):
        load_questions("HotpotQA")
    with pytest.raises(TypeError, match=r"got `dict`. Convert rows in memory with `Dataset.from_list\(rows\)`"):
        load_questions([GOOD])
    with pytest.raises(ValueError, match="`source` is an empty list"):
        load_questions([])
    with pytest.raises(ValueError, match="`source` has no rows"):
        load_questions(Dataset.from_dict({"question": [], "golden_answers": []}))
    with pytest.raises(ValueError, match="`source` has no rows"):
        load_questions(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match="`max_questions` must be at least 1, got 0"):
        load_questions(Dataset.from_list([GOOD]), max_questions=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "question"}, "`columns` must be a mapping such as {'question': 'query'}, got 'question'."),
        ({"columns": ["question"]}, "`columns` must be a mapping such as {'question': 'query'}, got ['question']."),
        ({"columns": {1: "question"}}, "to a column of the source, got the key 1."),
        ({"max_questions": "3"}, "`max_questions` must be an integer, got '3'."),
        ({"max_questions": 1.5}, "`max_questions` must be an integer, got 1.5."),
        ({"seed": None}, "`seed` must be an integer, got None."),
        ({"split": ["train"]}, "`split` must be a string, got ['train']."),
        ({"name": 3}, "`name` must be a string, got 3."),
    ],
)
def test_invalid_options_are_errors(tmp_path, options, message):
    write_jsonl(tmp_path / "a.jsonl", [GOOD])
    for source in ("a.jsonl", Dataset.from_list([GOOD])):
        with pytest.raises((TypeError, ValueError), match=re.escape(message) + "$"):
            load_questions(source, **options)


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_name_is_not_the_current_folder(tmp_path, source):
    write_jsonl(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(ValueError, match="`source` is an empty text"):
        load_questions(source)


def test_a_dictionary_of_splits_is_loaded():
    splits = {"train": Dataset.from_list([GOOD]), "test": Dataset.from_list([GOOD, GOOD])}
    for source in (splits, DatasetDict(splits)):
        assert len(load_questions(source, split="test")) == 2
        with pytest.raises(ValueError, match=r"`source` has several splits: .*\['train', 'test'\]"):
            load_questions(source)
        with pytest.raises(ValueError, match=r"`source` has no split 'dev', only"):
            load_questions(source, split="dev")
    assert len(load_questions({"train": splits["train"]})) == len(load_questions([splits["train"]] * 2)) - 1 == 1
    for source in ({}, DatasetDict()):
        with pytest.raises(ValueError, match="`source` has no splits"):
            load_questions(source)
    with pytest.raises(TypeError, match="got `dict`"):
        load_questions({"train": [GOOD]})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_is_an_error(streaming):
    Dataset.from_list([GOOD]).select([]).to_parquet("a.parquet")
    with pytest.raises(ValueError, match=r"^a\.parquet has no rows"):
        load_questions("a.parquet", streaming=streaming)


@pytest.mark.parametrize(
    ("name", "near"), [("hotpot", "hotpotqa"), ("2wiki", "2wikimultihopqa"), ("TriviaQ", "triviaqa")]
)
def test_error_of_an_unknown_benchmark_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"There is no benchmark '{name}', only .*Did you mean '{near}'"):
        load_benchmark(name)


def test_data_page_shows_the_current_messages(tmp_path, caplog):
    good = '{"question": "q", "golden_answers": ["a"]}\n'
    squad = Dataset.from_list([{"qid": 5, "query": "Who?", "answers": {"text": ["A"], "answer_start": [1]}}])

    def read(name, text):
        (tmp_path / name).write_text(text)
        load_questions(name)

    failing = [
        lambda: read("questions.jsonl", good + '\n{"question": "q", "golden_answers": []}\n'),
        lambda: read("questions.jsonl", good + '\n{"question": oops}\n'),
        lambda: read("questions.jsonl", good + '\n{"question": {"text": "q"}, "golden_answers": ["a"]}\n'),
        lambda: read("answers.csv", "question,golden_answers\nWho, when?,Austen\n"),
        lambda: read("answers.csv", "question,golden_answers\nq,a\nq,\"['a', 'b']\"\n"),
        lambda: load_questions(squad),
        lambda: load_questions(squad, columns={"question": "query", "golden_answers": "answers.txt"}),
        lambda: load_benchmark("hotpot"),
    ]
    messages = []
    for fail in failing:
        with pytest.raises(ValueError, match=r".") as error:
            fail()
        messages.append(str(error.value))
    rows = [{**GOOD, "golden_answers": golds} for golds in (["Austen"], ["The The"], ["!!!"], ["The The", "Johnson"])]
    caplog.clear()
    write_jsonl(tmp_path / "questions.jsonl", rows)
    with caplog.at_level(logging.WARNING, "tspo_trl"):
        load_questions("questions.jsonl")
    page = (ROOT / "docs" / "data.md").read_text()
    shown = page[page.index("## What is refused") :]
    blocks = [block.strip().splitlines() for block in re.findall(r"```\n(.*?)```", shown, re.DOTALL)]
    assert blocks == [messages, caplog.messages]
