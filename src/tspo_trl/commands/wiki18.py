"""Get the Wikipedia dump of 2018 in 21 million passages, with its published indexes, and serve it.

    tspo wiki18 all --subset 100000                  # a first try: the first 100,000 passages with their vectors
    tspo wiki18 all --form small                     # everything: 2 GB of memory, 16 GB of disk beside the downloads
    tspo wiki18 download; tspo wiki18 convert; tspo wiki18 serve   # the same, step by step

The corpus (`PeterJinGo/wiki-18-corpus`), the vectors of `intfloat/e5-base-v2` (`PeterJinGo/wiki-18-e5-index`, 64.5 GB) and the
Lucene index (`PeterJinGo/wiki-18-bm25-index`) are those of Search-R1. Nothing is encoded again. Every step goes on where it
was if it is interrupted. The backends are `dense`, `bm25` (Lucene, which needs Java 21; with `--subset`, BM25 in memory) and
`hybrid`. Train with `--retriever_url http://localhost:8000`.
"""

import gzip
import hashlib
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

from ..retrieval import BM25Retriever, HybridRetriever, LuceneRetriever, Retriever
from ..retrieval.open import BM25_FOLDER, DENSE_FOLDER
from ..support.files import replacing
from .options import check_at_least_one, make_parser

STEPS = ("download", "convert", "serve", "all")
ENCODER = "intfloat/e5-base-v2"
CORPUS_REPO, CORPUS_FILE = "PeterJinGo/wiki-18-corpus", "wiki-18.jsonl.gz"
VECTORS_REPO, VECTOR_FILES = "PeterJinGo/wiki-18-e5-index", ("part_aa", "part_ab")
LUCENE_REPO = "PeterJinGo/wiki-18-bm25-index"


@dataclass(frozen=True, slots=True)
class Places:
    """
    Where the files of one command are. A subset has files of its own.

    Args:
        folder (`Path`):
            The folder of everything.
        subset (`int`, *optional*):
            Number of passages. `None` for all.
    """

    folder: Path
    subset: int | None

    @property
    def downloads(self) -> Path:
        """Folder of the downloaded files."""
        return self.folder / "download"

    @property
    def corpus(self) -> Path:
        """The corpus."""
        return self.downloads / (CORPUS_FILE if self.subset is None else f"wiki-18-{self.subset}.jsonl")

    @property
    def vectors(self) -> list[Path]:
        """The file of the vectors, or its parts."""
        names = VECTOR_FILES if self.subset is None else (f"e5-{self.subset}.index",)
        return [self.downloads / name for name in names]

    @property
    def lucene(self) -> Path:
        """The downloaded index of Lucene."""
        return self.downloads / "lucene"

    def index(self, kind: str, form: str = "") -> Path:
        """The index that `convert` makes."""
        size = "all" if self.subset is None else str(self.subset)
        return self.folder / "-".join(part for part in (kind, form, size) if part)


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of the command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("step", choices=STEPS, help="what to do; 'all' does everything that is not done yet")
    add("--folder", default="wiki18", help="folder of the files (default: %(default)s)")
    add("--backend", choices=("dense", "bm25", "hybrid"), default="dense", help="retriever (default: %(default)s)")
    add("--subset", type=int, metavar="N", help="only the first N passages")
    add(
        "--form",
        choices=("exact", "small"),
        default="small",
        help="'exact' (32 GB, for a GPU) or 'small' (2 GB of memory) for all passages (default: %(default)s)",
    )
    add("--encoder", default=ENCODER, help="the model of the vectors, or a folder with it (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to serve (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to serve (default: %(default)s)")
    add(
        "--topk", type=int, default=3, metavar="N", help="passages for requests without a number (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    check_at_least_one(parser, args, "topk", *(["subset"] if args.subset is not None else []))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Do a step, or all of them."""
    args = parse_arguments(arguments)
    places = Places(Path(args.folder), args.subset)
    if args.step in ("download", "all"):
        download(places, args.backend)
    if args.step in ("convert", "all"):
        convert(places, args.backend, args.form, args.encoder)
    if args.step in ("serve", "all"):
        from .serve import serve  # needs FastAPI, which the other steps do not

        opened = partial(open_index, places, args.backend, args.form, args.encoder)
        serve(opened, host=args.host, port=args.port, topk=args.topk)


def download(places: Places, backend: str) -> None:
    """Get the files that a backend needs, unless they are there. Sizes and hashes are checked."""
    places.downloads.mkdir(parents=True, exist_ok=True)
    if places.subset is not None:
        _download_subset(places, places.subset, backend)
        return
    wanted = []
    if backend != "bm25":  # the index of Lucene holds the passages too
        wanted = [(CORPUS_REPO, CORPUS_FILE), *((VECTORS_REPO, name) for name in VECTOR_FILES)]
    missing = [(repo, name) for repo, name in wanted if not _is_checked(places.downloads / name)]
    facts = [_facts(repo, name) for repo, name in missing]
    _check_disk(places.downloads, [(places.downloads / f.path, f.size) for f in facts])
    for (repo, name), fact in zip(missing, facts, strict=True):
        path = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=places.downloads))
        check_download(path, fact.size, None if fact.lfs is None else fact.lfs.sha256)
        _checked_mark(path).touch()
    if backend != "dense":
        snapshot_download(LUCENE_REPO, repo_type="dataset", local_dir=places.lucene)


