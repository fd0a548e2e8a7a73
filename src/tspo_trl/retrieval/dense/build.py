"""Making an index of vectors, in steps that can be interrupted and continued."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from ...support.files import replace_file
from ..corpus import PassageFile, copy_corpus, corpus_fingerprint, iter_corpus
from .encoders import Encoder, TextEncoder
from .faiss_files import FlatFile, is_flat, open_flat
from .vectors import SmallVectors

logger = logging.getLogger(__name__)

IndexForm = Literal["exact", "small", "faiss"]
FORMAT = 1
#: Number of passages that are encoded before progress is recorded
STEP = 4096


def build_index(
    corpus: str | Path,
    folder: str | Path,
    encoder: Encoder,
    *,
    form: Literal["exact", "small"] = "exact",
    dtype: Literal["float16", "float32"] = "float16",
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> None:
    """
    Encode a corpus and write an index, for [`DenseRetriever.load`].

    Passages and vectors are written as they are read, so memory is bounded. They are in the folder `{folder}.partial` until
    the index is complete. If the process is killed, the same call continues where it was.

    Args:
        corpus (`str` or `Path`):
            The corpus file, see [`~retrieval.iter_corpus`].
        folder (`str` or `Path`):
            A new or empty folder.
        encoder ([`Encoder`]):
            Encodes the passages, for instance a [`TextEncoder`].
        form (`str`, *optional*, defaults to `"exact"`):
            `"exact"` or `"small"`, see [`ExactVectors`] and [`SmallVectors`].
        dtype (`str`, *optional*, defaults to `"float16"`):
            Type of the vectors of the form `"exact"`: `"float16"` or `"float32"`.
        devices (`Sequence[str]`, *optional*):
            Devices that encode at the same time, for instance `["cuda:0", "cuda:1"]`, each in a process of its own. The encoder
            must be a [`TextEncoder`] that was loaded by name. Defaults to the device of the encoder alone.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `FileExistsError`: If the folder holds something else.
        `ValueError`: If the corpus is malformed, two passages share an id, or the unfinished index is of another corpus or
            encoder, or if `devices` are given and the encoder cannot be loaded again.
        `OSError`: If the disk has too little room.
    """
    check_option("form", form, ("exact", "small"))
    check_option("dtype", dtype, ("float16", "float32"))
    if devices and not (isinstance(encoder, TextEncoder) and encoder.loaded_by_name):
        raise ValueError(
            f"`devices` need a `TextEncoder` that was loaded by name, which each process loads again, got {encoder!r}."
        )
    work = _Work(Path(folder), {"encoder": encoder_fingerprint(encoder), "dtype": dtype}, progress)
    passages = work.write_passages(corpus)
    first = encoder.encode_passages(passages[:1])
    blocks = _encoded(passages, encoder)
    if devices and isinstance(encoder, TextEncoder):
        from .workers import encode_on

        blocks = partial(encode_on, devices, encoder, work.folder, step=STEP)
    matrix = work.write_vectors(blocks, (len(passages), first.shape[1]), np.dtype(dtype))
    work.finish(form, matrix, encoder)


def convert_faiss(
    parts: Sequence[str | Path],
    corpus: str | Path,
    folder: str | Path,
    encoder: Encoder,
    *,
    form: Literal["exact", "small"] = "exact",
    dtype: Literal["float16", "float32"] = "float16",
    progress: bool = True,
) -> None:
    """
    Make an index of the vectors in a file of FAISS, without encoding anything. A flat index is read as a stream and written
    in the given form. Other indexes, such as HNSW, are copied, and searched by `faiss`.

    Args:
        parts (`Sequence[str | Path]`):
            The file, or the parts of it in order, such as `part_aa` and `part_ab`.
        corpus (`str` or `Path`):
            The corpus file whose passages the vectors belong to, in this order.
        folder (`str` or `Path`):
            A new or empty folder.
        encoder ([`Encoder`]):
            Encodes the queries. Its vectors must have the dimensions of the index.
        form (`str`, *optional*, defaults to `"exact"`):
            `"exact"` or `"small"`, of a flat index.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Type of the vectors of the form `"exact"`: `"float16"` or `"float32"`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `FileNotFoundError`, `ValueError`: If a part is missing or damaged, if the numbers of vectors and passages differ, or if
            the encoder has other dimensions. Further errors as for [`build_index`].
    """
    check_option("form", form, ("exact", "small"))
    check_option("dtype", dtype, ("float16", "float32"))
    files = [Path(part) for part in parts]
    flat = open_flat(files) if len(files) != 1 or not files[0].is_file() or is_flat(files) else None
    dimensions = encoder.encode_queries(["a"]).shape[1]
    if flat is not None and flat.dimensions != dimensions:
        raise ValueError(
            f"The vectors of {files[0]} have {flat.dimensions} dimensions, those of {encoder!r} have {dimensions}: they "
            "are of different encoders."
        )
    size = sum(file.stat().st_size for file in files)
    work = _Work(Path(folder), {"encoder": encoder_fingerprint(encoder), "dtype": dtype, "faiss": size}, progress)
    passages = work.write_passages(corpus)
    if flat is None:
        shutil.copyfile(files[0], work.folder / "index.faiss")
        work.finish("faiss", None, encoder)
        return
    if flat.rows != len(passages):
        raise ValueError(
            f"The index has {flat.rows} vectors, but the corpus {str(corpus)!r} has {len(passages)} passages: they do not "
            "belong together."
        )
    matrix = work.write_vectors(_streamed(flat), (flat.rows, flat.dimensions), np.dtype(dtype))
    work.finish(form, matrix, encoder)


def check_option(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a `ValueError` if an option has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")


def encoder_fingerprint(encoder: Encoder) -> str:
    """The fingerprint of an encoder, or the name of its class if it has none."""
    return str(getattr(encoder, "fingerprint", type(encoder).__name__))


def _encoded(passages: PassageFile, encoder: Encoder) -> Callable[[int], Iterator[np.ndarray]]:
    """The vectors of the passages from an index on, in blocks."""

    def blocks(first: int) -> Iterator[np.ndarray]:
        for start in range(first, len(passages), STEP):
            yield encoder.encode_passages(passages[start : start + STEP])

    return blocks


def _streamed(flat: FlatFile) -> Callable[[int], Iterator[np.ndarray]]:
    """The vectors of a file from an index on, in blocks."""
    return lambda first: flat.blocks(STEP, first)


class _Work:
    """An index that is being made, in a folder of its own. `about` is what an unfinished index must agree with."""

    def __init__(self, target: Path, about: dict[str, Any], progress: bool):
        self.target, self.about, self.progress = target.resolve(), about, progress
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise FileExistsError(f"{str(target)!r} is not empty: choose another folder, or remove it.")
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = self.folder / "progress.json"
        self.done: dict[str, Any] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        if self.done and (different := [key for key in about if self.done.get(key) != about[key]]):
            key = different[0]
            raise ValueError(
                f"The unfinished index in {str(self.folder)!r} has {key} {self.done.get(key)!r}, now it is {about[key]!r}. "
                "Remove this folder to start again."
            )

    def _remember(self, **done: Any) -> None:
        self.done |= {**self.about, **done}
        replace_file(self._record, json.dumps(self.done))

    def write_passages(self, corpus: str | Path) -> PassageFile:
        """Write the passages, unless that is done, and check that they are those of the corpus."""
        if "corpus" not in self.done:
            self._remember(corpus=copy_corpus(corpus, self.folder, progress=self.progress))
        elif (found := corpus_fingerprint(iter_corpus(corpus))) != self.done["corpus"]:
            raise ValueError(
                f"The unfinished index in {str(self.folder)!r} is of another corpus than {str(corpus)!r}: its passages have "
                f"the fingerprint {self.done['corpus']}, now it is {found}. Remove this folder to start again."
            )
        return PassageFile(self.folder)

    def write_vectors(
        self, blocks: Callable[[int], Iterator[np.ndarray]], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> np.ndarray:
        """Write vectors, from the first that is not written."""
        path, first = self.folder / "vectors.npy", self.done.get("vectors", 0)
        if not first:
            needed, free = shape[0] * shape[1] * dtype.itemsize, shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(
                    f"The vectors need {needed / 1e9:.1f} GB, but the disk of {str(self.folder)!r} has {free / 1e9:.1f} GB."
                )
            matrix = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        else:
            matrix = np.lib.format.open_memmap(path, mode="r+")
        with tqdm(total=shape[0], initial=first, desc="Vectors", disable=not self.progress) as bar:
            for block in blocks(first):
                if block.shape[1:] != shape[1:] or not np.isfinite(block).all():
                    raise ValueError(
                        f"The vectors from number {first} on are malformed: expected finite numbers of shape (n, {shape[1]}), "
                        f"got shape {block.shape}{'' if np.isfinite(block).all() else ' with NaN or infinite values'}."
                    )
                matrix[first : first + len(block)] = block
                first += len(block)
                matrix.flush()
                self._remember(vectors=first)
                bar.update(len(block))
        if first != shape[0]:
            raise ValueError(f"The encoder gave {first} vectors for {shape[0]} passages.")
        return matrix

    def finish(self, form: IndexForm, matrix: np.ndarray | None, encoder: Encoder) -> None:
        """Bring the vectors into their form, and give the folder its name."""
        if form == "small" and matrix is not None:
            SmallVectors.write(self.folder, matrix)
        about: dict[str, Any] = {"format": FORMAT, "form": form, "corpus": self.done["corpus"]}
        about |= {"passages": len(PassageFile(self.folder)), "encoder": encoder_fingerprint(encoder)}
        if isinstance(encoder, TextEncoder):
            about |= {"model": encoder.name, "settings": asdict(encoder.settings)}
        (self.folder / "index.json").write_text(json.dumps(about, indent=1))
        if self.target.exists():
            self.target.rmdir()
        os.rename(self.folder, self.target)
        # Only now: after an interruption, the work would start again without these files
        (self.target / self._record.name).unlink()
        if form == "small":
            (self.target / "vectors.npy").unlink()
