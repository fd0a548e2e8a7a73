"""The log of rollouts: records are read back unchanged, and bad lines are reported with file and line."""

import json
import math
import os

import pytest
from transformers import TrainerCallback

from tspo_trl import Passage, Trajectory, Turn, read_rollouts
from tspo_trl.rollout.facts import RolloutFacts
from tspo_trl.rollout.log import append_rollouts, find_logs, log_files, read_settings, rollout_record

NAN = float("nan")


def make_trajectory(answer="Zoë 東京 \u2028 🙂"):
    return Trajectory(
        prompt_ids=[1, 2],
        turns=[
            Turn(
                token_ids=[3, 4],
                logprobs=[-0.25, -1e-9],
                text='<search>"Zoë"\n\t</search>',
                action="search",
                content='"Zoë"',
                observation_ids=[5],
                passages=[Passage("p1", "Título", "línea\nuno\u2028dos", 1.5), Passage("p2", "", "")],
                retrieval="ok",
            ),
            Turn(token_ids=[6], text=f"<answer>{answer}</answer>", action="answer", content=answer),
        ],
        status="answered",
    )


def make_record(trajectory=None, **changes):
    facts = dict.fromkeys(RolloutFacts._fields, 0) | {"turns": 2, "searches": 1, "occurrence": 0, "credited": 0}
    facts |= changes.pop("facts", {})
    arguments = {
        "row": {"question": "Who is Zoë?", "golden_answers": ["Zoë", "東京"], "prompt": "unused"},
        "rewards": [0.0, 0.5],
        "outcome": 0.5,
        "facts": RolloutFacts(**facts),
        "turn_rewards": [1.0, 0.5, 7.0],
        "turn_advantages": [0.25, -0.25, 7.0],
        "reward_names": ["exact", "f1"],
        "step": 3,
        "group": 2,
        "rollout": 1,
    }
    return rollout_record(trajectory or make_trajectory(), **(arguments | changes))


def test_a_record_holds_the_rollout_and_its_credit():
    trajectory = make_trajectory()
    assert make_record(trajectory) == {
        "step": 3,
        "group": 2,
        "rollout": 1,
        "question": "Who is Zoë?",
        "golden_answers": ["Zoë", "東京"],
        "rewards": {"exact": 0.0, "f1": 0.5},
        "outcome": 0.5,
        "first_occurrence": 0,
        "credited_turn": 0,
        "chance": None,
        "turn_weight": 1.0,
        "turn_rewards": [1.0, 0.5],
        "turn_advantages": [0.25, -0.25],
        "trajectory": trajectory,
    }


def test_occurrence_and_credit_may_differ_or_be_none():
    record = make_record(facts={"occurrence": 0, "credited": 1})
    assert (record["first_occurrence"], record["credited_turn"]) == (0, 1)
    record = make_record(facts={"occurrence": 1, "credited": -1})
    assert (record["first_occurrence"], record["credited_turn"]) == (1, None)
    record = make_record(facts={"occurrence": -1, "credited": -1})
    assert (record["first_occurrence"], record["credited_turn"]) == (None, None)


