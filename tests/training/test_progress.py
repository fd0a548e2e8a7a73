"""What a run prints."""

import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from helpers.training import varied_reward
from tspo_trl.training.progress import ShortProgress, ShortTable, ignore_harmless_warnings

LOGS = {"reward": None, "search/hit": 0.25, "loss": 1.0, "search/calls": 1.5}
EVALUATED = {"eval_nq_reward": 0.5, "eval_nq_search/hit": 0.75, "eval_far_reward": 0.25, "eval_runtime": 3.0}
STATE = SimpleNamespace(is_world_process_zero=True, is_local_process_zero=True, global_step=7)


@pytest.fixture
def bar():
    """A progress bar that keeps what it shows."""
    progress, shown = ShortProgress(), SimpleNamespace(postfix={}, lines=[])
    progress.training_bar = SimpleNamespace(set_postfix=shown.postfix.update, write=shown.lines.append)
    return progress, shown


def test_the_bar_shows_the_main_metrics(bar):
    """TRL logs None where there is nothing to average."""
    progress, shown = bar
    progress.on_log(None, STATE, None, logs=LOGS)
    assert shown.postfix == {"reward": "-", "hit": "0.25", "all wrong": "-"}
    assert shown.lines == []


@pytest.mark.parametrize(("strategy", "lines"), [("steps", 2), ("no", 0)])
def test_the_bar_writes_a_line_for_each_evaluation_of_the_training(bar, strategy, lines):
    progress, shown = bar
    progress.on_log(SimpleNamespace(eval_strategy=strategy), STATE, None, logs=EVALUATED)
    assert len(shown.lines) == lines
    if lines:
        assert shown.lines[0] == "step 7, eval_nq: reward 0.500, hit 0.750, near miss -, all wrong -, searches -"
        assert shown.lines[1].startswith("step 7, eval_far: reward 0.250, hit -")


def test_the_table_has_a_row_for_each_log_and_titles_now_and_then(capsys):
    table = ShortTable()
    for _ in range(21):
        table.on_log(None, STATE, None, logs=LOGS)
    table.on_log(None, STATE, None, logs=EVALUATED)
    table.on_log(None, STATE, None, logs={"train_runtime": 3.0, "total_flos": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 21 + 2
    assert lines[0].split() == "step reward hit near miss all wrong searches".split()
    assert lines[1].split() == ["7", "-", "0.250", "-", "-", "1.500"]
    assert lines[-1].split() == ["7", "0.250", "-", "-", "-", "-", "eval_far"]
    assert max(map(len, lines)) <= 80


def test_a_plain_script_prints_a_table(make_trainer, capsys):
    make_trainer(reward_funcs=varied_reward).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2"]
    assert all(len(line) <= 80 for line in lines)


def test_a_plain_script_has_a_bar(make_trainer, capsys):
    make_trainer(reward_funcs=varied_reward, disable_tqdm=False).train()
    printed = capsys.readouterr()
    assert "{" not in printed.out
    assert "reward=" in printed.err
    assert "hit=" in printed.err


@pytest.mark.parametrize(("option", "base"), [(True, PrinterCallback), (False, ProgressCallback)])
def test_callbacks_of_the_user_are_kept(make_trainer, option, base):
    class Mine(base):
        pass

    class Other(TrainerCallback):
        pass

    trainer = make_trainer(disable_tqdm=option, callbacks=[Mine, Other])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Mine in kinds
    assert Other in kinds
    assert base not in kinds
    trainer.remove_callback(ShortTable if option else ShortProgress)
    trainer.remove_callback(base)  # as scripts for other trainers do
    assert not any(isinstance(callback, base) for callback in trainer.callback_handler.callbacks)


def test_only_harmless_warnings_are_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_harmless_warnings()
        for name in ("`is_gradient_checkpointing`", "`gradient_checkpointing`", "`gradient_checkpointing_enable`"):
            warnings.warn(f"{name} is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found", UserWarning, stacklevel=1)
        warnings.warn("`beta` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["`beta` is deprecated", "`is_gradient_checkpointing` is deprecated"]


def test_only_tied_weights_may_be_missing(caplog):
    ignore_harmless_warnings(SimpleNamespace(all_tied_weights_keys={"lm_head.weight": "model.embed_tokens.weight"}))
    logger = logging.getLogger("transformers.trainer")
    with caplog.at_level(logging.WARNING, "transformers.trainer"):
        logger.propagate, before = True, logger.propagate
        for keys in (["lm_head.weight"], ["lm_head.weight", "model.norm.weight"], ["model.norm.weight"]):
            logger.warning(f"There were missing keys in the checkpoint model loaded: {keys}.")
        logger.warning("There were unexpected keys in the checkpoint model loaded: ['lm_head.weight'].")
        logger.propagate = before
    assert len(caplog.records) == 3
    assert not any(
        "missing keys in the checkpoint model loaded: ['lm_head.weight']." in r.message for r in caplog.records
    )


SCRIPT = """
import sys
from datasets import Dataset
from tspo_trl import BM25Retriever, Passage, TSPOConfig, TSPOTrainer

passages = [Passage(id="0", title="Emma", text="Emma is a novel by Jane Austen.")]
rows = [{{"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}}] * 4
trainer = TSPOTrainer(
    model={model!r},
    args=TSPOConfig(
        {output!r}, num_generations=4, per_device_train_batch_size=8, max_steps=2, save_steps=1, max_searches=1,
        max_turn_tokens=8, max_completion_length=64, max_observation_tokens=32, report_to="none", use_cpu=True,
    ),
    train_dataset=Dataset.from_list(rows),
    retriever=BM25Retriever(passages),
)
trainer.train(resume_from_checkpoint=len(sys.argv) > 1)
"""


@pytest.mark.slow
def test_a_new_user_sees_a_bar_and_no_warnings(tmp_path, policy_dir):
    script = SCRIPT.format(model=policy_dir, output=str(tmp_path / "run"))
    for resumed in (False, True):
        command = [sys.executable, "-c", script, *(["resume"] if resumed else [])]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "retrieval/latency" not in result.stdout + result.stderr
        assert [line for line in result.stderr.splitlines() if "Warning" in line or "missing keys" in line] == []
        assert resumed or "reward=" in result.stderr
        if not resumed:
            for path in (tmp_path / "run" / "checkpoint-2").iterdir():
                path.unlink()
            (tmp_path / "run" / "checkpoint-2").rmdir()
