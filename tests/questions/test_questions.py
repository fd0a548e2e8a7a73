"""Loading questions from files, folders, the Hub and memory, and errors that name file, row and column."""

import csv
import gzip
import json
import logging
import os
import re
import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from helpers.dataset_hub import DatasetHub
from helpers.paths import ROOT
from tspo_trl import BENCHMARKS, TagProtocol, load_benchmark, load_questions, question_splits
from tspo_trl.demo import make_tokenizer
from tspo_trl.training.datasets import prepare_dataset

GOOD = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"]}
OURS = ["id", "question", "golden_answers", "data_source"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    datasets.disable_progress_bars()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def search_r1_row(index, data_source, metadata=None):
    """A row in the format of `PeterJinGo/nq_hotpotqa_train`."""
    answers = [f"answer {index}", "another"]
    return {
        "id": f"train_{index}",
        "question": f"question {index}?",
        "golden_answers": answers,
        "data_source": data_source,
        "prompt": [{"role": "user", "content": f"Answer the given question. Question: question {index}?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": answers}, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
        "metadata": metadata,
    }


HOTPOT = {"type": "bridge", "level": "easy", "context": {"title": ["A"], "sentences": [["One.", "Two."]]}}
SEARCH_R1 = [search_r1_row(0, "nq"), search_r1_row(1, "nq"), search_r1_row(0, "hotpotqa", HOTPOT)]


def as_list(dataset):
    return [{column: row[column] for column in OURS} for row in dataset]


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
    # The prompt is written by our protocol, not taken from the data set
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
def test_plain_files(tmp_path, name, streaming):
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


def test_a_string_is_one_answer(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "golden_answers": "Jane Austen"}, {**GOOD, "golden_answers": "[sic]"}])
    assert [row["golden_answers"] for row in load_questions("a.jsonl")] == [["Jane Austen"], ["[sic]"]]


def test_cells_of_a_csv_file_are_text(tmp_path):
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


def test_blank_answers_are_left_out():
    dataset = load_questions(Dataset.from_list([{**GOOD, "golden_answers": ["", "Jane Austen", " "]}]))
    assert dataset[0]["golden_answers"] == ["Jane Austen"]


def test_ids_are_strings(tmp_path):
    rows = [{**GOOD, "id": 7}, {**GOOD, "id": None}, {**GOOD, "id": 9}]
    assert load_questions(Dataset.from_list(rows))["id"][:] == ["7", "1", "9"]


# Other data sets


SQUAD = [
    {
        "qid": 5,
        "query": "Who?",
        "answers": {"text": ["A", "B"], "answer_start": [1, 2]},
        "all": [{"name": "C"}, {"name": "D"}],
    },
    {"qid": 6, "query": "Where?", "answers": {"text": ["E"], "answer_start": [3]}, "all": [{"name": "F"}]},
]


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


def test_a_stream_without_known_features():
    stream = IterableDataset.from_generator(lambda: iter(SQUAD))
    columns = {"question": "query", "golden_answers": "all.name"}
    dataset = load_questions(stream, columns=columns)
    assert [row["golden_answers"] for row in dataset] == [["C", "D"], ["F"]]
    with pytest.raises(ValueError, match=r"no column 'querry'.*Did you mean 'query'"):
        load_questions(stream, columns={**columns, "question": "querry"})


def test_mapped_columns_replace_columns_with_our_names():
    rows = [{"question": {"text": "Who?"}, "golden_answers": ["A"], "id": "x", "source": "mine"}]
    dataset = load_questions(Dataset.from_list(rows), columns={"question": "question.text", "data_source": "source"})
    assert list(dataset) == [{"id": "x", "question": "Who?", "golden_answers": ["A"], "data_source": "mine"}]


def test_prompts_are_kept_if_mapped():
    rows = Dataset.from_list([{**GOOD, "prompt": [{"role": "user", "content": "Who?"}]}])
    assert "prompt" not in load_questions(rows).column_names
    for dataset in (rows, rows.to_iterable_dataset()):
        (row,) = load_questions(dataset, columns={"prompt": "prompt"})
        assert row["prompt"] == [{"role": "user", "content": "Who?"}]


def test_data_sets_on_disk(tmp_path):
    train, test = Dataset.from_list([GOOD] * 3), Dataset.from_list([GOOD] * 2)
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    test.save_to_disk(tmp_path / "one")
    assert question_splits("both") == ["train", "test"]
    assert len(load_questions("both", split="test")) == 2
    assert len(load_questions("one")) == 2
    assert isinstance(load_questions("one", streaming=True), IterableDataset)
    with pytest.raises(ValueError, match=r"both has several splits.*`split`, one of \['train', 'test'\]"):
        load_questions("both")
    with pytest.raises(ValueError, match=r"both has no split 'dev', only \['train', 'test'\]"):
        load_questions("both", split="dev")