def test_nan_becomes_none(tmp_path):
    record = make_record(rewards=[NAN, 0.0], outcome=NAN, turn_rewards=[NAN, NAN, NAN], turn_advantages=[0.0, 0.0, 0.0])
    assert record["rewards"] == {"exact": None, "f1": 0.0}
    assert record["outcome"] is None
    assert record["turn_rewards"] == [None, None]
    append_rollouts(tmp_path / "log.jsonl", [record])
    assert "NaN" not in (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert next(read_rollouts(tmp_path / "log.jsonl"))["outcome"] is None


def test_appending_twice_reads_back_equal_trajectories(tmp_path):
    path = tmp_path / "new" / "folder" / "log.jsonl"
    first, second, third = (make_trajectory(answer) for answer in ("one", "Zoë 東京 \u2028 🙂", ""))
    append_rollouts(path, [make_record(first, step=0), make_record(second, step=0, rollout=2)])
    append_rollouts(path, [make_record(third, step=1)])
    records = list(read_rollouts(path))
    assert [r["trajectory"] for r in records] == [first, second, third]
    assert [(r["step"], r["rollout"]) for r in records] == [(0, 1), (0, 2), (1, 1)]
    assert records[1] == make_record(second, step=0, rollout=2)
    assert all(isinstance(r["trajectory"].turns[0].passages[0], Passage) for r in records)


def test_a_rollout_is_one_line_of_readable_json(tmp_path):
    append_rollouts(tmp_path / "log.jsonl", [make_record(), make_record()])
    content = (tmp_path / "log.jsonl").read_bytes().decode("utf-8")
    assert content.count("\n") == 2
    assert content.endswith("\n")
    assert "東京" in content
    assert json.loads(content.split("\n")[0])["trajectory"]["status"] == "answered"


def test_appending_does_not_change_the_records(tmp_path):
    record = make_record()
    append_rollouts(tmp_path / "log.jsonl", [record])
    assert record == make_record()


def test_other_values_of_a_record_are_kept(tmp_path):
    append_rollouts(tmp_path / "log.jsonl", [{**make_record(), "note": [1, "x"]}])
    assert next(read_rollouts(tmp_path / "log.jsonl"))["note"] == [1, "x"]


def test_turns_without_logprobs_are_read_back(tmp_path):
    trajectory = Trajectory(prompt_ids=[], turns=[Turn(token_ids=[1], retrieval="timeout")], status="retrieval_failed")
    append_rollouts(tmp_path / "log.jsonl", [make_record(trajectory)])
    assert next(read_rollouts(tmp_path / "log.jsonl"))["trajectory"] == trajectory


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "trajectory": {"prompt_ids": [1], "turns"',  # left by a killed run
        "not json",
        "",
        "[1, 2]",
        "3",
        "null",
        '{"step": 1}',
        '{"trajectory": null}',
        '{"trajectory": {"prompt_ids": [1], "status": "answered"}}',
        '{"trajectory": {"prompt_ids": [1], "turns": [{"action": "answer"}], "status": "answered"}}',
        '{"trajectory": {"prompt_ids": [1], "turns": 5, "status": "answered"}}',
        '{"trajectory": {"prompt_ids": [1], "turns": ["turn"], "status": "answered"}}',
        '{"trajectory": {"prompt_ids": [1], "turns": [null], "status": "answered"}}',
        '{"trajectory": {"prompt_ids": [1], "turns": [{"token_ids": [1], "passages": ["x"]}], "status": "answered"}}',
    ],
)
def test_a_bad_line_is_skipped_and_reported_with_file_and_line(tmp_path, line):
    path = tmp_path / "rank_0.jsonl"
    append_rollouts(path, [make_record()])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    append_rollouts(path, [make_record(step=4)])
    with pytest.warns(UserWarning, match=r"rank_0\.jsonl, line 2: not ") as warned:
        assert [record["step"] for record in read_rollouts(path)] == [3, 4]
    assert len(warned) == 1
    problems = []
    assert len(list(read_rollouts(path, on_problem=problems.append))) == 2
    assert problems == [str(warned[0].message)]


def test_warning_of_an_incomplete_last_line_names_its_possible_causes(tmp_path):
    path = tmp_path / "log.jsonl"
    append_rollouts(path, [make_record(), make_record()])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match=r"log\.jsonl, line 2: half a line: the run is writing it, or was killed"):
        assert list(read_rollouts(path)) == [make_record()]


def test_bytes_that_are_not_text_are_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    append_rollouts(path, [make_record()])
    with path.open("ab") as file:
        file.write(b"\xff\xfe\x00\n" + b"[" * 100_000 + b"\n")
    problems = []
    assert list(read_rollouts(path, on_problem=problems.append)) == [make_record()]
    assert ["line 2: not JSON" in problems[0], "line 3: not JSON" in problems[1]] == [True, True]


def test_a_folder_is_read_in_order_of_its_file_names(tmp_path):
    for name, step in (("b.jsonl", 2), ("a.jsonl", 1), ("c.jsonl", 3)):
        append_rollouts(tmp_path / name, [make_record(step=step), make_record(step=10 * step)])
    (tmp_path / "notes.txt").write_text("not a log")
    assert [r["step"] for r in read_rollouts(tmp_path)] == [1, 10, 2, 20, 3, 30]
    assert [r["step"] for r in read_rollouts(str(tmp_path))] == [1, 10, 2, 20, 3, 30]


