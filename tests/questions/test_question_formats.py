"""Formats of files of questions, and data sets with other columns."""

import csv
import gzip
import json
import re
import shlex
import zipfile

import pytest
from datasets import Dataset, IterableDataset

from helpers.paths import ROOT
from helpers.question_files import GOOD, HOTPOT, MUSIQUE, OURS, POPQA, SEARCH_R1, SQUAD, as_list, verl_row, write_jsonl
from tspo_trl import TagProtocol, load_questions
from tspo_trl.demo import make_tokenizer
from tspo_trl.training.datasets import prepare_dataset

# Formats


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("golds", ["golden_answers", "reward_model.ground_truth.target"])
def test_search_r1_parquet_is_loaded_unchanged(tmp_path, golds, streaming):
    rows = Dataset.from_list(SEARCH_R1)
    if golds != "golden_answers":
        rows = rows.remove_columns("golden_answers")
    rows.to_parquet(tmp_path / "train.parquet")
    dataset = load_questions(tmp_path / "train.parquet", streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert as_list(dataset) == [{column: row[column] for column in OURS} for row in SEARCH_R1]
    assert [row["metadata"] for row in dataset] == [None, None, HOTPOT]
    assert [row["reward_model"] for row in dataset] == [row["reward_model"] for row in SEARCH_R1]
    # The prompt comes from the protocol, not from the data set
    protocol = TagProtocol(make_tokenizer())
    assert [row["prompt"] for row in prepare_dataset(dataset, protocol)] == [
        protocol.prompt(row["question"]) for row in SEARCH_R1
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_flashrag_jsonl_is_loaded_unchanged(tmp_path, streaming):
    rows = [
        {"id": "dev_0", **GOOD, "metadata": {"supporting_facts": {"title": ["Emma"], "sent_id": [0]}}},
        {
            "id": "dev_1",
            "question": "q",
            "golden_answers": ["1816"],
            "metadata": {"supporting_facts": None, "level": "hard"},
        },
    ]
    write_jsonl(tmp_path / "hotpotqa" / "dev.jsonl", rows)
    for arguments in ({"source": "hotpotqa/dev.jsonl"}, {"source": tmp_path, "name": "hotpotqa", "split": "dev"}):
        dataset = load_questions(**arguments, streaming=streaming)
        # A file named after its split gets the name of its folder
        expected = [{"data_source": "hotpotqa", **{c: row[c] for c in OURS[:3]}} for row in rows]
        assert as_list(dataset) == [{c: row[c] for c in OURS} for row in expected]
        assert [row["metadata"].get("level") for row in dataset] == [None, "hard"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.json", "mine.parquet", "mine.csv"])
def test_files_of_all_formats_are_loaded(tmp_path, name, streaming):
    rows = [{**GOOD, "hops": 1}, {"question": 'Which "year",\nif any?', "golden_answers": ["1816", "NA"], "hops": 2}]
    file = tmp_path / name
    if ".jsonl" in name:
        write_jsonl(tmp_path / "mine.jsonl", rows)
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress((tmp_path / "mine.jsonl").read_bytes()))
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows, indent=2))
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(file)
    else:
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, ["question", "golden_answers", "hops"])
            writer.writeheader()
            writer.writerows({**row, "golden_answers": json.dumps(row["golden_answers"])} for row in rows)
    dataset = load_questions(name, streaming=streaming)
    assert as_list(dataset) == [
        {"id": str(i), "question": row["question"], "golden_answers": row["golden_answers"], "data_source": "mine"}
        for i, row in enumerate(rows)
    ]
    assert [row["hops"] for row in dataset] == [1, 2]


def test_a_string_is_loaded_as_one_golden_answer(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "golden_answers": "Jane Austen"}, {**GOOD, "golden_answers": "[sic]"}])
    assert [row["golden_answers"] for row in load_questions("a.jsonl")] == [["Jane Austen"], ["[sic]"]]


