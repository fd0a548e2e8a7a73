"""Passages, the [`Retriever`] protocol, the retrievers and their server. May import: `support`."""

from .base import Passage, RetrievalError, Retriever
from .bm25 import BM25Retriever
from .cache import CachedRetriever
from .corpus import iter_corpus, load_corpus
from .http import HTTPRetriever
from .hybrid import HybridRetriever
from .log import LoggedRetriever
from .lucene import LuceneRetriever, index_corpus
from .open import open_retriever
from .passages import read_passage

__all__ = [
    "BM25Retriever",
    "CachedRetriever",
    "HTTPRetriever",
    "HybridRetriever",
    "LoggedRetriever",
    "LuceneRetriever",
    "Passage",
    "RetrievalError",
    "Retriever",
    "index_corpus",
    "iter_corpus",
    "load_corpus",
    "open_retriever",
    "read_passage",
]
