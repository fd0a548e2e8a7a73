"""The reader of passages, and the published forms of corpus files."""

import gzip
import io
import json
import tarfile
from types import MappingProxyType
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
import torch

from tspo_trl import BM25Retriever, Passage, load_corpus
from tspo_trl.retrieval.passages import read_passage

TEXT = "The capital of France."


def read(record, **options):
    return read_passage(record, "here", **options)


# Fields


@pytest.mark.parametrize(
    "key",
    [
        *("id", "_id", "pid", "passage_id", "psg_id", "docid", "doc_id", "docno", "idx"),
        *("ID", "id_", "docId", "uid", "chunk_id", "chunkId", "corpus-id"),
    ],
)
def test_published_names_of_ids(key):
    assert read({key: "7", "text": TEXT}, default_id="0").id == "7"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        (np.int64(7), "7"),
        (np.uint8(7), "7"),
        (torch.tensor(7), "7"),
        (10**30, "1" + "0" * 30),
        (7.0, "7"),
        (np.float32(7), "7"),
        (np.str_("seven"), "seven"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (0, "0"),
        (None, "default"),
        (float("nan"), "default"),
        (pd.NA, "default"),
        (pd.NaT, "default"),
        ("", "default"),
        ({"$oid": "5f43"}, "5f43"),
    ],
)
def test_ids_become_strings(value, expected):
    for record in ({"id": value, "text": TEXT}, Passage(value, "", TEXT)):
        found = read(record, default_id="default").id
        assert (found, type(found)) == (expected, str)


@pytest.mark.parametrize("value", [True, 7.5, ["7"], b"7", np.bool_(True), np.array([1, 2]), {"a": "7"}])
def test_other_ids_are_an_error(value):
    with pytest.raises(ValueError, match=f"here: expected a string or an integer as id, found {type(value).__name__}"):
        read({"id": value, "text": TEXT})


@pytest.mark.parametrize(
    ("record", "title", "text"),
    [
        ({"title": "Paris", "text": TEXT}, "Paris", TEXT),
        ({"title": None, "text": TEXT}, "", TEXT),
        ({"title": float("nan"), "text": TEXT}, "", TEXT),
        ({"text": f"Paris\n{TEXT}"}, "", f"Paris\n{TEXT}"),
        ({"contents": f'"Paris"\n{TEXT}'}, "Paris", TEXT),
        ({"contents": f"Paris\n{TEXT}"}, "Paris", TEXT),
        ({"contents": f'""Paris""\n{TEXT}'}, "Paris", TEXT),
        ({"contents": f'""Weird Al" Yankovic"\n{TEXT}'}, '"Weird Al" Yankovic', TEXT),
        ({"contents": f'"Weird Al" Yankovic\n{TEXT}'}, '"Weird Al" Yankovic', TEXT),
        ({"contents": TEXT}, "", TEXT),
        ({"contents": f"{TEXT}\n"}, "", TEXT),
        ({"contents": '"Paris"\n'}, "Paris", ""),
        ({"contents": f"\n{TEXT}"}, "", TEXT),
        ({"contents": f"Paris\n{TEXT}", "title": None}, "Paris", TEXT),
        ({"contents": f"first\n{TEXT}", "title": "Paris"}, "Paris", f"first\n{TEXT}"),
        ({"contents": f'"Paris"\n{TEXT}', "title": "Paris"}, "Paris", TEXT),
        ({"contents": TEXT, "title": "Paris"}, "Paris", TEXT),
        ({"contents": "x", "text": TEXT, "title": "Paris"}, "Paris", TEXT),
        ({"contents": "Paris\nx", "text": None}, "Paris", "x"),
        ({"content": TEXT, "title": "Paris"}, "Paris", TEXT),
        ({"content": TEXT, "title": "Paris", "contents": f"Paris. {TEXT}"}, "Paris", TEXT),  # MedRAG
        ({"passage": TEXT}, "", TEXT),
        ({"segment": TEXT, "title": "Paris"}, "Paris", TEXT),
        (MappingProxyType({"title": np.str_("Paris"), "text": np.str_(TEXT)}), "Paris", TEXT),
        (Passage("7", None, TEXT), "", TEXT),
        (TEXT, "", TEXT),
        (f'"Paris"\n{TEXT}', "Paris", TEXT),
        (f'(Title: "Paris (Texas)") {TEXT}\n(1)', "Paris (Texas)", f"{TEXT}\n(1)"),
        (f"(Title: Paris) {TEXT}", "Paris", TEXT),
        (f"(Title: Emma (novel)) {TEXT}", "Emma (novel)", TEXT),
        (f"(Title: Smile :() {TEXT}", "Smile :(", TEXT),
        ({"contents": f'"a" or "b"\n{TEXT}'}, '"a" or "b"', TEXT),
        ({"contents": f'""a" or "b""\n{TEXT}'}, '"a" or "b"', TEXT),
        ({"contents": f'"The "b" of a"\n{TEXT}'}, 'The "b" of a', TEXT),
        ({"contents": f'"5" disk"\n{TEXT}'}, '5" disk', TEXT),
        ({"text": "", "contents": TEXT}, "", TEXT),
        ({"text": "", "contents": None}, "", ""),
        ({"Title": "Paris", "Text": TEXT}, "Paris", TEXT),
        ({"page_title": "Paris", "text": TEXT}, "Paris", TEXT),
        ({"wiki_title": "Paris", "pageContent": TEXT}, "Paris", TEXT),
        ({"page_content": TEXT, "metadata": {"title": "Paris", "text": "x"}}, "Paris", TEXT),
        ({"title": "Paris", "text": TEXT, "metadata": {"title": "x"}}, "Paris", TEXT),
        ({"id": "7", "metadata": {"title": "Paris", "text": TEXT}}, "Paris", TEXT),
    ],
)
def test_titles_and_texts(record, title, text):
    passage = read(record)
    assert (passage.title, passage.text) == (title, text)
    assert type(passage.title) is type(passage.text) is str


