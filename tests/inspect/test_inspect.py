"""The inspector: explanations of turns follow from the record, and unreadable lines are reported."""

import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from helpers.paths import ROOT
from helpers.records import SETTINGS, answer, mixed_group, record, rescued_group, search
from tspo_trl.commands.inspect import main
from tspo_trl.inspect import describe, explain_group, explain_turn, load_run, parse_steps, render_page
from tspo_trl.inspect.load import Group
from tspo_trl.inspect.spans import find_answers, in_utf16
from tspo_trl.inspect.terminal import print_run
from tspo_trl.inspect.view import FLAGS
from tspo_trl.inspect.why import composition
from tspo_trl.rollout.log import append_rollouts
from tspo_trl.scoring import contains_answer


@pytest.fixture
def run_dir(tmp_path):
    file = tmp_path / "run" / "trajectories" / "train-rank000.jsonl"
    for step in range(3):
        append_rollouts(file, [*rescued_group(step), *mixed_group(step)])
    (file.parent / "settings.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "run"


# --- golden answers in texts


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("In the U.S., and on a bus", ["US"], ["U.S"]),
        ("The  Eiffel-Tower; eiffel   the tower", ["Eiffel Tower"], ["Eiffel-Tower", "eiffel   the tower"]),
        ("Zoë 🙂 Oslo", ["oslo", "Zoë"], ["Zoë", "Oslo"]),
        ("New York City", ["New York", "York City"], ["New York City"]),
        ("İstanbul is big", ["is big"], ["is big"]),
        ("!!! and more", ["!!!"], ["!!!"]),
        ("nothing", ["some"], []),
        ("", ["a"], []),
    ],
)
def test_golden_answers_are_located_in_texts(text, golds, expected):
    assert [text[begin:end] for begin, end in find_answers(text, golds)] == expected


LETTERS = st.text(alphabet="aA tTheE nN.,'!-\n İΣß🙂", max_size=30)


@given(LETTERS, st.lists(LETTERS, max_size=3))
def test_marked_answers_are_those_that_scoring_finds(text, golds):
    found = find_answers(text, golds)
    assert bool(found) == contains_answer(text, golds)
    assert all(0 <= begin < end <= len(text) for begin, end in found)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))


def test_positions_are_counted_in_utf16_units():
    assert in_utf16("🙂 Oslo", [(2, 6)]) == [3, 7]
    assert in_utf16("a \ud800 b", [(2, 5)]) == [2, 5]


# --- reasons


def test_the_turn_that_found_the_answer_is_explained():
    group = Group(0, rescued_group())
    assert explain_group(group, SETTINGS) == (
        "No rollout is correct, so turns are compared with each other, and a turn that found a golden answer stands "
        "out: 1 of 2 rollouts found one and answered wrong."
    )
    assert explain_turn(group, 1, 0, SETTINGS) == (
        "+0.50: its passages are the first to contain “Oslo”, and the rollout is not correct.",
        "No rollout of the group is correct, so turns are compared: this one got 0.50, the mean of turn 1 over 2 rollouts "
        "is 0.25 → advantage +0.71, made more likely.",
    )
    assert explain_turn(group, 0, 0, SETTINGS) == (
        "Reward 0.00: the outcome, because the rollout is not correct. Its passages contain no golden answer.",
        "No rollout of the group is correct, so turns are compared: this one got 0.00, the mean of turn 1 over 2 rollouts "
        "is 0.25 → advantage −0.71, made less likely.",
    )
    assert explain_turn(group, 1, 1, SETTINGS) == (
        "Reward 0.00: the outcome, because the rollout is not correct. The partial reward went to turn 1.",
        "Turn 2 of all 2 rollouts that have one got 0.00, so there is nothing to compare → advantage 0.00, nothing is "
        "learned.",
    )


def by_chance(chance, weight, **changes):
    """The rescued group with turn advantages that are weighed."""
    records = [r | {"chance": chance, "turn_weight": weight} | changes for r in rescued_group()]
    return [r | {"turn_advantages": [weight * a for a in r["turn_advantages"]]} for r in records]


