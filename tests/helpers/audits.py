"""Rows, passages and a retriever for tests of the audit."""

from tspo_trl import Passage

ROME = Passage(id="rome", title="Rome", text="The capital of Italy.")
PARIS = Passage(id="paris", title="Paris", text="The capital of France.")
OSLO = Passage(id="oslo", title="Oslo", text="No capital is further north but Helsinki and Reykjavik.")


def row(question="q", golds=("a",), titles=(), ids=()):
    return {
        "question": question,
        "golden_answers": list(golds),
        "supporting_titles": list(titles),
        "supporting_ids": list(ids),
    }


class Words:
    """Finds the passages whose title is in the query, and records its calls."""

    passages = [ROME, PARIS, OSLO]

    def __init__(self):
        self.calls = []

    def search(self, queries, k):
        self.calls.append(list(queries))
        return [[p for p in self.passages if p.title in query] for query in queries]
