"""The options that several commands share, so that a flag has one name and one text."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ..retrieval import HTTPRetriever
from ..support.paths import check_model_path, looks_local, suggest_path

BACKENDS = ("bm25", "bm25s", "rank_bm25", "lucene", "dense", "hybrid")
BACKEND = "retriever of the corpus or index"
LANGUAGE = "language of BM25's stop words and stemmer, or 'none'; if not given, english, or that of the index"
ENCODER = "embedding model of the backends dense and hybrid; if not given, that of the index"
QUESTION_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
ALIASES = {  # other name of an option -> its name
    "dataset": "dataset_name",
    "columns": "dataset_columns",
    "backend": "retriever_backend",
    "encoder": "retriever_encoder",
    "model": "model_name_or_path",
    "split": "dataset_train_split",
    "topk": "num_passages",
    "form": "index_form",
}
RETRIEVER_OPTIONS = {  # name of the option -> its text in `--help`
    "corpus": "JSONL file of passages",
    "index": "saved index; if --corpus is given too, it must be the indexed corpus; with lucene, a path or a prebuilt index",
    "retriever_url": "address of a retrieval server, instead of a corpus or an index",
}
DATA_FLAGS = {  # argument of `load_questions` -> the flag of a command that names it in its errors
    "source": "--dataset_name",
    "load_benchmark": "--dataset_name",
    "split": "--split",
    "columns": "--dataset_columns",
    "max_questions": "--max_questions",
}


class ShortErrors(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Parser(ShortErrors):
    """A parser that reads other spellings of its options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        add_spellings(self)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options. Names the nearest option to an unknown one, before a missing option is reported."""
        add_spellings(self)
        names = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        for argument in sys.argv[1:] if args is None else args:
            flag = argument.partition("=")[0]
            if argument == "--":
                break
            if not flag.startswith("--") or " " in flag or any(name.startswith(flag[2:]) for name in names):
                continue  # a value, or the beginning of a name
            self.error(f"unknown option {flag}{nearest_option(flag[2:], names, '--')}")
        return super().parse_args(args, namespace)


def nearest_option(name: str, names: Iterable[str], prefix: str) -> str:
    """The question whether another option was meant, if one is similar."""
    names = [name for name in names if "-" not in name]  # with underscores, as `--help` shows them
    nearest = get_close_matches(name.replace("-", "_"), names, n=1)
    return f". Did you mean {prefix}{nearest[0]}?" if nearest else ""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help starts with the docstring of its command."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_spellings(parser: argparse.ArgumentParser) -> None:
    """Let a parser read the other names of its options, and dashes in place of underscores, without showing them."""
    known = parser._option_string_actions
    for alias, name in ALIASES.items():
        action = known.get(f"--{name}") or known.get(f"--{alias}")
        if action is not None:
            known.setdefault(f"--{name}", action)
            known.setdefault(f"--{alias}", action)
    for option in [option for option in known if option.startswith("--")]:
        known.setdefault("--" + option[2:].replace("_", "-"), known[option])


def add_retriever_options(parser: Any, *, url: bool = True, several: bool = False, compared: bool = False) -> None:
    """
    Add the options that choose a retriever. With `several`, each option takes one value for each data set. With `compared`,
    the backend and the URL take several values for one data set.
    """
    more: dict[str, Any] = {"nargs": "+"} if compared else {}
    count: dict[str, Any] = {"nargs": "+"} if several else {}
    add = parser.add_argument
    add("--corpus", **count, help=RETRIEVER_OPTIONS["corpus"] + ("" if url else ", or 'demo'"))
    add("--index", **count, help=RETRIEVER_OPTIONS["index"])
    if url:
        add("--retriever_url", **(more or count), metavar="URL", help=RETRIEVER_OPTIONS["retriever_url"])
    add(
        "--retriever_backend",
        "--backend",
        default=["bm25"] if compared else "bm25",
        choices=BACKENDS,
        help=f"{BACKEND} (default: bm25)",
        **more,
    )
    add("--retriever_language", metavar="LANGUAGE", help=LANGUAGE)
    add("--retriever_encoder", metavar="MODEL", help=ENCODER)


def add_columns_option(parser: Any) -> None:
    """Add `--dataset_columns`, which [`read_columns`] reads."""
    parser.add_argument(
        "--dataset_columns",
        "--columns",
        dest="columns",
        nargs="+",
        metavar="OURS=THEIRS",
        help="names of the columns, for instance golden_answers=answers.text; or a JSON object",
    )


def read_columns(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Replace `args.columns` by a dictionary of our names and theirs. It stays `None` if it was not given."""
    if args.columns is not None:
        try:
            args.columns = parse_columns(args.columns)
        except ValueError as error:
            parser.error(f"--dataset_columns must be {error}")


