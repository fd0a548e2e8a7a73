"""Every strategy of `recipes/accelerate` on real processes gives the same rollouts, groups, losses and weights."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers.batching import SMALL_CACHE
from helpers.paths import ACCELERATE_CONFIGS, HELPERS, TRAIN_ON_RANKS
from helpers.servers import free_port

EXPECTED = {  # what accelerate must report, because it falls back to data parallelism without a warning
    "ddp": {"distributed_type": "MULTI_CPU", "zero_stage": None},
    "zero2": {"distributed_type": "DEEPSPEED", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "zero_stage": 3},
    "zero3_offload": {"distributed_type": "DEEPSPEED", "zero_stage": 3},
    "multi_node_2": {"distributed_type": "DEEPSPEED", "zero_stage": 3},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_version": 2},
}


def launch(strategy, policy, folder, *arguments, num_processes=2, num_machines=1, **options):
    """Run the script and return the reports of its ranks. Each machine has its own launcher."""
    options = {"max_steps": 10, "per_device_train_batch_size": 16 // num_processes, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if strategy == "fsdp2":
        path = os.pathsep.join([str(HELPERS / "fsdp_on_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"PYTHONPATH": path, "ACCELERATE_TORCH_DEVICE": "cpu"}
        options["use_cpu"] = False  # `use_cpu=True` would select another strategy
    if strategy is None:
        command = [sys.executable]
    else:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ACCELERATE_CONFIGS / f"{strategy}.yaml"),
        ]
        port = free_port() if num_machines > 1 else 0
        command += ["--num_processes", str(num_processes), "--main_process_port", str(port)]
    script = [str(TRAIN_ON_RANKS), policy, str(folder), *arguments, "--options", json.dumps(options)]
    machines = [
        ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"] if num_machines > 1 else []
        for rank in range(num_machines)
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, *machine, *script], env=environment, **pipes) for machine in machines]
    for process in processes:
        _, errors = process.communicate(timeout=1000)
        assert process.returncode == 0, errors[-4000:]
    ranks = [json.loads((folder / f"about_{rank}.json").read_text()) for rank in range(num_processes)]
    for rank in ranks:
        assert rank["num_processes"] == num_processes
        if strategy is not None:
            assert EXPECTED[strategy].items() <= rank.items()
    return ranks


def losses(rank):
    return [entry["loss"] for entry in rank["history"] if "loss" in entry]


def assert_same_weights(folder, other, tolerance):
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, other))
    assert ours.keys() >= theirs.keys()  # some strategies also save the tied head
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= tolerance


@pytest.fixture(scope="module")
def single(policy_dir, tmp_path_factory):
    """A run on one process, with rollouts that do not depend on the number of processes."""
    folder = tmp_path_factory.mktemp("single")
    return folder, launch(None, policy_dir, folder, "--recorded", num_processes=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [("ddp", 2), ("zero2", 2), ("zero3", 2), ("zero3_offload", 2), ("fsdp2", 2), ("zero3", 4), ("multi_node_2", 2)],
)
def test_the_same_rollouts_give_the_same_weights(policy_dir, tmp_path, single, strategy, num_processes):
    folder, alone = single
    num_machines = 2 if strategy == "multi_node_2" else 1
    ranks = launch(strategy, policy_dir, tmp_path, "--recorded", num_processes=num_processes, num_machines=num_machines)
    assert losses(ranks[0]) == pytest.approx(losses(alone), abs=2e-5)
    assert any(abs(loss) > 1e-3 for loss in losses(alone))
    for ours, theirs in zip(ranks[0]["history"], alone["history"], strict=True):
        for name in ours:
            if name.startswith(("groups/", "search/", "turns/", "reward")) and theirs[name] is not None:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert_same_weights(tmp_path, folder, 1e-4)


@pytest.fixture(scope="module")
def sampled(policy_dir, tmp_path_factory):
    """A run on two data-parallel processes that sample."""
    folder = tmp_path_factory.mktemp("sampled")
    launch("ddp", policy_dir, folder)
    return folder


def tokens(folder):
    files = sorted((folder / "trajectories").glob("train-rank*.jsonl"))
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[[turn["token_ids"] for turn in r["trajectory"]["turns"]] for r in rank] for rank in records]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_the_same_seed_gives_the_same_rollouts(policy_dir, tmp_path, sampled, strategy):
    ranks = launch(strategy, policy_dir, tmp_path)
    assert tokens(tmp_path) == tokens(sampled)
    assert [len(rank) for rank in tokens(tmp_path)] == [80, 80]
    assert_same_weights(tmp_path, sampled, 1e-4)
    if strategy != "zero2":
        for rank in ranks:  # the parameters are gathered once for all turns of a rollout phase
            phases = rank["gathers_before_each_turn"]
            assert len(phases) > len(set(phases)) == rank["generations"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_ranks_with_different_numbers_of_turns_do_not_hang(policy_dir, tmp_path, strategy):
    """In every step, rank 0 stops after one turn and rank 1 uses all turns. If it hangs, the script prints its stacks."""
    ranks = launch(strategy, policy_dir, tmp_path, "--uneven", max_steps=100, per_device_train_batch_size=4)
    assert len(ranks[0]["gathers_before_each_turn"]) == 100
    assert len(ranks[1]["gathers_before_each_turn"]) == 400
    assert len(losses(ranks[0])) == 100


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_continuous_batching_with_different_numbers_of_turns(policy_dir, tmp_path, strategy):
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": SMALL_CACHE,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
    }
    ranks = launch(strategy, policy_dir, tmp_path, "--uneven", **options)
    for rank, turns in zip(ranks, (4, 16), strict=True):  # of 4 rollouts in a step
        assert len(rank["gathers_before_each_turn"]) == 4 * turns
        assert len(set(rank["gathers_before_each_turn"])) == rank["generations"] == 4


@pytest.mark.slow
def test_a_rank_whose_retriever_fails_does_not_hang_the_others(policy_dir, tmp_path):
    options = {"max_retrieval_failure_rate": 1.0, "max_steps": 20}
    ranks = launch("zero3", policy_dir, tmp_path, "--broken_rank", "1", **options)
    assert len(losses(ranks[0])) == 20
    steps = [entry for entry in ranks[0]["history"] if "loss" in entry]
    failed, searches = (sum(step[f"retrieval/{name}"] for step in steps) for name in ("failed_connection", "searches"))
    assert 0 < failed < searches  # the searches of the other rank succeeded


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "loss_type"), [("ddp", "dapo"), ("zero3", "bnpo"), ("fsdp2", "bnpo")])
def test_a_rank_without_a_signal_does_not_hang_the_others(policy_dir, tmp_path, strategy, loss_type):
    """The weights are those of a training with whole batches. With bnpo, no rollout changes its process."""
    options = {"loss_type": loss_type, "folr_alpha": 0.0, "max_steps": 4}
    for compact in (False, True):
        (folder := tmp_path / str(compact)).mkdir()
        ranks = launch(
            strategy, policy_dir, folder, "--recorded", "--idle_rank", "1", compact_forward=compact, **options
        )
        assert any(abs(loss) > 1e-3 for loss in losses(ranks[0]))
        assert all(0 < entry["groups/no_signal"] < 1 for entry in ranks[0]["history"] if "loss" in entry)
    assert_same_weights(tmp_path / "True", tmp_path / "False", 1e-4)


@pytest.mark.slow
def test_dynamic_sampling_is_the_same_on_several_processes(policy_dir, tmp_path):
    options = {"dynamic_sampling": True, "folr_alpha": 0.0, "max_steps": 4}
    runs = {}
    for strategy, num_processes in ((None, 1), ("ddp", 2)):
        (folder := tmp_path / str(num_processes)).mkdir()
        arguments = ("--recorded", "--few_signals")
        runs[num_processes] = launch(strategy, policy_dir, folder, *arguments, num_processes=num_processes, **options)[
            0
        ]["history"]
    for ours, theirs in zip(runs[2], runs[1], strict=True):
        for name in ours:
            if name.startswith(("sampling/", "groups/", "reward")):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    steps = [entry for entry in runs[1] if "loss" in entry]
    assert sum(step["sampling/replaced_groups"] for step in steps) > 0
    assert_same_weights(tmp_path / "2", tmp_path / "1", 1e-4)


@pytest.mark.slow
def test_lora_under_zero3(policy_dir, tmp_path):
    ranks = launch("zero3", policy_dir, tmp_path, "--lora", max_steps=4)
    adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert any(abs(loss) > 1e-3 for loss in losses(ranks[0]))


@pytest.mark.slow
def test_settings_that_would_hang_are_refused(policy_dir, tmp_path):
    with pytest.raises(AssertionError, match="ds3_gather_for_generation=False"):
        launch("zero3", policy_dir, tmp_path, ds3_gather_for_generation=False, max_steps=1)
    with pytest.raises(AssertionError, match=r"`train_dataset` must be the same in every process, .*\[72, 71\]"):
        launch("ddp", policy_dir, tmp_path, "--shorter_rank", "1", max_steps=1)
