"""Dense retrieval: the passages whose vectors are nearest to that of the query."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base import Passage
from ..corpus import PassageFile, corpus_fingerprint, iter_corpus
from ..passages import hold_passages
from ..results import read_arguments
from .build import FORMAT, build_index, encoder_fingerprint
from .encoders import Encoder, TextEncoder
from .faiss_files import FaissVectors
from .vectors import CANDIDATES, ExactVectors, SmallVectors, Vectors

logger = logging.getLogger(__name__)

#: Cosine of the vectors of a passage, in different precisions, or cut a little earlier
_SAME = 0.95


class DenseRetriever:
    """
    Finds the passages whose vectors have the largest inner products with the vector of the query.

    The constructor encodes passages in memory. [`DenseRetriever.build`] indexes a corpus file and writes the index to a folder,
    and [`DenseRetriever.load`] opens it.

    Args:
        passages (`Iterable[Passage]`):
            Passages of the corpus. See [`~retrieval.read_passage`] for other forms, such as dictionaries.
        encoder ([`Encoder`]):
            Encodes queries and passages, for instance `TextEncoder("intfloat/e5-base-v2")`.
        device (`str` or `torch.device`, *optional*):
            Where vectors are compared. Defaults to the device of the encoder, or to the CPU if it has none.

    Raises:
        `TypeError`: If `passages` is not a collection of passages.
        `ValueError`: If there are no passages, one is malformed, or two share an id.
    """

    def __init__(self, passages: Iterable[Passage], encoder: Encoder, *, device: str | torch.device | None = None):
        of_file = "DenseRetriever.build({}, folder, encoder)"
        self.passages: Sequence[Passage] = hold_passages(passages, "DenseRetriever", of_file)
        self.encoder = encoder
        device = getattr(encoder, "device", "cpu") if device is None else device
        self.vectors: Vectors = ExactVectors(encoder.encode_passages(self.passages), device)
        self._corpus = corpus_fingerprint(self.passages)
        self._sample = _hash(self.vectors)

    @classmethod
    def build(cls, corpus: str | Path, folder: str | Path, encoder: Encoder, **options: Any) -> "DenseRetriever":
        """Index a corpus file and open the index. See [`build_index`] for the arguments, options and errors."""
        build_index(corpus, folder, encoder, **options)
        return cls.load(folder, encoder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: Encoder | None = None,
        *,
        corpus: str | Path | None = None,
        device: str | torch.device | None = None,
        candidates: int = CANDIDATES,
    ) -> "DenseRetriever":
        """
        Open an index. Its passages are mapped into memory; its vectors too, unless they are moved to an accelerator.

        Args:
            folder (`str` or `Path`):
                Folder that [`build_index`] or [`convert_faiss`] has written.
            encoder ([`Encoder`], *optional*):
                Encodes queries. Defaults to the model whose name the index stores.
            corpus (`str` or `Path`, *optional*):
                The corpus file of the index. If it is given, it is read once to check that they belong together.
            device (`str` or `torch.device`, *optional*):
                Where vectors of the form `"exact"` are compared. Defaults to the device of the encoder, if they fit there.
            candidates (`int`, *optional*, defaults to `CANDIDATES`):
                Number of passages that the form `"small"` compares again by their numbers in 8 bits.

        Raises:
            `FileNotFoundError`: If there is no index in the folder.
            `ValueError`: If the index is damaged, of another version, of another corpus or of another encoder.
            `MemoryError`: If the bits of the form `"small"`, or an index that `faiss` reads, do not fit into memory.
        """
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"There is no dense index in {str(folder)!r} (no index.json).")
        about = _read_about(folder)
        self = cls.__new__(cls)
        if encoder is None:
            if not about.get("model"):
                raise ValueError(
                    f"The index in {str(folder)!r} names no model: give the `encoder` that it was made with."
                )
            encoder = TextEncoder(about["model"], **about["settings"])
        self.encoder, self._corpus = encoder, about["corpus"]
        if (found := encoder_fingerprint(encoder)) != about["encoder"]:
            raise ValueError(
                f"The index in {str(folder)!r} was made with the encoder {about['encoder']!r}, got {found!r}. Their vectors "
                "cannot be compared: give the same model and settings, or index the corpus again."
            )
        if corpus is not None and (found := corpus_fingerprint(iter_corpus(corpus))) != self._corpus:
            raise ValueError(
                f"The index in {str(folder)!r} does not belong to the corpus {str(corpus)!r}: its passages have the "
                f"fingerprint {self._corpus}, those of the corpus {found}. Index the corpus again."
            )
        try:
            self.passages = PassageFile(folder)
            self.vectors = _open_vectors(folder, about, encoder, device, candidates)
            if not self.vectors.shape[0] == len(self.passages) == about["passages"]:
                counts = (self.vectors.shape[0], len(self.passages), about["passages"])
                raise ValueError(f"its files disagree about the number of passages: {counts}")
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"The dense index in {str(folder)!r} cannot be read: {error}") from error
        self._sample = _hash(self.vectors)
        _check_encoder(self.passages, self.vectors, encoder, folder)
        return self

    @property
    def fingerprint(self) -> str:
        """A string that changes with the corpus, the encoder and the form of the vectors."""
        form = type(self.vectors).__name__
        return f"dense {form} {encoder_fingerprint(self.encoder)} {self._corpus} {self._sample}"

    def __repr__(self) -> str:
        return f"DenseRetriever({len(self.passages)} passages, encoder={self.encoder!r})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once. Equal queries are encoded once. Equal scores are ordered as in the corpus.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                Maximum number of passages for each query, at least 1. It may exceed the size of the corpus.

        Returns:
            `list[list[Passage]]`: Q lists of `k` passages, or of all passages if there are fewer, best first.
        """
        queries, k = read_arguments(queries, k)
        if not queries:
            return []
        distinct = list(dict.fromkeys(queries))
        scores, indices = self.vectors.search(self.encoder.encode_queries(distinct), k)
        results = {
            query: [
                replace(self.passages[int(i)], score=float(score)) for score, i in zip(*of_query, strict=True) if i >= 0
            ]
            for query, *of_query in zip(distinct, scores, indices, strict=True)
        }
        return [list(results[query]) for query in queries]