def test_splits_of_a_folder_of_files(tmp_path):
    (tmp_path / "mine").mkdir()
    Dataset.from_list(SEARCH_R1).to_parquet(tmp_path / "mine" / "train.parquet")
    Dataset.from_list(SEARCH_R1[:1]).to_parquet(tmp_path / "mine" / "test.parquet")
    (tmp_path / "mine" / "README.md").write_text("Mine.")
    assert sorted(question_splits("mine")) == ["test", "train"]
    assert len(load_questions("mine", split="test")) == 1
    assert len(load_questions("mine", split="train[1:]")) == 2
    with pytest.raises(ValueError, match=r"mine has several splits"):
        load_questions("mine")


def test_shards_of_a_split_are_joined(tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(2):
        Dataset.from_list(SEARCH_R1[i : i + 1]).to_parquet(tmp_path / "mine" / f"train-0000{i}-of-00002.parquet")
    assert question_splits("mine") == ["train"]
    assert load_questions("mine", split="train")["id"][:] == ["train_0", "train_1"]


def test_splits_of_single_data_sets(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [GOOD] * 5)
    assert question_splits("a.jsonl") == ["train"]
    assert len(load_questions("a.jsonl", split="train[:2]")) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl: a file is the split 'train', but `split` is 'test'"):
        load_questions("a.jsonl", split="test")
    with pytest.raises(ValueError, match="`source` is a single split, 'train', but `split` is 'test'"):
        load_questions(Dataset.from_list([GOOD]), split="test")


ON_THE_HUB = """
import json
from tspo_trl import load_benchmark, load_questions, question_splits

def message(*arguments, **options):
    try:
        load_questions(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

flashrag = "RUC-NLPIR/FlashRAG_datasets"
print(json.dumps({
    "benchmark": load_benchmark("hotpotqa").to_list(),
    "stream": list(load_questions("PeterJinGo/nq_hotpotqa_train", split="train", streaming=True)),
    "parquet": load_questions("PeterJinGo/nq_hotpotqa_train", split="test").to_list(),
    "splits": question_splits(flashrag, "nq"),
    "no repository": message("RUC-NLPIR/FlashRAG"),
    "no configuration": message(flashrag, name="nqq", split="test"),
    "no split": message(flashrag, name="nq", split="tset"),
    "which split": message(flashrag, name="nq"),
}))
"""


def test_data_sets_on_the_hub(tmp_path):
    """Uses the real clients, with repositories in their real layout on a local server."""
    rows = [{"id": f"dev_{i}", **GOOD, "metadata": {"level": "easy"}} for i in range(3)]
    flashrag = tmp_path / "hub" / "RUC-NLPIR" / "FlashRAG_datasets"
    card = "---\nconfigs:\n"
    for config, splits in {"nq": ["train", "dev", "test"], "hotpotqa": ["train", "dev"]}.items():
        card += f"- config_name: {config}\n  data_files:\n"
        for split in splits:
            card += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
            named = [{**row, "question": f"{config} {split}?"} for row in rows]
            write_jsonl(flashrag / config / f"{split}.jsonl", named)
    (flashrag / "README.md").write_text(card + "---\n# FlashRAG data sets\n")
    search_r1 = tmp_path / "hub" / "PeterJinGo" / "nq_hotpotqa_train"
    search_r1.mkdir(parents=True)
    Dataset.from_list(SEARCH_R1).to_parquet(search_r1 / "train.parquet")
    Dataset.from_list(SEARCH_R1[:1]).to_parquet(search_r1 / "test.parquet")

    with DatasetHub(tmp_path / "hub") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", ON_THE_HUB]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    expected = [{**row, "question": "hotpotqa dev?", "data_source": "hotpotqa"} for row in rows]
    assert found["benchmark"] == expected
    assert [{c: row[c] for c in OURS} for row in found["stream"]] == [{c: row[c] for c in OURS} for row in SEARCH_R1]
    assert [row["id"] for row in found["parquet"]] == ["train_0"]
    assert found["splits"] == ["train", "dev", "test"]
    assert {"hotpotqa/dev.jsonl", "train.parquet", "test.parquet"} <= set(hub.asked)
    assert (
        "'RUC-NLPIR/FlashRAG' is neither a file nor a folder here, and was not found on the" in found["no repository"]
    )
    assert re.match(r"ValueError: RUC-NLPIR/FlashRAG_datasets \(nqq\): .*'nq', 'hotpotqa'", found["no configuration"])
    assert re.match(r"ValueError: .* \(nq\): Unknown split \"tset\".*'train', 'dev', 'test'", found["no split"])
    assert (
        "(nq) has several splits: say which one with `split`, one of ['train', 'dev', 'test']" in found["which split"]
    )


# Mixing and drawing questions


def test_rows_of_mixed_sources_have_a_data_source(tmp_path):
    Dataset.from_list(SEARCH_R1).to_parquet(tmp_path / "search_r1.parquet")
    write_jsonl(tmp_path / "mine.jsonl", [{**GOOD, "metadata": "text"}, {**GOOD, "metadata": "more"}])
    sources = ["search_r1.parquet", "mine.jsonl", Dataset.from_list([{**GOOD, "hops": 2}])]
    dataset = load_questions(sources)
    assert dataset["data_source"][:] == ["nq", "nq", "hotpotqa", "mine", "mine", "questions"]
    assert dataset["hops"][:] == [None] * 5 + [2]
    assert "metadata" not in dataset.column_names  # a struct in one source, text in another
    assert dataset[0]["ability"] == "fact-reasoning"

    stream = load_questions(sources, streaming=True)
    assert [row["data_source"] for row in stream] == ["nq", "mine", "questions", "nq", "mine", "hotpotqa"]
    assert {tuple(sorted(row)) for row in stream} == {tuple(sorted(OURS))}  # the columns common to all sources


def test_sources_with_the_same_name_get_different_data_sources(tmp_path):
    for folder in "ab":
        write_jsonl(tmp_path / folder / "questions.jsonl", [GOOD])
    sources = ["a/questions.jsonl", "b/questions.jsonl", Dataset.from_list([GOOD])]
    assert load_questions(sources)["data_source"][:] == ["a/questions.jsonl", "b/questions.jsonl", "questions[2]"]


def test_loaded_questions_can_be_a_source(tmp_path):
    """Sources that need different column mappings are mixed in this way."""
    squad = load_questions(Dataset.from_list(SQUAD), columns={"question": "query", "golden_answers": "answers.text"})
    write_jsonl(tmp_path / "mine.jsonl", [GOOD])
    dataset = load_questions([squad, load_questions("mine.jsonl")])
    assert dataset["data_source"][:] == ["questions", "questions", "mine"]


def test_draws_are_stratified_and_repeatable():
    names = ["nq"] * 60 + ["hotpotqa"] * 30 + ["rare"] * 2
    rows = Dataset.from_list([{**GOOD, "id": i, "data_source": name} for i, name in enumerate(names)])

    def draw(count, seed=0):
        return load_questions(rows, max_questions=count, seed=seed)

    ids = draw(9)["id"][:]
    assert ids == draw(9)["id"][:]
    assert ids != draw(9, seed=1)["id"][:]
    assert ids == sorted(ids, key=int)
    counts = {
        count: [draw(count)["data_source"][:].count(name) for name in ("nq", "hotpotqa", "rare")]
        for count in (3, 9, 46)
    }
    assert counts == {3: [1, 1, 1], 9: [5, 3, 1], 46: [30, 15, 1]}
    assert set(ids) < set(draw(46)["id"][:])  # a larger subset contains a smaller one
    assert len(draw(92)) == len(draw(1000)) == 92


def test_first_questions_of_a_stream_are_taken():
    rows = Dataset.from_list([{**GOOD, "id": i} for i in range(5)])
    assert [row["id"] for row in load_questions(rows, streaming=True, max_questions=2)] == ["0", "1"]


# Errors


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


@pytest.mark.parametrize(
    ("bad", "column", "found"),
    [
        ({"query": 5}, "query", "5"),
        ({"answers": {"text": [1, 2]}}, "answers.text", r"\[1, 2\]"),
        ({"answers": {"text": [["a"], ["b"]]}}, "answers.text", r"\[\['a'\], \['b'\]\]"),
        ({"qid": 1.5}, "qid", "1.5"),
        ({"qid": True}, "qid", "True"),
        ({"data_source": 3}, "data_source", "3"),
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
            "a.jsonl, line 3, column 'question': found an object, but a string in line 1",
        ),
        (
            "a.csv",
            "question,golden_answers\na,b\nc,d,e\n",
            "a.csv cannot be read as csv: .*Expected 2 fields in line 3, saw 3",
        ),
        (
            "a.csv",
            "question,golden_answers\na,\"['b', 'c']\"\n",
            "a.csv, row 0 (from 0), column 'golden_answers'.*a list as JSON",
        ),
        ("a.parquet", "no", "a.parquet cannot be read as parquet"),
        ("a.txt", "no", "a.txt: a file of questions ends in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        load_questions(name)


def test_error_of_another_encoding_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "Où?", "golden_answers": "ici"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl.*UTF-?8"):
        load_questions("a.jsonl")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            r"`source` has no column 'question'.*\['qid', 'query', 'answers', 'all'\].*columns=\{'question': 'query'\}",
        ),
        ({"question": "query"}, r"no column 'golden_answers'.*columns=\{'golden_answers': 'answers.text'\}"),
        ({"question": "quory"}, "no column 'quory', from which 'question' is to be read.*Did you mean 'query'"),
        ({"question": "query", "golden_answers": "answers.txt"}, "no field 'txt' in 'answers'.*Did you mean 'text'"),
        ({"question": "query", "golden_answers": "all.nam"}, "no field 'nam' in 'all'.*Did you mean 'name'"),
        ({"query": "question"}, r"got the key 'query'. Swap key and value: \{'question': 'query'\}"),
        ({"golden_answer": "answers.text"}, "got the key 'golden_answer'. Did you mean 'golden_answers'"),
        ({"question": None}, r"`columns\['question'\]` must be the name of a column, got None"),
    ],
)
def test_error_of_an_unknown_column_suggests_the_nearest(columns, message):
    with pytest.raises(ValueError, match=message):
        load_questions(Dataset.from_list(SQUAD), columns=columns)


