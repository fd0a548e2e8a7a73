"""Caches and the retrieval log."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tspo_trl import BM25Retriever, CachedRetriever, LoggedRetriever, Passage, RetrievalError
from tspo_trl.retrieval.base import RetrievalLogError

PASSAGES = [
    Passage("fr", "Paris", "Paris is the capital of France."),
    Passage("it", "Rome", "Rome is the capital of Italy. \ud800 \x00"),
    Passage("no", "Oslo", "The capital of Norway lies at a fjord."),
]


class Counting:
    """A retriever that records its queries, and raises `error` if one is set."""

    fingerprint = "counting"

    def __init__(self, passages=PASSAGES):
        self.inner, self.asked, self.error = BM25Retriever(passages), [], None

    def search(self, queries, k):
        self.asked.append(list(queries))
        if self.error:
            raise self.error
        return self.inner.search(queries, k)


@pytest.fixture
def counting():
    return Counting()


# The cache


def test_cached_queries_are_not_searched_again(counting):
    cached = CachedRetriever(counting)
    expected = counting.inner.search(["Italy", "Norway", "Italy", "nothing known"], 2)
    assert cached.search(["Italy", "Norway", "Italy", "nothing known"], 2) == expected
    assert cached.search(["Norway", "Italy"], 2) == [expected[1], expected[0]]
    assert cached.search(["nothing known", "France"], 2) == [[], counting.inner.search(["France"], 2)[0]]
    assert counting.asked == [["Italy", "Norway", "nothing known"], ["France"]]
    assert (cached.hits, cached.misses) == (3, 4)
    assert repr(cached) == repr(counting)


def test_results_are_cached_separately_for_each_k(counting):
    cached = CachedRetriever(counting)
    assert [len(cached.search(["capital"], k)[0]) for k in (1, 3, 2)] == [1, 3, 2]
    assert len(counting.asked) == 3


def test_the_least_recently_used_query_is_dropped(counting):
    cached = CachedRetriever(counting, max_queries=2)
    for query in ("Italy", "Norway", "Italy", "France"):
        cached.search([query], 1)
    counting.asked.clear()
    cached.search(["Italy", "France"], 1)
    assert counting.asked == []
    cached.search(["Norway"], 1)
    assert counting.asked == [["Norway"]]


@pytest.mark.parametrize("max_queries", [0, 1])
def test_a_batch_larger_than_the_cache(counting, max_queries):
    cached = CachedRetriever(counting, max_queries=max_queries)
    queries = ["Italy", "Norway", "France"]
    for _ in range(2):
        assert cached.search(queries, 1) == counting.inner.search(queries, 1)


def test_changing_a_result_does_not_change_the_cache(counting):
    cached = CachedRetriever(counting)
    cached.search(["Italy"], 1)[0].clear()
    assert cached.search(["Italy"], 1)[0]


def test_failures_are_not_cached(counting):
    cached = CachedRetriever(counting)
    counting.error = ConnectionError("down")
    with pytest.raises(ConnectionError):
        cached.search(["Italy"], 1)
    counting.error = None
    assert cached.search(["Italy"], 1)[0]


@pytest.mark.parametrize("retriever", [BM25Retriever, None, "corpus.jsonl"])
def test_an_object_that_is_no_retriever_is_an_error(retriever):
    with pytest.raises(ValueError, match="`retriever` must be an object with a method"):
        CachedRetriever(retriever)


def test_wrong_number_of_results_is_an_error(counting, monkeypatch):
    cached = CachedRetriever(counting)
    monkeypatch.setattr(counting, "search", lambda queries, k: [])
    with pytest.raises(RetrievalError, match="2 queries, got 0") as error:
        cached.search(["Italy", "Norway"], 1)
    assert error.value.kind == "reply"


def test_a_folder_keeps_results_for_the_next_run(counting, tmp_path):
    queries = ["Italy", "Norway", "nothing known", "half \ud800", "/../" * 100]
    first = CachedRetriever(counting, folder=tmp_path / "cache").search(queries, 2)
    again = CachedRetriever(counting, folder=tmp_path / "cache")
    assert again.search(queries, 2) == first == counting.inner.search(queries, 2)
    assert len(counting.asked) == 1
    assert (again.hits, again.misses) == (5, 0)


def test_retrievers_share_a_folder_without_mixing_their_results(tmp_path):
    small, large = BM25Retriever(PASSAGES[:1]), BM25Retriever(PASSAGES)
    for _ in range(2):
        for retriever in (small, large):
            cached = CachedRetriever(retriever, folder=tmp_path)
            assert cached.search(["capital"], 3) == retriever.search(["capital"], 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"passages": [{"id',
        b"\xff",
        b"[]",
        b'{"query": "Italy", "k": 1, "passages": [{"id": "1"}]}',
        b'{"query": "Italy", "k": 1, "passages": {}}',
        b'{"query": "Italy", "k": 1, "passages": [{"id": "1", "title": "", "text": 5, "score": 1}]}',
        b'{"query": "Norway", "k": 1, "passages": []}',
    ],
)
def test_damaged_file_is_replaced_by_a_new_search(counting, tmp_path, content):
    expected = CachedRetriever(counting, folder=tmp_path).search(["Italy"], 1)
    (file,) = tmp_path.glob("*/*")
    file.write_bytes(content)
    for _ in range(2):
        assert CachedRetriever(counting, folder=tmp_path).search(["Italy"], 1) == expected
    assert len(counting.asked) == 2


def test_results_are_returned_if_the_folder_cannot_be_written(counting, tmp_path, caplog, monkeypatch):
    cached = CachedRetriever(counting, folder=tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert cached.search(["Italy"], 1) == counting.inner.search(["Italy"], 1)
    assert "No space left" in caplog.text
    assert cached.search(["Italy"], 1)  # from memory
    assert len(counting.asked) == 1
    monkeypatch.undo()
    assert cached.search(["Norway"], 1)  # and on disk when there is room again
    assert len(list(tmp_path.glob("*/*.json"))) == len(list(tmp_path.glob("*/*"))) == 1


def test_processes_can_write_the_same_query_at_the_same_time(tmp_path):
    caches = [CachedRetriever(Counting(), folder=tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda cached: cached.search(["Italy", "Norway", "France"], 1), caches))
    assert all(results == found[0] for results in found)
    files = list(tmp_path.glob("*/*"))
    assert len(files) == 3
    assert all(json.loads(file.read_bytes()) for file in files)


def test_numpy_scores_can_be_cached_and_logged(tmp_path):
    class Dense:
        fingerprint = "dense"

        def search(self, queries, k):
            return [[Passage("0", "a", "b", np.float32(0.5))] for _ in queries]

    for retriever in (CachedRetriever(Dense(), folder=tmp_path / "cache"), LoggedRetriever(Dense(), tmp_path / "log")):
        retriever.search(["Italy"], 1)
    for retriever in (CachedRetriever(Dense(), folder=tmp_path / "cache"), LoggedRetriever(None, tmp_path / "log")):
        assert retriever.search(["Italy"], 1) == [[Passage("0", "a", "b", 0.5)]]


def test_bad_arguments_of_the_cache(tmp_path):
    class Anonymous:
        def search(self, queries, k):
            return []

    with pytest.raises(ValueError, match=r"Anonymous.*fingerprint|fingerprint.*Anonymous"):
        CachedRetriever(Anonymous(), folder=tmp_path)
    assert CachedRetriever(Anonymous()).folder is None
    with pytest.raises(ValueError, match=r"`max_queries`.*-1"):
        CachedRetriever(Anonymous(), max_queries=-1)
    with pytest.raises(ValueError, match="`k`"):
        CachedRetriever(Anonymous()).search(["a"], 0)


# The log


def test_a_run_is_repeated_without_its_retriever(counting, tmp_path):
    calls = [(["Italy", "nothing known"], 2), (["Norway", "Italy"], 1), (["Italy", "Italy", "half \ud800 \n"], 2)]
    logged = LoggedRetriever(counting, tmp_path / "log")
    first = [logged.search(*call) for call in calls]
    assert first == [counting.inner.search(*call) for call in calls]
    replayed = LoggedRetriever(None, tmp_path / "log")
    assert [replayed.search(*call) for call in calls] == first
    assert str(tmp_path / "log") in repr(replayed)


def test_logged_queries_are_not_searched_again(counting, tmp_path):
    LoggedRetriever(counting, tmp_path).search(["Italy", "Norway"], 2)
    changed = Counting(PASSAGES[:1])
    logged = LoggedRetriever(changed, tmp_path)
    assert logged.search(["Norway"], 2) == counting.inner.search(["Norway"], 2)
    assert logged.search(["capital", "Norway"], 2)[0][0].id == "fr"
    assert changed.asked == [["capital"]]
    assert repr(logged) == repr(changed)


def test_failures_are_repeated_at_the_same_call(counting, tmp_path):
    logged = LoggedRetriever(counting, tmp_path)
    outcomes = []
    for number, error in enumerate([None, RetrievalError("late", "timeout"), None, ConnectionError("down"), None]):
        logged.begin(f"train {number // 2}")
        counting.error = error
        outcomes.append(attempt(logged, ["Italy", f"Norway {number if number != 2 else 1}"]))
    assert [kind for kind, _ in outcomes] == ["ok", "timeout", "ok", "connection", "ok"]
    replayed = LoggedRetriever(None, tmp_path)
    again = []
    for phase, number in enumerate((0, 1, 1, 3, 4)):
        replayed.begin(f"train {phase // 2}")
        again.append(attempt(replayed, ["Italy", f"Norway {number}"]))
    assert again == outcomes


def test_resumed_run_is_repeated_without_the_failures_before_the_restart(counting, tmp_path):
    first = LoggedRetriever(counting, tmp_path)
    first.begin("train 0")
    first.search(["Italy"], 1)
    first.search(["Italy"], 1)  # known: writes nothing
    first.begin("train 1")
    counting.error = ConnectionError("down")
    with pytest.raises(ConnectionError):
        first.search(["Norway"], 1)
    counting.error = None
    resumed = LoggedRetriever(counting, tmp_path)
    resumed.begin("train 1")
    resumed.search(["Norway"], 1)
    counting.error = TimeoutError("late")
    with pytest.raises(TimeoutError):
        resumed.search(["France"], 1)

    replayed = LoggedRetriever(None, tmp_path)
    replayed.begin("train 0")
    assert replayed.search(["Italy"], 1) == replayed.search(["Italy"], 1) == counting.inner.search(["Italy"], 1)
    replayed.begin("train 1")
    assert replayed.search(["Norway"], 1) == counting.inner.search(["Norway"], 1)
    with pytest.raises(RetrievalError, match="late"):
        replayed.search(["France"], 1)


def test_own_answer_has_priority_over_those_of_other_processes(tmp_path):
    corpora = [[Passage("0", "", "Italy first")], [Passage("1", "", "Italy second")]]
    for rank in (1, 0):
        changed = Counting(corpora[rank])
        (tmp_path / f"other{rank}").mkdir()
        LoggedRetriever(changed, tmp_path / f"other{rank}", rank=rank).search(["Italy"], 1)
    for rank in (0, 1):
        (tmp_path / f"other{rank}" / f"rank00{rank}.jsonl").rename(tmp_path / f"rank00{rank}.jsonl")
    for rank in (0, 1):
        assert LoggedRetriever(None, tmp_path, rank=rank).search(["Italy"], 1)[0][0].id == str(rank)


def test_a_full_disk_leaves_no_half_line(counting, tmp_path):
    logged = LoggedRetriever(counting, tmp_path)
    logged.search(["Italy"], 1)
    writer = logged._writer
    logged._writer = HalfWriter(writer)
    with pytest.raises(OSError, match="cannot be written"):
        logged.search(["Norway"], 1)
    logged._writer = writer
    assert logged.search(["Norway", "Italy"], 1) == counting.inner.search(["Norway", "Italy"], 1)
    assert LoggedRetriever(None, tmp_path).search(["Norway"], 1) == counting.inner.search(["Norway"], 1)


class HalfWriter:
    """A file on a disk that is full after ten bytes."""

    def __init__(self, file):
        self.seek, self.truncate, self._file = file.seek, file.truncate, file

    def write(self, line):
        return self._file.write(line[:10])


def attempt(retriever, queries):
    try:
        return "ok", retriever.search(queries, 2)
    except RetrievalError as error:
        return error.kind, str(error)
    except ConnectionError as error:
        return "connection", str(error)


def test_failed_queries_are_searched_again_with_a_retriever(counting, tmp_path):
    counting.error = ConnectionError("down")
    with pytest.raises(ConnectionError):
        LoggedRetriever(counting, tmp_path).search(["Italy"], 1)
    counting.error = None
    assert LoggedRetriever(counting, tmp_path).search(["Italy"], 1) == counting.inner.search(["Italy"], 1)


def test_query_that_is_not_in_the_log_is_not_a_failed_search(counting, tmp_path):
    """After a failed search, the run would continue and differ from the logged one."""
    LoggedRetriever(counting, tmp_path).search(["Italy"], 2)
    for query, k in (("Norway", 2), ("Italy", 3)):
        with pytest.raises(RetrievalLogError, match=rf"'{query}' \(k={k}\)"):
            LoggedRetriever(None, tmp_path).search([query], k)


def test_processes_write_their_own_files_and_read_all(counting, tmp_path):
    LoggedRetriever(counting, tmp_path, rank=0).search(["Italy"], 1)
    LoggedRetriever(counting, tmp_path, rank=1).search(["Norway"], 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank000.jsonl", "rank001.jsonl"]
    replayed = LoggedRetriever(None, tmp_path)
    assert replayed.search(["Norway", "Italy"], 1) == counting.inner.search(["Norway", "Italy"], 1)


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_query_of_an_incomplete_last_line_is_searched_again(counting, tmp_path, cut):
    LoggedRetriever(counting, tmp_path).search(["Italy", "Norway"], 1)
    file = tmp_path / "rank000.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(RetrievalLogError, match="Norway"):
        LoggedRetriever(None, tmp_path).search(["Italy", "Norway"], 1)
    for _ in range(2):
        logged = LoggedRetriever(counting, tmp_path)
        assert logged.search(["Italy", "Norway"], 1) == counting.inner.search(["Italy", "Norway"], 1)
    assert counting.asked == [["Italy", "Norway"], ["Norway"]]
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    "line",
    ["no JSON", "[]", '{"query": "a"}', '{"phase": "", "call": 0, "query": "a", "k": 1, "passages": [{"id": "1"}]}'],
)
def test_error_of_a_damaged_line_names_file_and_line(counting, tmp_path, line):
    LoggedRetriever(counting, tmp_path).search(["Italy"], 1)
    file = tmp_path / "rank000.jsonl"
    file.write_text(file.read_text() + line + "\n" + file.read_text())
    with pytest.raises(ValueError, match=r"rank000\.jsonl, line 2"):
        LoggedRetriever(counting, tmp_path)


def test_missing_log_is_an_error(tmp_path, counting):
    with pytest.raises(FileNotFoundError, match="no retrieval log"):
        LoggedRetriever(None, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        LoggedRetriever(counting, tmp_path / "file")
