"""Turns and trajectories: flattening into tokens, the fields that scores read, and JSON."""

import json

import pytest

from tspo_trl import Passage, Trajectory, Turn


def example():
    return Trajectory(
        prompt_ids=[1, 2, 3],
        turns=[
            Turn(
                token_ids=[10, 11],
                logprobs=[-0.5, -1.5],
                text="<search>capital</search>",
                action="search",
                content="capital",
                observation_ids=[20, 21, 22],
                passages=[Passage("7", "Paris", "is a capital", 2.5), Passage("8", "", "Rome")],
                retrieval="ok",
            ),
            Turn(token_ids=[12], logprobs=[-0.1], text="hm", action="invalid", observation_ids=[30]),
            Turn(token_ids=[13, 14], logprobs=[-2.0, 0.0], text="<answer>Zoë</answer>", action="answer", content="Zoë"),
        ],
        status="answered",
    )


def test_completion_is_turns_and_observations_in_order():
    assert example().completion_ids == [10, 11, 20, 21, 22, 12, 30, 13, 14]


def test_loss_mask_excludes_observations():
    assert example().loss_mask == [1, 1, 0, 0, 0, 1, 0, 1, 1]


def test_turn_index_numbers_sampled_tokens_from_zero():
    assert example().turn_index == [0, 0, -1, -1, -1, 1, -1, 2, 2]


def test_logprobs_are_zero_on_observations():
    assert example().logprobs == [-0.5, -1.5, 0.0, 0.0, 0.0, -0.1, 0.0, -2.0, 0.0]


def test_logprobs_are_unknown_if_a_turn_has_none():
    trajectory = example()
    trajectory.turns[1].logprobs = None
    assert trajectory.logprobs is None


def test_flattening_does_not_change_turns():
    trajectory, untouched = example(), example()
    for name in ("completion_ids", "loss_mask", "turn_index", "logprobs"):
        getattr(trajectory, name).append(99)
        assert len(getattr(trajectory, name)) == 9
    assert trajectory == untouched


def test_a_trajectory_without_turns_is_empty():
    trajectory = Trajectory(prompt_ids=[1])
    assert trajectory.completion_ids == trajectory.loss_mask == trajectory.turn_index == trajectory.logprobs == []
    assert trajectory.answer is None
    assert trajectory.queries == trajectory.passage_texts == []
    assert trajectory.status == "no_answer"


def test_turns_do_not_share_their_defaults():
    first, second = Turn(token_ids=[1]), Turn(token_ids=[2])
    first.observation_ids.append(5)
    first.passages.append(Passage("0", "", "x"))
    assert second.observation_ids == []
    assert second.passages == []


def test_the_answer_is_that_of_the_last_turn():
    trajectory = example()
    assert trajectory.answer == "Zoë"
    trajectory.turns.append(Turn(token_ids=[15], action="none"))
    assert trajectory.answer is None
    trajectory.turns.append(Turn(token_ids=[16], action="search", content="Rome"))
    assert trajectory.answer is None


def test_an_empty_answer_is_an_answer():
    assert Trajectory(prompt_ids=[], turns=[Turn(token_ids=[1], action="answer", content="")]).answer == ""


def test_queries_are_empty_for_turns_that_do_not_search():
    assert example().queries == ["capital", "", ""]


def test_passage_texts_hold_titles_and_texts():
    first, second, third = example().passage_texts
    assert second is None
    assert third is None
    for part in ("Paris", "is a capital", "Rome"):
        assert part in first.split("\n")


def test_constructors_accept_only_keyword_arguments():
    with pytest.raises(TypeError):
        Turn([1])
    with pytest.raises(TypeError):
        Trajectory([1])


def test_a_trajectory_is_unchanged_by_json():
    trajectory = example()
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory


def test_to_dict_is_a_copy():
    trajectory = example()
    data = trajectory.to_dict()
    data["turns"][0]["token_ids"].append(99)
    data["prompt_ids"].append(99)
    assert trajectory == example()


def test_from_dict_ignores_unknown_keys_of_trajectories_and_turns():
    data = example().to_dict()
    data["later"] = 1
    data["turns"][0]["later"] = 2
    assert Trajectory.from_dict(data) == example()


def test_from_dict_ignores_unknown_keys_of_passages():
    data = example().to_dict()
    data["turns"][0]["passages"][0]["later"] = 3
    assert Trajectory.from_dict(data) == example()


def test_from_dict_does_not_require_optional_keys_of_turns():
    data = {"prompt_ids": [1], "turns": [{"token_ids": [2]}], "status": "truncated"}
    assert Trajectory.from_dict(data) == Trajectory(prompt_ids=[1], turns=[Turn(token_ids=[2])], status="truncated")