def test_the_part_of_chance_in_the_finds_is_explained():
    group = Group(0, by_chance(0.31, 0.4))
    assert explain_group(group, SETTINGS) == (
        "No rollout is correct, so turns are compared with each other, and a turn that found a golden answer stands "
        "out: 1 of 2 rollouts found one and answered wrong. A golden answer occurs in 31% of the searches of other "
        "questions: the turn advantages are multiplied by 0.40, the squared share of finds that chance does not explain."
    )
    assert explain_turn(group, 1, 0, SETTINGS)[1] == (
        "No rollout of the group is correct, so turns are compared: this one got 0.50, the mean of turn 1 over 2 rollouts "
        "is 0.25, times 0.40 because of chance → advantage +0.28, made more likely."
    )


def test_finds_that_chance_explains_teach_nothing():
    group = Group(0, by_chance(0.6, 0.0))
    assert explain_group(group, SETTINGS) == (
        "The outcome of all rollouts is 0.00, so none has an advantage: nothing is learned. A golden answer occurs in 60% "
        "of the searches of other questions: chance explains what this group found, so turn rewards do not count."
    )
    assert "nothing is learned" in explain_turn(group, 1, 0, SETTINGS)[1]


@pytest.mark.parametrize(
    ("chance", "weight", "level", "shown"),
    [
        (0.0, 1.0, "stage", False),
        (0.02, 1.0, "stage", True),  # with another guard, chance has no effect
        (None, 1.0, "stage", False),  # an evaluation
        (0.6, 0.0, "trajectory", False),
    ],
)
def test_chance_is_mentioned_where_it_matters(chance, weight, level, shown):
    group = Group(0, by_chance(chance, weight))
    text = explain_group(group, SETTINGS | {"advantage_level": level})
    assert ("searches of other questions" in text) == shown
    assert "multiplied" not in text


def test_a_group_whose_outcomes_differ_is_not_rescued():
    group = Group(0, rescued_group())
    assert composition(group, SETTINGS) == "rescued"
    group.rollouts[0]["outcome"] = -1.0
    assert composition(group, SETTINGS) == "all_wrong"
    assert "so turns are compared with each other" in explain_group(group, SETTINGS)
    assert "learned" not in explain_group(group, SETTINGS)


def test_explanations_of_an_evaluation_do_not_speak_of_learning():
    rescued, mixed = Group(0, rescued_group(), "eval"), Group(0, mixed_group(), "eval")
    wrong = Group(0, [record([answer("Rome")], [0.0], [0.0]) for _ in range(2)], "eval")
    unscored = Group(0, [record([answer("Rome")], [None], [0.0], outcome=None)], "eval")
    texts = [
        sentence
        for group in (rescued, mixed, wrong, unscored)
        for sentence in (explain_group(group, SETTINGS), *explain_turn(group, 0, 0, SETTINGS))
    ]
    assert not any("learned" in text or "likely" in text for text in texts)
    assert "advantage −0.71, not used: this is an evaluation." in texts[2]


def test_a_near_miss_among_correct_rollouts_is_explained():
    group = Group(0, mixed_group())
    assert explain_turn(group, 1, 0, SETTINGS)[1] == (
        "1 of 2 rollouts is correct, so all turns of a rollout share one advantage: its outcome is 0.00, the mean 0.50 "
        "(partial rewards do not count in such a group) → advantage −0.71, made less likely."
    )
    assert explain_turn(group, 0, 0, SETTINGS)[0] == (
        "Reward 1.00: the outcome, because the answer is correct. Its passages are the first to contain “Oslo”; a "
        "correct rollout needs no partial reward."
    )