def test_warning_counts_golden_answers_that_normalise_to_the_empty_string(caplog):
    golds = [["Austen"], ["The The"], ["!!!", "a"], ["The The", "Matt Johnson"]]
    rows = Dataset.from_list([{**GOOD, "golden_answers": gold} for gold in golds])
    with caplog.at_level(logging.WARNING, "tspo_trl"):
        dataset = load_questions(rows)
    assert [row["golden_answers"] for row in dataset] == golds  # The The is a band
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


# The benchmarks


def test_benchmarks_are_those_of_search_r1():
    splits = {name: (b.config, b.split) for name, b in BENCHMARKS.items()}
    assert splits == {
        "nq": ("nq", "test"),
        "triviaqa": ("triviaqa", "test"),
        "popqa": ("popqa", "test"),
        "hotpotqa": ("hotpotqa", "dev"),
        "2wikimultihopqa": ("2wikimultihopqa", "dev"),
        "musique": ("musique", "dev"),
        "bamboogle": ("bamboogle", "test"),
    }
    assert {b.repository for b in BENCHMARKS.values()} == {"RUC-NLPIR/FlashRAG_datasets"}
    assert [name for name, b in BENCHMARKS.items() if not b.note] == ["popqa", "bamboogle"]
    assert all(b.split in ("test", "dev") and "dev split" in b.note for b in BENCHMARKS.values() if b.note)


