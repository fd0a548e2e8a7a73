"""The results of an evaluation: scores of questions, means with intervals, comparisons, and their files."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..support.files import replace_file
from .intervals import LEVEL, RESAMPLES, Floats, bootstrap_means, interval, mcnemar_test, permutation_test

FORMAT_VERSION = 1  # of results.json and scores.csv
RESULTS, SCORES = "results.json", "scores.csv"
SEED = 0  # of intervals and tests
AVERAGE = "average"

#: The metrics of a rollout, with the number of decimals that tables show.
METRICS = {
    "em": 3,
    "search_r1_em": 3,
    "triviaqa_em": 3,
    "f1": 3,
    "contains": 3,
    "hit": 3,
    "near_miss": 3,
    "searches": 2,
    "evidence": 2,
    "after_evidence": 2,
    "from_memory": 3,
    "unsupported": 3,
    "invalid": 3,
    "truncated": 3,
    "retrieval_failed": 3,
    "generation_failed": 3,
    "tokens": 1,
    "observation_tokens": 1,
}
#: Metrics that are 0 or 1 for a rollout.
EXACT_MATCHES = ("em", "search_r1_em", "triviaqa_em")
_COMPARED = (
    *EXACT_MATCHES,
    *("f1", "contains", "hit", "near_miss", "from_memory", "unsupported"),
    *("searches", "evidence", "after_evidence", "tokens"),
)


@dataclass(frozen=True, slots=True)
class Scores:
    """
    The scores of the questions of a data set.

    Args:
        ids (`list[str]`):
            The Q ids of the questions.
        digests (`list[str]`):
            Q short hashes of question and golden answers, which show whether two evaluations used the same questions.
        failed (`np.ndarray`):
            Shape (Q,), booleans: whether any rollout of the question failed.
        values (`dict[str, np.ndarray]`):
            Arrays of shape (Q,): the metrics of `METRICS`, averaged over the samples of a question, and with n > 1
            samples also `"pass@k"` for k = 2, 4, 8… and n.
        num_samples (`int`, *optional*, defaults to `1`):
            Number of rollouts for each question, n.
    """

    ids: list[str]
    digests: list[str]
    failed: np.ndarray
    values: dict[str, Floats]
    num_samples: int = 1

    def save(self, path: str | Path) -> None:
        """
        Write a CSV file with one line for each question.

        Args:
            path (`str` or `Path`):
                The file.
        """
        text = StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["id", "digest", "num_samples", "failed", *self.values])
        columns = [column.tolist() for column in self.values.values()]
        samples = [self.num_samples] * len(self.ids)
        writer.writerows(zip(self.ids, self.digests, samples, self.failed.astype(int).tolist(), *columns, strict=True))
        replace_file(path, text.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """
        Read a file that [`Scores.save`] wrote.

        Args:
            path (`str` or `Path`):
                The file.

        Raises:
            `ValueError`: If the file has another format.
        """
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header, rows = next(reader, []), list(reader)
        if header[:4] != ["id", "digest", "num_samples", "failed"] or not rows:
            raise ValueError(f"{path} does not hold the scores of an evaluation; its first line is {header}.")
        try:
            ids, digests, samples, failed, *columns = zip(*rows, strict=True)
            values = {name: np.array(column, dtype=float) for name, column in zip(header[4:], columns, strict=True)}
            return cls(list(ids), list(digests), np.array(failed, dtype=int) > 0, values, int(samples[0]))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}). Run the evaluation again to rewrite it.") from error


@dataclass(frozen=True, slots=True)
class EvaluationResults:
    """
    The results of an evaluation of a model.

    Args:
        scores (`dict[str, Scores]`):
            The scores by name of the data set.
        about (`dict[str, Any]`, *optional*):
            A description of the evaluation: model, data and settings.
    """

    scores: dict[str, Scores]
    about: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """
        The means of all metrics with their 95 % bootstrap intervals over questions: those of each data set under
        `"datasets"`, and their unweighted mean over data sets under `"average"`.
        """
        names: list[str] = []  # of the metrics that all data sets have
        for scores in self.scores.values():
            names = [name for name in scores.values if not names or name in names]
        datasets, means, resampled = {}, [], []
        for name, scores in self.scores.items():
            matrix = np.stack(list(scores.values.values()), axis=1)
            bootstrapped = bootstrap_means(matrix, seed=_seed(name))
            datasets[name] = {
                "questions": len(scores.ids),
                "metrics": _with_intervals(scores.values, matrix.mean(axis=0), bootstrapped),
            }
            shared = [list(scores.values).index(metric) for metric in names]
            means.append(matrix.mean(axis=0)[shared])
            resampled.append(bootstrapped[:, shared])
        average = _with_intervals(names, np.mean(means, axis=0), np.mean(resampled, axis=0))
        return {"datasets": datasets, AVERAGE: {"metrics": average}}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """
        Write `results.json`, and `NAME/scores.csv` for each data set.

        Args:
            folder (`str` or `Path`):
                The folder to write to.

        Returns:
            `dict`: The content of `results.json`.
        """
        folder = Path(folder)
        bootstrap = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "method": "percentile, over questions"}
        data = {"format_version": FORMAT_VERSION, **self.about, "intervals": bootstrap, **self.summary()}
        for name, scores in self.scores.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            scores.save(folder / name / SCORES)
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / RESULTS, text)
        return data

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResults":
        """
        Read the files that [`EvaluationResults.save`] wrote.

        Args:
            path (`str` or `Path`):
                The folder, or the `results.json` in it.

        Raises:
            `FileNotFoundError`: If there is no `results.json`, for instance because the evaluation has not finished.
            `ValueError`: If a file has another format.
        """
        file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
        if not file.is_file():
            below = sorted(str(found.parent) for found in Path(path).glob(f"*/{RESULTS}"))
            hint = f"Did you mean one of {below}?" if below else "An evaluation writes it when it has finished."
            raise FileNotFoundError(f"There is no {RESULTS} in {str(path)!r}. {hint}")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            names = list(data["datasets"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file} is not the result of an evaluation ({error!r}).") from error
        about = {k: v for k, v in data.items() if k not in ("datasets", AVERAGE, "intervals", "format_version")}
        return cls({name: Scores.load(file.parent / name / SCORES) for name in names}, about)


def _seed(name: str) -> int:
    return SEED + crc32(name.encode())  # the seed of a data set does not depend on the other data sets


def _with_intervals(names: Iterable[str], means: Floats, resampled: Floats) -> dict[str, dict[str, float]]:
    bounds = interval(resampled)
    return {
        name: {"mean": float(mean), "low": float(low), "high": float(high)}
        for name, mean, (low, high) in zip(names, means, bounds, strict=True)
    }


def compare_results(first: EvaluationResults, second: EvaluationResults) -> dict[str, Any]:
    """
    Compare two evaluations on their shared questions: those with the same id in data sets with the same name. Questions
    with a failed rollout in either evaluation are excluded.

    Args:
        first ([`EvaluationResults`]):
            The reference, for instance the results of the base model.
        second ([`EvaluationResults`]):
            The results to compare with it.

    Returns:
        `dict`: An entry for each shared data set, and one for their average if there are several. It has the number of
        `questions`, the number of failed questions `left_out`, the metrics `absent` from one of the evaluations (of an
        earlier version, or with another scorer), and `metrics`. For each metric, these are the means `first` and `second`,
        their `difference` (second − first) with the bounds `low` and `high` of its paired bootstrap interval, and the `p`
        value of a `test`: `"McNemar, exact"` if all scores are 0 or 1 (exact match with one rollout for each question),
        else `"permutation"`.

    Raises:
        `ValueError`: If the evaluations share no questions, or have different questions with the same id.
    """
    shared = [name for name in first.scores if name in second.scores]
    if not shared:
        raise ValueError(
            f"The evaluations share no data set: the first has {sorted(first.scores)}, the second "
            f"{sorted(second.scores)}."
        )
    comparison: dict[str, Any] = {}
    differences: dict[str, dict[str, Floats]] = {}
    for name in shared:
        # The shared questions that did not fail
        a, b = first.scores[name], second.scores[name]
        rows, columns = _pair(a, b, name)
        whole = ~(a.failed[rows] | b.failed[columns])
        rows, columns = rows[whole], columns[whole]
        if not len(rows):
            raise ValueError(f"All questions that both evaluations of {name!r} share have failed in one of them.")
        # Paired differences, with their intervals and tests
        pairs = {
            metric: (a.values[metric][rows], b.values[metric][columns])
            for metric in (*_COMPARED, *_pass_metrics([a]))
            if metric in a.values and metric in b.values
        }
        differences[name] = {metric: y - x for metric, (x, y) in pairs.items()}
        resampled = bootstrap_means(np.stack(list(differences[name].values()), axis=1), seed=_seed(name))
        metrics = {}
        for (metric, (x, y)), (low, high) in zip(pairs.items(), interval(resampled), strict=True):
            test, p = _significance(metric, x, y, _seed(name))
            values = {"first": x.mean(), "second": y.mean(), "difference": (y - x).mean(), "low": low, "high": high}
            metrics[metric] = {k: float(v) for k, v in values.items()} | {"p": p, "test": test}
        entry = {"questions": len(rows), "left_out": int((~whole).sum()), "metrics": metrics}
        absent = [metric for metric in _COMPARED if (metric in a.values) != (metric in b.values)]
        comparison[name] = entry | {"absent": absent}
    if len(shared) > 1:
        comparison[AVERAGE] = _average(comparison, differences)
    return comparison


def _average(comparison: Mapping[str, Any], differences: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """The comparison of the unweighted means over data sets."""
    names = [m for m in next(iter(differences.values())) if all(m in of_dataset for of_dataset in differences.values())]
    resampled = [
        bootstrap_means(np.stack([of_dataset[metric] for metric in names], axis=1), seed=_seed(name))
        for name, of_dataset in differences.items()
    ]
    metrics = {}
    for metric, (low, high) in zip(names, interval(np.mean(resampled, axis=0)), strict=True):
        entries = [entry["metrics"][metric] for entry in comparison.values()]
        means = {key: float(np.mean([entry[key] for entry in entries])) for key in ("first", "second", "difference")}
        weighted = np.concatenate([of_dataset[metric] / len(of_dataset[metric]) for of_dataset in differences.values()])
        p = permutation_test(weighted, seed=SEED)
        metrics[metric] = means | {"low": float(low), "high": float(high), "p": p, "test": "permutation"}
    totals = {key: sum(entry[key] for entry in comparison.values()) for key in ("questions", "left_out")}
    return {**totals, "metrics": metrics}


def _pair(a: Scores, b: Scores, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the shared questions in both evaluations."""
    places = {key: i for i, key in enumerate(_keys(b.ids))}
    pairs = [(i, places[key]) for i, key in enumerate(_keys(a.ids)) if key in places]
    if not pairs:
        raise ValueError(
            f"The two evaluations of {name!r} share no question: their ids look like {a.ids[0]!r} and {b.ids[0]!r}."
        )
    for i, j in pairs:
        if a.digests[i] != b.digests[j]:
            raise ValueError(
                f"The two evaluations of {name!r} cannot be compared: they have different questions or golden answers "
                f"with the id {a.ids[i]!r}."
            )
    rows, columns = zip(*pairs, strict=True)
    return np.array(rows), np.array(columns)


def _keys(ids: Sequence[str]) -> list[tuple[str, int]]:
    """Ids with their number of earlier occurrences, so that repeated ids are paired in order."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _significance(metric: str, first: Floats, second: Floats, seed: int) -> tuple[str, float]:
    if metric in EXACT_MATCHES and np.isin([first, second], (0.0, 1.0)).all():
        return "McNemar, exact", mcnemar_test(int((first > second).sum()), int((second > first).sum()))
    return "permutation", permutation_test(second - first, seed=seed)


def _pass_metrics(scores: Iterable[Scores]) -> list[str]:
    return list(dict.fromkeys(name for s in scores for name in s.values if name.startswith("pass@")))
