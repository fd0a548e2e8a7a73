"""The options that several commands share, so that a flag has one name and one text."""

import argparse
import json
from typing import Any

BACKENDS = ("bm25", "bm25s", "rank_bm25", "lucene")
BACKEND = "retriever of the corpus or index"
RETRIEVER_OPTIONS = {  # name of the option -> its text in `--help`
    "corpus": "JSONL file of passages",
    "index": "saved BM25 index, which must be of the corpus if both are given; with lucene, a path or a prebuilt index",
    "retriever_url": "address of a retrieval server, instead of a corpus or an index",
}
DATA_FLAGS = {  # argument of `load_questions` -> the flag of a command that names it in its errors
    "source": "--dataset",
    "load_benchmark": "--dataset",
    "split": "--split",
    "columns": "--columns",
    "max_questions": "--max_questions",
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help starts with the docstring of its command."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_retriever_options(parser: Any, *, url: bool = True, several: bool = False) -> None:
    """Add the options that choose a retriever. With `several`, each option takes one value for each data set."""
    count: dict[str, Any] = {"nargs": "+"} if several else {}
    add = parser.add_argument
    add("--corpus", **count, help=RETRIEVER_OPTIONS["corpus"] + ("" if url else ", or 'demo'"))
    add("--index", **count, help=RETRIEVER_OPTIONS["index"])
    if url:
        add("--retriever_url", **count, metavar="URL", help=RETRIEVER_OPTIONS["retriever_url"])
    add(
        "--retriever_backend",
        "--backend",
        default="bm25",
        choices=BACKENDS,
        help=f"{BACKEND} (default: %(default)s)",
    )


def add_columns_option(parser: Any) -> None:
    """Add `--columns`, which [`read_columns`] reads."""
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="OURS=THEIRS",
        help="names of the columns, for instance golden_answers=answers.text; or a JSON object",
    )


def read_columns(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Replace `args.columns` by a dictionary of our names and theirs. It stays `None` if it was not given."""
    if args.columns is None:
        return
    if args.columns[0].startswith("{"):
        try:
            args.columns = json.loads(" ".join(args.columns))
        except json.JSONDecodeError as error:
            parser.error(f"--columns must be a JSON object or like OURS=THEIRS, got {args.columns[0]!r}: {error}")
        return
    pairs = [spec.partition("=") for spec in args.columns]
    for spec, (ours, _, theirs) in zip(args.columns, pairs, strict=True):
        if not (ours and theirs):
            parser.error(f"--columns must be like OURS=THEIRS, got {spec!r}")
    args.columns = {ours: theirs for ours, _, theirs in pairs}


def add_output_option(parser: Any, default: str) -> None:
    """Add `--output_dir`."""
    parser.add_argument(
        "--output_dir", default=default, metavar="OUT", help="folder of the results (default: %(default)s)"
    )


def check_at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1. An option that was not given is `None`."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
