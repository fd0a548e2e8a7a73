"""Options: defaults, checks and the command line."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from trl import GRPOConfig, TrlParser

from tspo_trl import TSPOConfig
from tspo_trl.rollout.limits import SearchLimits


@pytest.fixture
def make(tmp_path):
    return lambda **options: TSPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} | options)


@pytest.fixture
def parse(tmp_path):
    def parse(*arguments):
        common = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        (config,) = TrlParser((TSPOConfig,)).parse_args_and_config([*common, *arguments])
        return config

    return parse


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("protocol", "tags"),
        ("max_searches", 4),
        ("num_passages", 3),
        ("max_turn_tokens", 500),
        ("max_query_tokens", 64),
        ("max_observation_tokens", 500),
        ("folr_alpha", 0.5),
        ("folr_placement", "first"),
        ("folr_guard", "chance"),
        ("advantage_level", "stage"),
        ("turn_baseline", "turn"),
        ("success_threshold", 1.0),
        ("max_completion_length", 4096),
        ("max_retrieval_failure_rate", 0.5),
        ("log_trajectories", True),
    ],
)
def test_defaults(make, parse, name, default):
    for config in (make(), parse()):
        assert getattr(config, name, "no such option") == default


def test_every_option_has_a_help_text_and_is_documented():
    inherited = {option.name for option in fields(GRPOConfig)}
    own = [option for option in fields(TSPOConfig) if option.name not in inherited]
    assert len(own) > 10
    for option in own:
        assert option.metadata.get("help")
        described = SearchLimits if option.name in SearchLimits.__dataclass_fields__ else TSPOConfig
        assert f"{option.name} (`" in described.__doc__
        assert option.name in TSPOConfig.__doc__


def test_options_of_grpo_keep_their_defaults(make, tmp_path):
    config, grpo = make(), GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for option in fields(GRPOConfig):
        if option.name not in ("max_completion_length", "logging_dir", "run_name"):
            assert getattr(config, option.name) == getattr(grpo, option.name), option.name


BAD = [
    ({"num_generations": 1}, "num_generations"),
    ({"num_generations": 0}, "num_generations"),
    ({"max_completion_length": 500}, "max_completion_length"),
    ({"max_completion_length": 200, "max_observation_tokens": 201}, "max_observation_tokens"),
    ({"max_completion_length": 0}, "max_completion_length"),
    ({"max_completion_length": None, "loss_type": "dr_grpo"}, "max_completion_length"),
    ({"max_searches": None}, "max_searches"),
    ({"protocol": "telepathy"}, "protocol"),
    ({"folr_placement": "last"}, "folr_placement"),
    ({"folr_guard": "paranoid"}, "folr_guard"),
    ({"advantage_level": "token"}, "advantage_level"),
    ({"turn_baseline": "batch"}, "turn_baseline"),
    ({"advantage_level": None}, "advantage_level"),
    ({"max_searches": -1}, "max_searches"),
    ({"num_passages": 0}, "num_passages"),
    ({"num_passages": -3}, "num_passages"),
    ({"max_turn_tokens": 0}, "max_turn_tokens"),
    ({"max_turn_tokens": -1}, "max_turn_tokens"),
    ({"max_query_tokens": 0}, "max_query_tokens"),
    ({"max_query_tokens": -1}, "max_query_tokens"),
    ({"max_observation_tokens": 0}, "max_observation_tokens"),
    ({"max_observation_tokens": -500}, "max_observation_tokens"),
    ({"folr_alpha": -0.5}, "folr_alpha"),
    ({"folr_alpha": float("nan")}, "folr_alpha"),
    ({"max_retrieval_failure_rate": -0.01}, "max_retrieval_failure_rate"),
    ({"max_retrieval_failure_rate": 1.01}, "max_retrieval_failure_rate"),
    ({"max_retrieval_failure_rate": float("nan")}, "max_retrieval_failure_rate"),
    ({"retrieval_cache_size": -1}, "retrieval_cache_size"),
    ({"use_vllm": True, "use_transformers_continuous_batching": True}, "use_vllm"),
    ({"stop_on_collapse": ["search"]}, "stop_on_collapse"),
    ({"stop_on_collapse": ["searches"], "warn_on_collapse": False}, "stop_on_collapse"),
    ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex"),
    ({"folr_alpha": "0.5"}, "folr_alpha"),
    ({"folr_alpha": None}, "folr_alpha"),
    ({"folr_alpha": True}, "folr_alpha"),
    ({"success_threshold": "1"}, "success_threshold"),
    ({"max_retrieval_failure_rate": "0.5"}, "max_retrieval_failure_rate"),
    ({"retrieval_cache_size": 10.5}, "retrieval_cache_size"),
    ({"retrieval_cache_dir": 5}, "retrieval_cache_dir"),
    ({"retrieval_log": ["a"]}, "retrieval_log"),
    ({"log_trajectories": "no"}, "log_trajectories"),
    ({"log_trajectories": None}, "log_trajectories"),
    ({"log_trajectories_max_gib": "10"}, "log_trajectories_max_gib"),
    ({"warn_on_collapse": 1}, "warn_on_collapse"),
    ({"stop_on_collapse": "searches"}, "stop_on_collapse"),
    ({"stop_on_collapse": None}, "stop_on_collapse"),
    ({"stop_on_collapse": [1]}, "stop_on_collapse"),
    ({"max_searches": "2"}, "max_searches"),
    ({"num_generations": "8"}, "num_generations"),
    ({"num_generations": 8.0}, "num_generations"),
    ({"per_device_train_batch_size": "8"}, "per_device_train_batch_size"),
    ({"learning_rate": "1e-6"}, "learning_rate"),
    # a run that would train nothing
    ({"max_steps": 0}, "max_steps"),
    ({"max_steps": -2}, "max_steps"),
    ({"num_train_epochs": 0}, "num_train_epochs"),
    ({"num_train_epochs": -1, "max_steps": -1}, "num_train_epochs"),
    ({"num_iterations": 0}, "num_iterations"),
    # numbers outside a range
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ({"per_device_train_batch_size": -4}, "per_device_train_batch_size"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ({"steps_per_generation": 0}, "steps_per_generation"),
    ({"num_generations_eval": -2}, "num_generations_eval"),
    ({"folr_alpha": float("inf")}, "folr_alpha"),
    ({"success_threshold": float("inf")}, "success_threshold"),
    ({"success_threshold": float("-inf")}, "success_threshold"),
    ({"success_threshold": float("nan")}, "success_threshold"),
    ({"temperature": 0}, "temperature"),
    ({"temperature": -1.0}, "temperature"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"top_p": 2}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"beta": -1}, "beta"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    # options of TRL and transformers
    ({"epsilon": "x"}, "epsilon"),
    ({"loss_type": "foo"}, "loss_type"),
    ({"importance_sampling_level": "foo"}, "importance_sampling_level"),
    ({"vllm_mode": "foo"}, "vllm_mode"),
    ({"mask_truncated_completions": "no"}, "mask_truncated_completions"),
    ({"max_steps": None}, "max_steps"),
    ({"max_steps": [1]}, "max_steps"),
    ({"max_steps": 1.5}, "max_steps"),
    ({"seed": None}, "seed"),
    ({"output_dir": 3}, "output_dir"),
    ({"reward_weights": 1.0}, "reward_weights"),
    ({"reward_weights": ["a"]}, "reward_weights"),
    ({"model_init_kwargs": "abc"}, "model_init_kwargs"),
    ({"model_init_kwargs": 3}, "model_init_kwargs"),
    ({"generation_kwargs": "{bad"}, "generation_kwargs"),
    ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs"),
    ({"optim_args": "foo"}, "optim_args"),
    ({"optim": "foo"}, "optim"),
    ({"eval_strategy": False}, "eval_strategy"),
]


@pytest.mark.parametrize(("options", "name"), BAD, ids=[str(options) for options, _ in BAD])
def test_the_error_for_a_bad_value_names_the_option(make, options, name):
    with pytest.raises(ValueError, match=f"`{name}") as error:
        make(**options)
    assert str(options.get(name, "")) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_generations": 2},
        {"max_searches": 0},
        {"max_searches": 0, "max_completion_length": 256},
        {"num_passages": 1},
        {"max_turn_tokens": 1, "max_query_tokens": 1},
        {"max_completion_length": 501},
        {"max_completion_length": None},
        {"max_completion_length": 100, "max_observation_tokens": 99},
        {"folr_alpha": 0.0},
        {"max_retrieval_failure_rate": 0.0},
        {"max_retrieval_failure_rate": 1.0},
        {"folr_placement": "up_to_first", "folr_guard": "none", "turn_baseline": "group"},
        {"folr_guard": "strict", "advantage_level": "trajectory"},
        {"advantage_level": "turn"},
        {"protocol": "tool_call"},
        {"success_threshold": 0.8},
        {"warn_on_collapse": False},
        {"stop_on_collapse": ["searches", "entropy"]},
        {"folr_alpha": 1, "success_threshold": 1},
        {"log_trajectories_max_gib": None, "retrieval_cache_dir": "cache"},
        {"max_steps": 5, "num_train_epochs": 0},
        {"max_grad_norm": float("inf"), "learning_rate": 0},
        {"resume_from_checkpoint": True, "num_generations_eval": None, "epsilon_high": None},
        {"generation_kwargs": {"min_p": 0.1}, "model_init_kwargs": {"dtype": torch.float32}},
        {"retrieval_log": Path("log"), "reward_weights": [1, 0.5], "num_generations": np.int64(4)},
    ],
    ids=str,
)
def test_valid_options_are_kept(make, options):
    config = make(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_options_are_read_from_the_command_line(parse):
    config = parse(
        *"--advantage_level turn --folr_alpha 0.3 --max_searches 2 --folr_guard strict --turn_baseline group".split(),
        *"--folr_placement up_to_first --success_threshold 0.8 --log_trajectories false --learning_rate 2e-5".split(),
    )
    assert config.advantage_level == "turn"
    assert config.folr_alpha == 0.3
    assert config.max_searches == 2
    assert config.folr_guard == "strict"
    assert config.turn_baseline == "group"
    assert config.folr_placement == "up_to_first"
    assert config.success_threshold == 0.8
    assert config.log_trajectories is False
    assert config.learning_rate == 2e-5  # an option of TRL beside ours


@pytest.mark.parametrize(
    "name",
    [
        *("max_new_tokens", "num_beams", "prompt_lookup_num_tokens", "num_return_sequences"),
        *("stop", "eos_token_id", "stop_token_ids", "ignore_eos", "structured_outputs", "token_healing"),
    ],
)
def test_generation_options_that_cannot_apply_are_refused(make, name):
    with pytest.raises(ValueError, match=f"`generation_kwargs` cannot have '{name}': "):
        make(generation_kwargs={"repetition_penalty": 1.1, name: 2})


@pytest.mark.parametrize("name", ["output_dir", "retrieval_cache_dir", "retrieval_log"])
def test_a_folder_that_is_a_file_is_refused(make, tmp_path, name):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"`{name}` must be a folder, but '.*file' is a file"):
            make(**{name: str(path)})


@pytest.mark.parametrize(
    "name", ["protocol", "advantage_level", "folr_placement", "folr_guard", "turn_baseline", "max_searches"]
)
def test_an_unknown_choice_on_the_command_line_ends_the_program(parse, capsys, name):
    with pytest.raises(SystemExit) as error:
        parse(f"--{name}", "nonsense")
    assert error.value.code != 0
    message = capsys.readouterr().err
    assert name in message
    assert "nonsense" in message


def test_options_are_read_from_a_file_and_the_command_line_wins(parse, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("advantage_level: turn\nfolr_alpha: 0.25\nmax_searches: 2\n")
    config = parse("--config", str(path), "--folr_alpha", "0.75")
    assert (config.advantage_level, config.folr_alpha, config.max_searches) == ("turn", 0.75, 2)


def test_the_error_for_an_unknown_choice_in_a_file_names_the_option(parse, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("advantage_level: nonsense\n")
    with pytest.raises(ValueError, match=r"`advantage_level`.*'nonsense'"):
        parse("--config", str(path))
