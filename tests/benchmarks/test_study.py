"""The study of turn credit: its arms, its regimes, its analysis, and a small run."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.study import arms
from benchmarks.study.__main__ import DOCS, RESULTS, insert, plan, read_results
from benchmarks.study.analysis import (
    half_of_the_error,
    largest_drop,
    mean_interval,
    mean_interval_of_regimes,
    running_mean,
    steps_to,
    summarize,
)
from benchmarks.study.arms import (
    ARMS,
    GRPO,
    TSPO,
    TSPO_SETTINGS,
    InformationGainTrainer,
    ModulatedTrainer,
    PassageUtilityTrainer,
    TwoSegmentTrainer,
    answer_probabilities,
    near_miss_reward,
    passage_utility,
)
from benchmarks.study.cells import HELDOUT
from benchmarks.study.regimes import REGIMES, ZONES, mislead, study_tokenizer
from benchmarks.study.report import arrange, markdown, paired, summaries
from helpers.paths import ROOT
from tspo_trl import Passage, Trajectory, TSPOConfig, TSPOTrainer, Turn
from tspo_trl.demo import make_world
from tspo_trl.scoring import contains_answer

nan = math.nan


def two_segments(outcomes, occurrence, turns, size):
    return TwoSegmentTrainer.compute_turn_advantages(
        None,
        torch.tensor(outcomes),
        torch.tensor(occurrence),
        torch.tensor(turns),
        num_generations=size,
        success_threshold=1.0,
    )


def test_two_segments_add_the_first_turn_reward_to_the_outcome():
    rewards, advantages, used = two_segments([1.0, 0.0], [-1, 0], [1, 3], 2)
    one = 0.5 / (math.sqrt(0.5) + 1e-4)
    # The first rollout is correct without evidence, the second found evidence and is wrong: their first turns get zero
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.0, 0.0], [0.0, -one, -one]]))
    torch.testing.assert_close(rewards, torch.tensor([[1.0, nan, nan], [1.0, 0.0, 0.0]]), equal_nan=True)
    assert used.all()


def test_two_segments_exclude_unscorable_rollouts():
    _, advantages, _ = two_segments([0.0, 0.0, nan], [0, -1, 0], [2, 2, 2], 3)
    one = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[one, 0.0], [-one, 0.0], [0.0, 0.0]]))


def credit(trainer_class, outcomes, occurrence, turns, size, *, weights=None, trajectories=()):
    """The turn rewards and advantages of an arm, which needs only the configuration of its trainer."""
    trainer = object.__new__(trainer_class)
    trainer.args = TSPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    trainer.scale_rewards = "group"
    return trainer.compute_turn_advantages(
        torch.tensor(outcomes),
        torch.tensor(occurrence),
        torch.tensor(turns),
        num_generations=size,
        success_threshold=1.0,
        turn_weights=torch.tensor(weights or [1.0] * (len(outcomes) // size)),
        rows=[{"trajectory": trajectory, "golden_answers": ["gold"]} for trajectory in trajectories],
    )


def test_modulated_credit_keeps_the_signs_of_outcomes():
    outcomes, occurrence = [1.0, 0.0, 0.0, 0.0] + [0.0] * 4, [0, 1, -1, -1] * 2
    _, advantages, used = credit(ModulatedTrainer, outcomes, occurrence, [2] * 8, 4, weights=[0.5, 1.0])
    good, bad = 0.75 / (0.5 + 1e-4), -0.25 / (0.5 + 1e-4)
    mixed = torch.tensor([[good * 1.25, good], [bad, bad * 0.75], [bad, bad], [bad, bad]])
    torch.testing.assert_close(advantages[:4], mixed)
    _, tspo, _ = credit(TSPOTrainer, outcomes, occurrence, [2] * 8, 4)
    torch.testing.assert_close(advantages[4:], tspo[4:])
    assert used.all()


def found(*turns):
    """A trajectory whose turns retrieved passages with these ids."""
    made = [Turn(token_ids=[1], action="search", passages=[Passage(i, "", i) for i in ids]) for ids in turns]
    return Trajectory(prompt_ids=[0], turns=made, status="no_answer")


def test_the_utility_of_a_passage_is_the_success_that_goes_with_it():
    trajectories = [found("ab"), found("b", "c"), found("c"), found("bc")]
    assert passage_utility(trajectories, [1.0, 0.0, 1.0, nan]) == pytest.approx({"a": 0.5, "b": -0.5, "c": -0.5})
    assert passage_utility(trajectories[:2], [1.0, 0.0])["b"] == 0.0  # all rollouts have it


def test_turns_with_useful_passages_get_more_of_the_outcome():
    trajectories = [found("a", "c"), found("b", "c"), found("a", "c"), found("b", "c")]
    _, advantages, used = credit(PassageUtilityTrainer, [1.0, 0, 1, 0], [-1] * 4, [2] * 4, 4, trajectories=trajectories)
    assert advantages[0, 0] > advantages[0, 1] > 0 > advantages[1, 1] > advantages[1, 0]
    assert used.all()
    _, wrong, _ = credit(PassageUtilityTrainer, [0.0] * 4, [-1] * 4, [2] * 4, 4, trajectories=trajectories)
    assert (wrong == 0).all()


def test_information_gain_is_the_change_of_the_probability_of_the_answer(make_trainer, tokenizer):
    trainer = make_trainer()
    turns = [Turn(token_ids=[5, 6], observation_ids=[7, 8, 9]), Turn(token_ids=[6]), Turn(token_ids=[4])]
    trajectory = Trajectory(prompt_ids=[3, 4, 5], turns=turns)
    start, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<answer>", "novel</answer>"))
    expected = []
    for context in ([3, 4, 5], [3, 4, 5, 5, 6, 7, 8, 9], [3, 4, 5, 5, 6, 7, 8, 9, 6]):
        ids = torch.tensor([[*context, *start, *answer]])
        with torch.no_grad():
            logps = trainer.model(ids).logits.log_softmax(-1)[0, -len(answer) - 1 : -1]
        expected.append(logps.gather(1, ids[0, -len(answer) :, None]).mean().exp())
    found = answer_probabilities(trainer, trajectory, "novel")
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_credit_by_information_gain_counts_later_turns(monkeypatch):
    gains = {1: torch.tensor([0.1, 0.5, 0.4]), 2: torch.tensor([0.1])}
    monkeypatch.setattr(arms, "answer_probabilities", lambda trainer, trajectory, gold: gains[trajectory.prompt_ids[0]])
    trajectories = [Trajectory(prompt_ids=[1]), Trajectory(prompt_ids=[2])]
    rewards, advantages, _ = credit(InformationGainTrainer, [0.0, 1.0], [-1, -1], [3, 1], 2, trajectories=trajectories)
    torch.testing.assert_close(rewards, torch.tensor([[0.4, -0.1, 0.0], [1.0, nan, nan]]), equal_nan=True)
    values = torch.tensor([0.4, -0.1, 0.0, 1.0])
    normal = (values - values.mean()) / (values.std() + 1e-4)
    torch.testing.assert_close(advantages[0], normal[:3].flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(advantages[1], torch.tensor([normal[3], 0.0, 0.0]))


def make_trajectory(answer, texts):
    turns = [
        Turn(token_ids=[1], action="search", passages=[Passage("0", "", text)] if text else [], retrieval="ok")
        for text in texts
    ]
    if answer is not None:
        turns.append(Turn(token_ids=[2], action="answer", content=answer))
    return Trajectory(prompt_ids=[0], turns=turns, status="no_answer" if answer is None else "answered")


def test_a_near_miss_retrieves_the_answer_but_does_not_give_it():
    trajectories = [
        make_trajectory("Rome", ["Rome is old"]),
        make_trajectory("Oslo", [None, "Rome is old"]),
        make_trajectory("Oslo", ["Oslo is cold"]),
        make_trajectory(None, ["yes"]),  # a degenerate gold
    ]
    golds = [["Rome"], ["Rome"], ["Rome"], ["yes"]]
    assert near_miss_reward(trajectories, golds) == [0.0, 1.0, 0.0, 0.0]


def test_each_arm_changes_the_option_in_its_name():
    settings = {name: TSPO_SETTINGS | arm.settings for name, arm in ARMS.items()}
    assert settings[TSPO] == TSPO_SETTINGS
    for name, options in settings.items():
        TSPOConfig(output_dir="unused", use_cpu=True, **options)
        changed = {key for key in TSPO_SETTINGS if options[key] != TSPO_SETTINGS[key]}
        assert len(changed) == (0 if name == TSPO else 1)
    assert all(arm.same_as in ARMS and arm.regimes for arm in ARMS.values() if arm.same_as or arm.regimes)


def test_the_study_uses_the_defaults_of_the_library():
    defaults = TSPOConfig(output_dir="unused", use_cpu=True)
    assert {name: getattr(defaults, name) for name in TSPO_SETTINGS} == TSPO_SETTINGS


def test_the_control_adds_answers_to_passages_and_keeps_the_facts():
    world = make_world(3)
    control = mislead(world, 3)
    assert mislead(world, 3) == control
    assert mislead(world, 4) != control
    texts = {p.title: p.text for p in control.passages}
    for questions in (control.train_questions, control.heldout_questions):
        assert {q.kind for q in questions} == {"country", "language", "zone"}
        for question in questions:
            assert contains_answer(texts[question.queries[-1]], [question.answer])
        found = [contains_answer(text, [question.answer]) for question in questions[:50] for text in texts.values()]
        assert 0.05 < np.mean(found) < 0.3
    plain = {p.title: p.text for p in world.passages}
    assert all(texts[title].startswith(text) for title, text in plain.items())
    zones = {q.answer for q in control.train_questions if q.kind == "zone"}
    assert zones == set(ZONES)


def test_the_tokenizer_knows_every_word_of_the_control():
    tokenizer = study_tokenizer()
    control = mislead(make_world(0), 0)
    texts = [p.text for p in control.passages] + [str(q.row()["prompt"]) for q in control.train_questions]
    assert tokenizer.unk_token_id not in {token for text in texts for token in tokenizer(text)["input_ids"]}


def test_running_mean_steps_and_largest_drop():
    rising = [0.0] * 8 + [1.0] * 8
    np.testing.assert_allclose(running_mean([1, 2, 3, 4], window=2), [1, 1.5, 2.5, 3.5])
    assert steps_to(rising, 0.5) == 12
    assert steps_to(rising, 1.0) == 16
    assert steps_to(rising, 0.0) == 8  # the first full mean
    assert steps_to(rising, 1.1) is None
    assert steps_to([1.0] * 7, 0.5) is None
    assert largest_drop(rising) == 0.0
    assert largest_drop(rising[::-1]) == pytest.approx(1.0)
    assert largest_drop(rising + [0.0] * 4) == pytest.approx(0.5)


def test_intervals_resample_the_seeds():
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    mean, low, high = mean_interval([0.0, 0.1, 0.2, 0.3, 0.4])
    assert mean == pytest.approx(0.2)
    assert 0.0 <= low < 0.1 < 0.3 < high <= 0.4
    mean, low, high = mean_interval_of_regimes([[0.0, 0.2], [1.0, 1.0, 1.0]])
    assert (mean, low, high) == pytest.approx((0.55, 0.5, 0.6))


def make_cell(regime, arm, seed, em, **curves):
    steps = len(em)
    zeros = [0.0] * steps
    names = ("em", "hit", "near_miss", "all_wrong", "rescued", "no_signal", "searches", "entropy")
    values = {name: list(curves.get(name, zeros)) for name in names} | {"em": list(em)}
    before, after = (dict.fromkeys(HELDOUT, value) for value in (0.2, em[-1]))
    return {
        "regime": regime, "arm": arm, "seed": seed, "steps": steps, "seconds": 2.0 * steps,
        "before": before, "after": after, "curves": values,
    }  # fmt: skip


def make_cells():
    return [
        make_cell(regime, arm, seed, [gain * (seed + 1) * 0.1] * 10, all_wrong=[0.5] * 10, rescued=[0.25] * 10)
        for regime in ("weak", "misleading")
        for arm, gain in (("grpo", 1), ("tspo", 2))
        for seed in (1, 0)
    ]


def test_summary_of_a_cell():
    cell = make_cell("weak", "tspo", 0, [0.1] * 8 + [0.9] * 8, all_wrong=[1.0, 0.0] * 8, rescued=[0.5, 0.0] * 8)
    summary = summarize(cell, 0.6)
    assert (summary.em, summary.area, summary.steps) == (0.9, pytest.approx(0.5), 13)
    assert (summary.all_wrong, summary.rescued, summary.seconds) == (0.5, 0.5, 2.0)
    assert math.isnan(summarize(make_cell("weak", "tspo", 0, [1.0] * 8), 0.6).rescued)
    assert half_of_the_error([cell]) == 0.6


def test_arms_are_compared_seed_by_seed():
    results = arrange(make_cells())
    numbers = summaries(results["weak"])
    assert paired(numbers["tspo"], numbers["grpo"]) == pytest.approx([0.1, 0.2])
    del numbers["tspo"][0]
    assert paired(numbers["tspo"], numbers["grpo"]) == pytest.approx([0.2])


def test_the_page_shows_the_committed_results():
    cells = read_results(RESULTS)
    measured = {cell["arm"] for cell in cells}  # an arm is published with all its regimes and seeds, or not at all
    assert measured >= {GRPO, TSPO}
    assert {(c["regime"], c["arm"], c["seed"]) for c in cells} == {
        (c.regime, c.arm, c.seed) for c in plan(REGIMES, measured, 5)
    }
    assert len({json.dumps(c["scale"]) for c in cells}) == 1
    for cell in cells:
        assert {len(curve) for curve in cell["curves"].values()} == {cell["steps"]} == {REGIMES[cell["regime"]].steps}
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    assert insert(page, markdown(arrange(cells))) == page


@pytest.mark.slow
def test_a_study_runs_and_resumes(tmp_path, policy_dir):
    """A tiny study with a prepared policy, stopped after one arm."""
    root = ROOT

    def study(*arguments):
        command = [
            sys.executable, "-m", "benchmarks.study", "--regimes", "nearly_solved", "--seeds", "1", "--steps", "0.05",
            "--heldout", "8", "--processes", "1", "--folder", str(tmp_path), *arguments,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)

    (tmp_path / "policies").mkdir()
    regime = REGIMES["nearly_solved"]
    for name in ("strong-0", f"plain_world-0-{regime.wrong_query}-{regime.wrong_answer}"):
        (tmp_path / "policies" / name).symlink_to(policy_dir)
    first = study("--arms", GRPO)
    assert first.returncode == 0, first.stderr[-3000:]
    cell = tmp_path / "cells" / "nearly_solved" / "grpo-0.json"
    written = cell.stat().st_mtime_ns
    second = study("--arms", GRPO, "two_segment")
    assert second.returncode == 0, second.stderr[-3000:]
    assert cell.stat().st_mtime_ns == written
    assert "1/1 cells: nearly_solved, two_segment, seed 0" in second.stdout
    assert "two segments" in second.stdout
    assert (tmp_path / "tables.md").read_text() in second.stdout
    for name in ("curves.png", "differences.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads(cell.read_text())
    assert found["steps"] == 2
    assert all(0 <= value <= 1 for value in found["curves"]["em"])
    other = study("--arms", GRPO, "--heldout", "9")
    assert other.returncode == 1
    assert "Use another `--folder`" in other.stderr
