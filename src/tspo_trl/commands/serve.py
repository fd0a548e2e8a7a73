"""Serve a retriever over HTTP: one index for all processes of a run, and for several runs.

    tspo serve --corpus passages.jsonl
    tspo serve --corpus passages.jsonl --save_index wiki-bm25     # index once ...
    tspo serve --index wiki-bm25 --host 0.0.0.0 --port 8000       # ... start at once
    tspo serve --retriever_backend lucene --index wikipedia-kilt-doc
    tspo serve --retriever_backend dense --corpus passages.jsonl --retriever_encoder intfloat/e5-base-v2 --save_index wiki-e5
    tspo serve --corpus demo                                      # the demo's encyclopedia

Train with it: `accelerate launch recipes/train.py --retriever_url http://localhost:8000 ...`. The server supports the
interfaces of Search-R1 and SkyRL (`POST /retrieve`) and of FlashRAG and ReCall (`POST /search`, `POST /batch_search`);
`GET /health` answers 200 when the index is loaded. Requires `pip install "tspo-trl[server]"`.
"""

import errno
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from ..retrieval import BM25Retriever, Retriever, open_retriever
from ..retrieval.open import BM25_FOLDER, DENSE_FOLDER
from ..support.paths import check_place
from .options import (
    add_retriever_options,
    add_server_options,
    check_at_least_one,
    check_input_files,
    check_server_options,
    make_parser,
)

try:
    import uvicorn

    from ..retrieval.server import ServerLimits, create_app
except ImportError as error:
    raise ImportError(f"The server needs FastAPI and uvicorn: pip install 'tspo-trl[server]' ({error}).") from error