def test_ids_of_variants_and_metadata():
    assert read({"ID": "x", "_id": "y", "id": "7", "text": TEXT}).id == "7"
    assert read({"id": None, "ID": "7", "text": TEXT}).id == "7"
    assert read({"id": "", "docid": "7", "text": TEXT}).id == "7"
    assert read({"page_content": TEXT, "metadata": {"id": 7, "title": "Paris"}}) == Passage("7", "Paris", TEXT)
    assert read({"text": TEXT, "metadata": {"doc_id": "of all its passages"}}, default_id="0").id == "0"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5}, 'a string under "text", found int'),
        ({"text": None}, 'a string under "text", found NoneType'),
        ({"title": "x", "text": ["a", "b"]}, 'a string under "text", found list'),
        ({"contents": b"x"}, 'a string under "contents", found bytes'),
        ({"title": 1917, "text": TEXT}, 'a string under "title", found int'),
        ({"id": "7"}, r"found the keys \['id'\]"),
        ({"document": {"id": "7"}, "score": 1}, "found the keys"),
        ({"document": 5}, 'under "document", found int'),
        ({"document": {"text": 5}}, 'a string under "text", found int'),
        (Passage("7", "Paris", None), 'a string under "text", found NoneType'),
        (None, "expected a passage .* found NoneType"),
        ((Passage("7", "Paris", TEXT), 0.5), "expected a passage .* found tuple"),
        (b"x", "found bytes"),
    ],
)
def test_error_of_a_malformed_passage_names_the_type(record, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        read(record)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0.5), (2, 2.0), (None, 0.0), (np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5), (-1, -1.0)],
)
def test_scores_become_floats(value, expected):
    for record in ({"text": TEXT, "score": value}, {"document": TEXT, "score": value}, Passage("7", "", TEXT, value)):
        score = read(record).score
        assert (score, type(score)) == (expected, float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400])
def test_scores_that_are_not_finite_are_an_error(value):
    for record in ({"text": TEXT, "score": value}, Passage("7", "", TEXT, value)):
        with pytest.raises(ValueError, match='number under "score", found'):
            read(record)


@pytest.mark.parametrize("value", ["0.5", True, [1.0], np.bool_(True), torch.tensor([1.0, 2.0])])
def test_other_scores_are_an_error(value):
    with pytest.raises(ValueError, match=f'number under "score", found {type(value).__name__}'):
        read({"text": TEXT, "score": value})


@pytest.mark.parametrize(
    "document", [{"id": 7, "contents": f'"Paris"\n{TEXT}'}, {"_id": "7", "title": "Paris", "text": TEXT}]
)
def test_a_document_beside_its_score(document):
    expected = Passage("7", "Paris", TEXT, 0.5)
    assert read({"document": document, "score": 0.5}) == expected
    assert read({"document": expected, "score": 0.5}) == expected


def test_a_document_may_have_its_id_outside():
    assert read({"id": 7, "document": f'"Paris"\n{TEXT}', "score": 1}) == Passage("7", "Paris", TEXT, 1.0)
    assert read({"id": 7, "document": {"id": None, "text": TEXT}}) == Passage("7", "", TEXT)


