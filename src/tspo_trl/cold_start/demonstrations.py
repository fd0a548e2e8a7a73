"""Demonstrations: rollouts that search and answer correctly, in the tokens of a protocol, made from questions and a retriever."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from ..credit import eligible_golds, first_occurrence
from ..questions.check import check_columns, check_row, read_texts
from ..retrieval import CachedRetriever, Passage, Retriever
from ..rollout.limits import SearchLimits
from ..rollout.loop import check_observation_tokens
from ..rollout.protocol import SearchProtocol
from ..rollout.scripted import follow_scripts
from ..rollout.trajectory import Trajectory
from .plans import Plan, add_failed_searches, find_plans

_BATCH = 256  # questions that are searched for together
_IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True, slots=True)
class Demonstration:
    """
    A rollout to learn from.

    Args:
        question (`str`):
            The question.
        trajectory ([`Trajectory`]):
            The prompt, the turns and their observations, exactly as in a model's rollout.
        by_titles (`bool`):
            Whether passages of all supporting titles were found. Otherwise only the golden answer is known to be found.
        num_failed (`int`):
            Number of turns at the beginning whose search finds no evidence. They are read and not learned.
    """

    question: str
    trajectory: Trajectory
    by_titles: bool
    num_failed: int

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the prompt, the turns and the observations."""
        return self.trajectory.prompt_ids + self.trajectory.completion_ids

    @property
    def labels(self) -> list[int]:
        """The token id of each learned token, -100 for all others: only what the model writes is learned."""
        trajectory, labels = self.trajectory, [_IGNORED] * len(self.trajectory.prompt_ids)
        for token, turn in zip(trajectory.completion_ids, trajectory.turn_index, strict=True):
            labels.append(token if turn >= self.num_failed else _IGNORED)
        return labels


@dataclass(slots=True)
class Demonstrations:
    """
    The demonstrations made from a data set, and how many of its questions they were made from.

    Args:
        items (`list[Demonstration]`):
            The demonstrations.
        questions (`int`):
            Number of questions that were searched for.
        with_evidence (`int`):
            Number of these questions whose evidence was found.
        too_long (`int`):
            Number of questions with evidence that were left out because a demonstration exceeds the limits.
        unwritable (`int`):
            Number of questions with evidence that were left out because the protocol would not parse their turns as written,
            for instance a question with markup in it.
    """

    items: list[Demonstration] = field(default_factory=list)
    questions: int = 0
    with_evidence: int = 0
    too_long: int = 0
    unwritable: int = 0

    def to_dataset(self) -> Dataset:
        """Rows of `input_ids` and `labels`, as [`~trl.SFTTrainer`] takes them."""
        return Dataset.from_list([{"input_ids": one.input_ids, "labels": one.labels} for one in self.items])


def make_demonstrations(
    dataset: Dataset | IterableDataset,
    retriever: Retriever,
    protocol: SearchProtocol,
    *,
    eos_token_ids: Sequence[int],
    limits: SearchLimits | None = None,
    num_demonstrations: int = 256,
    failed_share: float = 0.0,
    max_length: int | None = None,
    seed: int = 0,
) -> Demonstrations:
    """
    Make demonstrations from questions with golden answers. A question is used only if the passages of its searches have the
    evidence: all supporting titles, if the data set has them, and a golden answer.

    - With `supporting_titles`, the demonstration searches for one title after another, as soon as it is named in the question
      or in a passage. If this does not find all of them, and without titles, it searches for the question.
    - The searches are executed, so the passages are those that the model will see. Every turn is read back by the protocol.
    - Demonstrations contain no thoughts, because data sets have none. If the chat template opens a thought, it is closed at once.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `question`, `golden_answers` and optionally `supporting_titles` (lists of strings). A `prompt` is used
            unchanged. The rows of a `Dataset` are drawn at random, those of an `IterableDataset` are taken in order.
        retriever ([`Retriever`]):
            Executes the searches.
        protocol ([`SearchProtocol`]):
            Writes prompts, turns and observations.
        eos_token_ids (`Sequence[int]`):
            The tokens that end a message of the model.
        limits ([`SearchLimits`], *optional*):
            The limits of the search loop. Defaults to those of a new [`SearchLimits`].
        num_demonstrations (`int`, *optional*, defaults to `256`):
            Maximum number of demonstrations. The search stops when there are enough.
        failed_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations that begin with a search that finds no evidence. Its query is not learned, but the
            better query after it is.
        max_length (`int`, *optional*):
            Maximum number of tokens of a demonstration. Longer ones are left out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions and of the failed searches.

    Returns:
        [`Demonstrations`]: The demonstrations, at least one.

    Raises:
        `ValueError`: If a row is not as described, an option is out of range, or no question has evidence; the message then says
            what was searched for and found.
        [`RetrievalError`]: If a search fails.
    """
    limits = limits or SearchLimits()
    if limits.max_searches < 1:
        raise ValueError(f"`max_searches` must be at least 1 to demonstrate a search, got {limits.max_searches}.")
    if num_demonstrations < 1:
        raise ValueError(f"`num_demonstrations` must be at least 1, got {num_demonstrations}.")
    if not 0 <= failed_share <= 1:
        raise ValueError(f"`failed_share` must be between 0 and 1, got {failed_share}.")
    check_observation_tokens(protocol, limits)
    check_columns(dataset)
    rng = random.Random(seed)
    maker = _Maker(CachedRetriever(retriever), protocol, eos_token_ids, limits, max_length)
    made, rows = Demonstrations(), _rows(dataset, rng)
    while len(made.items) < num_demonstrations and (batch := list(islice(rows, _BATCH))):
        plans = find_plans(batch, maker.search, limits.max_searches)
        found = [(row, plan) for row, plan in zip(batch, plans, strict=True) if plan is not None]
        made.questions += len(batch)
        made.with_evidence += len(found)
        found = found[: max(2 * (num_demonstrations - len(made.items)), 16)]  # some may be left out
        if not found:
            continue
        rows_found, plans_found = map(list, zip(*found, strict=True))
        plans_found = add_failed_searches(
            plans_found,
            rows_found,
            maker.search,
            limits.max_searches,
            count=round(failed_share * len(plans_found)),
            rng=rng,
        )
        maker.make(rows_found, plans_found, made)
    if not made.items:
        raise ValueError(_why_none(made, maker, dataset))
    del made.items[num_demonstrations:]
    return made