def test_two_runs_in_one_folder_are_reported(tmp_path):
    for rank in (0, 1):
        places = ((0, 0), (1, 0), (1, 1), (2, 0))  # a step may have several groups
        records = [make_record(step=step, group=group) for step, group in places]
        append_rollouts(tmp_path / f"train-rank00{rank}.jsonl", records)
    append_rollouts(tmp_path / "train-rank001.jsonl", [make_record(step=step) for step in (0, 1)])
    append_rollouts(tmp_path / "train-rank001.00001.jsonl", [make_record(step=step) for step in (2, 1)])
    problems = []
    assert len(list(read_rollouts(tmp_path, on_problem=problems.append))) == 12
    assert [problem.partition(", line ")[2][:41] for problem in problems] == [
        "5: another run begins here (step 0 after ",
        "2: another run begins here (step 1 after ",
    ]
    with pytest.warns(UserWarning, match=r"train-rank001\.jsonl, line 5: another run begins here .*all runs are read"):
        list(read_rollouts(tmp_path / "train-rank001.jsonl"))


def test_a_run_that_begins_at_the_last_step_of_another_is_reported(tmp_path):
    """As trials of one step, and a run after one that was killed after its first evaluation."""
    file = tmp_path / "train-rank000.jsonl"
    places = [(group, rollout) for group in (0, 1) for rollout in (0, 1)]
    for _ in range(3):
        append_rollouts(file, [make_record(step=0, group=group, rollout=rollout) for group, rollout in places])
    append_rollouts(file, [make_record(step=1, group=0, rollout=0)])
    second = make_record(step=1, group=0, rollout=0) | {"question": "of a second generation phase"}
    append_rollouts(file, [second])
    problems = []
    assert len(list(read_rollouts(tmp_path, on_problem=problems.append))) == 14
    assert [problem.partition(", line ")[2][:52] for problem in problems] == [
        "5: the questions of step 0 are sampled again here, b",
        "9: the questions of step 0 are sampled again here, b",
    ]


def test_a_bad_line_in_a_folder_is_reported_with_its_file(tmp_path):
    append_rollouts(tmp_path / "a.jsonl", [make_record()])
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.warns(UserWarning, match=r"b\.jsonl.*line 1"):
        assert len(list(read_rollouts(tmp_path))) == 1


def test_the_folder_of_a_run_can_be_read(tmp_path):
    append_rollouts(tmp_path / "run" / "trajectories" / "train-rank000.jsonl", [make_record()])
    assert list(read_rollouts(tmp_path / "run")) == [make_record()]