def test_other_settings_are_explained():
    rollouts = rescued_group()
    everywhere = [0.0, 0.0, 0.5, 0.0]
    deviation = (sum((x - 0.125) ** 2 for x in everywhere) / 3) ** 0.5 + 1e-4
    for r in rollouts:
        r["turn_advantages"] = [(reward - 0.125) / deviation for reward in r["turn_rewards"]]
    reason = explain_turn(Group(0, rollouts), 1, 0, SETTINGS | {"turn_baseline": "group"})[1]
    assert "the mean of all turns of the group over 4 turns is 0.13 → advantage +1.50" in reason
    for r in rollouts:
        r["turn_advantages"] = [r["turn_rewards"][0] - 0.25, 0.0]
    reason = explain_turn(Group(0, rollouts), 1, 0, SETTINGS | {"scale_rewards": "none"})[1]
    assert "is 0.25 → advantage +0.25, made more likely" in reason
    reason = explain_turn(Group(0, rollouts), 1, 0, SETTINGS | {"scale_rewards": "batch"})[1]
    assert "divided by the deviation of the batch" in reason
    # numbers that do not follow from the settings are reported as such
    reason = explain_turn(Group(0, rollouts), 1, 0, SETTINGS)[1]
    assert reason.startswith("Advantage +0.25, made more likely. This does not follow from the logged rewards.")


def test_turns_before_and_after_the_first_occurrence_are_explained():
    turns = [search("one", "x"), search("two", "Oslo"), search("three", "Oslo again"), answer("Rome")]
    group = Group(0, [record(turns, [0.5, 0.5, 0.0, 0.0], [0.0] * 4)])
    before, there, later, _ = (explain_turn(group, 0, k, SETTINGS)[0] for k in range(4))
    assert before == "+0.50: it comes before turn 2, whose passages are the first to contain a golden answer."
    assert there.startswith("+0.50: its passages are the first to contain “Oslo”")
    assert later.endswith("Its passages contain “Oslo” too, but those of turn 2 were the first.")
    assert explain_turn(group, 0, 3, SETTINGS)[1].startswith("The only turn 4 of the group, nothing to compare with")


def test_turns_without_a_reward_are_explained():
    guarded = record([search("Oslo", "Oslo"), answer("Rome")], [0.0, 0.0], [0.0, 0.0], credited_turn=None)
    assert "but `folr_guard` grants nothing" in explain_turn(Group(0, [guarded]), 0, 0, SETTINGS)[0]
    closed = record([search("is it", "yes"), answer("no")], [0.0, 0.0], [0.0, 0.0], golds=("yes",))
    assert "No golden answer of this question may earn" in explain_turn(Group(0, [closed]), 0, 0, SETTINGS)[0]
    failed = record([search("x", retrieval="timeout")], [None], [0.0], outcome=None, status="retrieval_failed")
    assert explain_turn(Group(0, [failed]), 0, 0, SETTINGS)[0] == "No reward: a search of it failed."
    assert explain_group(Group(0, [failed]), SETTINGS).startswith("No rollout could be scored")
    cut = rescued_group()
    cut[1]["trajectory"] = replace(cut[1]["trajectory"], status="truncated")
    reason = explain_turn(Group(0, cut), 1, 0, SETTINGS | {"mask_truncated_completions": True})[1]
    assert reason.endswith("advantage +0.71, but truncated rollouts are left out of the loss.")


def test_every_number_of_a_real_run_is_explained(make_trainer):
    trainer = make_trainer(max_steps=3, num_generations=8, per_device_train_batch_size=16)
    trainer.train()
    run = load_run(trainer.args.output_dir)
    assert run.notes == []
    assert run.settings["num_generations"] == 8
    assert [group.step for group in run.modes["train"]] == [0, 0, 1, 1, 2, 2]
    reasons = [
        explain_turn(group, i, k, run.settings)
        for group in run.modes["train"]
        for i, rollout in enumerate(group.rollouts)
        for k in range(len(rollout["turn_rewards"]))
    ]
    assert not [why for why in reasons if "does not follow" in why[1]]
    assert any(why[0].startswith("+0.50: its passages are the first to contain") for why in reasons)


# --- reading a run


def test_steps_are_parsed_from_numbers_and_ranges():
    assert parse_steps("0-2, 7") == [range(3), range(7, 8)]
    assert parse_steps("0-1000000000") == [range(1_000_000_001)]  # takes no time
    with pytest.raises(ValueError, match=r"must begin with its smaller number, got '5-3' in '1,5-3'"):
        parse_steps("1,5-3")
    with pytest.raises(ValueError, match=r"numbers and ranges such as '0-50,100', got 'x'"):
        parse_steps("1,x")