def _rows(dataset: Dataset | IterableDataset, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The checked rows, those of a data set with a length in random order."""
    indices: Any = rng.sample(range(len(dataset)), len(dataset)) if isinstance(dataset, Dataset) else None
    rows = enumerate(dataset) if indices is None else ((i, dataset[i]) for i in indices)
    for index, row in rows:
        where = f"`train_dataset`, row {index}"
        check_row(row, where)
        yield {**row, "supporting_titles": read_texts(row, "supporting_titles", where)}


@dataclass(frozen=True, slots=True)
class _Maker:
    """Rolls out plans, and keeps those that are read as they were planned."""

    retriever: Retriever
    protocol: SearchProtocol
    eos_token_ids: Sequence[int]
    limits: SearchLimits
    max_length: int | None

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The passages of queries, as the model would see them."""
        unique = list(dict.fromkeys(queries))
        shown: dict[str, list[Passage]] = {}
        for start in range(0, len(unique), _BATCH):
            batch = unique[start : start + _BATCH]
            for query, passages in zip(batch, self.retriever.search(batch, self.limits.num_passages), strict=True):
                shown[query] = self.protocol.observe(passages, self.limits.max_observation_tokens).passages
        return [shown[query] for query in queries]

    def make(self, rows: Sequence[Mapping[str, Any]], plans: Sequence[Plan], made: Demonstrations) -> None:
        """Append the demonstrations of plans."""
        prompts = [row["prompt"] if row.get("prompt") else self.protocol.prompt(row["question"]) for row in rows]
        trajectories = follow_scripts(
            [list(self.protocol.encode_prompts([prompt])[0]) for prompt in prompts],
            [self._script(plan) for plan in plans],
            self.retriever,
            self.protocol,
            eos_token_ids=self.eos_token_ids,
            limits=self.limits,
        )
        for row, plan, trajectory in zip(rows, plans, trajectories, strict=True):
            if self._is_too_long(plan, trajectory):
                made.too_long += 1
            elif not _is_as_planned(trajectory, plan, row["golden_answers"]):
                made.unwritable += 1
            else:
                made.items.append(Demonstration(row["question"], trajectory, plan.by_titles, plan.num_failed))

    def _script(self, plan: Plan) -> list[list[int]]:
        write = self.protocol.write
        searches = [write("search", query, after_response=i > 0) for i, query in enumerate(plan.queries)]
        return [*searches, write("answer", plan.answer, after_response=True)]

    def _is_too_long(self, plan: Plan, trajectory: Trajectory) -> bool:
        limits, completion = self.limits, len(trajectory.completion_ids)
        whole = len(trajectory.prompt_ids) + completion
        return (
            any(len(turn.token_ids) > limits.max_turn_tokens for turn in trajectory.turns)
            or any(self.protocol.cut_query(query, limits.max_query_tokens) != query for query in plan.queries)
            or (limits.max_completion_length is not None and completion > limits.max_completion_length)
            or (self.max_length is not None and whole > self.max_length)
        )


def _is_as_planned(trajectory: Trajectory, plan: Plan, golden_answers: Sequence[str]) -> bool:
    """Whether the turns are read as they were planned, and the evidence is in the passages as shown."""
    planned = [*(("search", query) for query in plan.queries), ("answer", plan.answer)]
    if trajectory.status != "answered" or [(turn.action, turn.content) for turn in trajectory.turns] != planned:
        return False
    if plan.by_titles and not eligible_golds(golden_answers):
        return True
    occurrence = first_occurrence(trajectory.passage_texts, golden_answers)
    return occurrence is not None and occurrence >= plan.num_failed


def _why_none(made: Demonstrations, maker: _Maker, dataset: Dataset | IterableDataset) -> str:
    """Why there is no demonstration: what was searched for, and what was found."""
    limits = maker.limits
    if made.with_evidence:
        return (
            f"There are no demonstrations: {made.with_evidence} of {made.questions} questions have evidence, but {made.too_long} "
            "demonstrations of them exceed a limit (`max_query_tokens`, `max_turn_tokens`, `max_completion_length` or "
            f"`max_length`), and the protocol would not parse {made.unwritable} as written, for instance because of markup."
        )
    row = next(iter(dataset))
    (passages,) = maker.search([row["question"].strip()])
    titles = " and of its `supporting_titles`" if row.get("supporting_titles") else ""
    return (
        f"There are no demonstrations: none of the {made.questions} questions has evidence in the first {limits.num_passages} "
        f"passages that {maker.retriever!r} finds (hit@{limits.num_passages} is 0). The question itself was searched for{titles}. "
        f"For instance, {row['question']!r} with the golden answers {list(row['golden_answers'])!r} finds the passages "
        f"{[passage.title or passage.text[:40] for passage in passages]!r}. Check with `tspo audit` whether the passages belong "
        "to the questions; larger `num_passages` and `max_observation_tokens` show more of them."
    )
