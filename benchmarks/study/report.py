"""Report the results as Markdown tables, with every arm and every regime that was run."""

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from .analysis import (
    LEVEL,
    Cell,
    Summary,
    behind,
    half_of_the_error,
    mean_curve,
    mean_interval,
    mean_of_regimes,
    steps_ratio,
    summarize,
)
from .arms import ARMS, DEFAULT, GRPO, TSPO
from .regimes import ALL_REGIMES

MARGIN = 0.02  # of the mean exact match, by which the default may be behind GRPO

Results = Mapping[str, Mapping[str, Mapping[int, Cell]]]  # regime -> arm -> seed -> cell


def arrange(cells: Sequence[Cell]) -> Results:
    """
    Arrange cells by regime, arm and seed, in the order of the tables. An arm with `same_as` gets the cells of that arm.

    Args:
        cells (`Sequence[Mapping]`):
            The content of the cells' files.
    """
    results: dict[str, dict[str, dict[int, Cell]]] = {}
    ran = {cell["arm"] for cell in cells}
    for name in ALL_REGIMES:
        arms = {
            arm: {
                c["seed"]: c for c in sorted(cells, key=lambda c: c["seed"]) if (c["regime"], c["arm"]) == (name, arm)
            }
            for arm in ARMS
        }
        for arm, settings in ARMS.items():
            if arm in ran and settings.same_as and name not in (settings.regimes or ()):
                arms[arm] = arms[settings.same_as]
        if any(arms.values()):
            results[name] = {arm: of_seed for arm, of_seed in arms.items() if of_seed}
    return results


def summaries(of_regime: Mapping[str, Mapping[int, Cell]]) -> dict[str, dict[int, Summary]]:
    """Summarize the cells of a regime, by arm and seed."""
    target = target_of(of_regime)
    return {arm: {seed: summarize(c, target) for seed, c in cells.items()} for arm, cells in of_regime.items()}


def target_of(of_regime: Mapping[str, Mapping[int, Cell]]) -> float:
    """Return the exact match to reach in a regime."""
    return half_of_the_error([cell for cells in of_regime.values() for cell in cells.values()])


def paired(of_arm: Mapping[int, Summary], of_base: Mapping[int, Summary], name: str = "area") -> dict[int, float]:
    """Return the differences between an arm and a baseline arm, for each seed that both have."""
    seeds = sorted(of_arm.keys() & of_base.keys())
    return {seed: getattr(of_arm[seed], name) - getattr(of_base[seed], name) for seed in seeds}


def differences(results: Results, arm: str, base: str) -> dict[str, dict[int, float]]:
    """
    Return the differences in the mean exact match of the steps, by regime and seed. Regimes without both arms are left out.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        arm (`str`):
            Key of `ARMS`.
        base (`str`):
            Key of `ARMS`: the baseline.
    """
    numbers = {regime: summaries(of_regime) for regime, of_regime in results.items()}
    found = {regime: paired(n.get(arm, {}), n.get(base, {})) for regime, n in numbers.items()}
    return {regime: of_seed for regime, of_seed in found.items() if of_seed}


def claims(results: Results) -> str:
    """
    Compare the default with GRPO and with TSPO as published. The intervals hold together: with probability 95 %, all of them
    contain the true difference, whichever arm of the set had been chosen.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].

    Returns:
        `str`: A table and its conclusions; the empty string if the default or a baseline is missing in a regime.
    """
    to_grpo, to_tspo = (differences(results, DEFAULT, base) for base in (GRPO, TSPO))
    if not results or not (results.keys() == to_grpo.keys() == to_tspo.keys()):
        return ""
    candidates = {arm for of_regime in results.values() for arm in of_regime} - {GRPO, TSPO}
    count = 2 * len(results) * len(candidates)
    level = 1 - (1 - LEVEL) / count
    lines = [
        f"Default: {ARMS[DEFAULT].title}. Exact match, mean of the steps: paired "
        f"differences, with t intervals at {level:.2%}, which is 1 - {1 - LEVEL:.2f}/{count}: 2 baselines x {len(results)} "
        f"regimes x {len(candidates)} arm{'s' * (len(candidates) != 1)} that could have been chosen (Bonferroni).",
        "",
        _header(ARMS[DEFAULT].title, results),
        _row("seeds", [str(len(to_grpo[r])) for r in results]),
        _row("minus GRPO", [with_interval(list(to_grpo[r].values()), level) for r in results]),
        _row(f"behind GRPO by more than {MARGIN}", [_behind(list(to_grpo[r].values())) for r in results]),
        _row(f"minus {ARMS[TSPO].title}", [with_interval(list(to_tspo[r].values()), level) for r in results]),
        _row("steps to the target, ratio to GRPO", [_ratio(results[r], DEFAULT, one_left_out=True) for r in results]),
        "",
        *_conclusions(results, to_grpo, to_tspo),
    ]
    return "\n".join(lines)