def test_missing_rollouts_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_rollouts(tmp_path / "nowhere.jsonl"))
    with pytest.raises(
        FileNotFoundError, match=r"no rollouts in .*: neither trajectories/\*\.jsonl nor \*\.jsonl.*log_traj"
    ):
        list(read_rollouts(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        find_logs(tmp_path / "nowhere")


def write_steps(path, steps, max_bytes):
    for step in steps:
        append_rollouts(path, [make_record(step=step)], max_bytes=max_bytes)


def test_a_bounded_log_keeps_its_recent_half_and_thins_the_older_half(tmp_path):
    path = tmp_path / "train-rank000.jsonl"
    append_rollouts(path, [make_record(step=100_000)])
    line = path.stat().st_size
    path.unlink()
    max_bytes = 32 * 2 * line  # 2 rollouts per file
    for step in range(1000):
        append_rollouts(path, [make_record(step=100_000 + step)], max_bytes=max_bytes)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= max_bytes
    steps = [record["step"] - 100_000 for record in read_rollouts(path.parent)]
    assert steps == sorted(steps)
    assert steps[-32:] == list(range(968, 1000))  # the recent half of 32 files
    # each file holds 2 steps; every 32nd file is kept, at most 16 files
    assert steps[:-32] == [step for step in range(968) if (step // 2) % 32 == 0]
    assert log_files(path)[0] == path


def test_a_resumed_run_ends_with_the_same_files_as_an_uninterrupted_run(tmp_path):
    """Files that were dropped stay dropped, and files that were started after the checkpoint are removed."""
    line = len(json.dumps({**make_record(), "trajectory": make_trajectory().to_dict()}, ensure_ascii=False).encode())
    max_bytes = 32 * 2 * (line + 4)
    for name in ("whole", "killed"):
        write_steps(tmp_path / name / "log.jsonl", range(150), max_bytes)
    killed = tmp_path / "killed" / "log.jsonl"
    sizes = {file: file.stat().st_size for file in log_files(killed)}
    write_steps(killed, range(150, 170), max_bytes)  # lost steps
    for file in log_files(killed):
        if file in sizes:
            os.truncate(file, sizes[file])
        else:
            file.unlink()
    for name, first in (("whole", 150), ("killed", 150)):
        write_steps(tmp_path / name / "log.jsonl", range(first, 200), max_bytes)
    whole, killed = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert whole == killed
    assert 24 <= len(whole) <= 32


def test_large_single_writes_stay_within_the_bound(tmp_path):
    path = tmp_path / "log.jsonl"
    append_rollouts(path, [make_record()] * 8)
    max_bytes = 5 * path.stat().st_size
    for step in range(30):
        append_rollouts(path, [make_record(step=step)] * 8, max_bytes=max_bytes)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= max_bytes
    steps = sorted({record["step"] for record in read_rollouts(tmp_path)})
    assert steps[-2:] == [28, 29]
    assert len(steps) >= 3
    append_rollouts(
        path, [make_record(step=30)] * 80, max_bytes=max_bytes
    )  # larger than the bound on its own, but kept
    assert {record["step"] for record in read_rollouts(tmp_path)} == {30}


def test_logs_of_other_processes_are_not_changed(tmp_path):
    for name in ("train-rank000.jsonl", "train-rank001.jsonl", "eval-rank000.jsonl"):
        write_steps(tmp_path / name, range(10), 40_000)
    assert len(log_files(tmp_path / "train-rank000.jsonl")) == len(list(tmp_path.iterdir())) / 3 > 2
    assert [r["step"] for r in read_rollouts(tmp_path)] == [*range(10)] * 3
    steps = [r["step"] for file in log_files(tmp_path / "train-rank001.jsonl") for r in read_rollouts(file)]
    assert steps == list(range(10))


def test_a_bounded_run_resumes_exactly(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "log_trajectories_max_gib": 1.5e-3}

    def train(name, **more):
        folder = tmp_path / name
        trainer = make_trainer(output_dir=str(folder), max_steps=8, **options, **more)
        return trainer, folder / "trajectories"

    whole, files = train("whole")
    whole.train()
    expected = {file.name: file.read_bytes() for file in files.glob("*.jsonl")}
    assert len(expected) > 2
    assert json.loads((files / "settings.json").read_text())["folr_alpha"] == whole.args.folr_alpha

    class Killed(Exception):
        pass

    class KillAtStepFive(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    killed, files = train("killed", callbacks=[KillAtStepFive()])
    with pytest.raises(Killed):
        killed.train()
    resumed, _ = train("killed")
    resumed.train(resume_from_checkpoint=True)
    assert {file.name: file.read_bytes() for file in files.glob("*.jsonl")} == expected


def test_a_bound_that_is_not_positive_is_an_error(make_trainer):
    with pytest.raises(ValueError, match=r"`log_trajectories_max_gib` must be above 0, or None for no limit, got 0"):
        make_trainer(log_trajectories_max_gib=0)


def test_unreadable_settings_are_reported(tmp_path):
    assert read_settings(tmp_path) == {}
    for content in ("{", "[]"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
            read_settings(tmp_path)


def test_text_that_cannot_be_encoded_does_not_lose_the_rollouts(tmp_path):
    # JSON corpora may hold lone surrogates, and writing the log must not stop training
    trajectory = make_trajectory()
    trajectory.turns[0].passages[0] = Passage("p\ud800", "cut \udfff title", "text")
    append_rollouts(tmp_path / "log.jsonl", [make_record(trajectory), make_record()])
    first, second = read_rollouts(tmp_path / "log.jsonl")
    assert first["trajectory"].completion_ids == trajectory.completion_ids
    assert second["trajectory"] == make_trajectory()


def test_numbers_are_kept_exactly(tmp_path):
    trajectory = make_trajectory()
    trajectory.turns[0].logprobs = [-0.1 - 1e-16, -math.pi]
    append_rollouts(tmp_path / "log.jsonl", [make_record(trajectory, outcome=1 / 3)])
    record = next(read_rollouts(tmp_path / "log.jsonl"))
    assert record["trajectory"].turns[0].logprobs == [-0.1 - 1e-16, -math.pi]
    assert record["outcome"] == 1 / 3
