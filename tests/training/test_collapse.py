"""Each warning is tested with a real run whose reward causes the collapse. Healthy runs get no warning."""

import json
import logging
from types import SimpleNamespace

import pytest

from tspo_trl.demo import make_model, supervise
from tspo_trl.demo.warmup import demonstrate_world
from tspo_trl.training.collapse import WATCHES, CollapseCallback

WINDOW = 5


def no_search(trajectories, **kwargs):
    return [float(not any(turn.action == "search" for turn in t.turns)) for t in trajectories]


def no_answer(trajectories, **kwargs):
    return [float(t.answer is None) for t in trajectories]


def many_searches(trajectories, **kwargs):
    """Rewards searches, and repeated queries more."""
    queries = [[query for query in t.queries if query] for t in trajectories]
    return [len(q) / 3 + 2.0 * (len(q) - len(set(q))) for q in queries]


def malformed(trajectories, **kwargs):
    return [sum(turn.action == "invalid" for turn in t.turns) / 4 for t in trajectories]


def long(trajectories, **kwargs):
    return [sum(len(turn.token_ids) for turn in t.turns) / 10 for t in trajectories]


def end_at_once(trajectories, **kwargs):
    """The best rollout is a single end-of-sequence token, because it has the smallest id."""
    return [-float(sum(token for turn in t.turns for token in turn.token_ids)) for t in trajectories]


