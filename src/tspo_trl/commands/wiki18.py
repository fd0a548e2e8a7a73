"""Get the Wikipedia dump of 2018 in 21 million passages, with its published indexes, and serve it.

    tspo wiki18 all --subset 100000                  # a first try: the first 100,000 passages with their vectors
    tspo wiki18 all --index_form small               # everything: 2 GB of memory, 31 GB of disk beside the downloads
    tspo wiki18 download; tspo wiki18 convert; tspo wiki18 serve   # the same, step by step

The corpus (`PeterJinGo/wiki-18-corpus`), the vectors of `intfloat/e5-base-v2` (`PeterJinGo/wiki-18-e5-index`, 64.5 GB) and the
Lucene index (`PeterJinGo/wiki-18-bm25-index`) are those of Search-R1. Nothing is encoded again. An interrupted step resumes.
The backends are `dense`, `bm25` (Lucene, which needs Java 21; with `--subset`, BM25 in memory) and `hybrid`. Train with
`--retriever_url http://localhost:8000`.
"""

import gzip
import hashlib
import shlex
import shutil
import sys
import tarfile
import zlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from ..retrieval import BM25Retriever, HybridRetriever, LuceneRetriever, Retriever, iter_corpus
from ..retrieval.corpus import PassageFile, decompressed
from ..retrieval.open import BM25_FOLDER, DENSE_FOLDER
from ..support.files import replacing, replacing_folder
from ..support.paths import check_place
from .options import add_server_options, check_at_least_one, check_server_options, make_parser

