"""BM25 over corpus files: the index is that of `bm25s`, memory is bounded, and only postings that matter are read."""

import gzip
import io
import json
import sys
import tempfile
import tracemalloc
from random import Random

import bm25s
import numpy as np
import pytest
import Stemmer

from helpers.paths import HOTPOTQA
from tspo_trl import BM25Retriever, Passage, load_corpus
from tspo_trl.retrieval import corpus, postings
from tspo_trl.retrieval.corpus import PassageFile, corpus_fingerprint
from tspo_trl.retrieval.words import _STOP_WORDS, WORDS_VERSION, WordNumbers, index_words, split_words

ODD = [
    "",
    "the of and",
    "北京大学 was founded in 1898; ΑΣ ΣΟΦΟΣ İstanbul ＰＡＲＩＳ",
    "Running runs run runner don't O'Brien’s cafe\u0301 \ud800 R",
    "lake " * 700,
]


def words_of_bm25s(texts, language, *, indexed=False):
    return bm25s.tokenize(
        [" ".join(split_words(text, indexed=indexed)).replace("İ", "I") for text in texts],
        token_pattern=r"\S+",
        stopwords=list(_STOP_WORDS.get(language or "", ())),
        stemmer=None if language is None else Stemmer.Stemmer(language),
        return_ids=False,
        show_progress=False,
    )


def index_of_bm25s(texts, *, k1=1.5, b=0.75, language="english"):
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(words_of_bm25s(texts, language, indexed=True), show_progress=False)
    return index


def search_with_bm25s(index, words, k):
    """The scores of all passages, of which the best are taken."""
    scores = index.get_scores(words)
    found = sorted(np.flatnonzero(scores > 0).tolist(), key=lambda i: (-scores[i], i))[:k]
    return found, scores[found].tolist()