def _conclusions(
    results: Results, to_grpo: Mapping[str, Mapping[int, float]], to_tspo: Mapping[str, Mapping[int, float]]
) -> list[str]:
    """The sentences below the table of the default."""
    verdicts = {r: behind(list(to_grpo[r].values()), MARGIN) for r in results}
    named = {
        verdict: "; ".join(ALL_REGIMES[r].title for r in results if verdicts[r] == verdict) or "none"
        for verdict in ("no", "open", "yes")
    }
    leads = [r for r, found in differences(results, TSPO, GRPO).items() if mean_interval(list(found.values()))[1] > 0]
    against = [f"{ALL_REGIMES[r].title} ({with_interval(list(to_tspo[r].values()))})" for r in leads]
    means = [with_interval(mean_of_regimes(list(found.values()))) for found in (to_grpo, to_tspo)]
    nowhere = "yes" if set(verdicts.values()) == {"no"} else "no" if "yes" in verdicts.values() else "open"
    return [
        f"- Behind GRPO nowhere by more than {MARGIN}: **{nowhere}**. Within the margin (95 % interval): {named['no']}. "
        f"Behind: {named['yes']}. Open, because the interval does not decide: {named['open']}.",
        f"- Where TSPO as published leads GRPO (95 % interval), the default minus TSPO is: {'; '.join(against)}."
        if against
        else "- TSPO as published leads GRPO nowhere (95 % interval).",
        f"- Mean over the regimes (95 % interval): minus GRPO {means[0]}, minus {ARMS[TSPO].title} {means[1]}.",
    ]


def _behind(values: Sequence[float]) -> str:
    """The verdict of [`behind`]. An open one tells what the mean says."""
    verdict = behind(values, MARGIN)
    return verdict if verdict != "open" else f"open (mean: {'yes' if np.mean(values) < -MARGIN else 'no'})"


def choice_table(results: Results, base: str) -> str:
    """
    Compare every arm with a baseline in the mean exact match of the steps.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        base (`str`):
            Key of `ARMS`: the baseline.
    """
    lines = [_header(f"minus {ARMS[base].title}", [*results, "mean"])]
    for arm in ARMS:
        found = differences(results, arm, base) if arm != base else {}
        if not found:
            continue
        cells = [with_interval(list(found[r].values())) if r in found else "" for r in results]
        means = mean_of_regimes(list(found.values())) if found.keys() == results.keys() else []
        lines.append(_row(ARMS[arm].title, [*cells, with_interval(means) if means else ""]))
    return "\n".join(lines)


def table(results: Results, regime: str) -> str:
    """
    Format the arms of a regime as a Markdown table, below a line with the initial measures.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        regime (`str`):
            Key of `ALL_REGIMES`.
    """
    of_regime = results[regime]
    numbers = summaries(of_regime)
    cells = [cell for of_seed in of_regime.values() for cell in of_seed.values()]
    start = {name: np.mean([cell["before"][name] for cell in cells]) for name in ("em", "hit", "near_miss")}
    lines = [
        f"### {ALL_REGIMES[regime].title.capitalize()}",
        "",
        f"Start: exact match {start['em']:.3f}, answer found {start['hit']:.3f}, near miss {start['near_miss']:.3f}. "
        f"{cells[0]['steps']} steps, target {target_of(of_regime):.2f}.",
        "",
        "| | EM after | minus GRPO | found after | EM, mean of steps | minus GRPO | better | to target | ratio to GRPO | drop "
        "| all wrong | rescued | s/step |",
        "|---" * 13 + "|",
    ]
    for arm, of_seed in numbers.items():
        values = list(of_seed.values())
        after, area = (
            [] if arm == GRPO else list(paired(of_seed, numbers.get(GRPO, {}), name).values())
            for name in ("em", "area")
        )
        row = [
            f"{np.mean([v.em for v in values]):.3f}",
            with_interval(after) if after else "",
            f"{np.mean([v.hit for v in values]):.3f}",
            f"{np.mean([v.area for v in values]):.3f}",
            with_interval(area) if area else "",
            f"{sum(d > 0 for d in area)}/{len(area)}" if area else "",
            _to_target(values),
            "" if arm == GRPO else _ratio(of_regime, arm),
            f"{np.mean([v.drop for v in values]):.3f}",
            f"{np.mean([v.all_wrong for v in values]):.2f}",
            _share([v.rescued for v in values]),
            f"{np.mean([v.seconds for v in values]):.2f}",
        ]
        lines.append(_row(ARMS[arm].title, row))
    return "\n".join(lines)


