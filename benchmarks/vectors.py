"""Compare the forms of a dense index: size, memory, speed, and how often the small form finds what the exact one finds.

    python -m benchmarks.vectors                                           # generated vectors: 100,000 and 1,000,000
    python -m benchmarks.vectors --vectors 5000000 --dimensions 768        # 7.7 GB on disk, and 4.3 GB for the small form
    python -m benchmarks.vectors --encoder intfloat/e5-base-v2 --corpus passages.jsonl --queries questions.jsonl
    python -m benchmarks.vectors --index passages-e5 --queries questions.jsonl    # the vectors of an index of the form "exact"

Each form is searched in its own process. Generated vectors lie in clusters, as those of texts do; queries lie near vectors. The
recall of real embeddings needs `--encoder` or `--index`. Needs `pip install "tspo-trl[dense]"`. Memory is measured on Linux only.
"""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from tspo_trl.retrieval import iter_corpus
from tspo_trl.retrieval.dense import ExactVectors, SmallVectors, TextEncoder
from tspo_trl.retrieval.dense.vectors import BLOCK, CANDIDATES

K, BATCH = 10, 64
CLUSTER = 100  # vectors of a cluster


@dataclass(frozen=True)
class Measured:
    """The figures of one form."""

    seconds_to_open: float
    start_mib: float  # memory of the process before the vectors are opened
    peak_mib: float
    single_ms: list[float]
    batch_ms: list[float]
    found: list[list[int]]


def generate(folder: Path, rows: int, dimensions: int, queries: int) -> None:
    """Write normalised vectors in clusters, and queries near some of them."""
    random = np.random.default_rng(0)
    mean = random.standard_normal(dimensions, dtype=np.float32)  # embeddings of texts have a large common part
    matrix = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float16, shape=(rows, dimensions))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        centres = random.standard_normal((size // CLUSTER + 1, dimensions), dtype=np.float32)
        block = mean + np.repeat(centres, CLUSTER, axis=0)[:size]
        block += random.standard_normal(block.shape, dtype=np.float32)
        matrix[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    chosen = matrix[np.sort(random.choice(rows, queries, replace=False))].astype(np.float32)
    noise = random.standard_normal(chosen.shape, dtype=np.float32)
    chosen += 0.7 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    np.save(folder / "queries.npy", chosen / np.linalg.norm(chosen, axis=1, keepdims=True))


def encode(folder: Path, args: argparse.Namespace) -> None:
    """Write the vectors of a corpus, or use those of an index, and write the vectors of questions."""
    if args.index is None:
        model = TextEncoder(args.encoder)
        np.save(folder / "vectors.npy", model.encode_passages(list(iter_corpus(args.corpus))).astype(np.float16))
    else:
        about = json.loads((args.index / "index.json").read_text(encoding="utf-8"))
        model = TextEncoder(about["model"], **about["settings"])
        (folder / "vectors.npy").symlink_to((args.index / "vectors.npy").resolve(strict=True))
    with args.queries.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line in lines][: args.num_queries]
    np.save(folder / "queries.npy", model.encode_queries(texts))


def memory_mib(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    return int(fields[field].split()[0]) / 1024 if field in fields else float("nan")


def search(form: str, folder: Path, candidates: int, seconds: float) -> Measured:
    """Search with one form, single queries first, for about so many seconds each."""
    torch.set_num_threads(os.cpu_count() or 1)
    queries = np.load(folder / "queries.npy")
    before, start = memory_mib("VmRSS"), time.perf_counter()
    if form == "exact":
        vectors = ExactVectors(np.load(folder / "vectors.npy", mmap_mode="r"))
    else:
        vectors = SmallVectors(folder, candidates)
    opened = time.perf_counter() - start
    vectors.search(queries[:1], K)  # the first search reads the files
    single = timed(lambda i: vectors.search(queries[i : i + 1], K), len(queries), seconds)
    batches = timed(lambda i: vectors.search(queries[i * BATCH :][:BATCH], K), len(queries) // BATCH, seconds)
    found = np.concatenate([vectors.search(queries[i : i + BATCH], K)[1] for i in range(0, len(queries), BATCH)])
    return Measured(opened, before, memory_mib("VmHWM"), single, batches, found.tolist())


def timed(call: Callable[[int], object], count: int, seconds: float) -> list[float]:
    """Milliseconds of calls, until they are all done or the time is over."""
    end, times = time.perf_counter() + seconds, []
    for i in range(count):
        start = time.perf_counter()
        call(i)
        times.append(1000 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return times


def recall(found: list[list[int]], exact: list[list[int]], k: int) -> float:
    """The share of the k best vectors that are found among k."""
    return float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found, exact, strict=True)]))


def size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:,.0f}"


