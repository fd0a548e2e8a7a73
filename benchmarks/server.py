"""Load test of the retrieval server: many clients at once on the loopback device. Prints a Markdown table.

    python -m benchmarks.server                                     # 64 clients, 1,000 requests of 16 queries
    python -m benchmarks.server --servers dense --encoder intfloat/e5-base-v2

Each server runs in its own process. The clients are threads of this process, each with an `HTTPRetriever` of its own, as the
processes of a training run have. Every reply is compared with a direct search in the same index. The passages are generated,
as those of `benchmarks.retrieval`; without `--encoder`, the encoder has a random vector for each word. Needs `pip install
"tspo-trl[server,dense]"`. Memory is measured on Linux only.
"""

import argparse
import json
import logging
import math
import os
import platform
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.retrieval import peak_memory, serve, write_data
from tspo_trl.retrieval import (
    BM25Retriever,
    HTTPRetriever,
    Passage,
    RetrievalError,
    Retriever,
    iter_corpus,
    open_retriever,
)
from tspo_trl.retrieval.dense import TextEncoder, build_index

K = 3
TOLERANCE = 0.01  # of a score: rounding differs with the queries beside it, and may exchange neighbouring ranks
DIMENSIONS = 256  # of the random vectors


@dataclass
class Load:
    """What the clients have seen. Each appends to the lists; a request is lost if it has no reply in the end."""

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)


def save_random_encoder(corpus: Path, folder: Path) -> None:
    """Save static embeddings with a random vector for each word of a corpus."""
    words = Counter(word for p in iter_corpus(corpus) for word in re.findall(r"\w+", f"{p.title} {p.text}".lower()))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = torch.randn(len(vocabulary), DIMENSIONS, generator=torch.Generator().manual_seed(0))
    # Rare words count more, so that the passages of a search differ
    table /= torch.tensor([1, *(words[word] for word in sorted(words))])[:, None].sqrt()
    save_file({"embeddings": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))


def is_right(found: Sequence[Passage], best: Sequence[Passage]) -> bool:
    """Whether a reply has the passages of a direct search, which found more of them. Equal scores may be in any order."""
    scores = {passage.id: passage.score for passage in best}
    close = [math.isclose(p.score, scores.get(p.id, math.inf), rel_tol=TOLERANCE) for p in found]
    ranked = [math.isclose(p.score, other.score, rel_tol=TOLERANCE) for p, other in zip(found, best, strict=False)]
    return len(found) == min(K, len(best)) and all(close) and all(ranked)


def load(
    url: str, requests: Sequence[Sequence[str]], direct: Sequence[Sequence[Sequence[Passage]]], clients: int
) -> Load:
    """Send all requests, each by the next client that is free."""
    seen, waiting, lock = Load(), iter(range(len(requests))), threading.Lock()

    def work() -> None:
        retriever = HTTPRetriever(url)
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                break
            start = time.perf_counter()
            try:
                replies = retriever.search(requests[number], K)
            except RetrievalError as error:
                seen.lost.append(str(error))
                continue
            seen.seconds.append(time.perf_counter() - start)
            if not all(map(is_right, replies, direct[number])):
                seen.wrong.append(number)
        seen.again.append(retriever.retries)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def measure(
    name: str, options: list[str], retriever: Retriever, requests: list[list[str]], args: argparse.Namespace
) -> list[str]:
    """The rows of a server: with the default limit of waiting queries, and with a small one."""
    flat = [query for request in requests for query in request]
    found = [p for i in range(0, len(flat), 512) for p in retriever.search(flat[i : i + 512], 10 * K)]
    direct = [found[i : i + args.queries] for i in range(0, len(flat), args.queries)]
    rows = []
    for limit in (None, args.max_waiting):
        print(f"Measuring {name} ...", file=sys.stderr, flush=True)
        with serve(*options, *([] if limit is None else ["--max_waiting", str(limit)])) as (url, process):
            start = time.perf_counter()
            seen = load(url, requests, direct, args.clients)
            seconds = time.perf_counter() - start
            memory = peak_memory(process)
        for message in sorted(set(seen.lost))[:3]:
            print(f"Lost: {message}", file=sys.stderr)
        p50, p95 = (f"{1000 * value:,.0f}" for value in np.percentile(seen.seconds or [np.nan], [50, 95]))
        cells = [name, "default" if limit is None else str(limit), f"{len(requests):,}", str(len(seen.lost))]
        cells += [str(len(seen.wrong)), f"{sum(seen.again):,}", p50, p95]
        cells += [f"{args.queries * len(seen.seconds) / seconds:,.0f}", "–" if memory is None else f"{memory:,.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    kinds = ("bm25", "dense", "hybrid")
    add("--servers", nargs="+", choices=kinds, default=list(kinds), help="retrievers to serve (default: %(default)s)")
    add("--passages", type=int, default=20_000, help="size of the generated corpus (default: %(default)s)")
    add("--clients", type=int, default=64, help="clients at once (default: %(default)s)")
    add("--requests", type=int, default=1000, help="requests of all clients (default: %(default)s)")
    add("--queries", type=int, default=16, help="queries of a request (default: %(default)s)")
    add("--max_waiting", type=int, default=256, help="waiting queries in the second row (default: %(default)s)")
    add("--encoder", help="an embedding model (default: a random vector for each word)")
    args = parser.parse_args()
    logging.getLogger("tspo_trl").setLevel(logging.ERROR)  # each client that is turned away would say so
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.passages, args.requests * args.queries, seed=0)
        corpus = folder / "corpus.jsonl"
        with (folder / "queries.jsonl").open(encoding="utf-8") as lines:
            texts = [json.loads(line)["question"] for line in lines]
        requests = [texts[i : i + args.queries] for i in range(0, len(texts), args.queries)]
        index = folder / "index"
        BM25Retriever.from_jsonl(corpus).save(index / "bm25")
        if set(args.servers) - {"bm25"}:
            encoder = args.encoder or str(folder / "encoder")
            if args.encoder is None:
                save_random_encoder(corpus, folder / "encoder")
            build_index(corpus, index / "dense", TextEncoder(encoder), form="small")
        for kind in args.servers:
            path = str(index if kind == "hybrid" else index / kind)
            options = ["--retriever_backend", kind, "--index", path]
            rows += measure(kind, options, open_retriever(index=path, backend=kind), requests, args)
    print(
        f"\n{os.cpu_count()} cores ({platform.machine()}), {args.passages:,} passages, {args.clients} clients, ", end=""
    )
    print(f"{args.queries} queries a request\n")
    names = [
        "server",
        "max_waiting",
        "requests",
        "lost",
        "wrong",
        "sent again",
        "p50 ms",
        "p95 ms",
        "queries/s",
        "memory MiB",
    ]
    print("| " + " | ".join(names) + " |\n|---" + "|---:" * (len(names) - 1) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
