"""Where passages come from: the [`Passage`], the [`Retriever`] protocol, and retrievers that follow it."""

from .base import Passage, RetrievalError, Retriever
from .bm25 import BM25Retriever
from .corpus import iter_corpus, load_corpus

__all__ = ["BM25Retriever", "Passage", "RetrievalError", "Retriever", "iter_corpus", "load_corpus"]