def _download_subset(places: Places, count: int, backend: str) -> None:
    """Get the first passages, and their vectors, without the rest of the files."""
    files = HfFileSystem()
    if not places.corpus.is_file():
        with files.open(f"datasets/{CORPUS_REPO}/{CORPUS_FILE}", "rb") as source, replacing(places.corpus) as target:
            written = 0
            with gzip.open(cast(IO[bytes], source)) as lines:
                for line in islice(lines, count):
                    target.write(line)
                    written += 1
            if written < count:
                raise ValueError(f"--subset: the corpus has only {written} passages, got {count}.")
    (vectors,) = places.vectors
    if backend != "bm25" and not vectors.is_file():
        from ..retrieval.dense.faiss_files import write_head

        with files.open(f"datasets/{VECTORS_REPO}/{VECTOR_FILES[0]}", "rb") as source:
            write_head(cast(Any, source), vectors, count)


def check_download(path: Path, size: int, sha256: str | None) -> None:
    """
    Check a downloaded file, and remove it if it is damaged.

    Args:
        path (`Path`):
            The file.
        size (`int`):
            Its size in bytes.
        sha256 (`str`, *optional*):
            Its SHA-256, if it is known.

    Raises:
        `ValueError`: If the size or the hash differs.
    """
    found = path.stat().st_size
    if found == size and sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        if digest.hexdigest() == sha256:
            return
        found_text = f"has the SHA-256 {digest.hexdigest()}, expected {sha256}"
    elif found == size:
        return
    else:
        found_text = f"has {found} bytes, expected {size}"
    path.unlink()
    raise ValueError(f"The downloaded file {str(path)!r} {found_text}. It is removed: repeat the command.")


def convert(places: Places, backend: str, form: str, encoder: str) -> None:
    """Make the indexes that a backend needs, unless they are there."""
    _require(places, backend)
    if backend != "bm25" and not (target := places.index(DENSE_FOLDER, form)).exists():
        from ..retrieval.dense import TextEncoder, convert_faiss

        convert_faiss(places.vectors, places.corpus, target, TextEncoder(encoder), form=cast(Any, form))
    if backend != "dense" and places.subset is not None and not (target := places.index(BM25_FOLDER)).exists():
        BM25Retriever.build(places.corpus, target)


def open_index(places: Places, backend: str, form: str, encoder: str) -> Retriever:
    """The retriever of a backend."""
    retrievers: list[Retriever] = []
    if backend != "dense":
        bm25 = places.index(BM25_FOLDER)
        retrievers.append(
            LuceneRetriever(places.lucene / "bm25") if places.subset is None else BM25Retriever.load(bm25)
        )
    if backend != "bm25":
        from ..retrieval.dense import DenseRetriever, TextEncoder

        retrievers.append(DenseRetriever.load(places.index(DENSE_FOLDER, form), TextEncoder(encoder)))
    return retrievers[0] if len(retrievers) == 1 else HybridRetriever(retrievers)


def _require(places: Places, backend: str) -> None:
    """Raise an error if a downloaded file is missing."""
    needed = [] if backend == "bm25" and places.subset is None else [places.corpus]
    needed += places.vectors if backend != "bm25" else []
    needed += [places.lucene] if backend != "dense" and places.subset is None else []
    if missing := [str(path) for path in needed if not path.exists()]:
        subset = "" if places.subset is None else f" --subset {places.subset}"
        raise FileNotFoundError(f"{', '.join(missing)}: not downloaded yet. Run `tspo wiki18 download{subset}` first.")


def _facts(repo: str, name: str) -> Any:
    """The size of a file on the Hub, and its hash."""
    found = HfApi().get_paths_info(repo, [name], repo_type="dataset")
    if not found:
        raise FileNotFoundError(f"There is no file {name!r} in the data set {repo!r} on the Hub.")
    return found[0]


def _check_disk(folder: Path, files: Sequence[tuple[Path, int]]) -> None:
    """Raise an error if there is too little room for files that are not downloaded yet."""
    needed, free = sum(size for _, size in files), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The downloads need {needed / 1e9:.1f} GB, but the disk of {str(folder)!r} has {free / 1e9:.1f} GB. Choose "
            "another --folder, or try --subset 100000."
        )
    if needed:
        print(f"Downloading {needed / 1e9:.1f} GB to {folder}", file=sys.stderr, flush=True)


def _checked_mark(path: Path) -> Path:
    """A file that says that a download is complete and checked."""
    return path.with_name(f".{path.name}.checked")


def _is_checked(path: Path) -> bool:
    return path.is_file() and _checked_mark(path).is_file()