def test_shown_steps_are_complete_evenly_spaced_and_include_both_ends(tmp_path):
    file = tmp_path / "trajectories" / "train-rank000.jsonl"
    for step in range(20):
        append_rollouts(file, [*rescued_group(step), *mixed_group(step)])
    run = load_run(tmp_path, max_rollouts=23)
    steps = sorted({group.step for group in run.modes["train"]})
    assert len(steps) == 5
    assert (steps[0], steps[-1]) == (0, 19)
    assert all(len(group.rollouts) == 2 for group in run.modes["train"])
    assert any("20 of the 80 rollouts (train) are shown, from 5 of 20 steps" in note for note in run.notes)
    assert {group.step for group in load_run(tmp_path, steps=[3, 99]).modes["train"]} == {3}
    assert {group.step for group in load_run(tmp_path, steps=parse_steps("2-3,18-99")).modes["train"]} == {2, 3, 18, 19}
    assert len(load_run(tmp_path, max_rollouts=3).modes["train"]) == 1  # a whole group of the last step
    with pytest.raises(ValueError, match="no rollouts of these `steps`; the run has steps 0 to 19"):
        load_run(tmp_path, steps=[99])


def test_batches_of_a_step_are_separated_and_ranks_of_a_group_joined(tmp_path):
    first, second = rescued_group()
    for rank, rollout in enumerate((first, second)):
        for _ in range(2):  # an evaluation restarts the numbers of its groups in each batch
            append_rollouts(tmp_path / "trajectories" / f"eval-rank{rank:03d}.jsonl", [rollout])
    groups = load_run(tmp_path).modes["eval"]
    assert [[record["rollout"] for record in group.rollouts] for group in groups] == [[0, 1], [0, 1]]


def test_the_last_run_of_a_folder_is_shown(tmp_path):
    file = tmp_path / "trajectories" / "train-rank000.jsonl"
    for steps in (range(3), range(2)):
        for step in steps:
            append_rollouts(file, rescued_group(step))
    run = load_run(tmp_path)
    assert [group.step for group in run.modes["train"]] == [0, 1]
    assert any("holds 2 runs (train): the last is shown, 6 rollouts of the others are not" in n for n in run.notes)


def test_a_run_that_begins_at_the_last_step_of_another_is_noted(tmp_path):
    file = tmp_path / "trajectories" / "train-rank000.jsonl"
    for _ in range(3):
        append_rollouts(file, [*rescued_group(), *mixed_group()])
    append_rollouts(file, [*rescued_group(1), *mixed_group(1)])
    run = load_run(tmp_path)
    assert len(run.modes["train"]) == 8
    (note,) = [note for note in run.notes if "sampled again" in note]
    assert "train-rank000.jsonl, line 5: the questions of step 0 are sampled again here, by another run" in note
    assert note.endswith("All are shown (train). The same in 1 other lines.")


def test_unreadable_lines_are_noted_and_the_others_are_shown(run_dir):
    file = run_dir / "trajectories" / "train-rank000.jsonl"
    older = json.loads(file.read_text().split("\n")[0])
    del older["credited_turn"]
    wrong = older | {"credited_turn": 0, "turn_rewards": [0.5], "rollout": 7}
    with file.open("a") as log:
        log.write('{"foreign": 1}\n' + json.dumps(older | {"step": 5}) + "\n" + json.dumps(wrong | {"step": 6}) + "\n")
        log.write('{"step": 7, "group": 0, "rollout": 0, "question": "Wh')
    run = load_run(run_dir)
    assert {group.step for group in run.modes["train"]} == {0, 1, 2}
    assert len(run.notes) == 4
    for part in (
        "line 13: not a rollout (JSON, but no object with a 'trajectory')",
        "line 14: a rollout without 'credited_turn': written by another version or program",
        "line 15: 'turn_rewards' must be 2 numbers, found [0.5]",
        "line 16: half a line",
    ):
        assert any(part in note for note in run.notes), part


def test_missing_settings_are_noted(run_dir):
    (run_dir / "trajectories" / "settings.json").unlink()
    assert "trajectories/settings.json is missing" in load_run(run_dir).notes[0]
    (run_dir / "trajectories" / "settings.json").write_text("{")
    assert "settings.json cannot be read" in load_run(run_dir).notes[0]


