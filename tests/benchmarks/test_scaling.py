"""The benchmark of scaling, run on little: it prints tables, and the stages of a step make up the step."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.scaling.__main__ import memory_table, process_table
from benchmarks.scaling.cost import Cost, Setting, measure
from benchmarks.scaling.stages import STAGES, Stopwatch
from helpers.paths import ROOT


def test_a_stage_takes_its_time_from_the_one_around_it(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 100.0, 101.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.stage("outer"):
        assert watch.timed(lambda: watch.is_open("outer") and watch.is_open("inner"), "inner")()
    assert not watch.is_open("outer")
    watch.timed(sum, lambda values: f"sum of {len(values)}")([1, 2])
    assert watch.seconds == {"outer": 5.0, "inner": 2.0, "sum of 2": 1.5}


def test_a_stage_ends_when_its_function_fails():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.stage("outer"):
        watch.timed(lambda: 1 / 0, "inner")()
    assert not watch.is_open("outer")
    assert not watch.is_open("inner")


def test_the_stages_make_up_the_step():
    setting = Setting(questions=2, group=3, searches=2, turn_tokens=6, steps=2)
    cost = measure(setting)
    assert cost.processes == 1
    assert sum(cost.stages.values()) == pytest.approx(cost.step_seconds, rel=1e-3)
    assert set(cost.stages) == set(STAGES)
    assert all(seconds > 0 for seconds in cost.stages.values())
    assert 3 * 6 < cost.completion_tokens < 3 * 6 + 2 * 64
    assert cost.record_bytes > 4 * cost.completion_tokens  # every sampled token has a log-probability
    assert cost.trajectory_bytes > 8 * cost.completion_tokens
    assert cost.peak_bytes > 100 * 2**20


def test_tables_compare_with_their_first_row():
    def cost(processes, seconds, mebibytes):
        return Cost(
            processes=processes,
            step_seconds=seconds,
            stages={},
            completion_tokens=100.0,
            trajectory_bytes=2048.0,
            record_bytes=1024.0,
            peak_bytes=mebibytes * 2**20,
        )

    small, large = Setting(group=8), Setting(group=16)
    assert process_table([(small, cost(1, 2.0, 0)), (small, cost(2, 1.25, 0))]).splitlines()[2:] == [
        "| 1 | 64 | 2000 | 32.0 | 1.00 |",
        "| 2 | 32 | 1250 | 51.2 | 1.60 |",
    ]
    assert memory_table([(small, cost(1, 1.0, 500)), (large, cost(1, 1.0, 532))]).splitlines()[2:] == [
        "| 64 | 100 | 2.0 | 1.0 | 500 | – |",
        "| 128 | 100 | 2.0 | 1.0 | 532 | 0.50 |",
    ]


@pytest.mark.slow
def test_the_command_measures_everything_that_it_prints(tmp_path):
    results = tmp_path / "results.json"
    values = "--groups 2 4 --searches 0 1 --turn_tokens 4 8 --processes 1 2 --memory 2 4 --questions 2 --steps 1"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *values.split(), "--json", str(results)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {}
    for row in json.loads(results.read_text()):
        rows.setdefault(row["table"], []).append(row)
    assert {name: len(found) for name, found in rows.items()} == {
        "stages": 1,
        "group": 2,
        "searches": 2,
        "turn_tokens": 2,
        "processes": 2,
        "memory": 2,
    }
    assert [row["processes"] for row in rows["processes"]] == [1, 2]
    assert rows["searches"][0]["completion_tokens"] == 16  # one turn, and no passages
    assert all(row["step_seconds"] > 0 for found in rows.values() for row in found)
    assert result.stdout.count("\n## ") == 6
