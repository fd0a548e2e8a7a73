"""The study of turn credit: its analysis, its tables, its sets of cells, and what is published of them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.study import pages, sets, sweep
from benchmarks.study.analysis import (
    behind,
    half_of_the_error,
    largest_drop,
    mean_interval,
    mean_of_regimes,
    running_mean,
    steps_ratio,
    steps_to,
    summarize,
    t_quantile,
    t_within,
)
from benchmarks.study.arms import ARMS, DEFAULT, GRPO, TSPO
from benchmarks.study.cells import CURVES, HELDOUT, Cell, Scale
from benchmarks.study.regimes import ALL_REGIMES, REGIMES, SWEEP
from benchmarks.study.report import arrange, choice_table, claims, markdown, origin, paired, summaries
from helpers.paths import ROOT

RISING = [0.0] * 8 + [1.0] * 8


def test_running_mean_steps_and_largest_drop():
    np.testing.assert_allclose(running_mean([1, 2, 3, 4], window=2), [1, 1.5, 2.5, 3.5])
    assert steps_to(RISING, 0.5) == 12
    assert steps_to(RISING, 1.0) == 16
    assert steps_to(RISING, 0.0) == 8  # the first full mean
    assert steps_to(RISING, 1.1) is None
    assert steps_to([1.0] * 7, 0.5) is None
    assert largest_drop(RISING) == 0.0
    assert largest_drop(RISING[::-1]) == pytest.approx(1.0)
    assert largest_drop(RISING + [0.0] * 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("level", "degrees", "expected"),
    [
        (0.95, 1, 12.706205),
        (0.95, 2, 4.302653),
        (0.90, 3, 2.353363),
        (0.95, 4, 2.776445),
        (0.95, 9, 2.262157),
        (0.99, 9, 3.249836),
        (0.995, 9, 3.689662),
        (0.95, 30, 2.042272),
    ],
)
def test_the_t_quantile_is_that_of_printed_tables(level, degrees, expected):
    assert t_quantile(level, degrees) == pytest.approx(expected, abs=1e-6)


def test_the_t_distribution_becomes_normal():
    assert t_within(0.0, 5) == 0.0
    assert t_within(1.959964, 100_000) == pytest.approx(0.95, abs=1e-5)


def test_intervals_of_the_mean_over_seeds():
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    half = 2.776445 * math.sqrt(0.025 / 5)
    assert mean_interval([0.0, 0.1, 0.2, 0.3, 0.4]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_intervals_contain_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.normal(1.0, 3.0, size=5), 0.9)[1:] for _ in range(4000)]
    assert np.mean([low < 1.0 < high for low, high in found]) == pytest.approx(0.9, abs=0.015)


def test_the_mean_of_regimes_takes_the_seeds_that_all_have():
    assert mean_of_regimes([{0: 0.1, 1: 0.3}, {2: 0.9, 1: 0.5}]) == [0.4]
    assert mean_of_regimes([]) == []


def test_behind_is_open_when_the_margin_is_inside_the_interval():
    assert behind([0.0, 0.01, 0.02], 0.02) == "no"
    assert behind([-0.1, -0.1, -0.11], 0.02) == "yes"
    assert behind([-0.1, 0.0, 0.1], 0.02) == "open"
    assert behind([0.5], 0.02) == "open"  # one seed decides nothing


def test_the_ratio_of_steps_to_what_the_baseline_reaches():
    fast, never, half = [1.0] * 16, [0.0] * 16, [0.0] * 8 + [0.5] * 8
    assert steps_ratio(fast, RISING, 0.5) == ("", pytest.approx(8 / 12))
    assert steps_ratio(RISING, half, 0.9) == ("", pytest.approx(12 / 16))  # the baseline ends at 0.5
    assert steps_ratio(never, RISING, 0.5) == (">", pytest.approx(16 / 12))
    assert steps_ratio(never, never, 0.5) == ("", 1.0)
    assert steps_ratio(fast[:7], never[:7], 0.5) is None


def make_cell(regime, arm, seed, em, **curves):
    steps = len(em)
    values = {name: list(curves.get(name, [0.0] * steps)) for name in CURVES} | {"em": list(em)}
    before, after = (dict.fromkeys(HELDOUT, value) for value in (0.2, em[-1]))
    return {
        "regime": regime, "arm": arm, "seed": seed, "scale": asdict(Scale()), "steps": steps, "seconds": 2.0 * steps,
        "before": before, "after": after, "curves": values,
        "machine": {"cores": 2, "threads": 1, "device": "cpu", "cpu": "X1"}, "versions": {"torch": "2", "source": "ab"},
    }  # fmt: skip


def make_cells():
    return [
        make_cell(regime, arm, seed, [gain * (seed + 1) * 0.1] * 10, all_wrong=[0.5] * 10, rescued=[0.25] * 10)
        for regime in ("weak", "misleading")
        for arm, gain in ((GRPO, 1), (TSPO, 2))
        for seed in (1, 0)
    ]


def test_summary_of_a_cell():
    cell = make_cell("weak", TSPO, 0, [0.1] * 8 + [0.9] * 8, all_wrong=[1.0, 0.0] * 8, rescued=[0.5, 0.0] * 8)
    summary = summarize(cell, 0.6)
    assert (summary.em, summary.area, summary.steps) == (0.9, pytest.approx(0.5), 13)
    assert (summary.all_wrong, summary.rescued, summary.seconds) == (0.5, 0.5, 2.0)
    assert math.isnan(summarize(make_cell("weak", TSPO, 0, [1.0] * 8), 0.6).rescued)
    assert half_of_the_error([cell]) == 0.6


def test_arms_are_compared_seed_by_seed():
    numbers = summaries(arrange(make_cells())["weak"])
    assert paired(numbers[TSPO], numbers[GRPO]) == pytest.approx({0: 0.1, 1: 0.2})
    del numbers[TSPO][0]
    assert paired(numbers[TSPO], numbers[GRPO]) == pytest.approx({1: 0.2})


def test_an_arm_with_the_rollouts_of_another_is_shown_only_if_it_ran():
    cells = make_cells()
    assert "no_guard" not in arrange(cells)["weak"]
    results = arrange([*cells, make_cell("misleading", "no_guard", 0, [0.5] * 10)])
    assert results["weak"]["no_guard"] == results["weak"][TSPO]
    assert results["misleading"]["no_guard"].keys() == {0}


def compared(**of_regime):
    """Cells of the three arms of a claim, with the exact match of each seed."""
    return [
        make_cell(regime, arm, seed, [em] * 10)
        for regime, of_arms in of_regime.items()
        for arm, of_seed in zip((GRPO, TSPO, DEFAULT), of_arms, strict=True)
        for seed, em in enumerate(of_seed)
    ]


def test_the_claims_about_the_default_hold_together():
    cells = compared(
        weak=([0.2, 0.2, 0.2], [0.4, 0.4, 0.5], [0.3, 0.4, 0.5]),
        misleading=([0.5, 0.5, 0.5], [0.4, 0.3, 0.4], [0.47, 0.47, 0.47]),
    )
    text = claims(arrange(cells))
    assert "| seeds | 3 | 3 |" in text
    assert "t intervals at 98.75%, which is 1 - 0.05/4" in text
    mean, low, high = mean_interval([0.1, 0.2, 0.3], 0.9875)
    assert f"| minus GRPO | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | -0.030 [-0.030, -0.030] |" in text
    assert "| behind GRPO by more than 0.02 | open (mean: no) | yes |" in text
    assert "nowhere by more than 0.02: **no**" in text
    assert "the default minus TSPO is: weak search, weak answers (-0.033 [" in text
    mean, low, high = mean_interval([0.035, 0.085, 0.135])
    assert (
        f"Mean over the regimes (95 % interval): minus GRPO {mean:+.3f} [{low:+.3f}, {high:+.3f}], minus TSPO" in text
    )
    # A fourth arm could have been chosen too
    more = [{**cell, "arm": "strict"} for cell in cells if cell["arm"] == DEFAULT]
    assert "1 - 0.05/8" in claims(arrange([*cells, *more]))


def test_the_ratio_of_the_default_has_its_range_without_one_seed():
    cells = [
        make_cell("weak", arm, seed, [0.0] * (start + seed) + [1.0] * (30 - start - seed))
        for arm, start in ((GRPO, 12), (TSPO, 4), (DEFAULT, 4))
        for seed in (0, 4, 8)
    ]
    # Of the mean curves, those without the seed that begins to rise first are the latest
    text = claims(arrange(cells))
    (row,) = [line for line in text.splitlines() if line.startswith("| steps to the target")]
    ratios = [float(number) for number in re.findall(r"\d\.\d+", row)]
    assert len(ratios) == 3
    assert ratios[1] <= ratios[0] <= ratios[2] < 1
    assert ratios[1] < ratios[2]


def test_there_are_no_claims_without_the_default_or_a_baseline():
    cells = compared(weak=([0.2], [0.4], [0.3]), misleading=([0.5], [0.4], [0.5]))
    assert claims(arrange(cells))
    for arm in (GRPO, TSPO, DEFAULT):
        rest = [cell for cell in cells if (cell["regime"], cell["arm"]) != ("weak", arm)]
        assert claims(arrange(rest)) == ""
    assert claims({}) == ""


def test_the_table_of_choice_has_the_mean_of_complete_arms():
    table = choice_table(arrange(make_cells()), GRPO).splitlines()
    assert len(table) == 3
    assert table[2].count("+0.150 [") == 3
    rest = [cell for cell in make_cells() if (cell["regime"], cell["arm"]) != ("weak", TSPO)]
    assert choice_table(arrange(rest), GRPO).splitlines()[2].endswith("|  |")


def test_the_report_tells_where_cells_ran():
    text = origin(arrange(make_cells()))
    assert text == "Seeds: 2. Training runs: 8. Versions: torch 2. Processor: X1."


def test_the_sweep_is_a_table_over_shares():
    cells = [
        make_cell(regime, arm, seed, [0.4 + 0.1 * (arm == TSPO) * (place - 1) + 0.01 * seed] * 10, chance=[0.3] * 10)
        for place, regime in enumerate(list(SWEEP)[:3])
        for arm in (GRPO, TSPO)
        for seed in (0, 1)
    ]
    results = arrange(cells)
    assert sweep.is_sweep(results)
    assert not sweep.is_sweep(arrange(make_cells()))
    found = sweep.points(results, TSPO)
    assert found == {share: pytest.approx([mean] * 2) for share, mean in ((0.0, -0.1), (0.1, 0.0), (0.2, 0.1))}
    text = sweep.markdown(results)
    assert "| 20% | 0.30 | +0.100 [+0.100, +0.100] |" in text
    assert pages.tables(results) == text
    one_seed = arrange([cell for cell in cells if cell["seed"] == 0])
    assert "| 20% | 0.30 | +0.100 |" in sweep.markdown(one_seed)


def test_a_plan_is_sorted_by_seed_and_leaves_out_equal_cells():
    cells = sets.plan({"weak": 2, "misleading": 3}, [GRPO, "no_guard"])
    assert [(c.seed, c.regime, c.arm) for c in cells[:3]] == [
        (0, "weak", GRPO),
        (0, "misleading", GRPO),
        (0, "misleading", "no_guard"),
    ]
    assert [cell.seed for cell in cells] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_an_unfinished_plan_has_the_seeds_that_all_arms_have():
    planned = sets.plan({"weak": 3, "misleading": 3}, [GRPO, TSPO])
    cells = [make_cell(cell.regime, cell.arm, cell.seed, [0.5] * 10) for cell in planned]
    assert sets.complete(cells, planned) == cells
    assert sets.complete(cells, planned[:4]) == cells[:4]
    missing = ("weak", TSPO, 1)
    rest = [cell for cell in cells if sets.key_of(cell) != missing]
    found = sets.complete(rest, planned)
    assert {cell["seed"] for cell in found if cell["regime"] == "weak"} == {0, 2}
    assert {cell["seed"] for cell in found if cell["regime"] == "misleading"} == {0, 1, 2}
    assert sets.complete(cells[:-1], sets.plan({"misleading": 3}, [GRPO])) == [
        cell for cell in cells if (cell["regime"], cell["arm"]) == ("misleading", GRPO)
    ]
    assert sets.complete([], planned) == []


def test_cells_of_different_machines_are_not_paired():
    cells = make_cells()
    for cell in cells[:4]:  # another regime on another machine
        cell["machine"] = {"cpu": "X2"}
    cells[0]["versions"] = {"torch": "2", "source": "cd"}
    sets.check_pairs(cells)
    cells[0]["versions"] = {"torch": "3"}
    with pytest.raises(SystemExit, match=r"weak, seed 1: the arm tspo ran with .*'2'.* but grpo with .*'3'"):
        sets.check_pairs(cells)


def test_a_study_goes_on_where_another_machine_stopped(tmp_path):
    cells = make_cells()
    planned = sets.plan({"weak": 3, "misleading": 3}, [GRPO, TSPO])
    assert sets.take_published(cells, planned, Scale(), tmp_path / "new") == 8
    assert len(sets.read_folder(tmp_path / "new")) == 8
    assert [sets.is_done(cell, Scale(), tmp_path / "new") for cell in planned] == [True] * 8 + [False] * 4
    # Not where this machine has begun, and not where an arm is missing
    begun = Cell("weak", GRPO, 0).path(tmp_path / "begun")
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps(cells[0]))
    assert sets.take_published(cells[:-1], planned, Scale(), tmp_path / "begun") == 4
    with pytest.raises(SystemExit, match=r"made with .*'steps': 1.0.* uses .*'steps': 2.0"):
        sets.take_published(cells, planned, Scale(steps=2.0), tmp_path / "other")


def test_a_published_set_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "RESULTS", tmp_path)
    assert sets.read_set("defaults") == []
    sets.write_set("defaults", make_cells())
    assert sorted(sets.read_set("defaults"), key=str) == sorted(make_cells(), key=str)
    rest = [cell for cell in make_cells() if cell["regime"] == "weak"]
    sets.write_set("defaults", rest)
    assert sets.read_set("defaults") == rest


def test_the_answer_is_a_block_of_its_own():
    cells = compared(weak=([0.2, 0.2], [0.4, 0.4], [0.3, 0.4]))
    found = pages.blocks("defaults", cells)
    assert found.keys() == {"defaults", "answer"}
    assert found["answer"].startswith(claims(arrange(cells)))
    assert "![" in found["defaults"]
    assert set(pages.blocks("defaults", []).values()) == {pages.EMPTY}
    assert pages.blocks("defaults", make_cells())["answer"] == pages.EMPTY  # without the default
    assert pages.blocks("variants", make_cells()).keys() == {"variants"}


def test_a_set_is_inserted_between_its_marks():
    page = f"a\n{pages.begin('defaults')}old\n{pages.END}b\n{pages.begin('sweep')}old\n{pages.END}c\n"
    new = pages.insert(page, "sweep", "new")
    assert new == f"a\n{pages.begin('defaults')}old\n{pages.END}b\n{pages.begin('sweep')}\nnew\n{pages.END}c\n"
    with pytest.raises(ValueError, match="variants"):
        pages.insert(page, "variants", "new")


@pytest.mark.parametrize("name", sets.PUBLISHED)
def test_the_page_shows_the_committed_results(name):
    cells = sets.read_set(name)
    page = pages.PAGE.read_text(encoding="utf-8")
    for mark, text in pages.blocks(name, cells).items():
        assert pages.insert(page, mark, text) == page
    if not cells:
        return
    regimes = {cell["regime"] for cell in cells}
    assert regimes <= set(sets.SETS[name].seeds)
    assert {cell["arm"] for cell in cells} >= {GRPO, TSPO}
    seeds = {regime: 1 + max(cell["seed"] for cell in cells if cell["regime"] == regime) for regime in regimes}
    key = sets.key_of
    arms = [arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)]
    assert sorted(map(key, sets.complete(cells, sets.plan(seeds, arms)))) == sorted(map(key, cells))
    sets.check_pairs(cells)
    (scale,) = {json.dumps(cell["scale"]) for cell in cells}
    for cell in cells:
        steps = Scale(**json.loads(scale)).steps_of(ALL_REGIMES[cell["regime"]])
        assert {len(curve) for curve in cell["curves"].values()} == {cell["steps"]} == {steps}


def test_the_page_names_every_arm_and_every_regime():
    page = pages.PAGE.read_text(encoding="utf-8").partition(pages.begin("defaults"))[0]
    assert [arm.title for arm in ARMS.values() if f"| {arm.title} |" not in page] == []
    titles = [regime.title.capitalize() for regime in REGIMES.values()]
    assert [title for title in titles if f"**{title}**" not in page] == []


def test_pictures_are_drawn(tmp_path):
    text = pages.write_report(make_cells(), tmp_path)
    assert (tmp_path / "tables.md").read_text() == text == markdown(arrange(make_cells()))
    cells = [make_cell(regime, arm, 0, [0.5] * 10) for regime in SWEEP for arm in (GRPO, TSPO)]
    pages.write_report(cells, tmp_path)
    for name in ("curves", "differences", "sweep"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_only_published_sets_are_published():
    command = [sys.executable, "-m", "benchmarks.study", "--publish"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert found.returncode == 2
    assert "need `--set` with one of defaults, credits, variants, sweep; got 'small'" in found.stderr