def scored(group):
    """A group as `tspo evaluate` writes it."""
    found = [r["first_occurrence"] is not None for r in group]
    none = {"credited_turn": None, "turn_rewards": [None] * 2, "turn_advantages": [None] * 2}
    return [{"id": "q", **r, **none, "scores": {"hit": float(hit)}} for r, hit in zip(group, found, strict=True)]


@pytest.mark.parametrize("name", ["trajectories.jsonl", "renamed.jsonl"])
def test_a_folder_of_tspo_evaluate_is_shown_as_an_evaluation(tmp_path, name):
    folder = tmp_path / "model" / "nq"
    failed = scored(rescued_group(group=2))[0] | {"outcome": None}
    append_rollouts(folder / name, [*scored([*rescued_group(), *mixed_group()]), failed])
    (folder / "settings.json").write_text('{"model": "tiny", "search": {}}')  # of the evaluation, not of rewards
    run = load_run(folder)
    assert (run.settings, list(run.modes)) == ({"success_threshold": 1.0}, ["eval"])
    assert not any("settings.json" in note for note in run.notes)
    wrong, _, unscored = run.modes["eval"]
    assert explain_group(wrong, run.settings) == (
        "0 of 2 rollouts are correct; 1 found a golden answer and answered wrong. Turns have rewards and advantages in "
        "training only."
    )
    assert explain_turn(wrong, 1, 0, run.settings) == ("Its passages are the first to contain “Oslo”.",)
    assert explain_turn(wrong, 1, 1, run.settings) == (
        "Outcome 0.00: the answer of the rollout is not correct (exact match).",
    )
    assert explain_turn(unscored, 0, 1, run.settings) == ("Not scored: the generation of the rollout failed.",)
    console = Console(width=100, record=True, file=io.StringIO())
    print_run(run, console, group=2)
    shown = console.export_text()
    assert "nq: evaluation" in shown
    assert "Outcome 1.00: the answer of the rollout is correct (exact match)." in shown
    for word in ("train step", "learned", "trained", "No reward"):
        assert word not in shown
    assert describe(run)


def test_folders_inside_that_have_rollouts_are_named(tmp_path):
    append_rollouts(tmp_path / "evaluation" / "model" / "nq" / "trajectories.jsonl", scored(rescued_group()))
    append_rollouts(tmp_path / "run" / "trajectories" / "train-rank000.jsonl", rescued_group())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"that have rollouts: '.*/evaluation/model/nq', '.*/run'\."):
        load_run(tmp_path)
    for number in range(9):
        append_rollouts(tmp_path / "evaluation" / f"{number}" / "nq" / "trajectories.jsonl", scored(rescued_group()))
    with pytest.raises(FileNotFoundError, match=r"4/nq' and 5 more\."):
        load_run(tmp_path / "evaluation")


