"""The cold start of a tiny model: it learns to search, and the model that it saves is trained further."""

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from helpers.limits import LIMITS
from tspo_trl import (
    BM25Retriever,
    ColdStartConfig,
    ColdStartTrainer,
    Passage,
    SearchAgent,
    SearchConfig,
    TSPOTrainer,
    merge_adapter,
)
from tspo_trl.cold_start.rates import search_rates


@pytest.fixture
def make_cold_start(tmp_path, titled, retriever, silent_dir):
    """A function that creates a trainer of the cold start of a tiny model."""

    def make(**options):
        arguments = {"model": silent_dir, "train_dataset": titled, "retriever": retriever}
        for name in ("model", "train_dataset", "retriever", "peft_config", "processing_class"):
            if name in options:
                arguments[name] = options.pop(name)
        config = {
            "output_dir": str(tmp_path / "cold"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 3,
            **LIMITS,
            **options,
        }
        return ColdStartTrainer(args=ColdStartConfig(**config), **arguments)

    return make


def rates(model, tokenizer, titled, retriever, config):
    return search_rates(model, tokenizer, list(titled.select(range(24))), retriever, config)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_a_model_that_never_searches_learns_it(
    make_cold_start, make_trainer, tmp_path, titled, retriever, tokenizer, silent_dir, adapter
):
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = make_cold_start(peft_config=lora if adapter else None, num_train_epochs=6 if adapter else 4)
    before = rates(trainer.model, tokenizer, titled, retriever, trainer.search_config)
    assert before["search"] == 0
    assert before["answer"] > 0.5
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert SearchConfig.load(folder) == trainer.search_config
    if adapter:
        # An adapter is an agent too; the training that follows takes a full model
        assert SearchAgent.from_pretrained(folder, retriever=retriever, device="cpu").config == trainer.search_config
        merge_adapter(folder, tmp_path / "merged")
        folder = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    after = rates(model, AutoTokenizer.from_pretrained(folder), titled, retriever, SearchConfig.load(folder))
    assert after["search"] > 0.5
    assert after["searches"] > before["searches"]
    assert after["hit"] > before["hit"]
    # Training goes on from the folder
    tspo = make_trainer(model=str(folder), max_steps=1, temperature=0.1)
    tspo.train()
    (entry, *_) = [entry for entry in tspo.state.log_history if "reward" in entry]
    assert entry["search/calls"] > 0.5
    assert isinstance(tspo, TSPOTrainer)


def test_only_what_the_model_writes_is_learned(make_cold_start):
    """The loss is that of the learned tokens alone, so a change of a passage's label cannot change it."""
    trainer = make_cold_start(num_demonstrations=16, learning_rate=0.0)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    learned = batch["labels"][:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][learned], batch["input_ids"][:, 1:][learned])
    assert 0 < learned.sum() < batch["attention_mask"].sum() / 2
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-3)
    ids = [one.input_ids for one in trainer.demonstrations.items]
    rows = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(rows) == sorted(ids)  # not cut, and nothing added


def test_the_same_seed_gives_the_same_model(make_cold_start):
    weights = []
    for _ in range(2):
        trainer = make_cold_start(num_demonstrations=16, failed_share=0.25)
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_little_of_trl_is_overridden():
    ours = {
        name for name in vars(ColdStartTrainer) if callable(vars(ColdStartTrainer)[name]) and hasattr(SFTTrainer, name)
    }
    assert ours == {"__init__", "save_model"}


def test_defaults():
    config = ColdStartConfig("x", use_cpu=True)
    assert (config.max_length, config.num_train_epochs, config.logging_steps, config.save_strategy) == (
        None,
        1,
        1,
        "no",
    )
    assert (config.num_demonstrations, config.failed_share, config.protocol) == (256, 0.0, "tags")
    assert (config.max_searches, config.num_passages, config.max_observation_tokens) == (4, 3, 500)


def test_every_option_has_a_help_text_and_is_documented():
    inherited = {option.name for option in fields(SFTConfig)}
    own = [option for option in fields(ColdStartConfig) if option.name not in inherited]
    assert len(own) == 10
    for option in own:
        assert option.metadata.get("help")
        assert option.name in ColdStartConfig.__doc__


def test_fewer_demonstrations_than_asked_for_are_reported(make_cold_start, caplog):
    trainer = make_cold_start(num_demonstrations=100_000)
    assert (
        f"There are {len(trainer.demonstrations.items)} demonstrations instead of `num_demonstrations`" in caplog.text
    )


FEW = [{"question": "Who wrote Silent Harbor?", "golden_answers": ["Mira"]}]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "runs/nowhere/cold"}, FileNotFoundError, "there is no folder 'runs/nowhere/cold'"),
        (
            {"protocol": "tool_call"},
            ValueError,
            "`protocol='tool_call'` needs a chat template, but the tokenizer has none",
        ),
        ({"protocol": "json"}, ValueError, r"`protocol` must be one of \['tags', 'tool_call'\], got 'json'"),
        ({"train_dataset": None}, ValueError, "`train_dataset` is required"),
        ({"retriever": None}, ValueError, "`retriever` must be an object with a method"),
        ({"packing": True, "max_length": 64}, ValueError, "`packing` would let demonstrations be cut"),
        ({"max_searches": 0}, ValueError, "`max_searches` must be at least 1 to demonstrate a search"),
        ({"num_demonstrations": 0}, ValueError, "`num_demonstrations` must be at least 1"),
        ({"failed_share": -1}, ValueError, "`failed_share` must be between 0 and 1"),
        ({"num_demonstrations": 3}, ValueError, "There are too few demonstrations: .* gave 3, but a step takes 16"),
        (
            {"retriever": BM25Retriever([Passage("0", "Rome", "Rome is a city.")])},
            ValueError,
            "none of the .* questions has evidence in the first 2 passages",
        ),
        ({"max_observation_tokens": 5}, ValueError, "`max_observation_tokens` must be at least"),
    ],
)
def test_what_cannot_be_done_is_named(make_cold_start, options, error, message):
    with pytest.raises(error, match=message):
        make_cold_start(**options)


def test_a_configuration_of_another_trainer_is_refused(silent_dir, retriever, titled):
    with pytest.raises(TypeError, match="`args` must be a `ColdStartConfig`, got `SFTConfig`"):
        ColdStartTrainer(silent_dir, SFTConfig("x", use_cpu=True, bf16=False), titled, retriever)
