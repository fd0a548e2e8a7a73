"""Questions, golden answers and ids that look like dates, numbers or booleans are text, in every format."""

import csv
import datetime
import gzip
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, load_dataset

from helpers.question_files import GOOD, write_jsonl
from tspo_trl import load_questions

LOOK_ALIKES = [
    "1952-03-04",
    "1952-03-04T10:30:00",
    "1952-03-04 10:30:00Z",
    "10:30",
    "1969",
    "007",
    "1.50",
    "1e3",
    "-0",
    "true",
    "False",
    "null",
    "NA",
    "nan",
    "None",
    "inf",
]


def rows_of(values, nest=lambda value: {"golden_answers": value}):
    return [{"id": value, "question": value, **nest(value)} for value in values]


def read(dataset):
    return [(row["id"], row["question"], row["golden_answers"]) for row in dataset]


def write(path, rows):
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
                for row in rows
            )
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(text)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("nest", ["scalar", "list"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("values", [LOOK_ALIKES, *([value] * 2 for value in LOOK_ALIKES[:12])], ids=lambda v: v[1])
def test_text_that_looks_like_something_else_stays_text(tmp_path, name, values, nest, streaming):
    """A file of one kind only is the case in which a reader infers a type."""
    rows = rows_of(values, lambda value: {"golden_answers": [value] if nest == "list" else value})
    write(tmp_path / name, rows)
    assert read(load_questions(name, streaming=streaming)) == [(value, value, [value]) for value in values]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "nest"),
    [
        ("answers.text", lambda value: {"answers": {"text": [value], "answer_start": [1]}}),
        ("all.name", lambda value: {"all": [{"name": value}]}),
        ("a.b", lambda value: {"a.b": value}),
        (None, lambda value: {"reward_model": {"ground_truth": {"target": [value]}, "style": "rule"}}),
    ],
)
def test_text_in_structs_stays_text(tmp_path, column, nest, streaming):
    columns = None if column is None else {"golden_answers": column}
    for value in LOOK_ALIKES:
        write_jsonl(tmp_path / "a.jsonl", rows_of([value], nest))
        assert read(load_questions("a.jsonl", columns=columns, streaming=streaming)) == [(value, value, [value])]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("early", ["1952-03-04", 1969, True, ["1952-03-04"], [1969], None])
def test_a_word_in_a_late_row_of_a_large_file_is_read(tmp_path, early, streaming):
    """The types of the first rows of a file do not decide how the others are read."""
    rows = [{"question": "q", "id": early if early is None else str(early), "golden_answers": ["1952-03-04"]}] * 3000
    rows = [{**row, "golden_answers": early} for row in rows] if early is not None else rows
    late = {"question": "q", "id": "late", "golden_answers": "Paris"}
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "padding": "x" * 5000} for row in rows] + [late])
    assert path.stat().st_size > 12 << 20  # more than `datasets` reads at once
    *_, last = load_questions("a.jsonl", streaming=streaming)
    assert (last["id"], last["golden_answers"]) == ("late", ["Paris"])


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_and_booleans_of_json_are_the_text_of_the_file(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text(
        '{"id": 1, "question": 2, "golden_answers": 1969, "hops": 1.50}\n'
        '{"id": 1.0, "question": 1.10, "golden_answers": [1969, "nineteen sixty-nine", 1.50, 1e3], "hops": 2}\n'
        '{"id": true, "question": "q", "golden_answers": true, "hops": null}\n'
        '{"id": null, "question": "q", "golden_answers": [false, 123456789012345678901234567890], "hops": NaN}\n'
        '{"id": 12345678901234567890, "question": "q", "golden_answers": "a", "hops": 12345678901234567890}\n'
    )
    dataset = load_questions("a.jsonl", streaming=streaming)
    assert read(dataset) == [
        ("1", "2", ["1969"]),
        ("1.0", "1.10", ["1969", "nineteen sixty-nine", "1.50", "1e3"]),
        ("true", "q", ["true"]),
        ("3", "q", ["false", "123456789012345678901234567890"]),
        ("12345678901234567890", "q", ["a"]),
    ]
    assert [row["hops"] for row in dataset] == [1.5, 2, None, None, 12345678901234567890.0]  # other columns are numbers


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_json_are_kept(tmp_path, streaming):
    """Strings stay strings here too, and different types in a column are kept as they are."""
    more = [
        {"date": "1952-03-04", "answer": 42, "mixed": "1", "metadata": {"day": "1952-03-04"}, "text": "x"},
        {"date": "1952-03-05", "answer": 43, "mixed": [2], "metadata": {"level": 1}, "none": None},
    ]
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, **row} for row in more])
    rows = list(load_questions("a.jsonl", streaming=streaming))
    for column in ("date", "answer", "mixed"):
        assert [row[column] for row in rows] == [row[column] for row in more]
    assert [row["metadata"] for row in rows] == [{"day": "1952-03-04", "level": None}, {"day": None, "level": 1}]
    assert [(row["text"], row["none"]) for row in rows] == [("x", None), (None, None)]


