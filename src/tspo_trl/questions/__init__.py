"""Questions with their golden answers, from the forms in which they are found, and the seven benchmarks by name."""

from .catalogue import BENCHMARKS, Benchmark, load_benchmark
from .load import load_questions, question_splits, source_name

__all__ = ["BENCHMARKS", "Benchmark", "load_benchmark", "load_questions", "question_splits", "source_name"]
