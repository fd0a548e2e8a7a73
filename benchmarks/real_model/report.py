"""Tables and pictures of models that answered the same held-out questions. Pure functions of records, see [`make_record`]."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.analysis import WINDOW, mean_interval, running_mean
from benchmarks.study.cells import CURVES
from benchmarks.study.pictures import COLORS
from tspo_trl import EvaluationResults, compare_results
from tspo_trl.evaluation.results import METRICS, Scores
from tspo_trl.support.markdown import markdown_table

Record = Mapping[str, Any]

BASE, COLD_START = "base", "cold_start"
GRPO = "grpo"
TITLES = {BASE: "base", COLD_START: "cold start", GRPO: "GRPO", "tspo": "TSPO as published", "default": "default"}
GREEDY = {  # metric of the greedy evaluation -> row of the table
    "em": "exact match",
    "f1": "F1",
    "contains": "answer contains a gold",
    "hit": "answer found",
    "searches": "searches",
}
SAMPLED_EM = "pass@1"  # the mean over all samples
#: Short name -> the logged metric that is kept of every step.
STEPS = CURVES | {"f1": "rewards/f1_reward/mean", "seconds": "step_time", "generate": "time/generate"}
DRAWN = {"em": "exact match", "f1": "F1", "hit": "answer found", "searches": "searches"}


def make_record(
    model: str,
    seed: int | None,
    greedy: Scores,
    sampled: Scores,
    single_hop: Sequence[bool],
    history: Sequence[Mapping[str, Any]] = (),
    **about: Any,
) -> dict[str, Any]:
    """
    Describe what a model did, as plain data.

    Args:
        model (`str`):
            `"base"`, `"cold_start"` or the name of a credit.
        seed (`int`, *optional*):
            The seed of the training, `None` for a model that is not trained by its rollouts.
        greedy ([`Scores`]):
            The scores of Q questions with one greedy rollout each.
        sampled ([`Scores`]):
            The scores of the same questions with n sampled rollouts each.
        single_hop (`Sequence[bool]`):
            For each question, whether one search for it finds a golden answer.
        history (`Sequence[Mapping]`, *optional*, defaults to `()`):
            The logs of the training.
        about:
            What else to keep, for instance the settings.
    """
    num_samples = sampled.num_samples
    scores = {name: greedy.values[name] for name in GREEDY}
    scores |= {SAMPLED_EM: sampled.values["em"], f"pass@{num_samples}": sampled.values[f"pass@{num_samples}"]}
    steps = [entry for entry in history if "reward" in entry]
    return {
        "model": model,
        "seed": seed,
        **about,
        "num_samples": num_samples,
        "single_hop": [int(single) for single in single_hop],
        "scores": {name: [round(float(value), 4) for value in values] for name, values in scores.items()},
        "steps": len(steps),
        "curves": {
            name: [None if (value := entry.get(key)) is None else round(value, 4) for entry in steps]
            for name, key in STEPS.items()
        },
    }


def check_same(records: Sequence[Record]) -> None:
    """
    Refuse records that cannot be compared.

    Args:
        records (`Sequence[Mapping]`):
            The records.

    Raises:
        `ValueError`: If there are none, two were made with different settings or questions, or two runs with one seed continue
            different cold starts.
    """
    if not records:
        raise ValueError("There are no results yet: run `python -m benchmarks.real_model` first.")
    first = records[0]
    for record in records[1:]:
        for name in ("settings", "num_samples", "single_hop"):
            if record.get(name) != first.get(name):
                raise ValueError(
                    f"The results of {_name(record)} cannot be compared with those of {_name(first)}: their {name!r} differ, "
                    f"{record.get(name)!r} and {first.get(name)!r}."
                )
    of_seed: dict[int, Record] = {}
    for record in records:
        if record["seed"] is not None:
            other = of_seed.setdefault(record["seed"], record)
            if record.get("cold_start") != other.get("cold_start"):
                raise ValueError(
                    f"{_name(record)} and {_name(other)} continue different cold starts. The credits of a seed are compared, so "
                    "run all of them in one folder, or choose a seed that has no results yet."
                )


def _name(record: Record) -> str:
    return record["model"] if record["seed"] is None else f"{record['model']} with seed {record['seed']}"


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """
    The records of each model, sorted by seed.

    Args:
        records (`Sequence[Mapping]`):
            The records.
    """
    return {
        model: sorted(found, key=lambda record: record["seed"] or 0)
        for model in TITLES
        if (found := [record for record in records if record["model"] == model])
    }


def mean_scores(records: Sequence[Record], chosen: Sequence[bool]) -> Scores:
    """
    The scores of some questions, averaged over the records of a model.

    Args:
        records (`Sequence[Mapping]`):
            The records, which differ in their seed.
        chosen (`Sequence[bool]`):
            The questions.
    """
    places = np.flatnonzero(np.asarray(chosen))
    names = records[0]["scores"]
    values = {name: np.mean([record["scores"][name] for record in records], axis=0)[places] for name in names}
    ids = [str(place) for place in places]
    return Scores(ids, ids, np.zeros(len(ids), dtype=bool), values, records[0]["num_samples"])


def table(
    records: Sequence[Record],
    pairs: Sequence[tuple[str, str]],
    chosen: Sequence[bool],
    titles: Mapping[str, str] = TITLES,
) -> str:
    """
    A table of models on some questions: means with 95 % bootstrap intervals over questions, and paired differences.

    Args:
        records (`Sequence[Mapping]`):
            The records. Those of a model are averaged over its seeds.
        pairs (`Sequence[tuple[str, str]]`):
            Models to compare: the second minus the first.
        chosen (`Sequence[bool]`):
            The questions.
        titles (`Mapping[str, str]`, *optional*):
            The names of the models in the table.
    """
    results = {model: EvaluationResults({"": mean_scores(of, chosen)}) for model, of in by_model(records).items()}
    columns = {titles[model]: result.summary()["datasets"][""]["metrics"] for model, result in results.items()}
    for first, second in pairs:
        compared = compare_results(results[first], results[second])[""]["metrics"]
        columns[f"{titles[second]} − {titles[first]}"] = {
            name: {"mean": entry["difference"], **entry} for name, entry in compared.items()
        }
    number = records[0]["num_samples"]
    shown = {**GREEDY, SAMPLED_EM: f"exact match of {number} samples"}
    rows = [
        [title, *(_cell(name, of[name], "−" in column) for column, of in columns.items())]
        for name, title in shown.items()
    ]
    # A group is all wrong if none of its samples is correct
    wrong = {
        column: {key: ("−" not in column) - of[f"pass@{number}"][value] for key, value in _REVERSED.items()}
        for column, of in columns.items()
    }
    rows.append([f"groups of {number} all wrong", *(_cell("em", of, "−" in column) for column, of in wrong.items())])
    return markdown_table(["", *columns], rows)


_REVERSED = {"mean": "mean", "low": "high", "high": "low"}


def _cell(metric: str, value: Mapping[str, float], signed: bool = False) -> str:
    form = f"{'+' if signed else ''}.{METRICS.get(metric, 3)}f"
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def tables(records: Sequence[Record], pairs: Sequence[tuple[str, str]], titles: Mapping[str, str] = TITLES) -> str:
    """
    The tables of all questions and of those that one search answers.

    Args:
        records (`Sequence[Mapping]`):
            The records, see [`check_same`].
        pairs (`Sequence[tuple[str, str]]`):
            Models to compare: the second minus the first.
        titles (`Mapping[str, str]`, *optional*):
            The names of the models in the tables.
    """
    single = [flag == 1 for flag in records[0]["single_hop"]]
    parts = [f"All {len(single)} held-out questions:", table(records, pairs, [True] * len(single), titles)]
    if any(single):
        title = f"The {sum(single)} of them for which one search for the question finds a golden answer:"
        parts += [title, table(records, pairs, single, titles)]
    notes = "[…]: 95 % bootstrap interval over questions, paired for differences. Rows without a number of samples are greedy."
    return "\n\n".join([*parts, notes])


def pairs_of(records: Sequence[Record]) -> list[tuple[str, str]]:
    """
    The models to compare: each credit with the cold start, and with GRPO.

    Args:
        records (`Sequence[Mapping]`):
            The records.
    """
    models = by_model(records)
    trained = [model for model in models if model not in (BASE, COLD_START)]
    before = [(COLD_START, model) for model in trained if COLD_START in models]
    return before + [(GRPO, model) for model in trained if GRPO in models and model != GRPO]


def steps_table(records: Sequence[Record]) -> str:
    """
    A table of the training steps: means over the steps of each credit, with 95 % t intervals over seeds.

    Args:
        records (`Sequence[Mapping]`):
            The records.
    """
    header = [
        "",
        "seeds",
        "exact match",
        "minus GRPO",
        "better",
        "answer found",
        "all wrong",
        "rescued",
        "s/step",
        "of which generation",
        "minutes",
    ]
    trained = {model: of for model, of in by_model(records).items() if of[0]["steps"]}
    of_grpo = {record["seed"]: mean_of_steps(record, "em") for record in trained.get(GRPO, ())}
    rows = []
    for model, of in trained.items():
        means = {name: [mean_of_steps(record, name) for record in of] for name in STEPS}
        pairs = [
            (em, of_grpo[record["seed"]])
            for em, record in zip(means["em"], of, strict=True)
            if record["seed"] in of_grpo
        ]
        differences = [ours - theirs for ours, theirs in pairs] if model != GRPO else []
        rows.append(
            [
                TITLES[model],
                len(of),
                _over_seeds(means["em"]),
                _over_seeds(differences, signed=True) if differences else "",
                f"{sum(d > 0 for d in differences)}/{len(differences)}" if differences else "",
                *(_over_seeds(means[name]) for name in ("hit", "all_wrong", "rescued")),
                *(f"{np.mean(means[name]):.1f}" for name in ("seconds", "generate")),
                f"{np.mean([sum(record['curves']['seconds']) / 60 for record in of]):.1f}",
            ]
        )
    return markdown_table(header, rows)


def mean_of_steps(record: Record, name: str) -> float:
    """
    The mean of a metric over the steps of a run.

    Args:
        record (`Mapping`):
            The record of the run.
        name (`str`):
            Key of `STEPS`.
    """
    return float(np.mean([value for value in record["curves"][name] if value is not None] or [np.nan]))


def _over_seeds(values: Sequence[float], *, signed: bool = False) -> str:
    mean, low, high = mean_interval(values)
    form = "+.3f" if signed else ".3f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def markdown(records: Sequence[Record]) -> str:
    """
    All tables of a comparison of credits.

    Args:
        records (`Sequence[Mapping]`):
            The records.

    Raises:
        `ValueError`: If they cannot be compared.
    """
    check_same(records)
    parts = [tables(records, pairs_of(records))]
    if any(record["steps"] for record in records):
        parts += ["The rollouts of training, mean of all steps, […]: 95 % t interval over seeds:", steps_table(records)]
    return "\n\n".join(parts) + "\n"


def draw(records: Sequence[Record], path: Path) -> None:
    """
    Draw what the rollouts of training reach, against steps and against minutes: a thin line for each run, and a thick line
    for the mean of a credit.

    Args:
        records (`Sequence[Mapping]`):
            The records.
        path (`Path`):
            The picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(DRAWN), figsize=(13, 6), sharex="row", sharey="col", layout="constrained")
    colors = {**COLORS, "default": COLORS["chance"]}
    for model, of in by_model(records).items():
        runs = [record for record in of if record["steps"]]
        for column, name in enumerate(DRAWN if runs else ()):
            for row in (0, 1):
                lines = [(_times(run, minutes=row == 1), running_mean(run["curves"][name])) for run in runs]
                for x, y in lines:
                    axes[row, column].plot(x, y, color=colors[model], linewidth=0.7, alpha=0.4)
                shortest = min(len(x) for x, _ in lines)
                mean = [np.mean([line[i][:shortest] for line in lines], axis=0) for i in (0, 1)]
                label = f"{TITLES[model]} ({len(runs)})"
                axes[row, column].plot(*mean, color=colors[model], linewidth=2.2, label=label)
    for axis, title in zip(axes[0], DRAWN.values(), strict=True):
        axis.set_title(title)
    for row, label in zip(axes, ("step", "minutes of training"), strict=True):
        row[0].set_ylabel(f"running mean of {WINDOW} steps")
        for axis in row:
            axis.set_xlabel(label)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=max(1, len(labels)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _times(record: Record, *, minutes: bool) -> np.ndarray:
    """The steps of a run, or the minutes after each of them."""
    if minutes:
        return np.cumsum(record["curves"]["seconds"]) / 60
    return np.arange(1, record["steps"] + 1)
