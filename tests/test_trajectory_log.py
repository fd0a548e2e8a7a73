"""The log of rollouts: what is written can be read back, and a bad line is named."""

import json
import math

import pytest

from tspo_trl import Passage, Trajectory, Turn, read_rollouts
from tspo_trl.metrics import FACTS
from tspo_trl.trajectory_log import append_rollouts, rollout_record

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
    facts = dict.fromkeys(FACTS, 0) | {"turns": 2, "searches": 1, "occurrence": 0, "credited": 0}
    facts |= changes.pop("facts", {})
    arguments = {
        "row": {"question": "Who is Zoë?", "golden_answers": ["Zoë", "東京"], "prompt": "unused"},
        "rewards": [0.0, 0.5],
        "outcome": 0.5,
        "facts": [facts[name] for name in FACTS],
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
        "turn_rewards": [1.0, 0.5],
        "turn_advantages": [0.25, -0.25],
        "trajectory": trajectory,
    }


def test_occurrence_and_credit_may_differ_and_none_is_none():
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


def test_turns_that_were_never_sampled_with_logprobs_read_back(tmp_path):
    trajectory = Trajectory(prompt_ids=[], turns=[Turn(token_ids=[1], retrieval="timeout")], status="retrieval_failed")
    append_rollouts(tmp_path / "log.jsonl", [make_record(trajectory)])
    assert next(read_rollouts(tmp_path / "log.jsonl"))["trajectory"] == trajectory


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "trajectory": {"prompt_ids": [1], "turns"',  # what a killed run leaves
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
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "rank_0.jsonl"
    append_rollouts(path, [make_record()])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    rollouts = read_rollouts(path)
    assert next(rollouts)["step"] == 3  # the lines before it can be read
    with pytest.raises(ValueError, match=r"rank_0\.jsonl.*line 2"):
        next(rollouts)


def test_a_folder_is_read_in_order_of_its_file_names(tmp_path):
    for name, step in (("b.jsonl", 2), ("a.jsonl", 1), ("c.jsonl", 3)):
        append_rollouts(tmp_path / name, [make_record(step=step), make_record(step=10 * step)])
    (tmp_path / "notes.txt").write_text("not a log")
    assert [r["step"] for r in read_rollouts(tmp_path)] == [1, 10, 2, 20, 3, 30]
    assert [r["step"] for r in read_rollouts(str(tmp_path))] == [1, 10, 2, 20, 3, 30]


def test_a_bad_line_in_a_folder_is_named_by_its_file(tmp_path):
    append_rollouts(tmp_path / "a.jsonl", [make_record()])
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"b\.jsonl.*line 1"):
        list(read_rollouts(tmp_path))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_rollouts(tmp_path / "nowhere.jsonl"))


def test_text_that_cannot_be_encoded_does_not_lose_the_rollouts(tmp_path):
    # JSON corpora may hold lone surrogates, and a log must not end a training
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
