"""How often a model searches and answers, measured by greedy rollouts."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..agent import SearchAgent
from ..credit import first_occurrence
from ..retrieval import Retriever
from ..rollout.search_config import SearchConfig
from ..rollout.trajectory import Trajectory
from ..scoring import exact_match


def search_rates(
    model: Any,
    processing_class: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    retriever: Retriever,
    config: SearchConfig,
    *,
    batch_size: int = 32,
) -> dict[str, float]:
    """
    Roll out a model greedily and count what it does.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            N rows with `question` and `golden_answers`, N at least 1.
        retriever ([`Retriever`]):
            Executes the searches.
        config ([`SearchConfig`]):
            The settings of the search loop.
        batch_size (`int`, *optional*, defaults to `32`):
            Maximum number of questions that are rolled out together.

    Returns:
        `dict[str, float]`: Shares of the N rollouts: `"search"` (at least one search), `"answer"` (it ends with an answer),
            `"valid"` (no invalid turn), `"hit"` (a golden answer is in its passages) and `"correct"` (exact match), each in
            [0, 1]; and `"searches"`, the mean number of searches.
    """
    agent = SearchAgent.from_model(model, processing_class, retriever=retriever, config=config, batch_size=batch_size)
    protocol = agent.search_loop.protocol
    prompts = [row["prompt"] if row.get("prompt") else protocol.prompt(row["question"]) for row in rows]
    counted = [_count(*pair) for pair in zip(agent.rollout_prompts(prompts), rows, strict=True)]
    return {name: sum(one[name] for one in counted) / len(counted) for name in counted[0]}


def _count(trajectory: Trajectory, row: Mapping[str, Any]) -> dict[str, float]:
    searches = sum(turn.retrieval is not None for turn in trajectory.turns)
    return {
        "search": float(searches > 0),
        "searches": float(searches),
        "valid": float(all(turn.action != "invalid" for turn in trajectory.turns)),
        "answer": float(trajectory.status == "answered"),
        "hit": float(first_occurrence(trajectory.passage_texts, row["golden_answers"]) is not None),
        "correct": exact_match(trajectory.answer, row["golden_answers"]),
    }