FOLDER = "wiki18"
STEPS = ("download", "convert", "serve", "all")
ENCODER = "intfloat/e5-base-v2"
CORPUS_REPO, CORPUS_FILE = "PeterJinGo/wiki-18-corpus", "wiki-18.jsonl.gz"
VECTORS_REPO, VECTOR_FILES = "PeterJinGo/wiki-18-e5-index", ("part_aa", "part_ab")
LUCENE_REPO = "PeterJinGo/wiki-18-bm25-index"
UNPACKED = 3  # upper bound of the unpacked size of the corpus / the size of its archive
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the library that the client of the Hub uses


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
    def archive(self) -> Path:
        """The corpus as it is published."""
        return self.downloads / CORPUS_FILE

    @property
    def corpus(self) -> Path:
        """The unpacked corpus."""
        return self.downloads / ("wiki-18.jsonl" if self.subset is None else f"wiki-18-{self.subset}.jsonl")

    @property
    def vectors(self) -> list[Path]:
        """The file of the vectors, or its parts."""
        names = VECTOR_FILES if self.subset is None else (f"e5-{self.subset}.index",)
        return [self.downloads / name for name in names]

    @property
    def lucene(self) -> Path:
        """The downloaded files of the index of Lucene."""
        return self.downloads / "lucene"

    @property
    def lucene_index(self) -> Path:
        """The folder of the index of Lucene, which is published in the folder `bm25` of its repository."""
        commits = [
            path for path in self.lucene.rglob("segments_*") if not path.suffix
        ]  # beside the metadata of the Hub
        return min(commits).parent if commits else self.lucene

    def index(self, kind: str, form: str = "") -> Path:
        """The index that `convert` makes."""
        size = "all" if self.subset is None else str(self.subset)
        return self.folder / "-".join(part for part in (kind, form, size) if part)


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of the command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("step", choices=STEPS, help="what to do; 'all' does everything that is not done yet")
    add("--folder", default=FOLDER, help="folder of the files (default: %(default)s)")
    add(
        "--retriever_backend",
        choices=("dense", "bm25", "hybrid"),
        default="dense",
        help="retriever (default: %(default)s)",
    )
    add("--subset", type=int, metavar="N", help="only the first N passages")
    add(
        "--index_form",
        choices=("exact", "small"),
        default="small",
        help="'exact' (32 GB, for a GPU) or 'small' (2 GB of memory) for all passages (default: %(default)s)",
    )
    add(
        "--retriever_encoder",
        default=ENCODER,
        metavar="MODEL",
        help="the model of the vectors, or a folder with it (default: %(default)s)",
    )
    add_server_options(parser)
    args = parser.parse_args(arguments)
    check_at_least_one(parser, args, "subset")
    check_server_options(parser, args)
    if not args.folder:
        parser.error("--folder must name a folder, got ''")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Do a step, or all of them."""
    args = parse_arguments(arguments)
    places = Places(Path(args.folder), args.subset)
    if args.retriever_backend != "bm25":
        check_place(args.retriever_encoder, "--retriever_encoder")
    if args.step in ("serve", "all"):  # needs FastAPI, which the other steps do not
        from .serve import serve
    if args.step in ("download", "all"):
        try:
            download(places, args.retriever_backend)
        except HTTP_ERROR as error:
            if isinstance(error, OSError):  # an answer of the Hub, which is reported as it is
                raise
            raise ConnectionError(f"The Hub cannot be reached ({error}). Run the command again to resume.") from error
    if args.step in ("convert", "all"):
        _require("download", args, _downloaded(places, args.retriever_backend))
        convert(places, args.retriever_backend, args.index_form, args.retriever_encoder)
    if args.step in ("serve", "all"):
        _require("convert", args, _converted(places, args.retriever_backend, args.index_form))
        opened = partial(open_index, places, args.retriever_backend, args.index_form, args.retriever_encoder)
        serve(opened, host=args.host, port=args.port, topk=args.num_passages)


def download(places: Places, backend: str) -> None:
    """Get the files that a backend needs, unless they are there. Sizes and hashes are checked."""
    places.downloads.mkdir(parents=True, exist_ok=True)
    if places.subset is not None:
        _download_subset(places, places.subset, backend)
        return
    unpacked = places.corpus.is_file()
    wanted = {} if unpacked else {places.archive: CORPUS_REPO}
    wanted |= dict.fromkeys(places.vectors, VECTORS_REPO) if backend != "bm25" else {}
    wanted |= {places.lucene: LUCENE_REPO} if backend != "dense" else {}
    missing = {path: repo for path, repo in wanted.items() if not (path.exists() and _checked_mark(path).is_file())}
    facts = {path: _facts(repo, None if path == places.lucene else path.name) for path, repo in missing.items()}
    sizes = {path: sum(fact.size for fact in facts[path]) for path in missing}
    _check_disk(places.downloads, sum(sizes.values()), UNPACKED * sizes.get(places.archive, 0))
    for path, repo in missing.items():
        for fact in facts[path]:
            folder = path if path == places.lucene else places.downloads
            file = Path(hf_hub_download(repo, fact.path, repo_type="dataset", local_dir=folder))
            check_download(file, fact.size, None if fact.lfs is None else fact.lfs.sha256)
        _checked_mark(path).touch()
    if not unpacked:
        with places.archive.open("rb") as source:
            unpack(source, places.corpus)
        places.archive.unlink()


def _download_subset(places: Places, count: int, backend: str) -> None:
    """Get the first passages, and their vectors, without the rest of the files."""
    files = HfFileSystem()
    print(f"The first {count:,} passages go to {places.downloads}", file=sys.stderr, flush=True)
    if not places.corpus.is_file():
        with files.open(f"datasets/{CORPUS_REPO}/{CORPUS_FILE}", "rb") as source:
            unpack(cast(IO[bytes], source), places.corpus, count)
    (vectors,) = places.vectors
    if backend != "bm25":
        from ..retrieval.dense.faiss_files import is_complete, write_head

        if is_complete([vectors]):
            return
        with files.open(f"datasets/{VECTORS_REPO}/{VECTOR_FILES[0]}", "rb") as source:
            write_head(cast(Any, source), vectors, count)


def unpack(source: IO[bytes], corpus: Path, count: int | None = None) -> None:
    """
    Write the passages of the published corpus as a JSONL file. Despite its name, it is a gzip-compressed tar archive of one
    file. A compressed JSONL file is read too.

    Args:
        source (`IO[bytes]`):
            The published corpus, open for reading at its beginning.
        corpus (`Path`):
            The JSONL file. It is replaced when it is complete.
        count (`int`, *optional*):
            Number of passages. Defaults to all.

    Raises:
        `ValueError`: If it is damaged, or has fewer passages.
    """
    written = 0
    try:
        with replacing(corpus) as target, decompressed(source) as lines:
            for line in tqdm(islice(lines, count), total=count, desc="Getting passages"):
                target.write(line)
                written += 1
            if count is not None and written < count:
                raise ValueError(f"--subset: the corpus has only {written} passages, got {count}.")
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(
            f"The corpus {CORPUS_FILE!r} is damaged or incomplete after {written} passages ({error}): download it again."
        ) from error


def check_download(path: Path, size: int, sha256: str | None) -> None:
    """
    Check a downloaded file, and delete it if it is damaged.

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
    raise ValueError(f"The downloaded file {str(path)!r} {found_text}. It was deleted. Run the command again.")


