"""Scripted evaluations: an engine, a retriever, questions, and the scores read back from the folder."""

import csv

from datasets import Dataset

from tspo_trl import Passage
from tspo_trl.engines.base import BatchEngine, Generation

PROMPT = "Question: {question}\n"
FOUND = Passage(id="7", title="Silent Harbor", text="Silent Harbor is a novel by Mira Talvek.")


class ScriptedEngine(BatchEngine):
    """Writes the scripted texts of the question in the prompt, turn by turn."""

    def __init__(self, tokenizer, scripts):
        super().__init__()
        self.tokenizer, self.scripts = tokenizer, scripts

    def generate(self, contexts, max_new_tokens):
        generations = []
        for context, budget in zip(contexts, max_new_tokens, strict=True):
            text = self.tokenizer.decode(context)
            question = next(q for q in self.scripts if q in text.split("?")[0] + "?")
            turn = text.count("</information>") + text.count("My last action")
            ids = self.tokenizer(self.scripts[question][turn])["input_ids"][:budget]
            generations.append(Generation(ids, [-0.1] * len(ids)))
        return generations


class OneRetriever:
    fingerprint = "one"

    def __init__(self, fails=lambda queries: False):
        self.fails = fails

    def search(self, queries, k):
        if self.fails(queries):
            raise TimeoutError("too slow")
        return [[FOUND] for _ in queries]


def rows(**golds):
    return Dataset.from_list([{"id": q, "question": f"Who wrote {q}?", "golden_answers": g} for q, g in golds.items()])


def scores_of(folder):
    with open(folder / "scores.csv", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


SCRIPTS = {
    "Silent": ["<search> Silent Harbor</search>", "<answer> Mira Talvek</answer>"],
    "Golden": ["<search> Golden Mirror</search>", "<answer> the novel by Mira Talvek</answer>"],
    "Broken": ["<search> Broken Clock</search>", "<answer> Della Brisk</answer>"],
    "Hidden": ["<search> Hidden", "<answer> Corin Pell</answer>"],
    "Crimson": ["<answer> Greta Novik</answer>"],
    "Distant": ["<search> Distant Shore</search>"] * 3 + ["<search> Distant Shore</search>"],
}
GOLDS = {
    "Silent": ["Mira Talvek"],
    "Golden": ["Mira Talvek"],
    "Broken": ["Mira Talvek"],
    "Hidden": ["Orla Quarry"],
    "Crimson": ["Orla Quarry", "Greta Novik!"],
    "Distant": ["Orla Quarry"],
}