def test_another_column_of_a_stream_with_a_late_type_is_an_error_that_names_the_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "hops": 1}] * 1500 + [{**GOOD, "hops": "many"}])
    assert load_questions("a.jsonl")[-1]["hops"] == "many"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1501, column 'hops': found a string.*Without streaming"):
        list(load_questions("a.jsonl", streaming=True))


def test_large_integers_in_another_column_are_kept(tmp_path):
    """Ids of 19 digits are exact; beside a late fraction they become floats."""
    rows = [{**GOOD, "tweet": 1234567890123456789, "score": 1234567890123456789}] * 1000
    write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "score": 0.5}])
    first, *_, last = load_questions("a.jsonl")
    assert (first["tweet"], first["score"], last["score"]) == (1234567890123456789, float(1234567890123456789), 0.5)


def test_a_late_word_in_another_column_of_a_table_is_read(tmp_path):
    rows = [{"question": "q", "golden_answers": "007", "hops": 1}] * 12_000
    write(tmp_path / "a.csv", [*rows, {**rows[0], "hops": "many"}])
    dataset = load_questions("a.csv")
    assert (dataset[0]["golden_answers"], dataset[-1]["hops"]) == (["007"], "many")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pa.array([1969], pa.int16()), "1969"),
        (pa.array([1969, None], pa.float64()), "1969"),  # numbers beside a missing one, as pandas writes them
        (pa.array([1.5]), "1.5"),
        (pa.array([Decimal("1.50")]), "1.50"),
        (pa.array([True]), "true"),
        (pa.array([datetime.date(1952, 3, 4)]), "1952-03-04"),
        (pa.array([datetime.datetime(1952, 3, 4)], pa.timestamp("s")), "1952-03-04"),
        (pa.array([datetime.datetime(1952, 3, 4, 10, 30)], pa.timestamp("ns")), "1952-03-04T10:30:00"),
        (pa.array([datetime.datetime(1952, 3, 4)], pa.timestamp("us", "UTC")), "1952-03-04T00:00:00+00:00"),
        (pa.array([datetime.time(10, 30)], pa.time64("us")), "10:30:00"),
        (pa.array([b"Paris"], pa.binary()), "Paris"),
        (pa.array(["1952-03-04"], pa.large_string()), "1952-03-04"),
        (pa.array(["1952-03-04"]).dictionary_encode(), "1952-03-04"),
    ],
)
def test_typed_columns_of_parquet_become_text(tmp_path, value, text, streaming):
    lists = pa.ListArray.from_arrays([0, 1], value.slice(0, 1))
    for golds in (value.slice(0, 1), lists):
        table = pa.table({"id": value.slice(0, 1), "question": value.slice(0, 1), "golden_answers": golds})
        pq.write_table(table, tmp_path / "a.parquet")
        assert read(load_questions("a.parquet", streaming=streaming)) == [(text, text, [text])]


