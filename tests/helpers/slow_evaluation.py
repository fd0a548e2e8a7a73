"""An evaluation that is slow enough to be killed before it ends."""

import time

from datasets import load_from_disk

from helpers.limits import LIMITS
from tspo_trl import BM25Retriever, SearchAgent, evaluate


def slow_evaluation(model, corpus, data, out, seconds=0.0):
    """Evaluate two data sets with sampling and a slow retriever."""
    retriever = BM25Retriever.from_jsonl(corpus)
    search = retriever.search
    retriever.search = lambda queries, k: (time.sleep(seconds), search(queries, k))[1]
    agent = SearchAgent.from_pretrained(model, retriever=retriever, do_sample=True, batch_size=8, **LIMITS)
    datasets = {name: load_from_disk(f"{data}/{name}") for name in ("first", "second")}
    return evaluate(agent, datasets, out, num_samples=2, seed=1, progress=False)
