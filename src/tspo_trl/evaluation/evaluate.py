"""Evaluation of a model on data sets, outside the trainer. A killed evaluation can be resumed."""

import json
import logging
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from math import nan
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._version import __version__
from ..agent import SearchAgent
from ..credit import first_occurrence, is_near_miss
from ..questions.check import check_columns, check_row
from ..questions.values import as_text
from ..retrieval import Retriever
from ..retrieval.results import check_retriever
from ..rollout.facts import rollout_facts
from ..rollout.log import append_rollouts, rollout_record
from ..rollout.loop import SearchLoop
from ..rollout.tags import TagProtocol
from ..rollout.trajectory import Trajectory
from ..scoring import contains_answer, exact_match, f1_score, search_r1_exact_match, triviaqa_exact_match
from ..support.devices import default_device, get_rng_state, set_rng_state
from .evidence import all_scores, evidence_scores
from .folder import REMEDY, TRAJECTORIES, check_settings, keep_batches, read_records
from .intervals import pass_at_k
from .results import METRICS, EvaluationResults, Scores

logger = logging.getLogger(__name__)
Scorer = Literal["tspo", "search_r1", "triviaqa"]
_EXTRA_METRICS = {"search_r1": "search_r1_em", "triviaqa": "triviaqa_em"}  # of these scorers only
_TOLERATED_FAILURES = 8  # in a batch of any size, so that a few bad questions do not stop an evaluation


class EvaluationStopped(RuntimeError):
    """Too many rollouts of a batch failed. Earlier batches are kept, and the same evaluation resumes after them."""


