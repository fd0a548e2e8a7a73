"""CSV and TSV files: every row has the columns of the first line, quotes are closed, and each column has one type."""

import gzip
import re

import pytest

from tspo_trl import load_questions
from tspo_trl.retrieval.corpus import iter_corpus


def read(name, **options):
    return list(load_questions(name, **options))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "question,golden_answers\nWho, when?,Austen\nWhat, where?,Paris\n",
            "a.csv, row 0 (from 0): expected 2 columns ['question', 'golden_answers'], found 3: "
            "['Who', ' when?', 'Austen']. A cell that contains a comma must be in quotes",
        ),
        ("a.csv", "question,golden_answers\nq,a\n\nq\n", "a.csv, row 1 (from 0): expected 2 columns "),
        ("a.tsv", "question\tgolden_answers\nq\ta\tb\n", "a.tsv, row 0 (from 0): expected 2 columns "),
        ("a.csv", "question,golden_answers\nq,a,\nq,b,\n", "a.csv, row 0 (from 0): expected 2 columns "),
        (
            "a.tsv",
            'question\tgolden_answers\n"Unbalanced by\tX y\nnext q\tz z\nlast" one\tW w\n',
            "a.tsv, row 0 (from 0): not a valid table ('\t' expected after '\"'). A cell that begins with a quote must",
        ),
        ("a.csv", 'question,golden_answers\nq,a\nq,"b\nq,c\n', "a.csv, row 1 (from 0): not a valid table"),
        ("a.csv.gz", 'question,golden_answers\nq,"a" b\n', "a.csv.gz, row 0 (from 0): not a valid table"),
        ("a.csv", "question,golden_answers\n", "a.csv has no rows"),
        (
            "nq-test.qa.csv",
            "who wrote emma\t['Jane Austen', 'Austen']\n",
            "nq-test.qa.csv, line 1: expected the names of columns, separated by commas, found tabs: \"who wrote emma",
        ),
        ("a.csv", "question;golden_answers\nq;a\n", "a.csv, line 1: expected the names of columns, separated by commas, "
         "found semicolons"),
        ("a.tsv", "question,golden_answers\nq,a\n", "a.tsv, line 1: expected the names of columns, separated by tabs, "
         "found commas"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_an_error_that_names_file_and_row(tmp_path, name, content, message, streaming):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read(name, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_late_malformed_row_names_its_file(tmp_path, streaming):
    (tmp_path / "a.csv").write_text("question,golden_answers\n" + "q,a\n" * 2500 + "q,a,b\n")
    with pytest.raises(ValueError, match=r"^a\.csv, row 2500 \(from 0\): expected 2 columns"):
        read("a.csv", streaming=streaming)


@pytest.mark.parametrize("row", ['"Unbalanced by\tX\nnext\tZ\nlast" one\tW', "q\ta\tb", "q", '"open\ta'])
def test_corpora_and_questions_refuse_the_same_rows(tmp_path, row):
    (tmp_path / "a.tsv").write_text(f"question\tgolden_answers\n{row}\n")
    (tmp_path / "corpus.tsv").write_text(f"id\ttext\n{row}\n")
    for refuse in (lambda: read("a.tsv"), lambda: list(iter_corpus("corpus.tsv"))):
        with pytest.raises(ValueError, match=r"expected 2 columns|not a valid table"):
            refuse()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "2"], [1, 2]),
        (["1", ""], [1, None]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1e3", "-.5"], [1000.0, -0.5]),
        (["1", "many"], ["1", "many"]),
        (["1", "123456789012345678901"], ["1", "123456789012345678901"]),
        (["-9223372036854775808", "9223372036854775807"], [-(2**63), 2**63 - 1]),
        (["True", "false"], [True, False]),
        (["True", "1"], ["True", "1"]),
        (["", ""], ["", ""]),
        (["x", ""], ["x", ""]),
        (["1952-03-04", "NA"], ["1952-03-04", "NA"]),
    ],
)
def test_each_other_column_has_its_own_type(tmp_path, cells, values, streaming):
    rows = "".join(f"q,a,{i},{cell}\n" for i, cell in enumerate(cells))
    (tmp_path / "a.csv").write_text("question,golden_answers,number,other\n" + rows)
    loaded = read("a.csv", streaming=streaming)
    assert [row["other"] for row in loaded] == values
    assert [row["number"] for row in loaded] == [0, 1]
    assert [type(row["other"]) for row in loaded] == [type(value) for value in values]


@pytest.mark.parametrize("late", ["many", "123456789012345678901", "1.5"])
def test_a_late_value_of_a_column(tmp_path, late):
    (tmp_path / "a.csv").write_text("question,golden_answers,hops,n\n" + "q,a,1,1\n" * 2500 + f"q,a,{late},1\n")
    last = load_questions("a.csv")[-1]
    assert (last["hops"], last["n"]) == (1.5 if late == "1.5" else late, 1)
    message = rf"a\.csv, row 2500 \(from 0\), column 'hops': found '{late}', unlike the first 1000 rows \(int64\)"
    with pytest.raises(ValueError, match=message):
        read("a.csv", streaming=True)


def test_names_of_columns_are_those_of_pandas(tmp_path):
    (tmp_path / "a.csv").write_text(",question,golden_answers,question\n0,q,a,r\n")
    assert read("a.csv") == [
        {"id": "0", "question": "q", "golden_answers": ["a"], "data_source": "a", "Unnamed: 0": 0, "question.1": "r"}
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("sep: ';'", 'question;golden_answers;n\nq;"[""a"", ""b""]";1\n'),
        ("names: [question, golden_answers, n]", 'q,"[""a"", ""b""]",1\n'),
    ],
)
def test_a_card_may_set_options_of_a_table(tmp_path, option, content, streaming):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-0.csv").write_text(content)
    card = f"configs:\n- config_name: default\n  data_files: part-0.csv\n  {option}\n"
    (tmp_path / "data" / "README.md").write_text(f"---\n{card}---\n")
    (row,) = read("data", streaming=streaming)
    assert (row["question"], row["golden_answers"], row["n"]) == ("q", ["a", "b"], 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_table_in_a_copy_of_a_data_set_names_file_and_row(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-0.csv").write_text("question,golden_answers\nWho, when?,Austen\n")
    with pytest.raises(ValueError, match=r"part-0\.csv, row 0 \(from 0\): expected 2 columns"):
        read("data", streaming=streaming)
