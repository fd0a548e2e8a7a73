"""Reward functions that are named in a command line or a configuration."""

import re
import sys

import pytest

from tspo_trl.commands.rewards import REWARDS, find_rewards
from tspo_trl.commands.train import check_inputs, parse_arguments, report
from tspo_trl.rewards import exact_match_reward, format_reward


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the path, as with a console script."""
    (tmp_path / "rewards_of_mine.py").write_text(
        "limit = 3\n\ndef short_reward(trajectories, **kwargs):\n    return [1.0] * len(trajectories)\n"
        "\ndef format_reward(trajectories, **kwargs):\n    return [0.0] * len(trajectories)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "rewards_of_mine"
    sys.modules.pop("rewards_of_mine", None)


def test_functions_by_name_and_by_import_path(own_module):
    found = find_rewards(["exact_match_reward", "format_reward", f"{own_module}.short_reward"], [1.0, 0.1, 0.5])
    assert found[:2] == [exact_match_reward, format_reward]
    assert found[2](["a", "b"]) == [1.0, 1.0]
    assert find_rewards(["tspo_trl.rewards.format_reward"]) == [format_reward]
    assert find_rewards(None) is None
    assert find_rewards(None, [2.0]) is None  # the weight of the default


def test_every_function_of_the_library_has_a_name():
    import tspo_trl.rewards

    assert set(REWARDS) == {name for name in vars(tspo_trl.rewards) if name.endswith("_reward")}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["exact_match"], None, "'exact_match' is neither one of ['exact_match_reward', 'f1_reward', 'format_reward']"),
        ([], None, "must name at least one"),
        (["nowhere.my_reward"], None, "there is no module 'nowhere'"),
        (["nowhere.deeper.my_reward"], None, "there is no module 'nowhere.deeper'"),
        (["rewards_of_mine.long_reward"], None, "'long_reward' does not exist in"),
        (["rewards_of_mine.limit"], None, "'limit' has the type int in"),
        (["format_reward", "rewards_of_mine.format_reward"], None, "two functions have the name 'format_reward'"),
        (["format_reward"], [1.0, 0.1], "got [1.0, 0.1] for ['format_reward']"),
        (None, [1.0, 0.1], "got [1.0, 0.1] for the exact match alone, because `reward_funcs` is not given"),
    ],
)
def test_mistakes(own_module, names, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_rewards(names, weights)


def test_a_module_whose_own_import_fails_says_which(own_module):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        find_rewards(["broken_rewards.my_reward"])


def test_a_mistake_is_found_before_anything_is_loaded(tmp_path):
    options = ["--dataset_name", "demo", "--model_name_or_path", "demo", "--output_dir", tmp_path, "--bf16", "false"]
    parsed = parse_arguments([*map(str, options), "--reward_funcs", "exact_match"])
    with pytest.raises(ValueError, match="`reward_funcs`: 'exact_match'"):
        check_inputs(*parsed)
    assert not list(tmp_path.iterdir())


def test_one_function_in_a_configuration(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("reward_funcs: f1_reward\n")
    script_args, *_ = parse_arguments(["--config", str(file), "--output_dir", str(tmp_path)])
    assert script_args.reward_funcs == ["f1_reward"]


def test_the_table_has_the_outcome_if_it_is_not_the_exact_match(capsys):
    exact = {"eval_reward": 0.5, "eval_rewards/exact_match_reward/mean": 0.5}
    report(exact, exact, "")
    assert "Outcome" not in capsys.readouterr().out
    both = {"eval_reward": 0.59, "eval_rewards/exact_match_reward/mean": 0.5, "eval_rewards/format_reward/mean": 0.9}
    report(both, both, "")
    found = capsys.readouterr().out
    assert found.index("Outcome") < found.index("0.590") < found.index("Exact match") < found.index("0.500")
    report({"eval_reward": 0.3}, {"eval_reward": 0.3, "eval_rewards/f1_reward/mean": 0.3}, "")
    found = capsys.readouterr().out
    assert "Outcome" in found
    assert "Exact match" not in found
