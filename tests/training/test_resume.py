"""A run that is killed at any moment and resumed equals an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.paths import ACCELERATE_CONFIGS, TRAIN_ON_RANKS
from tspo_trl.training.checkpoints import last_checkpoint

# Rollouts are used in several steps, so most checkpoints must save the remaining rollouts
OPTIONS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "num_generations": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
}


def start(policy, folder, num_processes):
    """Start or resume the run."""
    command = [sys.executable]
    options = dict(OPTIONS)
    if num_processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIGS / "zero3.yaml")]
        command += ["--num_processes", str(num_processes), "--main_process_port", "0"]
        options["per_device_train_batch_size"] = 2
    command += [str(TRAIN_ON_RANKS), policy, str(folder), "--resume", "--options", json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", 'trap "" USR1; exec "$@"', "run", *command]  # as in the job script
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-12000:]


def send(process, number):
    """Send a signal to all processes of a run. A launcher starts them in their own sessions."""
    if process.poll() is None:
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)


def complete_checkpoints(folder):
    return len(list(folder.glob("checkpoint-*/complete.json")))


def wait_for(condition, process):
    while not condition():
        if process.poll() is not None:
            return
        time.sleep(0.005)


def assert_same_run(folder, whole):
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    files = sorted(path.name for path in (whole / "trajectories").iterdir())
    for name in files:
        assert (folder / "trajectories" / name).read_text() == (whole / "trajectories" / name).read_text(), name
    ours, theirs = (json.loads((path / "about_0.json").read_text())["history"] for path in (folder, whole))
    steps = [[entry for entry in history if "loss" in entry] for history in (ours, theirs)]
    for now, then in zip(*steps, strict=True):
        for name in ("loss", "grad_norm", "reward", "search/calls", "entropy", "step"):
            assert now.get(name) == then.get(name), (name, then.get("step"))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_repeatedly_killed_run_equals_an_uninterrupted_run(policy_dir, tmp_path, num_processes):
    """The run is killed at random moments: during generation, during updates, or while a checkpoint is written."""
    finish(start(policy_dir, tmp_path / "whole", num_processes))
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    for wanted in (rng.randint(1, 3), rng.randint(4, 6)):
        process = start(policy_dir, folder, num_processes)

        def reached(wanted=wanted):
            steps = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/complete.json")]
            return max(steps, default=0) >= wanted

        wait_for(reached, process)
        time.sleep(rng.random() * 0.5)  # a random moment in the next steps
        send(process, signal.SIGKILL)
        process.communicate()
    finish(start(policy_dir, folder, num_processes))
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "sent"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_saves_a_checkpoint_and_exits_with_143(policy_dir, tmp_path, num_processes, sent):
    finish(start(policy_dir, tmp_path / "whole", num_processes))
    folder = tmp_path / "preempted"
    process = start(policy_dir, folder, num_processes)
    wait_for(lambda: complete_checkpoints(folder) >= 1, process)
    send(process, sent)
    _, errors = process.communicate(timeout=300)
    assert "Stopped by a signal after step" in errors
    if num_processes == 1:  # a launcher has its own exit codes
        assert process.returncode == 143
    assert not (folder / "about_0.json").exists()
    finish(start(policy_dir, folder, num_processes))
    assert_same_run(folder, tmp_path / "whole")


def test_an_incomplete_checkpoint_is_skipped(make_trainer, tmp_path, caplog):
    make_trainer(max_steps=3, save_strategy="steps", save_steps=1).train()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "complete.json").unlink()
    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    trainer = make_trainer(max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "checkpoint-3 is incomplete" in caplog.text


def test_a_checkpoint_is_incomplete_while_it_is_rewritten(make_trainer, tmp_path, monkeypatch):
    """If retrieval fails after a saved step, the checkpoint of this step is written again."""
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-1")


def test_resuming_without_a_checkpoint_is_an_error(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*run"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 4}, {"num_generations": 2}, {"num_iterations": 2}])
def test_a_checkpoint_with_other_batch_options_is_refused(make_trainer, options):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"`{name}` = \d+, this run has {value}"):
        make_trainer(max_steps=2, **options).train(resume_from_checkpoint=True)


def test_a_full_disk_keeps_the_older_checkpoint(make_trainer, tmp_path, monkeypatch):
    class FullAtStepTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(torch, "save", full)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(OSError, match="No space left"):
        make_trainer(max_steps=3, callbacks=[FullAtStepTwo()], **options).train()
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-1")
    trainer = make_trainer(max_steps=3, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