LIMITS = {
    "max_body_bytes": "maximum size of a request in bytes",
    "max_queries": "maximum number of queries in a request",
    "max_query_chars": "maximum number of characters of a query",
    "max_topk": "maximum number of passages for each query",
    "max_waiting": "maximum number of queries that wait; further requests get HTTP 503 with Retry-After",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of the server."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_retriever_options(parser, url=False)
    add("--save_index", metavar="FOLDER", help="save the index of the corpus in this folder, for --index")
    add(
        "--index_form",
        choices=("exact", "small"),
        default="exact",
        help="vectors of --save_index: 'exact', or 'small' with one bit per dimension in memory (default: %(default)s)",
    )
    add_server_options(parser)
    add("--demo_seed", type=int, default=0, help="seed of the demo's encyclopedia (default: %(default)s)")
    for limit in fields(ServerLimits):
        text = f"{LIMITS[limit.name]} (default: %(default)s)"
        add(f"--{limit.name}", type=int, default=limit.default, metavar="N", help=text)
    args = parser.parse_args(arguments)
    if args.corpus is None and args.index is None:
        parser.error("--corpus or --index is required")
    if args.corpus == "demo" and args.retriever_backend not in ("bm25", "bm25s"):
        parser.error(f"--corpus demo is for --retriever_backend bm25, not {args.retriever_backend}")
    if args.save_index is not None and (args.corpus is None or args.retriever_backend in ("rank_bm25", "lucene")):
        parser.error("--save_index saves the index of a --corpus with --retriever_backend bm25, dense or hybrid")
    if args.index is None and args.retriever_backend in ("dense", "hybrid") and args.retriever_encoder is None:
        parser.error(
            f"--retriever_backend {args.retriever_backend} needs --retriever_encoder, the name of an embedding model"
        )
    if args.index is not None and (args.corpus == "demo" or args.save_index is not None):
        option = "--corpus demo" if args.corpus == "demo" else "--save_index"
        parser.error(f"--index is a saved index, and {option} makes one: give one of them")
    if args.index_form != "exact" and (args.save_index is None or args.retriever_backend not in ("dense", "hybrid")):
        parser.error(
            f"--index_form {args.index_form} is for --save_index with --retriever_backend dense or hybrid: a saved "
            "--index has the form in which it was saved"
        )
    if args.save_index == "":
        parser.error("--save_index must name a folder, got ''")
    check_server_options(parser, args)
    check_at_least_one(parser, args, *LIMITS)
    check_input_files(corpus=args.corpus, index=args.index, backend=args.retriever_backend)
    check_place(args.retriever_encoder, "--retriever_encoder")
    return args


def open_as_asked(arguments: Namespace) -> Retriever:
    """The retriever of the options. Saves its index if asked to."""
    if arguments.corpus == "demo":
        from ..demo import make_world

        retriever = BM25Retriever(make_world(arguments.demo_seed).passages)
        if arguments.save_index is not None:
            retriever.save(arguments.save_index)
        return retriever
    index, backend = arguments.index, arguments.retriever_backend
    if arguments.save_index is not None:
        index = arguments.save_index
        save_index(arguments, Path(index))
    return open_retriever(
        corpus=arguments.corpus if arguments.save_index is None else None,
        index=index,
        backend=backend,
        language=arguments.retriever_language,
        encoder=arguments.retriever_encoder,
    )


def save_index(arguments: Namespace, folder: Path) -> None:
    """Index the corpus of the options. An interrupted index of vectors is resumed."""
    backend, language = arguments.retriever_backend, arguments.retriever_language or "english"
    if backend != "dense":
        target = folder / BM25_FOLDER if backend == "hybrid" else folder
        BM25Retriever.build(arguments.corpus, target, language=None if language == "none" else language)
    if backend in ("dense", "hybrid"):
        from ..retrieval.dense import TextEncoder, build_index
        from ..support.devices import all_accelerators

        encoder = TextEncoder(arguments.retriever_encoder)
        target = folder / DENSE_FOLDER if backend == "hybrid" else folder
        devices = all_accelerators()
        build_index(
            arguments.corpus,
            target,
            encoder,
            form=arguments.index_form,
            devices=devices if len(devices) > 1 else None,
        )


def address(host: str, port: int) -> str:
    """The address of the server for `--retriever_url`, as other machines know it if it serves them."""
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. A port in use is an error now, not after the index is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise OSError(
                f"--port: {port} cannot be served on {host} ({error.strerror}). Give another one, or 0 for any free port."
            ) from error
        raise OSError(f"--host must be an address of this machine, got {host!r} ({error.strerror}).") from error
    return listener


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a retriever until it is stopped."""
    args = parse_arguments(arguments)
    limits = ServerLimits(**{limit.name: getattr(args, limit.name) for limit in fields(ServerLimits)})
    serve(lambda: open_as_asked(args), host=args.host, port=args.port, topk=args.num_passages, limits=limits)


def serve(
    open_retriever: Callable[[], Retriever], *, host: str, port: int, topk: int, limits: ServerLimits | None = None
) -> None:
    """
    Serve a retriever until the process is stopped. If the retriever cannot be opened, the process ends with exit code 1.

    Args:
        open_retriever (`Callable[[], Retriever]`):
            Opens the retriever. It is called while the server already answers `GET /health`.
        host (`str`):
            Address to serve.
        port (`int`):
            Port to serve.
        topk (`int`):
            Number of passages for requests that do not give one.
        limits ([`~retrieval.server.ServerLimits`], *optional*):
            Largest request that is answered.

    Raises:
        `OSError`: If the address cannot be served; the message names the option.
    """
    failures: list[BaseException] = []
    listener = listen(host, port)

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def open_and_report() -> Retriever:
        retriever = open_retriever()
        url = address(host, listener.getsockname()[1])
        print(f"{retriever!r} is ready at {url}", file=sys.stderr, flush=True)
        return retriever

    app = create_app(open_and_report, topk=topk, limits=limits, on_failure=stop)
    # Clients keep their connections while the model generates
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_keep_alive=120))
    # asyncio sets this only on sockets that it opens. Without it, a small reply waits 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        os._exit(130)  # does not wait for an index that is still loading
    if failures or not server.started:
        sys.exit(1)
