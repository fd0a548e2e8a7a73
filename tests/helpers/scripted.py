"""An engine that follows a script, and a retriever that records its queries."""

from contextlib import contextmanager

from tspo_trl.engines.base import BatchEngine, Generation
from tspo_trl.retrieval import Passage
from tspo_trl.rollout.limits import SearchLimits

QUESTION = "Question: Who wrote Silent Harbor?\n"
PASSAGE = Passage(id="7", title="Silent Harbor", text="Silent Harbor is a novel by Mira Talvek.", score=1.0)


class ScriptedEngine(BatchEngine):
    """Generates the next text of each prompt's script, cut at the budget as in a real engine."""

    def __init__(self, tokenizer, scripts):
        super().__init__()
        self.tokenizer, self.scripts = tokenizer, scripts
        self.calls, self.sessions = [], 0

    @contextmanager
    def session(self):
        self.sessions += 1
        with super().session():
            yield

    def generate(self, contexts, max_new_tokens):
        self.calls.append([list(c) for c in contexts])
        generations = []
        for context, budget in zip(contexts, max_new_tokens, strict=True):
            assert budget >= 1
            key = next(k for k in self.scripts if context[: len(k)] == list(k))
            ids = self.tokenizer(self.scripts[key].pop(0))["input_ids"][:budget]
            generations.append(Generation(token_ids=ids, logprobs=[-0.5] * len(ids)))
        return generations


class RecordingRetriever:
    def __init__(self, passages=(PASSAGE,), error=None):
        self.passages, self.error, self.calls = list(passages), error, []

    def search(self, queries, k):
        self.calls.append(list(queries))
        if self.error is not None:
            raise self.error
        return [self.passages[:k] for _ in queries]


def loop_options(options):
    """The options, with all limits among them combined into one argument."""
    limits = {name: value for name, value in options.items() if name in SearchLimits.__dataclass_fields__}
    return {name: value for name, value in options.items() if name not in limits} | {"limits": SearchLimits(**limits)}
