"""Questions from folders, data sets on disk, the Hub, several sources and the benchmarks."""

import json
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from helpers.dataset_hub import DatasetHub
from helpers.question_files import GOOD, OURS, SEARCH_R1, SQUAD, write_jsonl
from tspo_trl import BENCHMARKS, load_benchmark, load_questions, question_splits

# Splits and repositories


def test_data_sets_on_disk_are_loaded(tmp_path):
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


def test_splits_of_a_folder_are_found(tmp_path):
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


def test_a_single_data_set_has_one_split(tmp_path):
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


TEXT_ON_THE_HUB = """
import json
from tspo_trl import load_questions

def read(*arguments, **options):
    rows = load_questions(*arguments, **options)
    return [[row["id"], row["question"], row["golden_answers"], row["more"]] for row in rows]

sources = [("me/jsonl",), ("me/shards",), ("me/csv",), ("me/tsv",), ("me/configs", "one"), ("me/configs", "two")]
print(json.dumps({
    "read": [read(source[0], name=(source[1:] or (None,))[0], split="test", **options)
             for source in sources for options in OPTIONS],
    "mapped": [read("me/mapped", split="test", columns={"golden_answers": "all.name"}, **options)
               for options in OPTIONS],
}))
"""


def test_text_on_the_hub_stays_text(tmp_path):
    """JSON and tables; streamed or not; from the cache if there is no connection."""
    root = tmp_path / "hub" / "me"
    rows = [
        {"id": text, "question": text, "golden_answers": text, "more": 1}
        for text in ("1952-03-04", "007", "true", "null", "1952-03-05")
    ]
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    write_jsonl(root / "jsonl" / "test.jsonl", rows)
    for i, row in enumerate(rows):
        write_jsonl(root / "shards" / f"test-0000{i}-of-00005.jsonl", [row])
    for folder, separator in (("csv", ","), ("tsv", "\t")):
        (root / folder).mkdir()
        (root / folder / f"test.{folder}").write_text("".join(separator.join(row) + "\n" for row in table))
    write_jsonl(root / "configs" / "a" / "test.jsonl", rows)
    card = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: test\n    path: a/test.jsonl\n"
        for config in ("one", "two")
    )
    (root / "configs" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    nested = [{**row, "golden_answers": None, "all": [{"name": row["golden_answers"]}]} for row in rows]
    write_jsonl(root / "mapped" / "test.jsonl", nested)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
        "NO_PROXY": "127.0.0.1",
    }

    def run(options, offline):
        code = f"OPTIONS = {options}\n{TEXT_ON_THE_HUB}"
        with DatasetHub(tmp_path / "hub") as hub:
            found = environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline))}
            command = [sys.executable, "-c", code]
            result = subprocess.run(command, env=found, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    expected = [[row["id"], row["question"], [row["golden_answers"]], row["more"]] for row in rows]
    both = run([{}, {"streaming": True}], offline=False)
    assert both["read"] == [expected] * 12
    assert both["mapped"] == [expected] * 2
    assert run([{}], offline=True) == {"read": [expected] * 6, "mapped": [expected]}


def test_data_sets_on_the_hub_are_loaded(tmp_path):
    """Uses the real clients and a local server whose repositories have the real layout."""
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
    assert {"hotpotqa/dev.jsonl", "train.parquet", "test.parquet"} <= set(hub.requested)
    assert (
        "'RUC-NLPIR/FlashRAG' is neither a file nor a folder here, and was not found on the" in found["no repository"]
    )
    assert re.match(r"ValueError: RUC-NLPIR/FlashRAG_datasets \(nqq\): .*'nq', 'hotpotqa'", found["no configuration"])
    assert re.match(r"ValueError: .* \(nq\): Unknown split \"tset\".*'train', 'dev', 'test'", found["no split"])
    assert (
        "(nq) has several splits: say which one with `split`, one of ['train', 'dev', 'test']" in found["which split"]
    )


# Mixing and sampling questions


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
    """Sources that need different column mappings can be mixed this way."""
    squad = load_questions(Dataset.from_list(SQUAD), columns={"question": "query", "golden_answers": "answers.text"})
    write_jsonl(tmp_path / "mine.jsonl", [GOOD])
    dataset = load_questions([squad, load_questions("mine.jsonl")])
    assert dataset["data_source"][:] == ["questions", "questions", "mine"]


def test_samples_of_questions_are_stratified_and_reproducible():
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


def test_benchmarks_are_loaded_from_a_copy_of_the_repository(tmp_path):
    for benchmark in BENCHMARKS.values():
        rows = [{"id": f"{benchmark.split}_{i}", **GOOD, "metadata": {"n": i}} for i in range(4)]
        write_jsonl(tmp_path / benchmark.config / f"{benchmark.split}.jsonl", rows)
        write_jsonl(tmp_path / benchmark.config / "train.jsonl", [{"id": "train_0", **GOOD}])
    for name, benchmark in BENCHMARKS.items():
        dataset = load_benchmark(name, repository=tmp_path)
        assert dataset["id"][:] == [f"{benchmark.split}_{i}" for i in range(4)]
        assert set(dataset["data_source"]) == {name}
        assert len(load_benchmark(benchmark.title, repository=tmp_path, max_questions=2)) == 2
