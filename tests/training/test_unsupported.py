"""Arguments and options of TRL that have no meaning in a search loop."""

import inspect
import logging

import pytest
from transformers import Trainer
from trl import GRPOTrainer

from helpers.batching import SMALL_CACHE
from tspo_trl import TSPOTrainer
from tspo_trl.rollout.log import read_rollouts
from tspo_trl.rollout.search_config import SearchConfig


def search(query: str) -> str:
    return query


class Environment:
    def reset(self):
        return None


@pytest.mark.parametrize(
    ("name", "value", "found", "instead"),
    [
        ("tools", [search], r"\[<function search", "`retriever`.*`protocol='tool_call'`"),
        ("rollout_func", search, "<function search", "`retriever`"),
        ("environment_factory", Environment, "<class .*Environment'>", "`retriever`.*`reward_funcs`"),
        ("environment_factory", {"a": Environment}, "{'a': <class", "`retriever`.*`reward_funcs`"),
        ("compute_metrics", search, "<function search", "`reward_funcs`.*`log_metric`"),
        ("preprocess_logits_for_metrics", search, "<function search", "`log_metric`"),
        ("compute_loss_func", search, "<function search", "`loss_type`.*`compute_turn_advantages`"),
        ("data_collator", search, "<function search", "Leave it out"),
        ("model_init", search, "<function search", "`model`"),
        ("ref_model", "gpt2", "'gpt2'", "`beta`"),
        ("tokenizer", "gpt2", "'gpt2'", "`processing_class`"),
        ("optimizer_cls_and_kwargs", (search, {}), r"\(<function search", "`optimizers`"),
    ],
)
def test_an_argument_without_a_meaning_is_refused_by_name(policy_dir, dataset, retriever, name, value, found, instead):
    with pytest.raises(TypeError, match=f"has no argument `{name}`, got {found}.*: .*{instead}"):
        TSPOTrainer(policy_dir, train_dataset=dataset, retriever=retriever, **{name: value})


def test_every_argument_of_the_trainers_above_is_known_or_refused_with_advice():
    above = {name for trainer in (GRPOTrainer, Trainer) for name in inspect.signature(trainer).parameters}
    own = inspect.signature(TSPOTrainer).parameters
    for name in above - set(own):
        with pytest.raises(TypeError, match=f"has no argument `{name}`"):
            TSPOTrainer("no-model", **{name: 1})


def test_a_misspelt_argument_is_an_error_with_a_suggestion(policy_dir, dataset, retriever):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'retreiver'. Did you mean `retriever`\?"):
        TSPOTrainer(policy_dir, train_dataset=dataset, retreiver=retriever)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'\.$"):
        TSPOTrainer(policy_dir, train_dataset=dataset, zzz=retriever)


def test_none_is_accepted_as_in_trl(policy_dir, dataset, retriever, make_trainer):
    args = make_trainer().args
    TSPOTrainer(policy_dir, args=args, train_dataset=dataset, retriever=retriever, tools=None, rollout_func=None)


@pytest.mark.parametrize("number", [None, 2])
def test_an_option_without_an_effect_is_reported_once(make_trainer, caplog, number):
    with caplog.at_level(logging.WARNING, "tspo_trl"):
        make_trainer(max_tool_calling_iterations=number)
    said = [record.message for record in caplog.records if "max_tool_calling_iterations" in record.message]
    assert len(said) == (number is not None)
    assert all("(2) has no effect: `max_searches` (3)" in message for message in said)


CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": SMALL_CACHE,
}


@pytest.mark.parametrize("options", [{"loss_type": "grpo"}, {"loss_type": "dapo"}, CONTINUOUS], ids=str)
def test_without_a_maximum_length_only_the_other_limits_apply(make_trainer, tmp_path, options):
    longest = {"max_searches": 6, "num_passages": 10, "max_observation_tokens": 300}
    trainer = make_trainer(max_completion_length=None, max_steps=1, save_strategy="steps", **longest, **options)
    trainer.train()
    rollouts = [record["trajectory"] for record in read_rollouts(tmp_path / "run")]
    assert max(len(t.completion_ids) for t in rollouts) > 160
    assert all(t.status != "truncated" for t in rollouts)
    assert SearchConfig.load(tmp_path / "run" / "checkpoint-1").max_completion_length is None


def test_without_a_maximum_length_the_context_of_the_model_is_the_limit(make_trainer):
    trainer = make_trainer(max_completion_length=None)
    loop = trainer.search_loop
    assert loop._limit([1] * 48) == trainer.model.config.max_position_embeddings - 48
    loop.max_context_length = loop.engine.max_context_length = None
    assert loop._limit([1] * 48) > 10**9
