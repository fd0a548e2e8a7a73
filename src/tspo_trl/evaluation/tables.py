"""Markdown tables of evaluations and comparisons, also readable in a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..support.markdown import markdown_table
from .results import AVERAGE, METRICS

_TABLES = {
    "Answers": ("em", "search_r1_em", "triviaqa_em", "f1", "contains"),
    "Searches": ("hit", "near_miss", "searches", "retrieval_failed"),
    "Evidence": ("evidence", "after_evidence", "from_memory", "unsupported"),
    "Turns": ("invalid", "truncated", "tokens", "generation_failed"),
}
_TITLES = {
    "em": "EM",
    "search_r1_em": "EM (Search-R1)",
    "triviaqa_em": "EM (TriviaQA)",
    "f1": "F1",
    "contains": "contained",
    "hit": "hit",
    "near_miss": "near miss",
    "searches": "searches",
    "evidence": "with evidence",
    "after_evidence": "after evidence",
    "from_memory": "from memory",
    "unsupported": "unsupported",
    "invalid": "invalid",
    "truncated": "truncated",
    "retrieval_failed": "failed retrieval",
    "generation_failed": "failed endpoint",
    "tokens": "tokens",
}


def results_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Write tables of the results of one or several models.

    Args:
        summaries (`Mapping[str, Mapping]`):
            [`EvaluationResults.summary`] by name of the model.

    Returns:
        `str`: Four Markdown tables: answers, searches, evidence and turns. Each cell has a mean with its 95 % interval.
    """
    rows = []  # (data set, model, metrics)
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary["datasets"]))
    for name in names:
        for model, summary in summaries.items():
            if name in summary["datasets"]:
                entry = summary["datasets"][name]
                rows.append((f"{name} ({entry['questions']})", model, entry["metrics"]))
    if len(names) > 1:
        rows += [(f"**{AVERAGE}**", model, summary[AVERAGE]["metrics"]) for model, summary in summaries.items()]

    parts = []
    for title, metrics in _TABLES.items():
        shown = [metric for metric in metrics if any(metric in values for _, _, values in rows)]
        if not shown:  # evaluations of earlier versions
            continue
        if not any(values.get("generation_failed", {}).get("mean") for _, _, values in rows):
            shown = [metric for metric in shown if metric != "generation_failed"]
        if title == "Answers":
            shown += _largest_pass_at_k(values for _, _, values in rows)
        header = ["data set (questions)", "model", *(_TITLES.get(metric, metric) for metric in shown)]
        cells = [
            [name, model, *(_cell(metric, values.get(metric)) for metric in shown)] for name, model, values in rows
        ]
        left = 2
        if len(summaries) == 1:  # omit the column of its name
            header, cells, left = [header[0], *header[2:]], [[row[0], *row[2:]] for row in cells], 1
        parts.append(f"{title}:\n\n{markdown_table(header, cells, left=left)}")
    return "\n\n".join(parts)


def comparison_table(comparison: Mapping[str, Any], first: str, second: str) -> str:
    """
    Write a table that compares two models.

    Args:
        comparison (`Mapping[str, Any]`):
            The result of [`compare_results`].
        first (`str`):
            The name of the first model.
        second (`str`):
            The name of the second model.

    Returns:
        `str`: A Markdown table, and notes on the tests.
    """
    rows = []
    for name, entry in comparison.items():
        label = f"**{AVERAGE}**" if name == AVERAGE else f"{name} ({entry['questions']})"
        for metric, values in entry["metrics"].items():
            digits = METRICS.get(metric, 3)
            difference = f"{values['difference']:+.{digits}f} {_bounds(values, digits, '+')}"
            means = [f"{values[key]:.{digits}f}" for key in ("first", "second")]
            mark = "*" if values["test"] == "permutation" else ""
            rows.append([label, _TITLES.get(metric, metric), *means, difference, _p(values["p"]) + mark])
            label = ""
    text = markdown_table(["data set (questions)", "", first, second, "difference", "p"], rows, left=2)
    notes = [
        "difference: with its paired bootstrap interval (95 %). p: two-sided, McNemar's exact test, with * a paired "
        "permutation test; one comparison each, not corrected for their number."
    ]
    if left_out := max(entry["left_out"] for entry in comparison.values()):
        notes.append(f"{left_out} questions that failed in one of the evaluations are excluded.")
    if absent := dict.fromkeys(metric for entry in comparison.values() for metric in entry.get("absent", ())):
        titles = ", ".join(_TITLES.get(metric, metric) for metric in absent)
        notes.append(f"Only one of the evaluations has: {titles}.")
    return f"{text}\n\n{' '.join(notes)}"


def _cell(metric: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    digits = METRICS.get(metric, 3)
    return f"{value['mean']:.{digits}f} {_bounds(value, digits)}"


def _bounds(value: Mapping[str, float], digits: int, sign: str = "") -> str:
    return f"[{value['low']:{sign}.{digits}f}, {value['high']:{sign}.{digits}f}]"


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _largest_pass_at_k(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    passes = {name for values in metrics for name in values if name.startswith("pass@")}
    return sorted(passes, key=lambda name: int(name.removeprefix("pass@")))[-1:]
