"""Opening a retriever from the options of a command line or YAML file."""

from pathlib import Path
from typing import Literal, get_args

from .base import Retriever
from .bm25 import BM25Retriever
from .http import HTTPRetriever
from .lucene import LuceneRetriever

BackendName = Literal["bm25", "bm25s", "rank_bm25", "lucene"]


def open_retriever(
    *,
    corpus: str | Path | None = None,
    index: str | Path | None = None,
    url: str | None = None,
    backend: str = "bm25",
    language: str | None = None,
) -> Retriever:
    """
    Open a retriever for a corpus, an index or a server.

    Args:
        corpus (`str` or `Path`, *optional*):
            A JSONL corpus, which `backend` indexes in memory. With a saved BM25 `index`, the corpus that the index must
            belong to.
        index (`str` or `Path`, *optional*):
            A saved index: of BM25 (see [`BM25Retriever.save`]), or with the backend `"lucene"` the path of a Lucene index
            or the name of a prebuilt one.
        url (`str`, *optional*):
            Address of a retrieval server, used instead of a corpus or an index.
        backend (`str`, *optional*, defaults to `"bm25"`):
            `"bm25"` (the same as `"bm25s"`), `"rank_bm25"` or `"lucene"`.
        language (`str`, *optional*):
            Language of stop words and stemmer of the backend `"bm25"`, see [`BM25Retriever`]; `"none"` for neither.
            Defaults to `"english"`, or to the language of a saved index.

    Returns:
        [`Retriever`]: The retriever.

    Raises:
        `ValueError`: If the options name no source or more than one, or a language that the retriever cannot have; the
            message names them.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"The backend must be one of {list(get_args(BackendName))}, got {backend!r}.")
    if language is not None and (url is not None or backend not in ("bm25", "bm25s")):
        raise ValueError(f"The language {language!r} is only for the backend 'bm25'; a server has its own.")
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
    if index is not None:
        if backend == "rank_bm25":
            raise ValueError("An index of the backend 'rank_bm25' cannot be saved or loaded: give the corpus.")
        retriever = BM25Retriever.load(index, corpus)
        if language is not None and (retriever.language or "none") != language:
            raise ValueError(
                f"The index {str(index)!r} has the language {retriever.language or 'none'!r}, not {language!r}: index the "
                "corpus again."
            )
        return retriever
    if corpus is None:
        raise ValueError("There is nothing to search in: give a corpus, an index, or the URL of a retrieval server.")
    if backend == "rank_bm25":
        return BM25Retriever.from_jsonl(corpus, backend="rank_bm25")
    return BM25Retriever.from_jsonl(corpus, language=None if language == "none" else language or "english")