def evaluate(
    agent: SearchAgent,
    datasets: Mapping[str, Dataset],
    output_dir: str | Path,
    *,
    retrievers: Mapping[str, Retriever] | None = None,
    num_samples: int = 1,
    seed: int = 0,
    scorer: Scorer = "tspo",
    max_failure_rate: float = 0.5,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvaluationResults:
    """
    Evaluate a model on questions with golden answers.

    The rollouts of a batch are written to disk when the batch is finished. If the evaluation is interrupted, call it
    again with the same arguments: it resumes after the finished batches and gives the same results. Batches with failed
    rollouts are repeated. A batch contains questions of similar length. Only scores are kept in memory.

    Args:
        agent ([`SearchAgent`]):
            The agent, with its model, retriever and sampling parameters.
        datasets (`Mapping[str, Dataset]`):
            Data sets by name, with the columns `question` and `golden_answers` (a non-empty list of strings). The
            columns `id` and `prompt` (used instead of the prompt template, as in training) are optional.
        output_dir (`str` or `Path`):
            Folder for `results.json`, and for `NAME/trajectories.jsonl` and `NAME/scores.csv` of each data set.
        retrievers (`Mapping[str, Retriever]`, *optional*):
            Retrievers by name of the data set. Other data sets use the retriever of the agent.
        num_samples (`int`, *optional*, defaults to `1`):
            Number of rollouts for each question, n. Scores are means over these rollouts. With n > 1, pass@k is
            reported too.
        seed (`int`, *optional*, defaults to `0`):
            Seed for sampling.
        scorer (`str`, *optional*, defaults to `"tspo"`):
            `"search_r1"` adds the exact match as Search-R1 computes it, see
            [`~tspo_trl.scoring.search_r1_exact_match`]. `"triviaqa"` adds the exact match of the official evaluation of
            TriviaQA, see [`~tspo_trl.scoring.triviaqa_exact_match`].
        max_failure_rate (`float`, *optional*, defaults to `0.5`):
            The evaluation stops if more than this share of the rollouts of a batch fails, and more than 8 of them.
        about (`Mapping[str, Any]`, *optional*):
            Other settings on which the results depend, for instance the name of the model. They are written to
            `results.json`, and must be the same when the evaluation is resumed.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`EvaluationResults`]: The scores.

    Raises:
        `TypeError`: If an argument has another type.
        `ValueError`: If an argument or a row is invalid, or the folder contains another evaluation; the message lists
            the differences.
        [`EvaluationStopped`]: If too many rollouts of a batch fail.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from tspo_trl import BM25Retriever, SearchAgent, evaluate

    >>> agent = SearchAgent.from_pretrained("my-search-agent", retriever=BM25Retriever.from_jsonl("corpus.jsonl"))
    >>> questions = load_dataset("json", data_files="questions.jsonl", split="train")
    >>> results = evaluate(agent, {"mine": questions}, "runs/evaluation")
    >>> results.summary()["average"]["metrics"]["em"]
    ```
    """
    retrievers, about = {} if retrievers is None else retrievers, {} if about is None else about
    _check_types(agent, datasets, output_dir, retrievers, about)
    _check_numbers(num_samples, seed, max_failure_rate)
    loop = agent.search_loop
    _check_arguments(datasets, scorer, loop)
    for name, retriever in retrievers.items():
        if name not in datasets:
            raise ValueError(f"`retrievers` has the name {name!r}, but `datasets` only {list(datasets)}.")
        check_retriever(retriever)
    common = {
        **about,
        "search": {"protocol": type(loop.protocol).__name__, **asdict(loop.limits)},
        "prompt_template": loop.protocol.prompt_template,
        "num_samples": num_samples,
        "batch_size": agent.batch_size,
        "seed": seed,
        "scorer": scorer,
    }
    # Check all rows and settings before the first rollout
    has_template = agent.config is None or agent.config.prompt_template is not None
    plans = {name: _make_plan(name, dataset, has_template=has_template) for name, dataset in datasets.items()}
    sets = {}
    for name, plan in plans.items():
        retriever = retrievers.get(name, loop.retriever)
        sets[name] = {
            "questions": len(plan.ids),
            "fingerprint": plan.fingerprint,
            "retriever": getattr(retriever, "fingerprint", None) or type(retriever).__name__,
        }
        check_settings(Path(output_dir) / name, {**common, "dataset": sets[name]})

    # Evaluate each data set with its own retriever
    scores = {}
    own = loop.retriever
    try:
        for name, plan in plans.items():
            loop.retriever = retrievers.get(name, own)
            evaluation = _Evaluation(agent, plan, Path(output_dir) / name, num_samples, seed, scorer, max_failure_rate)
            scores[name] = evaluation.run(progress)
    finally:
        loop.retriever = own
    results = EvaluationResults(scores, {**common, "data": sets, "versions": _versions()})
    results.save(output_dir)
    return results


def _check_types(agent: Any, datasets: Any, output_dir: Any, retrievers: Any, about: Any) -> None:
    if not isinstance(agent, SearchAgent):
        raise TypeError(
            "`agent` must be a `SearchAgent`, for instance `SearchAgent.from_pretrained(model, retriever=retriever)`, got "
            f"{agent!r:.200}."
        )
    if not isinstance(datasets, Mapping):
        raise TypeError(
            "`datasets` must be a mapping of names to data sets, for instance `{'mine': dataset}`, got "
            f"`{type(datasets).__name__}`."
        )
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):  # a stream has no order in which its questions can be batched
            hint = " Load it without streaming." if isinstance(dataset, IterableDataset) else ""
            raise TypeError(f"`datasets[{name!r}]` must be a `Dataset`, got `{type(dataset).__name__}`.{hint}")
    if not isinstance(output_dir, (str, Path)) or not str(output_dir):
        raise TypeError(f"`output_dir` must be the path of a folder, got {output_dir!r}.")
    for option, value in (("retrievers", retrievers), ("about", about)):
        if not isinstance(value, Mapping):
            raise TypeError(f"`{option}` must be a mapping with names as keys, got {value!r:.200}.")
    for key, value in about.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`about[{key!r}]` must be a value that JSON can hold, got {value!r:.200} ({error})."
            ) from None