def test_a_complete_passage_is_returned_as_it_is():
    passage = Passage("7", "Paris", TEXT, 0.5)
    assert read(passage) is passage


class Odd(dict):
    def items(self, *_):
        raise KeyError("boom")

    get = __float__ = items


@pytest.mark.parametrize("record", [Odd(text=TEXT), {"text": TEXT, "score": Odd()}, {"text": TEXT, "metadata": Odd()}])
def test_an_object_that_cannot_be_read_is_an_error_with_its_place(record):
    with pytest.raises(ValueError, match=r"^here: .*KeyError\('boom'\)|^here: .*found Odd \('boom'\)"):
        read(record)


# Objects of Python


def test_bm25_reads_passages_in_any_form():
    records = [{"_id": np.int64(3), "title": None, "text": "lake"}, "hill", Passage(5, "Moor", "wood")]
    retriever = BM25Retriever(records)
    assert retriever.passages == [Passage("3", "", "lake"), Passage("1", "", "hill"), Passage("5", "Moor", "wood")]


@pytest.mark.parametrize(
    ("passages", "error", "message"),
    [
        ("passages.jsonl", TypeError, r"use `BM25Retriever.from_jsonl\('passages.jsonl'\)`"),
        ({"id": "7", "text": TEXT}, TypeError, r"a list of passages, got a dict with the keys \['id', 'text'\]"),
        (Passage("7", "", TEXT), TypeError, "a list of passages, got `Passage`"),
        (5, TypeError, "a list of passages, got `int`"),
        (None, TypeError, "a list of passages, got None"),
        (["a.jsonl"], TypeError, r"the file names \['a.jsonl'\].* use `BM25Retriever.from_jsonl\('a.jsonl'\)`"),
        ([__file__], TypeError, "the file names .* use `BM25Retriever.from_jsonl"),
        (pd.DataFrame([{"id": 1, "text": TEXT}]), TypeError, r"got a DataFrame: .*`df.to_dict\(\"records\"\)`"),
        ([{"id": 1, "text": TEXT}, {"text": "x"}], ValueError, "id '1': ids must be unique.* some have none"),
        ([{"text": TEXT}, {"text": 5}], ValueError, "`passages`, item 1: .* found int"),
    ],
)
def test_error_of_a_corpus_that_is_none(passages, error, message):
    with pytest.raises(error, match=message):
        BM25Retriever(passages)


def test_texts_may_end_with_the_name_of_a_file():
    assert len(BM25Retriever(["See readme.json", "a.json"]).passages) == 2
    assert len(BM25Retriever(["See readme.json"]).passages) == 1


# Files

