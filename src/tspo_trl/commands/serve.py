"""Serve a retriever over HTTP: one index for all processes of a run, and for several runs.

    tspo serve --corpus passages.jsonl
    tspo serve --corpus passages.jsonl --save_index wiki-bm25     # index once ...
    tspo serve --index wiki-bm25 --host 0.0.0.0 --port 8000       # ... start at once
    tspo serve --retriever_backend lucene --index wikipedia-kilt-doc
    tspo serve --corpus demo                                      # the demo's encyclopedia

Train with it: `accelerate launch recipes/train.py --retriever_url http://localhost:8000 ...`. It speaks the dialects of
Search-R1 and SkyRL (`POST /retrieve`) and of FlashRAG and ReCall (`POST /search`, `POST /batch_search`); `GET /health`
answers 200 when the index is loaded. Needs `pip install "tspo-trl[server]"`.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields

import uvicorn

from ..retrieval import BM25Retriever, Retriever, open_retriever
from ..retrieval.server import ServerLimits, create_app


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a JSONL file of passages, or 'demo'")
    parser.add_argument(
        "--index", help="a saved BM25 index; with the backend 'lucene' a path or the name of a prebuilt one"
    )
    parser.add_argument(
        "--retriever_backend", "--backend", default="bm25", help="'bm25' (default), 'rank_bm25' or 'lucene'"
    )
    parser.add_argument("--save_index", help="save the BM25 index of the corpus in this folder, for --index")
    parser.add_argument(
        "--host", default="127.0.0.1", help="'0.0.0.0' serves other machines too (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--topk", type=int, default=3, help="passages for requests that do not say (default: %(default)s)"
    )
    parser.add_argument(
        "--demo_seed", type=int, default=0, help="seed of the demo's encyclopedia (default: %(default)s)"
    )
    for limit in fields(ServerLimits):
        parser.add_argument(f"--{limit.name}", type=int, default=limit.default, help="a limit (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.corpus is None and args.index is None:
        parser.error("--corpus or --index is required")
    return args


def open_as_asked(arguments: argparse.Namespace) -> Retriever:
    retriever: Retriever
    if arguments.corpus == "demo":
        from ..demo import make_world

        retriever = BM25Retriever(make_world(arguments.demo_seed).passages)
    else:
        retriever = open_retriever(corpus=arguments.corpus, index=arguments.index, backend=arguments.retriever_backend)
    if arguments.save_index is not None:
        if not isinstance(retriever, BM25Retriever):
            raise ValueError(f"--save_index saves indexes of BM25 only, this is {retriever!r}.")
        retriever.save(arguments.save_index)
    print(f"{retriever!r} is ready.", file=sys.stderr, flush=True)
    return retriever


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a retriever until it is stopped."""
    args = parse_arguments(arguments)
    limits = ServerLimits(**{limit.name: getattr(args, limit.name) for limit in fields(ServerLimits)})
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(lambda: open_as_asked(args), topk=args.topk, limits=limits, on_failure=stop)
    # Clients keep their connections while the model generates
    config = uvicorn.Config(app, host=args.host, port=args.port, log_level="warning", timeout_keep_alive=120)
    server = uvicorn.Server(config)
    listener = config.bind_socket()  # a port that is taken is an error now, not after the index was loaded
    # asyncio sets this on sockets of its own only; without, a small reply waits 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for an index that is being loaded
    if failures or not server.started:
        sys.exit(1)
