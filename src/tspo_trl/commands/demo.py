"""The embedded demo: its questions, its passages, and the tiny model that training starts from."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from rich.console import Console

from ..retrieval import BM25Retriever, Passage, Retriever, iter_corpus
from ..rollout.limits import SearchLimits
from ..rollout.search_config import SearchConfig

if TYPE_CHECKING:  # models are imported where they are made: `tspo audit` needs none
    from ..demo import World

DEMO = "demo"
DEMO_CONFIG = Path(__file__).parent / "demo.yaml"


def demo_datasets(world: "World", max_train: int | None, max_eval: int | None) -> tuple[Dataset, Dataset]:
    """The first training questions of the demo, and its first held-out questions."""
    train = Dataset.from_list([question.row() for question in world.train_questions[:max_train]])
    heldout = Dataset.from_list([question.row() for question in world.heldout_questions[:max_eval]])
    return train, heldout


def demo_retriever(passages: list[Passage], backend: str) -> Retriever:
    """BM25 over the passages of the demo."""
    if backend not in ("bm25", "bm25s", "rank_bm25"):
        raise ValueError(f"`retriever_backend` of the demo is 'bm25' or 'rank_bm25', got {backend!r}.")
    return BM25Retriever(passages, "rank_bm25" if backend == "rank_bm25" else "bm25s")


def save_world(world: "World", folder: Path) -> None:
    """Write the passages of the demo and its held-out questions, so that its models can be evaluated later."""

    def write(name: str, records: Iterable[Mapping[str, object]]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / name).write_text(lines, encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    write("passages.jsonl", ({"id": p.id, "title": p.title, "text": p.text} for p in world.passages))
    rows = enumerate(question.row() for question in world.heldout_questions)
    write("heldout.jsonl", ({"id": f"heldout_{i}", **row} for i, row in rows))


def save_demo_model(folder: Path, limits: SearchLimits, *, seed: int) -> None:
    """Make the tiny model of the demo, teach it to search, and save it with its tokenizer and search settings."""
    from ..demo import make_tokenizer, warm_start
    from ..demo.world import PROMPT

    tokenizer = make_tokenizer()
    model = warm_start(tokenizer, seed=seed, progress=True)
    _save(model, tokenizer, folder, SearchConfig(prompt_template=PROMPT, **asdict(limits)))


def save_tiny_model(
    folder: Path,
    limits: SearchLimits,
    *,
    corpus: str | None,
    retriever: Any,
    rows: Iterable[Mapping[str, Any]],
    seed: int,
    steps: int,
) -> None:
    """Make a tiny model for other data: it learns the words of the corpus, and to search for the question."""
    from ..demo import demonstrate, make_model, make_tokenizer, supervise
    from ..rollout.tags import PROMPT, TagProtocol

    if corpus is None:
        raise ValueError("The model 'demo' learns its words from `corpus`: give it too, or another model.")
    Console().print("Making a tiny model for this data; it learns to search for the question, and little else.")
    rows = list(rows)
    texts = [PROMPT, *(f"{p.title} {p.text}" for p in iter_corpus(corpus)), *(row["question"] for row in rows)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer, seed=seed)
    protocol = TagProtocol(tokenizer, max_searches=limits.max_searches)
    prompts: dict[Any, Any] = {protocol.prompt(row["question"]): row for row in rows}
    scripts = [
        [f"<search> {row['question']}</search>", f"<answer> {row['golden_answers'][0]}</answer>"]
        for row in prompts.values()
    ]
    demonstrations = demonstrate(tokenizer, retriever, list(prompts), scripts, limits)
    supervise(model, demonstrations, steps=steps, progress="Warm start", batch_size=16)
    _save(model, tokenizer, folder, SearchConfig(prompt_template="default", **asdict(limits)))


def _save(model: Any, tokenizer: Any, folder: Path, config: SearchConfig) -> None:
    """Save what the trainer loads, and what `tspo evaluate` needs to compare this model with the trained one."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config.save(folder)
