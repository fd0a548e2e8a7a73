"""A run that is killed while a checkpoint is deleted or rewritten keeps a complete one, and resumes from the right one."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from tspo_trl.training.checkpoints import last_checkpoint

SAVE = {"save_strategy": "steps", "save_steps": 1}


class Falling(TrainerCallback):
    """The first evaluation is the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = -state.global_step


LIMITS = {
    "one": {"save_total_limit": 1},
    "two": {"save_total_limit": 2},
    "one and the best": {"save_total_limit": 1, "load_best_model_at_end": True},
    "two and the best": {"save_total_limit": 2, "load_best_model_at_end": True},
    "one, best not loaded": {"save_total_limit": 1, "metric_for_best_model": "eval_score"},
}


def with_best(options, dataset):
    """The options, and those that the choice of a best checkpoint needs."""
    if not {"load_best_model_at_end", "metric_for_best_model"} & set(options):
        return options
    return {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_score",
        "greater_is_better": True,
        "eval_dataset": dataset.select(range(2)),
        "callbacks": [Falling()],
        **options,
    }


def files_of(checkpoint):
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in Path(checkpoint).rglob("*.*")}


def steps_of(run):
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


@pytest.fixture
def in_any_order(monkeypatch):
    """A function that makes each deletion of a folder shuffled, and calls `after` when one of its files is gone."""

    def install(seed, after):
        rng = random.Random(seed)
        unlink, rmdir = os.unlink, os.rmdir

        def observed_unlink(path, *args, **kwargs):
            unlink(path, *args, **kwargs)
            if "checkpoint-" in str(path):
                after(Path(path))

        def rmtree(folder, *args, **kwargs):
            entries = sorted(Path(folder).rglob("*"))
            files = [path for path in entries if not path.is_dir()]
            rng.shuffle(files)
            for path in files:
                os.unlink(path)
            for path in [*reversed([path for path in entries if path.is_dir()]), Path(folder)]:
                rmdir(path)

        monkeypatch.setattr(os, "unlink", observed_unlink)
        monkeypatch.setattr(shutil, "rmtree", rmtree)

    return install


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("limit", LIMITS)
def test_a_complete_checkpoint_exists_after_each_deleted_file(
    make_trainer, dataset, tmp_path, in_any_order, limit, seed
):
    run = tmp_path / "run"
    trainer = make_trainer(max_steps=4, **SAVE, **with_best(LIMITS[limit], dataset))
    deleted = []

    def check(path):
        deleted.append(path)
        found = last_checkpoint(run)  # a run killed now would resume from this one
        (step,) = {int(part.split("-")[1]) for part in path.parts if part.startswith("checkpoint-")}
        assert found != str(run / f"checkpoint-{step}")
        assert set(files_of(found)) == names

    names = set()

    class Names(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            names.update(files_of(run / f"checkpoint-{state.global_step}"))

    trainer.add_callback(Names())
    in_any_order(seed, check)
    trainer.train()
    assert "complete.json" in names
    assert len(deleted) >= 2 * len(names)
    best = "best" in limit
    kept = {"one": [4], "two": [3, 4], "one and the best": [1], "two and the best": [1, 4], "one, best not loaded": [1]}
    assert steps_of(run) == kept[limit]
    assert last_checkpoint(run).endswith(f"checkpoint-{kept[limit][-1]}")
    assert (trainer.state.best_model_checkpoint is not None) == best


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_run_killed_while_a_checkpoint_is_deleted_resumes_exactly(
    make_trainer, tmp_path, monkeypatch, in_any_order, number
):
    whole = make_trainer(output_dir=str(tmp_path / "whole"), max_steps=3)
    whole.train()
    deleted = []

    def kill(path):
        deleted.append(path)
        if len(deleted) == number:
            raise KeyboardInterrupt

    options = {"max_steps": 3, "save_total_limit": 1, **SAVE}
    with monkeypatch.context() as patched:
        in_any_order(number, kill)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(**options).train()
        patched.undo()
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(tmp_path / "run") == [3]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_any_missing_or_truncated_file_makes_a_checkpoint_incomplete(make_trainer, tmp_path):
    make_trainer(max_steps=2, **SAVE).train()
    newest = tmp_path / "run" / "checkpoint-2"
    for file in [path for path in newest.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        for damaged in (None, content[:-1]):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            assert last_checkpoint(tmp_path / "run").endswith("checkpoint-1"), file
            file.write_bytes(content)
    assert last_checkpoint(tmp_path / "run") == str(newest)
    (newest / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2' is incomplete: 'scheduler.pt' is missing"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("mark", ["copied", "none", "old"])
def test_a_stale_checkpoint_with_a_higher_number_is_deleted_first(make_trainer, tmp_path, monkeypatch, limit, mark):
    run = tmp_path / "run"
    make_trainer(max_steps=1, **SAVE).train()
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-9")
    if mark == "none":
        (run / "checkpoint-9" / "complete.json").unlink()
    elif mark == "old":  # as written before marks listed the files
        options = json.loads((run / "checkpoint-9" / "complete.json").read_text())
        options.pop("files", None), options.pop("number", None)
        (run / "checkpoint-9" / "complete.json").write_text(json.dumps(options))
    shutil.rmtree(run / "checkpoint-1")
    monkeypatch.setattr(os.path, "getmtime", lambda path: 0.0)
    options = {"save_total_limit": limit, **SAVE}
    trainer = make_trainer(max_steps=1, **options)
    trainer.train()
    assert steps_of(run) == ([1] if limit == 1 else [1, 9])
    assert last_checkpoint(run).endswith("checkpoint-1")
    resumed = make_trainer(max_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert steps_of(run) == ([3] if limit == 1 else [2, 3])
    assert last_checkpoint(run).endswith("checkpoint-3")


def test_incomplete_checkpoints_are_deleted_first(make_trainer, tmp_path):
    run = tmp_path / "run"
    make_trainer(max_steps=2, **SAVE).train()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-0")
    (run / "checkpoint-0" / "scheduler.pt").unlink()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (run / "checkpoint-9" / "complete.json").unlink()
    (run / "checkpoint-notes").mkdir()
    trainer = make_trainer(max_steps=3, save_total_limit=3, **SAVE)
    trainer.train(resume_from_checkpoint=True)
    names = sorted(path.name for path in run.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-notes"]


def test_the_only_complete_checkpoint_is_not_rewritten(make_trainer, tmp_path, monkeypatch):
    """If retrieval fails after a saved step, this step is saved again. Nothing has been trained since."""
    trainer = make_trainer(max_steps=2, save_total_limit=1, **SAVE)
    trainer.train()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", killed)
        trainer._save_checkpoint(trainer.model, trial=None)
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")

    class Resave(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with monkeypatch.context() as patched:
                patched.setattr(torch, "save", killed)
                resumed._save_checkpoint(resumed.model, trial=None)

    resumed = make_trainer(max_steps=3, save_total_limit=1, callbacks=[Resave()], **SAVE)
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(tmp_path / "run") == [3]


def test_a_second_training_writes_its_checkpoints(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_total_limit=1, **SAVE)
    for _ in range(2):
        trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(saved[name].equal(value) for name, value in trainer.model.state_dict().items() if name in saved)


def test_a_model_without_its_state_cannot_be_resumed(make_trainer, tmp_path, monkeypatch):
    run = tmp_path / "run"
    make_trainer(max_steps=2, **SAVE).train()
    shutil.rmtree(run / "checkpoint-1")
    monkeypatch.setattr(os.path, "getmtime", lambda path: 0.0)
    (run / "checkpoint-2").rename(run / "checkpoint-7")
    shutil.copytree(run / "checkpoint-7", run / "checkpoint-2")
    make_trainer(max_steps=2, save_only_model=True, save_total_limit=1, **SAVE).train()
    assert steps_of(run) == [2]
    assert not (run / "checkpoint-2" / "complete.json").exists()
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*`save_only_model=True` cannot be resumed"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-2' cannot be resumed.*`save_only_model=True`"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_without_a_mark_is_resumed_with_a_warning(make_trainer, tmp_path, caplog):
    """As pushed to the Hub: the mark is written after the push."""
    make_trainer(max_steps=1, **SAVE).train()
    checkpoint = (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "kept")
    make_trainer(max_steps=2).train(resume_from_checkpoint=str(checkpoint))  # a folder of any name may be given
    assert "not marked as complete" not in caplog.text
    (checkpoint / "complete.json").unlink()
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert "not marked as complete" in caplog.text
    (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="cannot be resumed"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))


def test_the_options_of_the_run_are_saved_and_rotation_is_restored(make_trainer, tmp_path):
    rotate = transformers.trainer.rotate_checkpoints
    make_trainer(max_steps=1, save_total_limit=1, **SAVE).train()
    saved = torch.load(tmp_path / "run" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1
    assert transformers.trainer.rotate_checkpoints is rotate
