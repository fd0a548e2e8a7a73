"""Train language models to search: Turn-level Stage-aware Policy Optimization (TSPO) for TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

# Public name -> the module that defines it. Modules are imported on first use, so that `import tspo_trl` is fast and
# needs no torch
_MODULES = {
    "BENCHMARKS": "questions",
    "BM25Retriever": "retrieval",
    "Benchmark": "questions",
    "CachedRetriever": "retrieval",
    "ColdStartConfig": "cold_start.config",
    "ColdStartTrainer": "cold_start.trainer",
    "CollapseCallback": "training.collapse",
    "DenseRetriever": "retrieval.dense",
    "Demonstration": "cold_start.demonstrations",
    "Demonstrations": "cold_start.demonstrations",
    "EndpointEngine": "engines.endpoint",
    "EvaluationResults": "evaluation.results",
    "HTTPRetriever": "retrieval",
    "HybridRetriever": "retrieval",
    "LoggedRetriever": "retrieval",
    "LuceneRetriever": "retrieval",
    "Passage": "retrieval",
    "RetrievalError": "retrieval",
    "Retriever": "retrieval",
    "SearchAgent": "agent",
    "SearchConfig": "rollout.search_config",
    "SearchLimits": "rollout.limits",
    "SearchLoop": "rollout.loop",
    "TSPOConfig": "training.config",
    "TSPOTrainer": "training.trainer",
    "TagProtocol": "rollout.tags",
    "TextEncoder": "retrieval.dense",
    "ToolCallProtocol": "rollout.tool_call",
    "Trajectory": "rollout.trajectory",
    "Turn": "rollout.trajectory",
    "TransformersEngine": "engines.static",
    "compare_results": "evaluation.results",
    "evaluate": "evaluation.evaluate",
    "index_corpus": "retrieval",
    "load_benchmark": "questions",
    "load_corpus": "retrieval",
    "load_questions": "questions",
    "make_demonstrations": "cold_start.demonstrations",
    "merge_adapter": "cold_start.trainer",
    "open_retriever": "retrieval",
    "question_splits": "questions",
    "read_rollouts": "rollout.log",
}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from .agent import SearchAgent as SearchAgent
    from .cold_start.config import ColdStartConfig as ColdStartConfig
    from .cold_start.demonstrations import Demonstration as Demonstration
    from .cold_start.demonstrations import Demonstrations as Demonstrations
    from .cold_start.demonstrations import make_demonstrations as make_demonstrations
    from .cold_start.trainer import ColdStartTrainer as ColdStartTrainer
    from .cold_start.trainer import merge_adapter as merge_adapter
    from .engines.endpoint import EndpointEngine as EndpointEngine
    from .engines.static import TransformersEngine as TransformersEngine
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.results import EvaluationResults as EvaluationResults
    from .evaluation.results import compare_results as compare_results
    from .questions import BENCHMARKS as BENCHMARKS
    from .questions import Benchmark as Benchmark
    from .questions import load_benchmark as load_benchmark
    from .questions import load_questions as load_questions
    from .questions import question_splits as question_splits
    from .retrieval import BM25Retriever as BM25Retriever
    from .retrieval import CachedRetriever as CachedRetriever
    from .retrieval import HTTPRetriever as HTTPRetriever
    from .retrieval import HybridRetriever as HybridRetriever
    from .retrieval import LoggedRetriever as LoggedRetriever
    from .retrieval import LuceneRetriever as LuceneRetriever
    from .retrieval import Passage as Passage
    from .retrieval import RetrievalError as RetrievalError
    from .retrieval import Retriever as Retriever
    from .retrieval import index_corpus as index_corpus
    from .retrieval import load_corpus as load_corpus
    from .retrieval import open_retriever as open_retriever
    from .retrieval.dense import DenseRetriever as DenseRetriever
    from .retrieval.dense import TextEncoder as TextEncoder
    from .rollout.limits import SearchLimits as SearchLimits
    from .rollout.log import read_rollouts as read_rollouts
    from .rollout.loop import SearchLoop as SearchLoop
    from .rollout.search_config import SearchConfig as SearchConfig
    from .rollout.tags import TagProtocol as TagProtocol
    from .rollout.tool_call import ToolCallProtocol as ToolCallProtocol
    from .rollout.trajectory import Trajectory as Trajectory
    from .rollout.trajectory import Turn as Turn
    from .training.collapse import CollapseCallback as CollapseCallback
    from .training.config import TSPOConfig as TSPOConfig
    from .training.trainer import TSPOTrainer as TSPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
