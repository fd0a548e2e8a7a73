"""The benchmark of scaling, run with small settings: it prints tables, and the stages of a step sum to the step."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.scaling.cost import Setting, measure
from benchmarks.scaling.stages import STAGES
from helpers.paths import ROOT


def test_stages_sum_to_the_step():
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


@pytest.mark.slow
def test_the_command_prints_all_tables(tmp_path):
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
