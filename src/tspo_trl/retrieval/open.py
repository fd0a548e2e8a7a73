"""Opening a retriever from the options of a command line or YAML file."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from .base import Retriever
from .bm25 import BM25Retriever
from .http import HTTPRetriever
from .hybrid import HybridRetriever
from .lucene import LuceneRetriever

BackendName = Literal["bm25", "bm25s", "rank_bm25", "lucene", "dense", "hybrid"]
#: Folders of the two indexes in the index of the backend "hybrid"
BM25_FOLDER, DENSE_FOLDER = "bm25", "dense"


def open_retriever(
    *,
    corpus: str | Path | None = None,
    index: str | Path | None = None,
    url: str | None = None,
    backend: str = "bm25",
    language: str | None = None,
    encoder: str | Path | None = None,
) -> Retriever:
    """
    Open a retriever for a corpus, an index or a server.

    Args:
        corpus (`str` or `Path`, *optional*):
            A corpus file, which `backend` indexes. The passages are mapped from a temporary file, see
            [`BM25Retriever.from_jsonl`]; only `"rank_bm25"` holds them in memory. With a saved `index`, the corpus that the
            index must belong to.
        index (`str` or `Path`, *optional*):
            A saved index: of BM25 (see [`BM25Retriever.save`]); with the backend `"lucene"` the path of a Lucene index or
            the name of a prebuilt one; with `"dense"` a folder of [`~retrieval.dense.build_index`]; with `"hybrid"` a folder
            with one of BM25 in `bm25` and one of vectors in `dense`.
        url (`str`, *optional*):
            Address of a retrieval server, used instead of a corpus or an index.
        backend (`str`, *optional*, defaults to `"bm25"`):
            `"bm25"` (the same as `"bm25s"`), `"rank_bm25"`, `"lucene"`, `"dense"`, or `"hybrid"` (BM25 and dense).
        language (`str`, *optional*):
            Language of stop words and stemmer of the backends `"bm25"` and `"hybrid"`, see [`BM25Retriever`]; `"none"` for
            neither. Defaults to `"english"`, or to the language of a saved index.
        encoder (`str` or `Path`, *optional*):
            Embedding model of the backends `"dense"` and `"hybrid"`, see [`~retrieval.dense.TextEncoder`]. Required with a
            corpus alone. Defaults to the model that the index names.

    Returns:
        [`Retriever`]: The retriever.

    Raises:
        `ValueError`: If the options name no source or more than one, or a language that the retriever cannot have; the
            message names them.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"The backend must be one of {list(get_args(BackendName))}, got {backend!r}.")
    if language is not None and (url is not None or backend not in ("bm25", "bm25s", "hybrid")):
        raise ValueError(
            f"The language {language!r} is only for the backends 'bm25' and 'hybrid'; a server has its own."
        )
    if encoder is not None and (url is not None or backend not in ("dense", "hybrid")):
        raise ValueError(
            f"The encoder {str(encoder)!r} is only for the backends 'dense' and 'hybrid'; a server has its own."
        )
    if url is not None:
        if corpus is not None or index is not None:
            raise ValueError("Give either the URL of a retrieval server or a corpus or index, not both.")
        return HTTPRetriever(url)
    if backend == "lucene":
        if index is None:
            raise ValueError(
                "The backend 'lucene' needs an index: its path, or the name of a prebuilt one. "
                "`tspo_trl.retrieval.index_corpus(corpus, folder)` makes one of a JSONL corpus."
            )
        return LuceneRetriever(index)
    if backend == "rank_bm25" and index is not None:
        raise ValueError("An index of the backend 'rank_bm25' cannot be saved or loaded: give the corpus.")
    if corpus is None and index is None:
        raise ValueError("There is nothing to search in: give a corpus, an index, or the URL of a retrieval server.")
    if backend == "dense":
        return _open_dense(corpus, index, encoder)
    if backend == "hybrid":
        folders = (None, None) if index is None else (Path(index) / BM25_FOLDER, Path(index) / DENSE_FOLDER)
        return HybridRetriever([_open_bm25(corpus, folders[0], language), _open_dense(corpus, folders[1], encoder)])
    if backend == "rank_bm25" and corpus is not None:
        return BM25Retriever.from_jsonl(corpus, backend="rank_bm25")
    return _open_bm25(corpus, index, language)


def _open_bm25(corpus: str | Path | None, index: str | Path | None, language: str | None) -> BM25Retriever:
    """BM25 of a saved index, or of a corpus."""
    if index is None:
        assert corpus is not None
        return BM25Retriever.from_jsonl(corpus, language=None if language == "none" else language or "english")
    retriever = BM25Retriever.load(index, corpus)
    if language is not None and (retriever.language or "none") != language:
        raise ValueError(
            f"The index {str(index)!r} has the language {retriever.language or 'none'!r}, not {language!r}: index the "
            "corpus again."
        )
    return retriever


def _open_dense(corpus: str | Path | None, index: str | Path | None, encoder: str | Path | None) -> Retriever:
    """Dense retrieval of a saved index, or of a corpus whose vectors are in a temporary file."""
    from .dense import DenseRetriever, TextEncoder  # imports transformers, which the other backends do not need

    if index is not None:
        return DenseRetriever.load(index, None if encoder is None else TextEncoder(encoder), corpus=corpus)
    if encoder is None:
        raise ValueError(
            "The backends 'dense' and 'hybrid' need an encoder for a corpus: the name of an embedding model, for instance "
            "'intfloat/e5-base-v2'."
        )
    assert corpus is not None
    # Mapped files can still be read after they are deleted
    with TemporaryDirectory(prefix="dense-", ignore_cleanup_errors=True) as folder:
        show = sys.stderr.isatty()
        return DenseRetriever.build(
            corpus, Path(folder) / "index", TextEncoder(encoder), dtype="float32", progress=show
        )