def _check_numbers(num_samples: Any, seed: Any, max_failure_rate: Any) -> None:
    for option, value in (("num_samples", num_samples), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{option}` must be an integer, got {value!r}.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    is_number = isinstance(max_failure_rate, (int, float)) and not isinstance(max_failure_rate, bool)
    if not is_number or not 0 <= max_failure_rate <= 1:
        raise ValueError(f"`max_failure_rate` must be a number from 0 to 1, got {max_failure_rate!r}.")


def _check_arguments(datasets: Mapping[str, Dataset], scorer: str, loop: SearchLoop) -> None:
    if not datasets:
        raise ValueError("`datasets` is empty: give at least one data set.")
    if scorer not in get_args(Scorer):
        raise ValueError(f"`scorer` must be 'tspo', 'search_r1' or 'triviaqa', got {scorer!r}.")
    if scorer == "search_r1" and not isinstance(loop.protocol, TagProtocol):
        raise ValueError("`scorer='search_r1'` reads answers between tags, so it needs the protocol 'tags'.")
    for name in datasets:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.@+-]+", name) or name.startswith("."):
            raise ValueError(
                f"`datasets`: names are used as folder names, so they may contain only letters, digits and '_.@+-' and "
                f"must not begin with '.', got {name!r}."
            )
    if scorer == "search_r1" and "<answer>" not in loop.protocol.prompt_template:
        logger.warning(
            "The scorer of Search-R1 takes the first <answer>…</answer> of a sequence as the example in the prompt. "
            "This prompt template has no such example, so a rollout with one answer scores 0."
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """A data set, and the order of its questions."""

    name: str
    dataset: Dataset
    ids: list[str]
    digests: list[str]
    order: np.ndarray  # (Q,), longest first: a batch that does not fit into memory fails at the start
    fingerprint: str


def _make_plan(name: str, dataset: Dataset, *, has_template: bool) -> _Plan:
    """Read a data set once, checking every row."""
    check_columns(dataset, name)
    columns = [c for c in ("id", "question", "golden_answers", "prompt") if c in dataset.column_names]
    ids, digests, prompts, lengths = [], [], [], []
    for i, row in enumerate(dataset.select_columns(columns)):
        check_row(row, f"`{name}`, row {i}")
        golds, prompt, question = row["golden_answers"], row.get("prompt"), row["question"]
        if prompt is None and not has_template:
            raise ValueError(
                f"`{name}`, row {i}: it has no 'prompt', and none can be written from its question: the model was trained "
                "on prompts of its data set. Set `prompt_template`, a text with '{question}' in it."
            )
        ids.append(as_text(i if row.get("id") is None else row["id"], f"`{name}`, row {i}: 'id' must be a text"))
        digests.append(_hash([question, *golds]))
        prompts.append("" if prompt is None else _hash([json.dumps(prompt)]))
        lengths.append(len(question if prompt is None else str(prompt)))
    order = np.argsort(-np.array(lengths), kind="stable")
    return _Plan(name, dataset, ids, digests, order, _hash([*ids, *digests, *prompts]))


def _hash(texts: Sequence[str]) -> str:
    state = sha256()
    for text in texts:
        data = text.encode(errors="backslashreplace")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()[:16]


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "datasets", "numpy")
    return {"tspo_trl": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


class _Evaluation:
    """The evaluation of one data set. The plan fixes the batches, so that only missing ones run after a resume."""

    def __init__(
        self,
        agent: SearchAgent,
        plan: _Plan,
        folder: Path,
        num_samples: int,
        seed: int,
        scorer: Scorer,
        max_failure_rate: float,
    ):
        self.loop: SearchLoop = agent.search_loop
        self.plan = plan
        self.path = folder / TRAJECTORIES
        self.num_samples = num_samples
        self.seed = seed
        self.max_failure_rate = max_failure_rate
        others = {metric for name, metric in _EXTRA_METRICS.items() if name != scorer}
        self.metrics = [name for name in METRICS if name not in others]
        size = max(1, agent.batch_size // num_samples)
        self.batches = [plan.order[i : i + size] for i in range(0, len(plan.order), size)]
        # Only these numbers of a rollout are kept in memory
        self.values = np.full((len(plan.ids), num_samples, len(self.metrics)), np.nan)
        self.failed = np.zeros((len(plan.ids), num_samples), dtype=bool)

    def run(self, progress: bool) -> Scores:
        """Roll out and score the batches that are not in the file yet, and return the scores of all questions."""
        done = self._restore()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("questions, EM {task.fields[em]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        with bar:
            task = bar.add_task(self.plan.name, total=len(self.plan.ids), em="-")
            for number, questions in enumerate(self.batches):
                if number not in done:
                    self._roll_out(number, questions)
                em = np.nanmean(self.values[:, :, self.metrics.index("em")])
                bar.update(task, advance=len(questions), em=f"{em:.3f}")
        return self._scores()

    def _roll_out(self, number: int, questions: np.ndarray) -> None:
        """Roll out a batch, score its rollouts and write them to the file."""
        # Roll out all samples of all questions
        rows = [self.plan.dataset[int(i)] for i in questions]
        protocol = self.loop.protocol
        prompts = [p if (p := row.get("prompt")) is not None else protocol.prompt(row["question"]) for row in rows]
        prompt_ids = [ids for prompt in prompts for ids in protocol.encode_prompts([prompt]) * self.num_samples]
        with _seeded(self.seed + number):
            trajectories, stats = self.loop.run(prompt_ids)
        # Score every rollout
        errors: Mapping[int, str] = getattr(self.loop.engine, "failures", {})
        records = []
        for place, trajectory in enumerate(trajectories):
            question, sample = int(questions[place // self.num_samples]), place % self.num_samples
            failure = (
                "generation" if place in errors else "retrieval" if trajectory.status == "retrieval_failed" else None
            )
            row = rows[place // self.num_samples]
            record = self._record(trajectory, row, failure, number=question, sample=sample)
            records.append(record | {"batch": number, "failure": failure})
            self.values[question, sample] = [record["scores"][name] for name in self.metrics]
            self.failed[question, sample] = failure is not None
        # Stop without writing the batch if too many rollouts failed
        failures = Counter(record["failure"] for record in records if record["failure"])
        if failures.total() > max(self.max_failure_rate * len(records), _TOLERATED_FAILURES):
            known = int((~np.isnan(self.values[:, 0, 0])).sum()) - len(rows)
            by_endpoint = failures["generation"] >= failures["retrieval"]
            source = self.loop.engine if by_endpoint else self.loop.retriever
            last = list(errors.values())[-1] if by_endpoint else repr(stats.error)
            raise EvaluationStopped(
                f"{failures.total()} of {len(records)} rollouts of a batch of {self.plan.name!r} failed, more than "
                f"`max_failure_rate` ({self.max_failure_rate}) allows. The failing component is {source!r}; "
                f"its last failure: {last} The results of {known} of {len(self.plan.ids)} questions are in "
                f"{self.path}. Run the same evaluation again to resume from there."
            )
        append_rollouts(self.path, records)

    def _record(
        self, trajectory: Trajectory, row: Mapping[str, Any], failure: str | None, *, number: int, sample: int
    ) -> dict[str, Any]:
        """The record of a rollout, in the format of training, with its scores."""
        golds = row["golden_answers"]
        occurrence = first_occurrence(trajectory.passage_texts, golds)
        facts = rollout_facts(trajectory, occurrence, None)
        em = exact_match(trajectory.answer, golds)
        outcome = nan if failure else em
        scores = {
            "em": em,
            "f1": f1_score(trajectory.answer, golds),
            "contains": float(contains_answer(trajectory.answer, golds)),
            "hit": float(occurrence is not None),
            "near_miss": float(is_near_miss(outcome, occurrence)),
            "searches": facts.searches,
            **evidence_scores(trajectory, golds, em),
            "invalid": facts.invalid,
            "truncated": facts.truncated,
            "retrieval_failed": float(failure == "retrieval"),
            "generation_failed": float(failure == "generation"),
            "tokens": sum(len(turn.token_ids) for turn in trajectory.turns),
            "observation_tokens": sum(len(turn.observation_ids) for turn in trajectory.turns),
        }
        if "search_r1_em" in self.metrics:
            text = self.loop.protocol.tokenizer.decode(trajectory.prompt_ids + trajectory.completion_ids)
            scores["search_r1_em"] = search_r1_exact_match(str(text), golds) if failure is None else 0.0
        if "triviaqa_em" in self.metrics:
            scores["triviaqa_em"] = triviaqa_exact_match(trajectory.answer, golds)
        none = [nan] * len(trajectory.turns)
        record = rollout_record(
            trajectory,
            row,
            [outcome],
            outcome,
            facts,
            none,
            none,
            reward_names=["exact_match"],
            step=0,
            group=number,
            rollout=sample,
        )
        return {"id": self.plan.ids[number], **record, "scores": scores}

    def _restore(self) -> set[int]:
        """Read the complete batches without failures; remove all other lines from the file."""
        lines: Counter[int] = Counter()
        failed: set[int] = set()
        for where, record in read_records(self.path):
            try:
                batch, question, sample = record["batch"], record["group"], record["rollout"]
                found = all_scores(record)
                scores = [found[name] for name in self.metrics]
                if batch not in range(len(self.batches)) or question not in self.batches[batch]:
                    raise ValueError("it belongs to no batch of this evaluation")
                self.values[question, sample] = scores
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{where}: not a rollout of this evaluation ({error!r}). {REMEDY}") from error
            lines[batch] += 1
            if record["failure"]:
                failed.add(batch)
        whole = {n for n, batch in enumerate(self.batches) if lines[n] == len(batch) * self.num_samples} - failed
        for n, batch in enumerate(self.batches):
            if n not in whole:
                self.values[batch] = np.nan
        keep_batches(self.path, whole)
        return whole

    def _scores(self) -> Scores:
        means = self.values.mean(axis=1)
        values = {name: means[:, i] for i, name in enumerate(self.metrics)}
        correct = self.values[:, :, self.metrics.index("em")].astype(int).sum(axis=1)
        k = 2
        while k < 2 * self.num_samples:
            k = min(k, self.num_samples)
            values[f"pass@{k}"] = pass_at_k(correct, self.num_samples, k)
            k *= 2
        return Scores(self.plan.ids, self.plan.digests, np.any(self.failed, axis=1), values, self.num_samples)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Sample from a separate random state, so that a batch does not depend on earlier ones."""
    device = default_device()
    states = get_rng_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(device, states)
