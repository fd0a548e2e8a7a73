"""Loading, mixing and checking questions with golden answers, and the seven benchmarks. May import: `scoring`, `support`."""

from .catalogue import BENCHMARKS, Benchmark, load_benchmark
from .load import load_questions, question_splits, source_name

__all__ = ["BENCHMARKS", "Benchmark", "load_benchmark", "load_questions", "question_splits", "source_name"]