def measure(folder: Path, candidates: list[int], seconds: float) -> list[str]:
    """The rows of the table for the vectors in a folder."""
    rows, dimensions = np.load(folder / "vectors.npy", mmap_mode="r").shape
    start = time.perf_counter()
    SmallVectors.write(folder, np.load(folder / "vectors.npy", mmap_mode="r"))
    converted = time.perf_counter() - start
    lines, exact = [], None
    for form, count in (("exact", 0), *(("small", count) for count in candidates)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            result = executor.submit(partial(search, form, folder, count, seconds)).result()
        exact = exact or result
        name = "exact, float16" if form == "exact" else f"small, {count} candidates"
        disk = (
            size(folder / "vectors.npy")
            if form == "exact"
            else f"{size(folder / 'bits.npy')} + {size(folder / 'codes.npy')}"
        )
        recalls = [recall(result.found, exact.found, k) for k in (3, 10)]
        cells = [
            f"{rows:,} × {dimensions}",
            name,
            disk,
            f"{result.peak_mib - result.start_mib:,.0f}",
            "–" if form == "exact" else f"{converted:.1f}",
            f"{np.median(result.single_ms):.1f}",
            f"{np.median(result.batch_ms) / BATCH:.2f}",
            *(f"{value:.3f}" for value in recalls),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print(json.dumps({"form": name, **{k: v for k, v in asdict(result).items() if k != "found"}})[:200], flush=True)
    return lines


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vectors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vectors", type=int, nargs="+", default=[100_000, 1_000_000], help="numbers of generated vectors")
    add("--dimensions", type=int, default=768, help="dimensions of generated vectors (default: %(default)s)")
    add("--num_queries", type=int, default=512, help="number of queries (default: %(default)s)")
    add("--candidates", type=int, nargs="+", default=[100, CANDIDATES, 1600], help="candidates of the small form")
    add("--seconds", type=float, default=20, help="time for single queries, and for batches (default: %(default)s)")
    add("--encoder", help="an embedding model, for real vectors")
    add("--corpus", type=Path, help="its passages")
    add("--index", type=Path, help="an index of the form 'exact', instead of an encoder and passages")
    add("--queries", type=Path, help="questions of --encoder or --index, a JSONL file")
    add("--folder", type=Path, help="where to write the vectors (default: the system's temporary folder)")
    args = parser.parse_args()
    if args.encoder is not None and (args.corpus is None or args.queries is None):
        parser.error("--encoder needs --corpus and --queries")
    if args.index is not None and (args.encoder is not None or args.queries is None):
        parser.error("--index needs --queries, and no --encoder")
    generated = args.encoder is None and args.index is None
    table = []
    for rows in args.vectors if generated else [0]:
        with TemporaryDirectory(dir=args.folder) as folder:
            if generated and 3 * rows * args.dimensions > shutil.disk_usage(folder).free:
                parser.error(f"{rows} vectors do not fit on the disk of {folder}: choose another --folder")
            if generated:
                generate(Path(folder), rows, args.dimensions, min(args.num_queries, rows))
            else:
                encode(Path(folder), args)
            table += measure(Path(folder), args.candidates, args.seconds)
    print(f"\n{os.cpu_count()} cores ({platform.machine()}), {K} results\n")
    names = ["vectors", "form", "disk MiB", "memory MiB", "to convert, s", "1 query, ms", f"of {BATCH}, ms a query"]
    names += ["recall@3", "recall@10"]
    print("| " + " | ".join(names) + " |\n" + "|---" * 2 + "|---:" * (len(names) - 2) + "|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