def nothing(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def random_half(trajectories, **kwargs):
    """The reward does not depend on the quality of the rollout."""
    return [float(sum(t.completion_ids) % 2) for t in trajectories]


#: kind -> the reward and the options that cause the collapse
PATHOLOGIES = {
    "searches": (no_search, {}),
    "answers": (no_answer, {}),
    "duplicates": (many_searches, {"learning_rate": 2e-3}),
    "invalid": (malformed, {}),
    "length": (long, {}),
    "entropy": (end_at_once, {"learning_rate": 3e-3}),
    "signal": (nothing, {"advantage_level": "trajectory", "max_steps": 2 * WINDOW}),
    "likelihood": (random_half, {"entropy_coef": 2.0}),
}


@pytest.fixture(scope="module")
def capable_policy(tmp_path_factory, tokenizer, world):
    """A policy that searches and answers in the right format, so that a collapse can be observed."""
    folder = tmp_path_factory.mktemp("capable_policy")
    model = make_model(tokenizer, hidden_size=48, num_layers=2)
    supervise(model, demonstrate_world(tokenizer, world, wrong_query=0.3, wrong_answer=0.9), steps=250, batch_size=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def watched(make_trainer, **options):
    """Train a short run with a callback that has a small window."""
    callback = CollapseCallback(window=WINDOW, stop_on=options.pop("stop_on", ()))
    trainer = make_trainer(
        callbacks=[callback],
        warn_on_collapse=False,  # disables the callback with the default window
        advantage_level=options.pop("advantage_level", "trajectory"),
        max_steps=options.pop("max_steps", 50),
        learning_rate=options.pop("learning_rate", 1e-3),
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        log_trajectories=False,
        **options,
    )
    trainer.train()
    return trainer, callback


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHOLOGIES)
def test_a_collapsing_run_is_warned_about(make_trainer, capable_policy, kind, caplog):
    reward, options = PATHOLOGIES[kind]
    with caplog.at_level(logging.WARNING, "tspo_trl.training.collapse"):
        _, callback = watched(
            make_trainer, model=capable_policy, reward_funcs=reward, stop_on=[kind], **{"max_steps": 200, **options}
        )
    (watch,) = [watch for watch in WATCHES if watch.kind == kind]
    assert kind in callback.warned
    (message,) = [record.message for record in caplog.records if watch.meaning in record.message]  # once
    assert message == callback.warned[kind]
    assert f"`{watch.metric}` was" in message
    assert watch.advice in message


def test_every_watch_is_tested():
    assert [watch.kind for watch in WATCHES] == list(PATHOLOGIES)


@pytest.mark.slow
def test_a_collapse_can_stop_the_run_with_a_checkpoint(make_trainer, capable_policy, tmp_path):
    trainer, callback = watched(
        make_trainer, model=capable_policy, reward_funcs=no_search, stop_on=["searches"], max_steps=200
    )
    assert "searches" in callback.warned
    assert 2 * WINDOW <= trainer.state.global_step < 200
    checkpoint = tmp_path / "run" / f"checkpoint-{trainer.state.global_step}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == trainer.state.global_step


def feed(callback, entries, history=(), args=None):
    state = SimpleNamespace(log_history=list(history), global_step=len(history), is_world_process_zero=True)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    callback.on_train_begin(args, state, control)
    for entry in entries:
        state.global_step += 1
        callback.on_log(args, state, control, logs=entry)
    return control


def test_a_resumed_run_is_compared_with_the_start_of_the_original_run():
    began = [{"search/none": 0.0}] * 3
    lost = [{"search/none": 1.0}] * 3
    callback = CollapseCallback(window=3, stop_on=["searches"])
    control = feed(callback, lost, history=began)
    assert callback.warned["searches"].startswith("Step 6: the model has stopped searching. `search/none` was 0 in")
    assert control.should_save
    assert control.should_training_stop
    untouched = CollapseCallback(window=3)
    feed(untouched, lost)  # too few steps for a comparison
    feed(untouched, [{"eval_search/none": 1.0}] * 9, history=began)
    feed(untouched, [{"search/none": None}, {"search/none": float("nan")}] * 9, history=began)
    assert untouched.warned == {}


def test_a_run_that_solves_its_task_gets_no_warning():
    """As in the demo: low entropy, short completions and mostly all-correct groups, but no collapse."""
    steps = [
        {
            "search/none": 0.02,
            "search/duplicate": 0.05,
            "search/invalid": max(0.1 - step / 1000, 0.0),
            "completions/mean_length": 12 - step / 100,
            "entropy": 1.2 / (1 + step / 5),
            "groups/no_signal": 0.3 + step / 200,
            "logps/correct": -0.6 + step / 250,
        }
        for step in range(100)
    ]
    callback = CollapseCallback()
    feed(callback, steps)
    assert callback.warned == {}


def below(trajectories, **kwargs):
    return [(i % 4) / 10 for i in range(len(trajectories))]


def test_a_threshold_that_no_outcome_reaches_is_warned_about_once(make_trainer, caplog):
    callback = CollapseCallback(window=2, stop_on=["threshold"])
    trainer = make_trainer(callbacks=[callback], warn_on_collapse=False, reward_funcs=below, max_steps=4)
    with caplog.at_level(logging.WARNING, "tspo_trl.training.collapse"):
        trainer.train()
    assert trainer.state.global_step == 2
    (message,) = [record.message for record in caplog.records if "success_threshold" in record.message]
    assert message == callback.warned["threshold"]
    assert message.startswith(
        "Step 2: no outcome has reached `success_threshold`. The largest of the first 2 logged steps"
    )
    assert "is 0.3, and `success_threshold` is 1. " in message


def test_the_threshold_is_checked_once_in_a_run_that_is_resumed():
    def warned(entries, history=(), threshold=1.0):
        callback = CollapseCallback(window=3)
        feed(callback, entries, history, args=SimpleNamespace(success_threshold=threshold))
        return callback.warned

    low, high, none = {"reward_max": 0.5}, {"reward_max": 1.0}, {"reward_max": None}
    assert "The largest of the first 3 logged steps is 0.5" in warned([low] * 9)["threshold"]
    assert "threshold" in warned([low], history=[low] * 2)
    assert "threshold" in warned([none, low, none], history=[low] * 2)
    assert warned([low] * 9, threshold=0.5) == {}
    assert warned([low] * 2 + [high]) == {}
    assert warned([low] * 9, history=[high]) == {}
    assert warned([low] * 9, history=[low] * 3) == {}  # the run has warned before it was resumed
    assert warned([{"eval_reward_max": 0.5}] * 9) == {}
    callback = CollapseCallback(window=3)
    feed(callback, [low] * 9)  # a trainer without the option
    assert callback.warned == {}


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
        CollapseCallback(window=0)