def test_benchmarks_of_a_copy_of_the_repository(tmp_path):
    for benchmark in BENCHMARKS.values():
        rows = [{"id": f"{benchmark.split}_{i}", **GOOD, "metadata": {"n": i}} for i in range(4)]
        write_jsonl(tmp_path / benchmark.config / f"{benchmark.split}.jsonl", rows)
        write_jsonl(tmp_path / benchmark.config / "train.jsonl", [{"id": "train_0", **GOOD}])
    for name, benchmark in BENCHMARKS.items():
        dataset = load_benchmark(name, repository=tmp_path)
        assert dataset["id"][:] == [f"{benchmark.split}_{i}" for i in range(4)]
        assert set(dataset["data_source"]) == {name}
        assert len(load_benchmark(benchmark.title, repository=tmp_path, max_questions=2)) == 2


@pytest.mark.parametrize(
    ("name", "near"), [("hotpot", "hotpotqa"), ("2wiki", "2wikimultihopqa"), ("TriviaQ", "triviaqa")]
)
def test_error_of_an_unknown_benchmark_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"There is no benchmark '{name}', only .*Did you mean '{near}'"):
        load_benchmark(name)


def test_data_page_shows_the_messages_that_are_raised(tmp_path, caplog):
    good = '{"question": "q", "golden_answers": ["a"]}\n'
    squad = Dataset.from_list([{"qid": 5, "query": "Who?", "answers": {"text": ["A"], "answer_start": [1]}}])

    def read(name, text):
        (tmp_path / name).write_text(text)
        load_questions(name)

    failing = [
        lambda: read("questions.jsonl", good + '\n{"question": "q", "golden_answers": []}\n'),
        lambda: read("questions.jsonl", good + '\n{"question": oops}\n'),
        lambda: read("questions.jsonl", good + '\n{"question": {"text": "q"}, "golden_answers": ["a"]}\n'),
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