def test_cells_of_a_csv_file_are_loaded_as_text(tmp_path):
    """Answers that look like numbers, missing values or booleans are not converted."""
    (tmp_path / "a.csv").write_text(
        "id,question,golden_answers,hops\n007,q,1952,1\n008,q,NA,2\n009,None,true,3\n010,1,01.50,4\n"
    )
    dataset = load_questions("a.csv")
    assert [row["golden_answers"] for row in dataset] == [["1952"], ["NA"], ["true"], ["01.50"]]
    assert [row["question"] for row in dataset] == ["q", "q", "None", "1"]
    assert dataset["id"][:] == ["007", "008", "009", "010"]
    assert dataset["hops"][:] == [1, 2, 3, 4]
    mapped = load_questions("a.csv", columns={"golden_answers": "hops"})
    assert [row["golden_answers"] for row in mapped] == [["1"], ["2"], ["3"], ["4"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("text", ["[0, 1]", "[1969]", "[1]", "[]", "[sic]", "[null]"])
def test_a_string_in_json_or_parquet_is_never_converted(tmp_path, text, streaming):
    musique = {"question": "q", "answer": text, "answer_aliases": ["b"]}
    for row, expected in (({**GOOD, "golden_answers": text}, [text]), (musique, [text, "b"])):
        write_jsonl(tmp_path / "a.jsonl", [row])
        Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
        for source in ("a.jsonl", "a.parquet", Dataset.from_list([row])):
            assert [row["golden_answers"] for row in load_questions(source, streaming=streaming)] == [expected]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("cell", "golds"),
    [
        ("[0, 1]", ["[0, 1]"]),
        ("[1969]", ["[1969]"]),
        ("[sic]", ["[sic]"]),
        ('["1969", "a"]', ["1969", "a"]),
        ("[]", None),
        ("[null]", None),
        ('["a", 1]', None),
        ('[["a"]]', None),
        ("['a']", None),
    ],
)
def test_a_list_of_strings_in_a_cell_is_several_answers(tmp_path, cell, golds, streaming):
    Dataset.from_list([{"question": "q", "possible_answers": cell}]).to_parquet(tmp_path / "popqa.parquet")
    for name, column in (("a.csv", "golden_answers"), ("a.tsv", "possible_answers"), ("popqa.parquet", None)):
        if column:
            with (tmp_path / name).open("w", newline="") as lines:
                table = csv.writer(lines, delimiter="," if name == "a.csv" else "\t")
                table.writerows([["question", column], ["q", cell]])
        if golds is None:
            with pytest.raises(ValueError, match=r"row 0 \(from 0\), column '.*': expected .*, found .*"):
                load_questions(name, streaming=streaming)
        else:
            assert [row["golden_answers"] for row in load_questions(name, streaming=streaming)] == [golds]


@pytest.mark.parametrize("text", ['["Paris", "Rome"]', "['Paris']"])
def test_a_list_that_is_written_as_text_is_refused(tmp_path, text):
    """In one golden answer it would match nothing."""
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "golden_answers": text}])
    with pytest.raises(ValueError, match=r"line 1, column 'golden_answers': expected .* that is not written as text"):
        load_questions("a.jsonl")


def test_blank_golden_answers_are_removed():
    dataset = load_questions(Dataset.from_list([{**GOOD, "golden_answers": ["", "Jane Austen", " "]}]))
    assert dataset[0]["golden_answers"] == ["Jane Austen"]


def test_ids_are_converted_to_strings(tmp_path):
    rows = [{**GOOD, "id": 7}, {**GOOD, "id": None}, {**GOOD, "id": 9}]
    assert load_questions(Dataset.from_list(rows))["id"][:] == ["7", "1", "9"]


# Other columns


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
def test_columns_are_mapped(make):
    columns = {"id": "qid", "question": "query", "golden_answers": "answers.text"}
    dataset = load_questions(make(SQUAD), columns=columns)
    assert [{column: row[column] for column in OURS[:3]} for row in dataset] == [
        {"id": "5", "question": "Who?", "golden_answers": ["A", "B"]},
        {"id": "6", "question": "Where?", "golden_answers": ["E"]},
    ]
    assert set(next(iter(dataset))) == {*OURS, "answers", "all"}  # mapped columns are renamed, other columns stay
    listed = load_questions(make(SQUAD), columns={**columns, "golden_answers": "all.name"})
    assert [row["golden_answers"] for row in listed] == [["C", "D"], ["F"]]


def test_a_stream_without_known_features_is_loaded():
    stream = IterableDataset.from_generator(lambda: iter(SQUAD))
    columns = {"question": "query", "golden_answers": "all.name"}
    dataset = load_questions(stream, columns=columns)
    assert [row["golden_answers"] for row in dataset] == [["C", "D"], ["F"]]
    with pytest.raises(ValueError, match=r"no column 'querry'.*Did you mean 'query'"):
        load_questions(stream, columns={**columns, "question": "querry"})


def test_mapped_columns_replace_columns_with_standard_names():
    rows = [{"question": {"text": "Who?"}, "golden_answers": ["A"], "id": "x", "source": "mine"}]
    dataset = load_questions(Dataset.from_list(rows), columns={"question": "question.text", "data_source": "source"})
    assert list(dataset) == [{"id": "x", "question": "Who?", "golden_answers": ["A"], "data_source": "mine"}]


def test_prompts_are_kept_if_mapped():
    rows = Dataset.from_list([{**GOOD, "prompt": [{"role": "user", "content": "Who?"}]}])
    assert "prompt" not in load_questions(rows).column_names
    for dataset in (rows, rows.to_iterable_dataset()):
        (row,) = load_questions(dataset, columns={"prompt": "prompt"})
        assert row["prompt"] == [{"role": "user", "content": "Who?"}]


