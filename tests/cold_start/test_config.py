"""Options of the cold start."""

import pytest

from tspo_trl import ColdStartConfig

BAD = [
    ({"max_steps": 0}, "max_steps"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs"),
    ({"num_demonstrations": 0}, "num_demonstrations"),
    ({"num_demonstrations": 2.5}, "num_demonstrations"),
    ({"failed_share": None}, "failed_share"),
    ({"failed_share": 1.5}, "failed_share"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ({"learning_rate": -1}, "learning_rate"),
    ({"protocol": "telepathy"}, "protocol"),
    ({"loss_type": "grpo"}, "loss_type"),
    ({"chat_template_kwargs": "abc"}, "chat_template_kwargs"),
    ({"max_searches": 0}, "max_searches"),
]


@pytest.mark.parametrize(("options", "name"), BAD, ids=[str(options) for options, _ in BAD])
def test_the_error_for_a_bad_value_names_the_option(tmp_path, options, name):
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        ColdStartConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert str(options[name]) in str(error.value)


def test_a_configuration_can_be_copied(tmp_path):
    config = ColdStartConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, failed_share=0.5)
    assert ColdStartConfig(**{name: getattr(config, name) for name in config.__dataclass_fields__}) == config