def convert(places: Places, backend: str, form: str, encoder: str) -> None:
    """Make the indexes that a backend needs, unless they are there."""
    if backend != "bm25" and not (target := places.index(DENSE_FOLDER, form)).exists():
        from ..retrieval.dense import TextEncoder, convert_faiss

        convert_faiss(places.vectors, places.corpus, target, TextEncoder(encoder), form=cast(Any, form))
    if backend != "dense" and places.subset is not None and not (target := places.index(BM25_FOLDER)).exists():
        BM25Retriever.build(places.corpus, target)
    if backend == "bm25" and places.subset is None and not (target := places.index("passages")).exists():
        with replacing_folder(target) as unfinished:
            PassageFile.write(unfinished, tqdm(iter_corpus(places.corpus), desc="Passages"))


def open_index(places: Places, backend: str, form: str, encoder: str) -> Retriever:
    """The retriever of a backend."""
    dense = None
    if backend != "bm25":
        from ..retrieval.dense import DenseRetriever, TextEncoder

        dense = DenseRetriever.load(places.index(DENSE_FOLDER, form), TextEncoder(encoder))
        if backend == "dense":
            return dense
    bm25: Retriever
    if places.subset is not None:
        bm25 = BM25Retriever.load(places.index(BM25_FOLDER))
    else:  # the published index holds no texts
        passages = PassageFile(places.index("passages")) if dense is None else dense.passages
        bm25 = LuceneRetriever(places.lucene_index, passages=passages)
    return bm25 if dense is None else HybridRetriever([bm25, dense])


def _downloaded(places: Places, backend: str) -> list[Path]:
    """What `convert` needs."""
    needed = [places.corpus]
    needed += places.vectors if backend != "bm25" else []
    return needed + ([places.lucene] if backend != "dense" and places.subset is None else [])


def _converted(places: Places, backend: str, form: str) -> list[Path]:
    """What `serve` needs."""
    needed = [places.index(DENSE_FOLDER, form)] if backend != "bm25" else []
    if backend != "dense" and places.subset is not None:
        needed.append(places.index(BM25_FOLDER))
    elif backend == "bm25":
        needed.append(places.index("passages"))
    return needed


def _require(step: str, args: Namespace, needed: Sequence[Path]) -> None:
    """Raise an error if a file of an earlier step is missing."""
    if missing := [str(path) for path in needed if not path.exists()]:
        defaults = {"folder": FOLDER, "retriever_backend": "dense", "subset": None}
        if step == "convert":
            defaults |= {"index_form": "small", "retriever_encoder": ENCODER}
        given = {name: getattr(args, name) for name in defaults}
        options = "".join(
            f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value != defaults[name]
        )
        raise FileNotFoundError(f"{', '.join(missing)}: not there yet. Run `tspo wiki18 {step}{options}` first.")


def _facts(repo: str, name: str | None) -> list[Any]:
    """The path, the size and the hash of a file on the Hub, or of all files of a repository."""
    if name is None:
        entries = HfApi().list_repo_tree(repo, repo_type="dataset", recursive=True)
        return [entry for entry in entries if isinstance(entry, RepoFile)]
    found = HfApi().get_paths_info(repo, [name], repo_type="dataset")
    if not found:
        raise FileNotFoundError(f"There is no file {name!r} in the data set {repo!r} on the Hub.")
    return list(found)


def _check_disk(folder: Path, downloads: int, unpacked: int) -> None:
    """Raise an error if there is too little room for bytes that are not downloaded and unpacked yet."""
    needed, free = downloads + unpacked, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The downloads need {needed / 1e9:.1f} GB, but the disk of {str(folder)!r} has {free / 1e9:.1f} GB. Choose "
            "another --folder, or try --subset 100000."
        )
    if downloads:
        print(f"Downloading {downloads / 1e9:.1f} GB to {folder}", file=sys.stderr, flush=True)


def _checked_mark(path: Path) -> Path:
    """A file that says that a download is complete and checked."""
    return path.with_name(f".{path.name}.checked")
