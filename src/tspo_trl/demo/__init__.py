"""A fictional encyclopedia and a tiny model, which run offline on two CPU cores. May import: `engines`, `rollout`, `retrieval`, `scoring`."""

from .model import make_model, make_tokenizer
from .warmup import demonstrate, supervise, warm_start
from .world import Question, World, make_world

__all__ = [
    "Question",
    "World",
    "demonstrate",
    "make_model",
    "make_tokenizer",
    "make_world",
    "supervise",
    "warm_start",
]