def test_a_log_without_a_line_and_a_file_are_errors(tmp_path):
    file = tmp_path / "trajectories" / "train-rank000.jsonl"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(SystemExit, match=r"No line of .*rank000\.jsonl is a rollout\. Nothing has been written yet\."):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"rank000\.jsonl' is a file: give its folder, '.*trajectories'\."):
        main([str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "2"], "--group is for --terminal"),
        (["--mode", "eval"], "--mode is for --terminal"),
        (["--output", "page.html", "--terminal"], "--terminal writes none"),
        (["--output", "."], "--output must be a file, for instance 'inspect.html', got a folder"),
    ],
)
def test_options_without_an_effect_are_refused(run_dir, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([str(run_dir), *arguments])
    assert message in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_named(run_dir):
    file = run_dir / "trajectories" / "train-rank000.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"outcome": 10**400})  # no float can hold it
    file.write_text("\n".join(lines) + "\n")
    (file.parent / "settings.json").write_text('{"folr_alpha": NaN}')
    run = load_run(run_dir)
    assert "settings.json cannot be read: 'folr_alpha' must be finite, found nan" in run.notes[0]
    assert any("line 2: 'outcome' must be a number or null, found 1000" in note for note in run.notes)
    assert render_page(run)


def test_missing_rollouts_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no rollouts in .*log_trajectories=True"):
        main([str(tmp_path)])
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"No line of .*x\.jsonl is a rollout\. The first: .*line 1: not a rollout"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--max_rollouts", "0"])
    assert "--max_rollouts must be at least 1, got 0" in capsys.readouterr().err


# --- output


def test_the_view_contains_each_passage_once_and_the_curves(run_dir):
    index, texts = describe(load_run(run_dir))
    steps = index["modes"]["train"]
    assert [step["step"] for step in steps] == [0, 1, 2]
    expected = {"reward": 0.25, "hit": 0.75, "near_miss": 0.5, "all_wrong": 0.5, "rescued": 0.5, "turns": 2}
    assert steps[0]["values"] == expected
    assert [group["kind"] for group in steps[0]["groups"]] == ["rescued", "mixed"]
    flags = [
        [name for bit, name in enumerate(FLAGS) if r[0] >> bit & 1] for g in steps[0]["groups"] for r in g["rollouts"]
    ]
    assert flags == [["all_wrong", "rescued"], ["near_miss", "all_wrong", "rescued"], ["correct"], ["near_miss"]]
    assert texts["passages"] == [("Title 0", "nothing"), ("Title 0", "In Oslo, 1900"), ("Title 0", "Oslo")]
    group = texts["modes"]["train"][0][0]
    assert group["marks"] == {1: [[], [3, 7]]}
    turn = group["rollouts"][1]["turns"][0]
    assert (turn["reward"], turn["tokens"], turn["logprob"]) == (0.5, [2, 5], -0.375)
    assert json.dumps([index, texts], allow_nan=False)


def test_the_terminal_shows_a_group_in_detail(run_dir):
    console = Console(width=100, record=True, file=io.StringIO())
    print_run(load_run(run_dir), console)
    shown = console.export_text()
    assert "run: train step 2" in shown
    for part in (
        "all wrong, rescued",
        "○◐",
        "golden answer first found here",
        "advantage +0.71",
        "<answer>Rome</answer>",
    ):
        assert part in shown
    with pytest.raises(ValueError, match="`group` must be between 1 and 2 at step 2, got 3"):
        print_run(load_run(run_dir), console, group=3)
    with pytest.raises(ValueError, match=r"`mode` must be one of \['train'\], got 'eval'"):
        print_run(load_run(run_dir), console, mode="eval")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["question"], 3),
        (["golden_answers"], "Oslo"),
        (["rewards"], {"x": "1"}),
        (["outcome"], float("inf")),
        (["turn_advantages"], [1]),
        (["trajectory", "prompt_ids"], None),
        (["trajectory", "status"], None),
        (["trajectory", "turns", 0, "text"], None),
        (["trajectory", "turns", 0, "token_ids"], ["1"]),
        (["trajectory", "turns", 0, "observation_ids"], None),
        (["trajectory", "turns", 0, "logprobs"], 5),
        (["trajectory", "turns", 0, "passages", 0, "score"], None),
        (["trajectory", "turns", 0, "passages", 0, "title"], 1),
    ],
)
def test_values_of_another_type_are_noted(run_dir, path, value):
    file = run_dir / "trajectories" / "train-rank000.jsonl"
    lines = file.read_text().splitlines()
    changed = json.loads(lines[1])
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")
    run = load_run(run_dir)
    assert sum(len(group.rollouts) for group in run.modes["train"]) == 11
    assert "line 2: " in run.notes[0]
    assert "1 groups (train) have fewer than 2 rollouts" in run.notes[1]
    assert describe(run)


@pytest.mark.parametrize("command", [["recipes/inspect_rollouts.py"], ["-m", "tspo_trl.inspect"]])
def test_the_recipe_writes_a_page(run_dir, tmp_path, command):
    output = tmp_path / "new" / "page.html"
    result = subprocess.run(
        [sys.executable, *command, str(run_dir), "--output", str(output), "--steps", "0-1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert f"8 rollouts, 0.1 MB: {output}" in result.stdout
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