# Other published data sets


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_verl_data_is_loaded_unchanged(tmp_path, name, streaming):
    """verl's preprocessing of Search-R1's data drops the columns `question` and `golden_answers`."""
    rows = [verl_row(0), verl_row(1, ["1952-03-04"])]
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(name)
    else:
        write_jsonl(tmp_path / name, rows)
    dataset = load_questions(name, streaming=streaming)
    assert as_list(dataset) == [
        {
            "id": str(i),
            "question": f"question {i}?",
            "golden_answers": row["reward_model"]["ground_truth"]["target"],
            "data_source": "searchR1_nq",
        }
        for i, row in enumerate(rows)
    ]
    assert [row["extra_info"] for row in dataset] == [row["extra_info"] for row in rows]
    assert "prompt" not in next(iter(dataset))


def test_command_of_the_migration_page_loads_verl_data(tmp_path):
    from tspo_trl.commands.train import load_datasets, parse_arguments

    page = (ROOT / "docs" / "migration.md").read_text()
    after = page[page.index("## From verl") :].split("After:")[1]
    command = re.search(r"recipes/train\.py(.*?)```", after, re.DOTALL)[1].replace("\\\n", " ")
    Dataset.from_list([verl_row(0)]).to_parquet("train.parquet")
    train, evaluated = load_datasets(parse_arguments(shlex.split(command))[0])
    assert train["question"][:] == ["question 0?"]
    assert evaluated is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data", "data/train.zip"])
def test_shards_and_archives_of_json_are_loaded(tmp_path, name, streaming):
    rows = [{"id": f"{i}", "question": "q", "golden_answers": "1952-03-04"} for i in range(3)]
    if name.endswith(".zip"):
        (tmp_path / "data").mkdir()
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        for i, row in enumerate(rows):
            write_jsonl(tmp_path / "data" / f"train-0000{i}-of-00003.jsonl", [row])
    dataset = load_questions("data", split="train", streaming=streaming)
    assert [(row["id"], row["golden_answers"]) for row in dataset] == [(f"{i}", ["1952-03-04"]) for i in range(3)]


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"reward_model": {"ground_truth": "72", "style": "rule"}}, ["72"]),
        ({"reward_model": {"ground_truth": ["72", "73"], "style": "rule"}}, ["72", "73"]),
        ({"extra_info": {"question": "q", "golden_answers": ["72"]}}, ["72"]),
        ({"extra_info": {"question": "q", "answers": ["72"]}}, ["72"]),
    ],
)
def test_answers_in_other_columns_of_verl_are_found(tmp_path, columns, answers):
    row = {"prompt": "q", "extra_info": {"index": 0, "question": "q"}, **columns}
    write_jsonl(tmp_path / "a.jsonl", [row])
    for source in ("a.jsonl", Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        (read,) = load_questions(source)
        assert (read["question"], read["golden_answers"]) == ("q", answers)


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_and_aliases_of_musique_are_joined(tmp_path, streaming):
    write_jsonl(tmp_path / "musique_ans_v1.0_dev.jsonl", MUSIQUE)
    dataset = load_questions("musique_ans_v1.0_dev.jsonl", streaming=streaming)
    assert [(row["id"], row["golden_answers"]) for row in dataset] == [
        ("2hop__1", ["1969", "MCMLXIX"]),
        ("3hop__2", ["Rome"]),
    ]
    assert [row["paragraphs"] for row in dataset] == [row["paragraphs"] for row in MUSIQUE]
    chosen = load_questions(
        "musique_ans_v1.0_dev.jsonl", columns={"golden_answers": "answer_aliases"}, split="train[:1]"
    )
    assert [(row["golden_answers"], row["answer"]) for row in chosen] == [(["MCMLXIX", "1969"], "1969")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["popQA.tsv", "popQA.tsv.gz"])
def test_popqa_tsv_is_loaded_unchanged(tmp_path, name, streaming):
    with (gzip.open if name.endswith(".gz") else open)(name, "wt", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(POPQA[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(POPQA)
    dataset = load_questions(name, streaming=streaming)
    assert as_list(dataset) == [
        {
            "id": str(row["id"]),
            "question": row["question"],
            "golden_answers": [row["obj"], "é"],
            "data_source": "popQA",
        }
        for row in POPQA
    ]
    assert [row["s_pop"] for row in dataset] == [142, 100]


def test_original_hotpotqa_needs_one_column(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps([{"_id": "5a8b", "question": "Who?", "answer": "1952-03-04"}]))
    with pytest.raises(ValueError, match=r"`columns=\{'golden_answers': 'answer'\}`"):
        load_questions("dev.json")
    (row,) = load_questions("dev.json", columns={"golden_answers": "answer"})
    assert (row["id"], row["golden_answers"]) == ("5a8b", ["1952-03-04"])