def _read_about(folder: Path) -> dict[str, Any]:
    """The description of an index."""
    try:
        about: dict[str, Any] = json.loads((folder / "index.json").read_text())
        if about["format"] != FORMAT or about["form"] not in ("exact", "small", "faiss"):
            raise ValueError(f"its format is {about['format']!r} ({about['form']!r}), this version reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The dense index in {str(folder)!r} cannot be read: {error!r}") from error
    return about


def _open_vectors(
    folder: Path, about: Mapping[str, Any], encoder: Encoder, device: str | torch.device | None, candidates: int
) -> Vectors:
    free = _free_memory()
    if about["form"] == "small":
        _check_memory(
            folder, folder / "bits.npy", free, "Searching it over HTTP on a larger machine needs no memory here."
        )
        return SmallVectors(folder, candidates)
    if about["form"] == "faiss":
        bits = about["passages"] * encoder.encode_queries(["a"]).shape[1] / 8e9
        _check_memory(
            folder, folder / "index.faiss", free, f"The form 'small' of a flat index would need {bits:.1f} GB."
        )
        return FaissVectors(folder / "index.faiss")
    matrix = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    wanted = torch.device(getattr(encoder, "device", "cpu") if device is None else device)
    if wanted.type == "cuda" and device is None and matrix.nbytes > torch.cuda.mem_get_info(wanted)[0]:
        logger.warning(
            "The vectors (%.1f GB) do not fit on %s (%.1f GB free), so they are compared on the CPU.",
            *(matrix.nbytes / 1e9, wanted, torch.cuda.mem_get_info(wanted)[0] / 1e9),
        )
        wanted = torch.device("cpu")
    if wanted.type == "cpu" and free is not None and matrix.nbytes > free:
        logger.warning(
            "The vectors in %r (%.1f GB) do not fit into memory (%.1f GB free), so every search reads them from the disk. The "
            "form 'small' would need %.1f GB of memory.",
            *(str(folder), matrix.nbytes / 1e9, free / 1e9, matrix.size / 8e9),
        )
    return ExactVectors(matrix, wanted)


def _hash(vectors: Vectors) -> str:
    """A hash of the first vectors: weights of the same name may change."""
    return sha256(np.ascontiguousarray(vectors.first(64)).tobytes()).hexdigest()[:8]


def _check_encoder(passages: Sequence[Passage], vectors: Vectors, encoder: Encoder, folder: Path) -> None:
    """Raise an error if the encoder does not give the vectors of the index: the first passages are encoded again."""
    stored = vectors.first(3)
    now = encoder.encode_passages(passages[: len(stored)])
    if stored.shape != now.shape:
        raise ValueError(
            f"The vectors of the index in {str(folder)!r} have {stored.shape[1]} dimensions, those of {encoder!r} have "
            f"{now.shape[1]}: they are of different encoders."
        )
    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(now, axis=1)
    cosine = float(((stored * now).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
    if cosine < _SAME:
        raise ValueError(
            f"The vectors of the index in {str(folder)!r} are not those of {encoder!r}: encoded again, one of the first "
            f"passages has a cosine of {cosine:.2f} with its stored vector, expected at least {_SAME}. Give the model and "
            "the settings that the index was made with."
        )


def _check_memory(folder: Path, file: Path, free: int | None, advice: str) -> None:
    """Raise an error if a file does not fit into memory, as far as this is known."""
    needed = file.stat().st_size
    if free is not None and needed > free:
        raise MemoryError(
            f"The index in {str(folder)!r} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free. {advice}"
        )


def _free_memory() -> int | None:
    """Free memory in bytes, within the limit of the container. `None` if this system does not tell."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    files = [group / "memory.max", group / "memory.current"]
    if all(file.is_file() for file in files):
        limit, used = (file.read_text().strip() for file in files)
        if limit != "max":
            free = min(free, max(0, int(limit) - int(used)))
    return free