PASSAGES = [Passage("w1", "Paris", 'The "city of light".'), Passage("w2", "", "A\tB")]
FILES = {
    "corpus.jsonl": '{"id": "w1", "title": "Paris", "text": "The \\"city of light\\"."}\n{"id": "w2", "text": "A\\tB"}\n',
    "beir.jsonl": '{"_id": "w1", "title": "Paris", "text": "The \\"city of light\\".", "metadata": {}}\n'
    '{"_id": "w2", "title": "", "text": "A\\tB", "metadata": {}}',
    "docid.jsonl": '{"docid": "w1", "title": "Paris", "contents": "The \\"city of light\\"."}\n'
    '{"docid": "w2", "title": null, "contents": "A\\tB"}\n',
    "list.json": '[{"id": "w1", "title": "Paris", "text": "The \\"city of light\\"."}, {"id": "w2", "text": "A\\tB"}]',
    "pretty.json": '\n[\n  {\n    "id": "w1",\n    "title": "Paris",\n    "text": "The \\"city of light\\"."\n  },\n'
    '  {"id": "w2", "text": "A\\tB"}\n]\n',
    "lines.json": '{"id": "w1", "title": "Paris", "text": "The \\"city of light\\"."}\n{"id": "w2", "text": "A\\tB"}\n',
    "dpr.tsv": 'id\ttext\ttitle\nw1\t"The ""city of light""."\tParis\nw2\t"A\tB"\t\n',
    "windows.tsv": 'id\ttext\ttitle\r\nw1\t"The ""city of light""."\tParis\r\nw2\t"A\tB"\t\r\n',
    "table.csv": 'ID,Title,Text\nw1,Paris,"The ""city of light""."\nw2,,A\tB\n',
    "upper.jsonl": '{"ID": "w1", "Title": "Paris", "Text": "The \\"city of light\\"."}\n{"ID": "w2", "Text": "A\\tB"}\n',
    "table": 'id\ttitle\ttext\nw1\tParis\tThe "city of light".\nw2\t\t"A\tB"\n',
    "marked.jsonl": '\ufeff{"id": "w1", "title": "Paris", "text": "The \\"city of light\\"."}\n'
    '{"id": "w2", "text": "A\\tB"}',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compressed", [False, True])
def test_published_forms_of_corpora(tmp_path, name, compressed):
    path = tmp_path / (f"{name}.gz" if compressed else name)
    content = FILES[name].encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert load_corpus(path) == PASSAGES


def test_a_compressed_file_is_recognised_without_its_suffix(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(gzip.compress(FILES["corpus.jsonl"].encode()))
    assert load_corpus(tmp_path / "corpus.jsonl") == PASSAGES


@pytest.mark.parametrize("name", ["corpus.jsonl", "list.json", "dpr.tsv"])
def test_the_first_file_of_a_compressed_archive_is_read(tmp_path, name):
    """As the corpus of Search-R1 is published: an archive that is named like a compressed file."""
    content = FILES[name].encode()
    with tarfile.open(tmp_path / f"{name}.gz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder, member = tarfile.TarInfo("indexes"), tarfile.TarInfo("indexes/file")
        folder.type, member.size = tarfile.DIRTYPE, len(content)
        archive.addfile(folder)
        archive.addfile(member, io.BytesIO(content))
    assert load_corpus(tmp_path / f"{name}.gz") == PASSAGES


def test_an_archive_without_a_file_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "corpus.jsonl.gz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("indexes")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz.*damaged or incomplete: the archive has no file"):
        load_corpus(tmp_path / "corpus.jsonl.gz")


def test_a_text_of_a_table_may_be_long_and_have_several_lines(tmp_path):
    text = "one\n" + "two " * 100_000
    (tmp_path / "long.tsv").write_text(f'id\ttext\n7\t"{text}"\n')
    assert load_corpus(tmp_path / "long.tsv") == [Passage("7", "", text)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", '[{"text": "a"}, {"text": 5}]', r"list\.json, item 1: .* found int"),
        ("list.json", '[\n{"text": "a"},\n{"text": }]', r"list\.json, line 3: not valid JSON"),
        ("list.json", "[]", r"list\.json.* has no passages"),
        ("dpr.tsv", "id\ttext\ttitle\n1\ta\tb\n2\ta\n", r"dpr\.tsv, line 3: expected 3 columns .*, found 2"),
        ("dpr.tsv", 'id\ttext\ttitle\n1\t"a" b\tc\n', r"dpr\.tsv, line 2: not a valid table .* quotes doubled"),
        ("dpr.tsv", 'id\ttext\ttitle\n1\t"a b\tc\n', r"dpr\.tsv, line 2: not a valid table"),
        ("collection.tsv", "0\tThe capital\n1\tThe lake\n", r"collection\.tsv, line 1: .*names of columns"),
        ("dpr.tsv", "id\ttext\ttitle\n", r"dpr\.tsv.* has no passages"),
        ("dpr.tsv", "id\ttext\ttitle\n1\tZo\udceb\tb\n", r"dpr\.tsv, line 2: not UTF-8"),
        ("list.json", '[{"text": "a"},\n{"text": "Zo\udceb"}]', r"list\.json, line 2: not valid JSON"),
        ("corpus.jsonl", "PAR1abc", r"corpus\.jsonl.* format Parquet"),
        ("corpus.jsonl", "PK\x03\x04abc", r"corpus\.jsonl.* format zip"),
    ],
)
def test_error_of_a_bad_file_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name)


def test_a_damaged_compressed_file_is_an_error(tmp_path):
    lines = "".join(json.dumps({"id": str(i), "text": str(hash(str(i)))}) + "\n" for i in range(1000))
    content = gzip.compress(lines.encode())
    for damaged in (content[:-500], content[:-4] + b"abcd", content[:100] + b"abc" + content[103:]):
        (tmp_path / "corpus.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz"):
            load_corpus(tmp_path / "corpus.jsonl.gz")


def test_error_of_a_file_where_some_lines_have_an_id(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": 1, "text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl.* two passages with the id '1': .* some have none"):
        BM25Retriever.from_jsonl(tmp_path / "corpus.jsonl")


def test_ids_are_kept_and_lines_without_one_get_their_number(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"docid": 9, "text": "a"}\n{"text": "b"}\n{"_id": "x", "text": "c"}\n')
    assert [passage.id for passage in load_corpus(tmp_path / "corpus.jsonl")] == ["9", "1", "x"]