def test_loaded_data_sets_become_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of(["1952-03-04", "1960-01-01"]))
    dataset = load_dataset("json", data_files="a.jsonl", split="train")  # `datasets` reads dates
    expected = [(text, text, [text]) for text in ("1952-03-04", "1960-01-01")]
    assert read(load_questions(dataset)) == read(load_questions(dataset.to_iterable_dataset())) == expected
    stream = IterableDataset.from_generator(
        lambda: iter([{"id": np.int64(7), "question": "q", "golden_answers": np.array([1969, 1970])}])
    )
    assert read(load_questions(stream)) == [("7", "q", ["1969", "1970"])]


def test_classes_become_their_names():
    classes = ClassLabel(names=["no", "yes"])
    rows = Dataset.from_dict(
        {"question": ["q", "r"], "answer": [1, 0], "all": [{"label": [1]}, {"label": [0, 1]}]},
        features=Features({"question": Value("string"), "answer": classes, "all": {"label": List(classes)}}),
    )
    for source in (rows, rows.to_iterable_dataset()):
        read = load_questions(source, columns={"golden_answers": "answer"})
        assert [row["golden_answers"] for row in read] == [["yes"], ["no"]]
        read = load_questions(source, columns={"golden_answers": "all.label"})
        assert [row["golden_answers"] for row in read] == [["yes"], ["no", "yes"]]
    rows = Dataset.from_dict(
        {"question": ["q"], "answer": [-1]}, features=rows.select_columns(["question", "answer"]).features
    )
    with pytest.raises(ValueError, match=r"row 0 .*'answer': expected a string or a list of strings, found None"):
        load_questions(rows, columns={"golden_answers": "answer"})


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_over_several_lines_are_read(tmp_path, name):
    (tmp_path / name).write_text("\n".join(json.dumps(row, indent=2) for row in rows_of(["1952-03-04", "1969"])))
    assert read(load_questions(name)) == [(text, text, [text]) for text in ("1952-03-04", "1969")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(GOOD) + "\n", encoding="utf-8")
    assert len(load_questions("a.jsonl")) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_are_no_patterns(tmp_path, streaming):
    for name in ("a[1].jsonl", "a?.csv", "a*.tsv"):
        write(tmp_path / name.replace("[1]", "1").replace("?", "b").replace("*", "c"), rows_of(["another file"]))
        write(tmp_path / name, rows_of(["1952-03-04"]))
        assert read(load_questions(name, streaming=streaming)) == [("1952-03-04", "1952-03-04", ["1952-03-04"])]


def test_changed_files_are_read_again(tmp_path):
    for text in ("1952-03-04", "1969"):
        write_jsonl(tmp_path / "a.jsonl", rows_of([text] * len(text)))
        assert load_questions("a.jsonl")[0]["golden_answers"] == [text]
    first = load_questions("a.jsonl")
    assert first.cache_files == load_questions("a.jsonl").cache_files != []


def test_streams_can_be_mixed_sampled_and_resumed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "hops": 1} for row in rows_of(["1952-03-04", "1969"])])
    write_jsonl(tmp_path / "b.jsonl", [{**row, "hops": 2} for row in rows_of(["Paris", "Rome"])])
    stream = load_questions(["a.jsonl", "b.jsonl"], streaming=True)
    assert [(row["id"], row["hops"]) for row in stream] == [("1952-03-04", 1), ("Paris", 2), ("1969", 1), ("Rome", 2)]
    write_jsonl(
        tmp_path / "c.jsonl", [{**row, "hops": hops} for row, hops in zip(rows_of("pq"), ["3", [4]], strict=True)]
    )
    stream = load_questions(["c.jsonl", load_questions("c.jsonl")], streaming=True)
    assert [row["hops"] for row in stream] == ["3", "3", [4], [4]]
    stream = load_questions("a.jsonl", streaming=True)
    rows = iter(stream)
    next(rows)
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert [row["id"] for row in stream] == ["1969"]