def write(path, passages):
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(count, seed=0, vocabulary=400, length=30):
    """Passages of words with the frequencies of Zipf's law."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocabulary + 1)
    words = random.choice(vocabulary, (count, length), p=weights / weights.sum())
    lengths = random.integers(1, length + 1, count)
    return [
        Passage(str(i), "", " ".join(f"w{w}" for w in row[:n]))
        for i, (row, n) in enumerate(zip(words, lengths, strict=True))
    ]


@pytest.fixture
def hotpotqa():
    return [f"{p.title} {p.text}" for p in load_corpus(HOTPOTQA / "passages.jsonl")]


@pytest.mark.parametrize("language", ["english", "german", None])
def test_words_are_those_of_bm25s(hotpotqa, language):
    texts = [*hotpotqa, *ODD]
    assert index_words(texts, language) == words_of_bm25s(texts, language)
    expected = words_of_bm25s(texts, language, indexed=True)
    numbers = WordNumbers(language)
    found = [numbers.of(text) for text in texts]
    names = {number: word for word, number in numbers.numbers.items()}
    assert [[names[n] for n in row] for row in found] == expected
    assert sorted(names) == list(range(len({word for row in expected for word in row})))


def test_words_of_ascii_texts():
    random = Random(0)
    texts = ["".join(random.choices("aaB1_' .'-\t\x1c\x7f", k=random.randrange(14))) for _ in range(5000)]
    assert index_words(texts, None) == words_of_bm25s(texts, None)


def test_words_keep_their_numbers_when_the_cache_is_full(hotpotqa, monkeypatch):
    monkeypatch.setattr("tspo_trl.retrieval.words._MAX_FORMS", 50)
    small, large = WordNumbers("english"), WordNumbers("english")
    found = [small.of(text) for text in hotpotqa]
    monkeypatch.setattr("tspo_trl.retrieval.words._MAX_FORMS", 10**6)
    assert found == [large.of(text) for text in hotpotqa]


@pytest.mark.parametrize("block", [300, 2**22])
@pytest.mark.parametrize("options", [{}, {"k1": 0.9, "b": 0.4}, {"k1": 0, "b": 1, "language": None}])
def test_the_index_is_that_of_bm25s(tmp_path, hotpotqa, monkeypatch, block, options):
    monkeypatch.setattr(postings, "_BLOCK", block)
    texts = [*hotpotqa, *ODD]
    expected = index_of_bm25s(texts, **options)
    passages = [Passage(str(i), "", text) for i, text in enumerate(texts)]
    BM25Retriever.build(write(tmp_path / "corpus.jsonl", passages), tmp_path / "index", **options)
    found = postings.Postings.load(tmp_path / "index", mapped=False)
    assert set(found.numbers) == set(expected.vocab_dict) - {""}
    assert (found.passages.dtype, found.weights.dtype) == (np.int32, np.float32)
    for word, number in found.numbers.items():
        start, stop = expected.scores["indptr"][expected.vocab_dict[word] :][:2]
        passages_of, weights = found._of(number)
        assert passages_of.tolist() == expected.scores["indices"][start:stop].tolist()
        assert weights.tobytes() == expected.scores["data"][start:stop].tobytes()


# All passages are scored, or only some: reading as little as possible, the usual, and everything
@pytest.mark.parametrize(("small", "lookup"), [(10**9, 16), (0, 0), (0, 16), (0, 10**9)])
@pytest.mark.parametrize("k", [1, 3, 50, 5000])
def test_results_are_those_of_scoring_every_passage(monkeypatch, small, lookup, k):
    monkeypatch.setattr(postings, "_SMALL", small)
    monkeypatch.setattr(postings, "_LOOKUP", lookup)
    passages = generated(3000)
    retriever, index = BM25Retriever(passages), index_of_bm25s([p.text for p in passages])
    random = np.random.default_rng(1)
    queries = [[f"w{int(400 * x**2)}" for x in random.random(n)] for n in [1, 2, 3, 4, 6, 12] * 10]
    queries += [["w0"], ["w0", "w1"], ["w399", "w0", "w0", "w1"], ["w0"] * 40 + ["w1", "w350"], ["none", "w3"]]
    results = retriever.search([" ".join(query) for query in queries], k)
    for query, found in zip(queries, results, strict=True):
        best, scores = search_with_bm25s(index, query, k)
        assert [int(p.id) for p in found] == best
        assert [p.score for p in found] == scores


def test_lists_of_frequent_words_are_not_read(monkeypatch):
    passages = generated(3000)
    passages[7:7] = [Passage("rare", "", "w999 w999 w1")]
    retriever = BM25Retriever(passages)
    index = retriever._postings
    read = []
    original = postings.Postings._of
    monkeypatch.setattr(postings.Postings, "_of", lambda self, number: read.append(number) or original(self, number))
    numbers = [index.numbers[word] for word in ("w0", "w999", "w1")]
    candidates = index._candidates(numbers, 1, np.zeros(len(passages), np.float32))
    assert candidates.tolist() == [7]
    assert read == [index.numbers["w999"]]


@pytest.mark.parametrize("small", [0, 10**9])
def test_a_search_leaves_nothing_for_the_next_query(monkeypatch, small):
    monkeypatch.setattr(postings, "_SMALL", small)
    retriever = BM25Retriever(generated(500))
    queries = ["w3 w40 w90", "w0 w1", "w3 w40 w90", "w399", "w0"]
    assert retriever.search(queries, 20) == [retriever.search([query], 20)[0] for query in queries]


def test_passages_of_a_corpus_file_are_mapped(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    retriever = BM25Retriever.from_jsonl(HOTPOTQA / "passages.jsonl")
    assert isinstance(retriever.passages, PassageFile)
    index = retriever._postings
    assert all(isinstance(array.base, np.memmap) for array in (index.starts, index.passages, index.weights))
    assert list((tmp_path / "temporary").iterdir()) == []  # also after a crash
    in_memory = BM25Retriever(load_corpus(HOTPOTQA / "passages.jsonl"))
    assert isinstance(in_memory.passages, list)
    queries = [json.loads(line)["question"] for line in (HOTPOTQA / "questions.jsonl").open(encoding="utf-8")]
    assert retriever.search(queries, 5) == in_memory.search(queries, 5)
    assert retriever.fingerprint == in_memory.fingerprint
    retriever.save(tmp_path / "index")
    assert BM25Retriever.load(tmp_path / "index").search(queries, 5) == in_memory.search(queries, 5)


def test_memory_of_indexing_does_not_grow_with_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(postings, "_BLOCK", 2**12)

    def peak(count):
        path = write(tmp_path / f"{count}.jsonl", generated(count))
        tracemalloc.start()
        BM25Retriever.build(path, tmp_path / str(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(500)  # what is loaded only once
    small, large = peak(500), peak(6000)
    assert large - small < 100 * 5500  # bytes a passage; the words of one take 16 · 60, as Python objects far more


def test_an_index_is_built_and_replaced(tmp_path):
    path = write(tmp_path / "corpus.jsonl", generated(50))
    built = BM25Retriever.build(path, tmp_path / "index", k1=0.9, b=0.4, language=None)
    assert (built.k1, built.b, built.language, len(built.passages)) == (0.9, 0.4, None, 50)
    assert BM25Retriever.load(tmp_path / "index", corpus=path).fingerprint == built.fingerprint
    assert built.fingerprint == BM25Retriever(load_corpus(path), k1=0.9, b=0.4, language=None).fingerprint
    other = write(tmp_path / "other.jsonl", generated(60, seed=1))
    assert len(BM25Retriever.build(other, tmp_path / "index").passages) == 60
    with pytest.raises(ValueError, match=r"does not belong to the corpus .*corpus\.jsonl"):
        BM25Retriever.load(tmp_path / "index", corpus=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "index", "other.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"id": "1", "text": "a lake"}\n' * 2000)[:-40], "damaged or incomplete"),
        (b'{"id": "1", "text": "a lake"}\n{"id": "2"}\n', "line 2"),
        (
            b'{"id": "7", "text": "a"}\n{"id": "8", "text": "b"}\n{"id": "7", "text": "c"}\n',
            "two passages with the id '7'",
        ),
        (b'{"id": "1", "text": "the of"}\n', "The corpus .*corpus' has no passage with any word"),
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "corpus, line 1: not valid JSON .*recursion"),
        (b'[{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]", "corpus, line 1: not valid JSON .*recursion"),
        (b'{\n  "text": "a"\n}\n', r"corpus, line 1: not valid JSON .*Expected a passage on one line, or .* a list"),
        (b"", "has no passages"),
    ],
)
def test_a_bad_corpus_leaves_nothing_and_keeps_the_old_index(tmp_path, content, message):
    old = BM25Retriever.build(write(tmp_path / "old.jsonl", generated(20)), tmp_path / "index")
    (tmp_path / "corpus").write_bytes(content)
    for folder in ("index", "new"):
        with pytest.raises(ValueError, match=message):
            BM25Retriever.build(tmp_path / "corpus", tmp_path / folder)
    with pytest.raises(ValueError, match=message):
        BM25Retriever.from_jsonl(tmp_path / "corpus")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "index", "old.jsonl"]
    assert BM25Retriever.load(tmp_path / "index", tmp_path / "old.jsonl").fingerprint == old.fingerprint


def test_error_of_a_wrong_path(tmp_path):
    with pytest.raises(TypeError, match="must be the path of a file, got `list`"):
        BM25Retriever.from_jsonl(["a"])
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="file' is a file"):
        BM25Retriever.build(HOTPOTQA / "passages.jsonl", tmp_path / "file")


def test_a_folder_with_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no index"):
        BM25Retriever.build(HOTPOTQA / "passages.jsonl", tmp_path)


def test_an_index_that_bm25s_has_written_is_opened(tmp_path, hotpotqa):
    """Such as those that were saved before this library wrote the files by itself."""
    folder = tmp_path / "index"
    passages = load_corpus(HOTPOTQA / "passages.jsonl")
    index_of_bm25s(hotpotqa).save(folder, show_progress=False)
    PassageFile.write(folder, passages)
    about = {"format": 2, "k1": 1.5, "b": 0.75, "language": "english", "passages": len(passages)}
    about |= {"corpus": corpus_fingerprint(passages), "files": {}, "words": WORDS_VERSION}
    (folder / "index.json").write_text(json.dumps(about))
    old, new = BM25Retriever.load(folder), BM25Retriever(passages)
    queries = [json.loads(line)["question"] for line in (HOTPOTQA / "questions.jsonl").open(encoding="utf-8")]
    assert old.search([*queries, "", "xylophone"], 10) == new.search([*queries, "", "xylophone"], 10)
    assert old.fingerprint == new.fingerprint


@pytest.mark.parametrize("way", ["build", "save"])
def test_bm25s_opens_an_index(tmp_path, hotpotqa, way):
    if way == "build":
        BM25Retriever.build(HOTPOTQA / "passages.jsonl", tmp_path / "index")
    else:
        BM25Retriever(load_corpus(HOTPOTQA / "passages.jsonl")).save(tmp_path / "index")
    loaded, expected = bm25s.BM25.load(tmp_path / "index", mmap=True), index_of_bm25s(hotpotqa)
    words = index_words(["Which film of an American director is older?"], "english")[0]
    assert loaded.get_scores(words).tobytes() == expected.get_scores(words).tobytes()


@pytest.mark.parametrize("options", [{"k1": -1}, {"k1": float("nan")}, {"b": 1.1}, {"b": -0.1}])
@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
def test_parameters_out_of_range_are_an_error(backend, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{options[name]}"):
        BM25Retriever([Passage("0", "", "text")], backend, **options)


def test_progress_is_shown_on_a_terminal_if_it_takes_long(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "corpus.jsonl", generated(50))
    monkeypatch.setattr(corpus, "_PATIENCE", 0.0)
    BM25Retriever.build(path, tmp_path / "index")
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    BM25Retriever.build(path, tmp_path / "index")
    for name in ("Passages", "Words", "Postings"):
        assert f"{name}:" in terminal.getvalue()
    assert "50/50" in terminal.getvalue()
