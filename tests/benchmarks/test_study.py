"""The study of turn credit: its arms, its worlds, its regimes, and a small run."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from benchmarks.study import arms, regimes
from benchmarks.study.__main__ import jobs_of
from benchmarks.study.arms import (
    ARMS,
    DEFAULT,
    GRPO,
    NEAR_MISS,
    TSPO,
    TSPO_SETTINGS,
    EvidenceTrainer,
    InformationGainTrainer,
    ModulatedTrainer,
    PassageUtilityTrainer,
    TwoSegmentTrainer,
    answer_probabilities,
    first_supporting_turn,
    near_miss_reward,
    passage_utility,
)
from benchmarks.study.cells import Cell, Scale, make_row, processor, source_digest
from benchmarks.study.regimes import REGIMES, SHARES, SWEEP, study_tokenizer, with_more_words
from benchmarks.study.schedule import Job, run_jobs
from benchmarks.study.worlds import (
    REAL_COUNT,
    ZONES,
    add_noise,
    mislead,
    real_passages,
    real_text_world,
    repeat_facts,
    repeated_world,
)
from helpers.paths import ROOT
from tspo_trl import Passage, Trajectory, TSPOConfig, TSPOTrainer, Turn
from tspo_trl.demo import make_model, make_world
from tspo_trl.rewards import exact_match_reward
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


def credit(trainer_class, outcomes, occurrence, turns, size, *, weights=None, trajectories=(), **columns):
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
        rows=[{"trajectory": trajectory, "golden_answers": ["gold"], **columns} for trajectory in trajectories],
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


def titled(*turns):
    """A trajectory whose turns retrieved passages with these titles."""
    made = [Turn(token_ids=[1], action="search", passages=[Passage("0", t, "") for t in titles]) for titles in turns]
    return Trajectory(prompt_ids=[0], turns=made, status="no_answer")


def test_the_first_supporting_turn_retrieves_any_of_the_titles():
    trajectory = titled(("Oslo",), (), ("Rome", "Oslo"), ("Paris",))
    assert first_supporting_turn(trajectory, ["Paris", "Rome"]) == 2
    assert first_supporting_turn(trajectory, ["Oslo"]) == 0
    assert first_supporting_turn(trajectory, ["oslo", "Os"]) == -1  # whole titles


def test_credit_by_titles_is_the_credit_of_tspo_at_the_first_supporting_turn():
    trajectories = [titled((), ("Rome",)), titled(("Oslo",), ()), titled(("Rome",), ("Rome",)), titled((), ())]
    arguments = [0.0] * 4, [2] * 4, 4
    found = credit_by_titles(arguments, [-1, 0, -1, 1], trajectories, ["Rome", "Paris"])
    tspo = credit(TSPOTrainer, arguments[0], [1, -1, 0, -1], *arguments[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, tspo, strict=True))
    assert found[0].tolist() == [[0.0, 0.5], [0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    # Without titles, it is TSPO
    found = credit_by_titles(arguments, [-1, 0, -1, 1], trajectories, None)
    tspo = credit(TSPOTrainer, arguments[0], [-1, 0, -1, 1], *arguments[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, tspo, strict=True))


def credit_by_titles(arguments, occurrence, trajectories, titles):
    outcomes, turns, size = arguments
    return credit(
        EvidenceTrainer, outcomes, occurrence, turns, size, trajectories=trajectories, supporting_titles=titles
    )


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
        assert len(changed) == (0 if name in (TSPO, "evidence") else 1)
    assert all(arm.same_as in ARMS and arm.regimes for arm in ARMS.values() if arm.same_as or arm.regimes)


def test_the_study_uses_the_defaults_of_the_library():
    defaults = TSPOConfig(output_dir="unused", use_cpu=True)
    assert {name: getattr(defaults, name) for name in TSPO_SETTINGS} == TSPO_SETTINGS | ARMS[DEFAULT].settings


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


def test_noise_grows_with_the_share_and_keeps_the_facts():
    world = make_world(3)
    texts = [[p.text for p in add_noise(world, 3, share).passages] for share in (0.0, 0.2, 0.5)]
    assert texts[0] == [p.text for p in world.passages]
    changed = [{i for i, text in enumerate(of_share) if text != texts[0][i]} for of_share in texts]
    assert [len(places) for places in changed] == [0, round(0.2 * len(texts[0])), round(0.5 * len(texts[0]))]
    assert changed[1] < changed[2]
    assert all(texts[2][i] == texts[1][i] for i in changed[1])
    assert all(text.startswith(plain) for plain, text in zip(texts[0], texts[2], strict=True))
    noisy = add_noise(world, 3, 0.5)
    questions = [*noisy.train_questions, *noisy.heldout_questions]
    assert {question.kind for question in questions} == {"country", "language"}
    plain, found = (
        np.mean([contains_answer(text, [q.answer]) for q in questions[:50] for text in of_share])
        for of_share in (texts[0], texts[2])
    )
    assert found > 2 * plain


@pytest.mark.parametrize(("rates", "calls"), [([0.9], 1), ([0.5, 0.6, 0.7], 3), ([0.6] * 4, 4)])
def test_a_policy_is_adapted_until_it_reads_the_passages(monkeypatch, rates, calls):
    left, made = iter(rates), []
    monkeypatch.setattr(regimes, "_demonstrate", lambda *args, **kwargs: [])
    monkeypatch.setattr(regimes, "supervise", lambda *args, **kwargs: made.append(kwargs["steps"]))
    monkeypatch.setattr(regimes, "sample", lambda *args, **kwargs: [])
    monkeypatch.setattr(regimes, "answer_rate", lambda *args: next(left))
    if rates[-1] < 0.7:
        with pytest.raises(RuntimeError, match="seed 3 did not learn to read the passages: it answers 60%"):
            regimes._adapt(None, None, [make_world(0)], seed=3)
    else:
        regimes._adapt(None, None, [make_world(0)], seed=3)
    assert made == [regimes.ADAPT_STEPS] * calls


def test_regimes_of_the_sweep_differ_only_in_their_passages():
    assert [regime.share for regime in SWEEP.values()] == list(SHARES)
    assert len({(regime.policy, regime.steps) for regime in SWEEP.values()}) == 1
    worlds = [regime.make_world(1) for regime in SWEEP.values()]
    assert len({str(world.train_questions) for world in worlds}) == 1
    assert len({str(world.passages) for world in worlds}) == len(SHARES)


def test_with_repeated_facts_every_search_finds_the_answer():
    world = repeat_facts(make_world(3))
    texts = {p.title: p.text for p in world.passages}
    questions = [*world.train_questions, *world.heldout_questions]
    assert {question.hops for question in questions} == {2, 3}
    assert all(contains_answer(texts[title], [q.answer]) for q in questions for title in q.queries)
    found = [
        contains_answer(text, [q.answer]) for q in repeated_world(3).train_questions[:50] for text in texts.values()
    ]
    assert np.mean(found) < 0.06


def test_real_passages_fit_an_observation_and_are_known():
    passages = real_passages()
    assert len({p.id for p in passages}) == REAL_COUNT
    tokenizer = study_tokenizer(real_words=True)
    ids = [tokenizer(f"{p.title} {p.text}")["input_ids"] for p in passages]
    assert tokenizer.unk_token_id not in {token for of_passage in ids for token in of_passage}
    assert np.quantile([len(of_passage) for of_passage in ids], 0.9) < 28
    world = real_text_world(2)
    assert len({p.id for p in world.passages}) == len(world.passages)
    assert world.passages[: -len(passages)] == make_world(2).passages


def test_a_larger_vocabulary_keeps_what_a_policy_knows():
    small, large = study_tokenizer(), study_tokenizer(real_words=True)
    assert len(large) > 2 * len(small)
    model = make_model(small, seed=1)
    grown = with_more_words(model, small, large, seed=2)
    text = "Question: Who wrote Silent Harbor?\n<search> Silent Harbor</search>"
    ids, more = (torch.tensor([tokenizer(text)["input_ids"]]) for tokenizer in (small, large))
    assert not torch.equal(ids, more)  # the tags have other numbers
    words, places = small.get_vocab(), large.get_vocab()
    order = sorted(words, key=words.get)
    with torch.no_grad():
        expected, found = model(ids).logits, grown(more).logits
    torch.testing.assert_close(found[..., [places[word] for word in order]], expected)
    assert grown.get_output_embeddings().weight is grown.get_input_embeddings().weight


def test_a_row_names_the_passages_that_it_needs():
    world = make_world(0)
    titles = {p.title for p in world.passages}
    rows = [make_row(question) for question in world.train_questions]
    assert all(titles.issuperset(row["supporting_titles"]) for row in rows)
    assert {len(row["supporting_titles"]) for row in rows} == {1, 2, 3}


def test_a_cell_tells_its_processor_and_its_source():
    assert processor()
    assert len(source_digest()) == 12
    assert source_digest() == source_digest()


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
    assert "3/3 seed 0: nearly_solved, two_segment" in second.stdout
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


def test_jobs_run_in_their_order_after_the_jobs_that_they_need(tmp_path):
    cells = [
        Cell(regime, arm, seed) for seed in (0, 1) for regime in ("chance_00", "chance_50") for arm in (GRPO, TSPO)
    ]
    jobs = jobs_of(cells, Scale(), tmp_path)
    of_first_seed = [job.name for job in jobs if "seed 0" in job.name]
    assert of_first_seed[:2] == [
        "seed 0: strong policy",
        "seed 0: policy of noisy_world 0.25/0.6",
    ]  # one for both regimes
    assert of_first_seed[2:] == [f"seed 0: {cell.regime}, {cell.arm}" for cell in cells[:4]]
    for order in (jobs, jobs[::-1]):
        ran = []
        named = [Job(job.name, ran.append, (job.name,), job.needs) for job in order]
        with ThreadPoolExecutor(1) as pool:
            run_jobs(pool, named, 1, lambda name: None)
        assert sorted(ran) == sorted(job.name for job in jobs)
        assert all(job.needs is None or ran.index(job.needs) < ran.index(job.name) for job in jobs)
        if order is jobs:
            assert ran == [job.name for job in jobs]


def test_as_many_jobs_run_at_a_time_as_there_are_processes():
    both = Barrier(2, timeout=60)
    done = []
    jobs = [Job("a", both.wait, ()), Job("b", both.wait, ()), Job("c", done.append, ("c",), needs="a")]
    with ThreadPoolExecutor(8) as pool:
        run_jobs(pool, jobs, 2, done.append)
    assert sorted(done[:2]) == ["a", "b"]
    assert done[2:] == ["c", "c"]


def test_a_failed_job_stops_only_the_jobs_that_need_it(capsys):
    done = []

    def fail():
        raise ValueError("no such world")

    jobs = [
        Job("policy", fail, ()),
        Job("first", done.append, ("first",), needs="policy"),
        Job("second", done.append, ("second",), needs="first"),
        Job("other", done.append, ("other",)),
    ]
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match=r"These jobs failed: policy\.") as raised:
        run_jobs(pool, jobs, 1, lambda name: None)
    assert done == ["other"]
    assert isinstance(raised.value.__cause__, ValueError)
    assert "no such world" in capsys.readouterr().err


def test_every_arm_measures_the_exact_match():
    """The results of a cell are read from its logs."""
    assert {name for name, arm in ARMS.items() if exact_match_reward not in arm.rewards} == set()
    weights = {name: arm.settings["reward_weights"] for name, arm in ARMS.items() if len(arm.rewards) > 1}
    assert weights == {"merged": [1.0, NEAR_MISS], "graded": [0.0, 1.0]}