def origin(results: Results) -> str:
    """Say on which machines and with which versions the cells ran, and with how many seeds."""
    cells = [c for of_regime in results.values() for of_arm in of_regime.values() for c in of_arm.values()]
    versions = {
        ", ".join(f"{name} {value}" for name, value in cell["versions"].items() if name != "source") for cell in cells
    }
    machines = {cell["machine"].get("cpu", "not recorded") for cell in cells}
    seeds = sorted({cell["seed"] for cell in cells})
    return (
        f"Seeds: {len(seeds)}. Training runs: {len({(c['regime'], c['arm'], c['seed']) for c in cells})}. "
        f"Versions: {'; '.join(sorted(versions))}. Processor: {'; '.join(sorted(machines))}."
    )


def markdown(results: Results, *, chosen: bool = True) -> str:
    """
    Format all tables.

    Args:
        results (`Mapping`):
            The arranged results, see [`arrange`].
        chosen (`bool`, *optional*, defaults to `True`):
            Whether the default is chosen by these results. Then they begin with its comparison, see [`claims`].
    """
    descriptive = (
        "Every arm minus a baseline, in the exact match, mean of the steps. The intervals are 95 % t intervals of paired "
        "differences, each read alone: of twenty, one misses the true difference."
    )
    answer = claims(results) if chosen else ""
    parts = [origin(results), answer, descriptive, choice_table(results, GRPO), choice_table(results, TSPO)]
    return "\n\n".join([*filter(None, parts), *(table(results, regime) for regime in results)]) + "\n"


def _header(first: str, regimes: Sequence[str] | Results) -> str:
    """The head of a table with a column for each regime, or for a name that is no regime."""
    titles = [ALL_REGIMES[name].title if name in ALL_REGIMES else name for name in regimes]
    return _row(first, titles) + "\n" + "|---" * (len(titles) + 1) + "|"


def _row(first: str, cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join([first, *cells]) + " |"


def with_interval(values: Sequence[float], level: float = LEVEL) -> str:
    """Format the mean of differences with its interval, which a single value does not have."""
    mean, low, high = mean_interval(values, level)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if low == low else f"{mean:+.3f}"


def _ratio(of_regime: Mapping[str, Mapping[int, Cell]], arm: str, *, one_left_out: bool = False) -> str:
    """
    Format the ratio of the steps to the target of an arm and GRPO, on their mean curves over the seeds that both have; with its
    range over all sets of seeds that leave one out, if asked for and if all of them have a ratio.
    """
    seeds = sorted(of_regime.get(arm, {}).keys() & of_regime.get(GRPO, {}).keys())
    if not seeds:
        return ""
    target = target_of(of_regime)

    def over(kept: Sequence[int]) -> tuple[str, float] | None:
        curves = [mean_curve([of_regime[name][seed] for seed in kept]) for name in (arm, GRPO)]
        return steps_ratio(*curves, target)

    found = over(seeds)
    text = f"{found[0]}{found[1]:.2f}" if found else "-"
    if one_left_out and len(seeds) > 2:
        ratios = [ratio for left in seeds if (ratio := over([seed for seed in seeds if seed != left]))]
        if len(ratios) == len(seeds):
            low, high = (f"{sign}{value:.2f}" for sign, value in (f(ratios, key=lambda r: r[1]) for f in (min, max)))
            text += f" ({low} to {high})"
    return text


def _to_target(values: Sequence[Summary]) -> str:
    """Format the median of the steps to the target, and how many seeds reach it."""
    reached = [v.steps for v in values if v.steps is not None]
    if not reached:
        return "-"
    middle = median(float("inf") if v.steps is None else v.steps for v in values)
    text = f"{middle:.0f}" if middle < float("inf") else "-"
    return text if len(reached) == len(values) else f"{text} ({len(reached)}/{len(values)})"


def _share(values: Sequence[float]) -> str:
    """Format the mean of the values that are not NaN."""
    known = [value for value in values if value == value]
    return f"{np.mean(known):.2f}" if known else "-"