def parse_columns(specs: Sequence[str]) -> dict[str, str]:
    """Our names of columns and theirs, from `OURS=THEIRS` or a JSON object. A `ValueError` says what is expected."""
    if specs[0].startswith("{"):
        try:
            columns: dict[str, str] = json.loads(" ".join(specs))
        except json.JSONDecodeError as error:
            raise ValueError(f"a JSON object or like OURS=THEIRS, got {specs[0]!r}: {error}") from error
        return columns
    pairs = [spec.partition("=") for spec in specs]
    for spec, (ours, _, theirs) in zip(specs, pairs, strict=True):
        if not (ours and theirs):
            raise ValueError(f"like OURS=THEIRS, got {spec!r}")
    return {ours: theirs for ours, _, theirs in pairs}


def check_input_files(*, corpus: Any = None, index: Any = None, url: Any = None, backend: str = "bm25") -> None:
    """
    Refuse a corpus or an index that is not there, and options that exclude each other, before anything is loaded. Each is
    one value, several or `None`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"--retriever_backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if url and (corpus or index):
        raise ValueError("Give either --retriever_url, or --corpus and --index, not both.")
    for address in _listed(url):
        HTTPRetriever(address)  # raises an error for an invalid address; sends no request
    for label, paths in (("--corpus", corpus), ("--index", index)):
        if "" in _listed(paths):  # `Path("")` is the current folder
            raise ValueError(f"{label} must name a file or folder, got ''.")
    for path in _listed(corpus):
        if path != "demo" and not Path(path).exists():
            raise FileNotFoundError(f"--corpus: {path!r} does not exist.{suggest_path(path)}")
    for path in _listed(index):
        if backend != "lucene" and not Path(path).exists():
            raise FileNotFoundError(f"--index: there is no saved index in {path!r}.")


def check_question_files(names: Sequence[str], label: str = "--dataset_name") -> None:
    """Refuse files of questions that do not exist. Names on the Hub and of benchmarks are not checked."""
    for name in names:
        local = looks_local(name) or Path(name).suffix.lower() in QUESTION_FILES
        if local and "://" not in name and not Path(name).exists():
            raise FileNotFoundError(f"{label}: there is no file {name!r}.{suggest_path(name)}")


def check_model(model: str, label: str, revision: str | None = None) -> None:
    """Refuse a model that is neither a folder nor on the Hub, before passages are indexed. Only its configuration is loaded."""
    from huggingface_hub import is_offline_mode, try_to_load_from_cache  # here: `--help` is quick
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import cached_file

    check_model_path(model, label)
    adapter, options = "adapter_config.json", {"revision": revision}
    reason = ""
    try:
        if cached_file(model, "config.json", **options):
            return
        if cached_file(model, adapter, **options, _raise_exceptions_for_missing_entries=False):
            return
    except OSError as error:
        reason = f" ({str(error).splitlines()[0]})"
        if isinstance(error.__cause__, LocalEntryNotFoundError):  # not in the cache, and the Hub does not answer
            if isinstance(try_to_load_from_cache(model, adapter, **options), str):
                return
            if not is_offline_mode():
                raise ConnectionError(
                    f"{label}: {model!r} is neither a folder here nor in the cache, and the Hub cannot be reached: check "
                    f"the network.{suggest_path(model)}"
                ) from error
            reason = " (the environment variable HF_HUB_OFFLINE is set: only the cache is searched)"
    raise FileNotFoundError(
        f"{label}: {model!r} is not a folder here, and was not found on the Hub{reason}.{suggest_path(model)}"
    )


def _listed(value: Any) -> list[str]:
    """One value, several or none as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def check_output_dir(path: str | Path) -> None:
    """Refuse an output folder that cannot be made because a part of its path is a file."""
    path = Path(path)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"--output_dir must be a folder, but {str(part)!r} is a file.")


def add_output_option(parser: Any, default: str) -> None:
    """Add `--output_dir`."""
    parser.add_argument(
        "--output_dir", default=default, metavar="OUT", help="folder of the results (default: %(default)s)"
    )


def add_server_options(parser: Any) -> None:
    """Add the options of a server, which [`check_server_options`] checks."""
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to serve; '0.0.0.0' also serves other machines (default: %(default)s)",
    )
    add("--port", type=int, default=8000, help="port to serve (default: %(default)s)")
    add(
        "--num_passages",
        type=int,
        default=3,
        metavar="N",
        help="passages per query if a request does not say (default: %(default)s)",
    )


def check_server_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a port or a number of passages that cannot be one."""
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, got {args.port}")
    check_at_least_one(parser, args, "num_passages")


def check_at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1. An option that was not given is `None`."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
