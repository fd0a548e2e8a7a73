"""Groups that span processes: the same rollouts get the same advantages on one process and on several."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import HELPERS

SCRIPT = HELPERS / "credit_on_ranks.py"


def run(policy, folder, num_processes):
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    result = subprocess.run(
        [*launcher, str(SCRIPT), policy, str(folder), "stage"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [torch.load(folder / f"rank{i}.pt") for i in range(num_processes)]
    assert [rank["num_processes"] for rank in ranks] == [num_processes] * num_processes
    return ranks


@pytest.mark.slow
def test_groups_may_span_processes(policy_dir, tmp_path):
    # 16 rollouts are two groups of 8; four processes hold 4 each
    (single,) = run(policy_dir, tmp_path / "one", 1)
    several = run(policy_dir, tmp_path / "four", 4)
    spread = [row for rank in several for row in rank["advantages"]]
    assert len(spread) == 16
    for ours, expected in zip(spread, single["advantages"], strict=True):
        assert ours == pytest.approx(expected, abs=1e-6)
    assert any(value for row in spread for value in row)
    for rank in several:
        assert rank["metrics"].keys() == single["metrics"].keys()
        for name, values in single["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(values, nan_ok=True, abs=1e-5), name
