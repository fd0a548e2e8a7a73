"""Dense retrieval: encoders, vectors on disk, and the retriever."""

from .build import build_index, convert_faiss
from .encoders import Encoder, EncoderSettings, TextEncoder
from .retriever import DenseRetriever
from .vectors import ExactVectors, SmallVectors

__all__ = [
    "DenseRetriever",
    "Encoder",
    "EncoderSettings",
    "ExactVectors",
    "SmallVectors",
    "TextEncoder",
    "build_index",
    "convert_faiss",
]
