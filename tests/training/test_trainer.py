import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from helpers.batching import SMALL_CACHE
from helpers.training import generation_batch, prepared, varied_reward
from tspo_trl import BM25Retriever, Passage, RetrievalError, TSPOConfig, TSPOTrainer
from tspo_trl.engines.continuous import ContinuousBatchingEngine
from tspo_trl.rewards import exact_match_reward, f1_reward, format_reward
from tspo_trl.rollout.log import read_rollouts
from tspo_trl.scoring import contains_answer
from tspo_trl.sharing.mixin import SharingMixin
from tspo_trl.training.checkpoints import ExactResumeMixin
from tspo_trl.training.evaluations import EvaluationMixin
from tspo_trl.training.forward import CompactForwardMixin
from tspo_trl.training.generation import with_end
from tspo_trl.training.masking import keep_ratios_finite
from tspo_trl.training.turn_credit import TurnCreditMixin

LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


# The sampling forward and the training forward


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.8},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic", "top_p": 0.9},
        {"generation_kwargs": {"use_cache": False}},
        {"top_k": 20, "min_p": 0.01},
        {"generation_kwargs": {"prefill_chunk_size": 16}},
        {"generation_kwargs": {"return_dict_in_generate": True, "output_scores": True}},
    ],
    ids=str,
)
def test_training_and_sampling_logprobs_agree(make_trainer, options):
    """Both forwards use the same masks, positions and contexts."""
    trainer = make_trainer(**options, per_device_train_batch_size=16)
    inputs, trajectories = prepared(trainer)
    assert len({len(t.turns) for t in trajectories}) > 1
    assert len({len(t.prompt_ids) for t in trajectories}) > 1
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
    compared = 0
    for row, trajectory in enumerate(trajectories):
        for position, (sampled, trained) in enumerate(zip(trajectory.logprobs, trajectory.loss_mask, strict=True)):
            if trained:
                compared += 1
                assert logps[row, position].item() == pytest.approx(sampled, abs=1e-4)
    assert compared > 100


def test_trained_tokens_are_the_sampled_tokens(make_trainer, tokenizer):
    inputs, trajectories = prepared(make_trainer())
    for row, trajectory in enumerate(trajectories):
        length = len(trajectory.completion_ids)
        completion = inputs["completion_ids"][row]
        assert completion[:length].tolist() == trajectory.completion_ids
        trained = inputs["completion_mask"][row] * inputs["tool_mask"][row]
        assert trained[:length].tolist() == trajectory.loss_mask
        assert trained[length:].sum() == 0
        # The completion mask covers observations. A rollout that was not truncated ends with a token that is not trained on
        closed = trajectory.status != "truncated" and trajectory.completion_ids[-1] != tokenizer.eos_token_id
        assert inputs["completion_mask"][row].sum() == length + closed
        assert not closed or completion[length] == tokenizer.eos_token_id


# Gradients


def test_gradient_flows_only_from_sampled_tokens(make_trainer):
    """The derivative of the loss with respect to the log-probability of each token is zero on observations and padding."""
    trainer = make_trainer(advantage_level="turn", folr_alpha=1.0, reward_funcs=varied_reward)
    inputs, trajectories = prepared(trainer)
    original, leaves = trainer._get_per_token_logps_and_entropies, []

    def watched(*args, **kwargs):
        logps, entropies, aux = original(*args, **kwargs)
        logps.retain_grad()
        leaves.append(logps)
        return logps, entropies, aux

    trainer._get_per_token_logps_and_entropies = watched
    gradients(trainer, inputs)
    (logps,) = leaves
    for row, trajectory in enumerate(trajectories):
        mask = torch.tensor(trajectory.loss_mask, dtype=torch.bool)
        derivative = logps.grad[row]
        assert (derivative[: len(mask)][~mask] == 0).all()
        assert (derivative[len(mask) :] == 0).all()
        has_advantage = (
            inputs["advantages"][row, : len(mask)] != 0
        )  # zero if no other rollout of the group has this turn
        assert ((derivative[: len(mask)] != 0) == (mask & has_advantage)).all()
    assert any(0 in t.loss_mask for t in trajectories)
    assert (inputs["advantages"] != 0).any(dim=1).sum() > 4


def wrong_reward(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def with_golds(dataset, golds):
    return dataset.map(lambda row: {"golden_answers": golds})


def test_an_all_wrong_group_without_a_near_miss_has_zero_gradient(make_trainer, dataset):
    trainer = make_trainer(train_dataset=with_golds(dataset, ["Nowhere To Be Found"]), reward_funcs=wrong_reward)
    inputs, _ = prepared(trainer)
    _, gradient = gradients(trainer, inputs)
    assert (gradient == 0).all()


def test_an_all_wrong_group_with_a_near_miss_has_a_gradient(make_trainer, dataset):
    # Every passage about a book contains "novel", so some searches find it
    trainer = make_trainer(
        train_dataset=with_golds(dataset, ["novel"]), reward_funcs=wrong_reward, per_device_train_batch_size=16
    )
    inputs, trajectories = prepared(trainer)
    hits = [[contains_answer(text, ["novel"]) for text in t.passage_texts] for t in trajectories]
    assert any(map(any, hits))
    assert not all(map(any, hits))
    _, gradient = gradients(trainer, inputs)
    assert gradient.abs().sum() > 0


def test_only_the_turn_of_the_first_occurrence_has_a_positive_advantage(make_trainer, dataset):
    trainer = make_trainer(
        train_dataset=with_golds(dataset, ["novel"]), reward_funcs=wrong_reward, per_device_train_batch_size=16
    )
    inputs, trajectories = prepared(trainer)
    paid = 0
    for row, trajectory in enumerate(trajectories):
        found = [contains_answer(text, ["novel"]) for text in trajectory.passage_texts]
        positive = {
            turn
            for turn, advantage in zip(trajectory.turn_index, inputs["advantages"][row].tolist(), strict=False)
            if advantage > 0
        }
        assert positive <= ({found.index(True)} if any(found) else set())
        paid += bool(positive)
    assert paid > 0


# GRPO


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_trajectory_level_is_grpo(make_trainer, policy_dir, dataset, tmp_path, loss_type, num_iterations, beta):
    """For the same rollouts, loss and gradients equal those of TRL's trainer, also after updates of the policy."""
    options = {
        "loss_type": loss_type,
        "num_iterations": num_iterations,
        "beta": beta,
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token",
    }
    ours = make_trainer(advantage_level="trajectory", reward_funcs=varied_reward, **options)
    inputs, trajectories = prepared(ours)

    def same_rewards(prompts, completions, **kwargs):
        return varied_reward(completions)

    config = {f: getattr(ours.args, f) for f in ("num_generations", "max_completion_length", "learning_rate")}
    trl = GRPOTrainer(
        model=policy_dir,
        reward_funcs=same_rewards,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            report_to="none",
            max_steps=2,
            **config,
            **options,
        ),
        train_dataset=dataset,
    )
    eos = trl._tokenizer.eos_token_id
    trl.rollout_func = lambda prompts, trainer: {
        "prompt_ids": [t.prompt_ids for t in trajectories],
        "completion_ids": [with_end(t, t.completion_ids, eos, ours.eos_token_ids) for t in trajectories],
        "env_mask": [with_end(t, t.loss_mask, 0, ours.eos_token_ids) for t in trajectories],
        "logprobs": None,
    }
    trl.current_gradient_accumulation_steps = 1
    trl.model.train()
    expected = trl._generate_and_score_completions(generation_batch(trl))

    for key in ("completion_ids", "completion_mask", "tool_mask", "advantages", "num_items_in_batch"):
        torch.testing.assert_close(inputs[key], expected[key], rtol=0, atol=0)
    assert inputs["advantages"].abs().sum() > 0
    for _ in range(num_iterations):
        (loss, gradient), (expected_loss, expected_gradient) = gradients(ours, inputs), gradients(trl, expected)
        assert loss == expected_loss
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
        assert gradient.abs().sum() > 0
        for trainer in (ours, trl):
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad


def test_stage_level_is_grpo_in_groups_with_a_correct_rollout(make_trainer):
    def some_correct(trajectories, **kwargs):
        return [1.0 if i % 4 == 0 else 0.0 for i in range(len(trajectories))]

    (stage, _), (grpo, trajectories) = (
        prepared(make_trainer(advantage_level=level, reward_funcs=some_correct)) for level in ("stage", "trajectory")
    )
    for row, trajectory in enumerate(trajectories):
        for position, turn in enumerate(trajectory.turn_index):
            expected = grpo["advantages"][row] if turn >= 0 else 0.0
            assert stage["advantages"][row, position] == expected


# Training


class ByNumber(TSPOTrainer):
    """The advantage of a turn is its number. Only even groups use turn advantages."""

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, **kwargs):
        numbers = torch.arange(1.0, int(num_turns.max()) + 1).expand(len(outcomes), -1)
        numbers = numbers.masked_fill(numbers > num_turns[:, None], torch.nan)
        group = torch.arange(len(outcomes)) // num_generations
        return numbers, numbers.nan_to_num(), group % 2 == 0


def test_compute_turn_advantages_can_be_overridden(make_trainer):
    def some_correct(trajectories, **kwargs):
        return [1.0 if i % 4 == 0 else 0.0 for i in range(len(trajectories))]

    inputs, trajectories = prepared(make_trainer(trainer_class=ByNumber, reward_funcs=some_correct))
    grpo, _ = prepared(make_trainer(advantage_level="trajectory", reward_funcs=some_correct))
    whole = grpo["advantages"][4:]
    assert whole[0] > 1
    assert len({len(t.turns) for t in trajectories}) > 1
    for row, trajectory in enumerate(trajectories):
        index = torch.tensor(trajectory.turn_index)
        expected = (index + 1.0) if row < 4 else torch.where(index >= 0, whole[row - 4], 0.0)
        torch.testing.assert_close(inputs["advantages"][row, : len(index)], expected)


def test_the_signal_of_a_group_is_that_of_the_advantages_it_is_trained_with(make_trainer):
    trainer = make_trainer(trainer_class=ByNumber, reward_funcs=lambda trajectories, **_: [0.0] * len(trajectories))
    prepared(trainer)  # the second of two groups is trained with TRL's advantages, which are 0
    assert trainer._metrics["train"]["groups/no_signal"] == [0.5]
    assert trainer._metrics["train"]["groups/rescued"] == [0.5]


def test_training_moves_the_policy_and_logs_every_metric(make_trainer):
    trainer = make_trainer(max_steps=3, advantage_level="turn", reward_funcs=varied_reward)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any((before[k] != v).any() for k, v in trainer.model.state_dict().items())
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert logged >= {
        "reward", "groups/all_wrong", "groups/mixed", "groups/all_correct", "groups/rescued", "search/calls",
        "search/invalid", "search/duplicate", "search/hit", "search/near_miss", "search/failed", "turns/mean",
        "turns/truncated", "time/generate", "time/search", "completions/clipped_ratio",
    }  # fmt: skip


def test_several_rewards_with_weights(make_trainer):
    trainer = make_trainer(
        reward_funcs=[exact_match_reward, f1_reward, format_reward], reward_weights=[1.0, 0.5, 0.2], max_steps=1
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    parts = [entry[f"rewards/{name}/mean"] for name in ("exact_match_reward", "f1_reward", "format_reward")]
    assert entry["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.2 * parts[2], abs=1e-6)
    (first, *_) = read_rollouts(Path(trainer.args.output_dir) / "trajectories")
    assert first["outcome"] == pytest.approx(
        sum(w * r for w, r in zip([1.0, 0.5, 0.2], first["rewards"].values(), strict=True)), abs=1e-6
    )


def test_reward_functions_get_completions_without_passages(make_trainer, dataset):
    seen = []

    def spy(prompts, completions, trajectories, golden_answers, question, **kwargs):
        seen.extend(zip(completions, trajectories, golden_answers, question, strict=True))
        return [0.0] * len(completions)

    trainer = make_trainer(reward_funcs=spy)
    prepared(trainer)
    assert any(turn.passages for _, t, _, _ in seen for turn in t.turns)
    for completion, trajectory, golds, question in seen:
        assert completion == "".join(turn.text for turn in trajectory.turns)
        assert "<information>" not in completion
        assert isinstance(golds, list)
        assert question.endswith("?")


def test_conversational_prompts_give_conversations(make_trainer, policy_dir, dataset, tmp_path):
    chat = AutoTokenizer.from_pretrained(policy_dir)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    chat.save_pretrained(tmp_path / "chat")
    AutoModelForCausalLM.from_pretrained(policy_dir, dtype="float32").save_pretrained(tmp_path / "chat")
    seen = []

    def spy(completions, **kwargs):
        seen.extend(completions)
        return [0.0] * len(completions)

    rows = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"].strip()}]})
    trainer = make_trainer(model=str(tmp_path / "chat"), train_dataset=rows, reward_funcs=spy)
    prepared(trainer)
    assert {m["role"] for completion in seen for m in completion} == {"assistant", "tool"}
    assert all("<information>" not in m["content"] for c in seen for m in c if m["role"] == "assistant")
    assert all("<information>" in m["content"] or "not valid" in m["content"] for c in seen for m in c[1::2])


def test_rows_without_a_prompt_are_trained_on(make_trainer, dataset):
    trainer = make_trainer(train_dataset=dataset.select_columns(["question", "golden_answers"]), max_steps=1)
    trainer.train()
    prompt = trainer.train_dataset[0]["prompt"]
    assert "at most 3 times" in prompt
    assert trainer.train_dataset[0]["question"] in prompt


def test_lora(make_trainer, tmp_path):
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), beta=0.1, reward_funcs=varied_reward
    )
    frozen = trainer.model.get_base_model().model.embed_tokens.weight.clone()
    trainer.train()
    adapters = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert any((p != 0).any() for p in adapters)
    assert torch.equal(frozen, trainer.model.get_base_model().model.embed_tokens.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_evaluation(make_trainer, dataset):
    trainer = make_trainer(eval_dataset={"a": dataset.select(range(4)), "b": dataset.select(range(4, 6))})
    metrics = trainer.evaluate(trainer.eval_dataset["a"])
    assert {"eval_reward", "eval_search/hit", "eval_groups/all_wrong"} <= metrics.keys()
    assert 0 <= metrics["eval_search/hit"] <= 1


def test_evaluate_accepts_rows_without_a_prompt(make_trainer, dataset):
    trainer = make_trainer(num_generations_eval=2)
    metrics = trainer.evaluate(dataset.select_columns(["question", "golden_answers"]).select(range(4)))
    assert "eval_reward" in metrics
    with pytest.raises(ValueError, match="`eval_dataset` has no column 'golden_answers'"):
        trainer.evaluate(dataset.remove_columns("golden_answers"))


def test_a_stream_of_questions(make_trainer, dataset):
    trainer = make_trainer(train_dataset=dataset.to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    rows = list(read_rollouts(Path(trainer.args.output_dir) / "trajectories"))
    assert all(
        len({r["question"] for r in rows if (r["step"], r["group"]) == (s, g)}) == 1 for s in (0, 1) for g in (0, 1)
    )


def test_completions_can_be_logged(make_trainer, tmp_path):
    make_trainer(log_completions=True, max_steps=1).train()
    assert list((tmp_path / "run" / "completions").glob("*.parquet"))


def test_a_checkpoint_can_be_resumed_and_loaded_by_transformers(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, reward_funcs=varied_reward)
    trainer.train()
    final = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    resumed = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, reward_funcs=varied_reward)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, final[key], rtol=0, atol=0)
    folder = tmp_path / "run" / "checkpoint-4"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.model.embed_tokens.weight, final["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(folder)("Silent Harbor")["input_ids"]
    card = (folder.parent / "README.md").read_text()
    assert "2601.22776" in card
    assert "ma2026tspo" in card
    assert "vonwerra2020trl" in card


def test_callbacks_are_called(make_trainer):
    from transformers import TrainerCallback

    class Counter(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    counter = Counter()
    make_trainer(max_steps=2, callbacks=[counter]).train()
    assert counter.steps == 2


def test_unused_columns_can_be_removed(make_trainer, dataset):
    trainer = make_trainer(train_dataset=dataset.map(lambda row: {"noise": 1}), remove_unused_columns=True, max_steps=1)
    trainer.train()
    assert "reward" in trainer.state.log_history[0]


def test_truncated_completions_can_be_masked(make_trainer):
    trainer = make_trainer(mask_truncated_completions=True, max_completion_length=50, max_observation_tokens=40)
    inputs, trajectories = prepared(trainer)
    statuses = {t.status for t in trajectories}
    assert statuses >= {"truncated", "answered"}
    for row, trajectory in enumerate(trajectories):
        trained = inputs["completion_mask"][row] * inputs["tool_mask"][row]
        assert (trained.sum() == 0) == (trajectory.status == "truncated")


@pytest.mark.parametrize("masked", [True, False])
def test_truncated_rollouts_whose_last_turn_ended_are_truncated(make_trainer, masked):
    """A message that ends with a call for which there is no room: the end-of-sequence token does not make it complete."""
    trainer = make_trainer(mask_truncated_completions=masked)
    eos, run = trainer.eos_token_ids[0], trainer.search_loop.run

    def without_room(prompt_ids):
        trajectories, stats = run(prompt_ids)
        for trajectory in trajectories[::2]:
            trajectory.status = "truncated"
            trajectory.turns[-1].token_ids[-1] = eos
        return trajectories, stats

    trainer.search_loop.run = without_room
    inputs, trajectories = prepared(trainer)
    truncated = [trajectory.status == "truncated" for trajectory in trajectories]
    trained = (inputs["completion_mask"] * inputs["tool_mask"]).sum(dim=1)
    assert any(truncated)
    assert not all(truncated)
    for row, trajectory in enumerate(trajectories):
        expected = 0 if masked and truncated[row] else sum(trajectory.loss_mask)
        assert trained[row] == expected
    metrics = trainer._metrics["train"]
    assert metrics["completions/clipped_ratio"][-1] == metrics["turns/truncated"][-1] == sum(truncated) / len(truncated)


def test_observations_do_not_affect_the_loss(make_trainer, monkeypatch):
    """Ratios of observation tokens would overflow before they are masked."""
    options = {"beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": True, "reward_funcs": varied_reward}
    trainer = make_trainer(**options)
    inputs, _ = prepared(trainer)
    loss, gradient = gradients(trainer, inputs)
    masked = (inputs["completion_mask"] * inputs["tool_mask"]) == 0
    assert (masked & (inputs["completion_mask"] == 1)).any()
    compute = trainer._get_per_token_logps_and_entropies

    def shifted(*args, **kwargs):
        logps, *rest = compute(*args, **kwargs)
        return logps - 200.0 * masked, *rest  # much less likely than before

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", shifted)
    shifted_loss, shifted_gradient = gradients(trainer, inputs)
    assert loss == shifted_loss
    assert torch.isfinite(shifted_gradient).all()
    torch.testing.assert_close(gradient, shifted_gradient, rtol=0, atol=0)


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.9},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(50))},
        {"min_new_tokens": 12},
        {"num_beams": 2},
        {"cache_implementation": "static"},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_generation_config_of_the_model_does_not_change_sampling(make_trainer, own):
    _, expected = prepared(make_trainer())
    trainer = make_trainer()
    for name, value in own.items():
        setattr(trainer.model.generation_config, name, value)
    _, trajectories = prepared(trainer)
    assert [t.completion_ids for t in trajectories] == [t.completion_ids for t in expected]
    for name, value in own.items():  # it is saved with the model as it was
        assert getattr(trainer.model.generation_config, name) == value


@pytest.mark.parametrize(
    ("rate", "options", "warned"), [(0.05, {}, True), (0.0, {}, False), (0.05, {"disable_dropout": True}, False)]
)
def test_dropout_is_reported(make_trainer, caplog, rate, options, warned):
    config = LoraConfig(r=4, lora_dropout=rate, target_modules="all-linear", task_type="CAUSAL_LM")
    make_trainer(peft_config=config, **options)
    assert ("The model has dropout (0.05)" in caplog.text) is warned


def test_ratios_of_masked_tokens_are_finite():
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
        "ref_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0, -4.0]]),
        "old_per_token_logps": torch.tensor([[-1.0, -200.0, -3.0, -4.0]]),
    }
    keep_ratios_finite(batch)
    assert batch["ref_per_token_logps"].tolist() == [[-1.0, -1e4, -3.0, -1e4]]
    assert batch["old_per_token_logps"].tolist() == [[-1.0, 0.0, -3.0, 0.0]]
    only_mask = {"completion_mask": torch.tensor([[1, 0]])}
    keep_ratios_finite(only_mask)
    assert list(only_mask) == ["completion_mask"]


@pytest.mark.parametrize("level", ["turn", "trajectory"])
def test_logged_completions_show_the_advantages_of_training(make_trainer, level):
    trainer = make_trainer(advantage_level=level, log_completions=True)
    inputs, trajectories = prepared(trainer)
    shown = list(trainer._logs["advantages"])
    assert len(shown) == len(trajectories)
    for row, trajectory in enumerate(trajectories):
        expected = inputs["advantages"][row]
        if level == "turn":
            trained = torch.tensor(trajectory.loss_mask, dtype=torch.bool)
            expected = expected[: len(trained)][trained].mean()
        assert shown[row] == pytest.approx(expected.item(), abs=1e-6)
    assert any(shown)


def test_accumulation_over_one_generation_batch(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, reward_funcs=varied_reward)
    trainer.train()
    assert trainer.state.global_step == 2
    rollouts = list(read_rollouts(Path(trainer.args.output_dir) / "trajectories"))
    assert [r["step"] for r in rollouts] == [0] * 8 + [1] * 8


# Retrieval that fails


class Flaky:
    """Fails in the calls for which `fails` is true."""

    def __init__(self, retriever, fails):
        self.retriever, self.fails, self.calls = retriever, fails, 0

    def search(self, queries, k):
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionError("the index is missing")
        return self.retriever.search(queries, k)


def test_rollouts_with_a_failed_search_have_no_advantage_and_are_excluded_from_the_baseline(make_trainer, retriever):
    trainer = make_trainer(
        retriever=Flaky(retriever, lambda call: call > 2),
        max_retrieval_failure_rate=1.0,
        advantage_level="turn",
        folr_alpha=0.0,
        reward_funcs=varied_reward,
        per_device_train_batch_size=16,
    )
    inputs, trajectories = prepared(trainer)
    failed = [t.status == "retrieval_failed" for t in trajectories]
    assert any(failed)
    assert not all(failed)
    for row, is_failed in enumerate(failed):
        if is_failed:
            assert (inputs["advantages"][row] == 0).all()
    for start in range(0, 16, 4):
        known = [varied_reward(trajectories)[i] for i in range(start, start + 4) if not failed[i]]
        if len(known) > 1 and len(set(known)) > 1:
            rewards = torch.tensor(known)
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            actual = [inputs["advantages"][i, 0] for i in range(start, start + 4) if not failed[i]]
            torch.testing.assert_close(torch.stack(actual), expected)


def test_too_many_failures_stop_the_run_with_a_checkpoint(make_trainer, retriever, tmp_path):
    flaky = Flaky(retriever, lambda call: call > 7)
    trainer = make_trainer(retriever=flaky, max_steps=20, reward_funcs=varied_reward)
    with pytest.raises(RetrievalError, match=r"Flaky.*the index is missing.*resume_from_checkpoint"):
        trainer.train()
    step = trainer.state.global_step
    assert step > 0
    assert (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").is_file()
    flaky.fails = lambda call: False
    resumed = make_trainer(retriever=flaky, max_steps=step + 1, reward_funcs=varied_reward)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == step + 1


def test_a_failure_in_the_first_step_saves_no_checkpoint(make_trainer, retriever, tmp_path):
    trainer = make_trainer(retriever=Flaky(retriever, lambda call: True))
    with pytest.raises(RetrievalError, match=r"the index is missing.*Start again"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_trial_search_changes_no_metric_cache_or_log(make_trainer, retriever, tmp_path):
    watching = Flaky(retriever, lambda call: False)
    watching.fingerprint = retriever.fingerprint
    folders = {"retrieval_cache_dir": str(tmp_path / "cache"), "retrieval_log": str(tmp_path / "log")}
    trainer = make_trainer(retriever=watching, **folders)
    assert watching.calls == 1
    assert trainer.rollout_func.retrievers.counters() == (0, 0)
    assert not any((tmp_path / "cache").iterdir())
    assert [path.stat().st_size for path in (tmp_path / "log").iterdir()] == [0]


class WrongResults:
    """Returns what a function makes of the queries and `k`."""

    def __init__(self, results):
        self.results = results

    def search(self, queries, k):
        return self.results(queries)


class OneQuery:
    def search(self, query):
        return []


@pytest.mark.parametrize(
    ("retriever", "error", "message"),
    [
        (BM25Retriever, ValueError, "got the class `BM25Retriever` itself"),
        (OneQuery(), ValueError, r"`OneQuery.search` has the arguments \(query\)"),
        (WrongResults(lambda queries: None), RetrievalError, "`WrongResults.search` returned None"),
        (WrongResults(lambda queries: [Passage("7", "", "x")]), RetrievalError, "a flat list of `Passage`"),
        (WrongResults(lambda queries: [[{"id": 7}] for _ in queries]), RetrievalError, "found the keys"),
        (WrongResults(lambda queries: [[Passage("7", "", None)]]), RetrievalError, "found NoneType"),
    ],
)
def test_mistakes_of_a_retriever_are_reported_before_the_model_is_loaded(make_trainer, retriever, error, message):
    with pytest.raises(error, match=message):
        make_trainer(model="no/such-model", retriever=retriever)


# Bad input


def test_arguments_are_checked_before_the_model_is_loaded(make_trainer, dataset, retriever, tmp_path):
    missing = "no/such-model"  # would fail if it were loaded first
    for options, message in [
        ({"train_dataset": dataset.remove_columns("golden_answers")}, "no column 'golden_answers'"),
        ({"train_dataset": dataset.remove_columns(["question", "prompt"])}, "neither a column 'question'"),
        ({"train_dataset": dataset.select([])}, "`train_dataset` is empty"),
        ({"eval_dataset": {"dev": dataset.remove_columns("golden_answers")}}, r"eval_dataset\['dev'\]"),
        ({"retriever": None}, "`retriever` must be"),
        ({"train_dataset": None}, "`train_dataset` is required"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(model=missing, **options)


@pytest.mark.parametrize("golds", [[], [1, 2], "Mira Talvek", None])
def test_golden_answers_must_be_lists_of_strings(make_trainer, dataset, golds):
    bad = Dataset.from_list([{**row, "golden_answers": golds} for row in dataset.to_list()])
    with pytest.raises(ValueError, match=r"`train_dataset`, row 0: 'golden_answers' must be a non-empty list"):
        make_trainer(train_dataset=bad)


def test_the_configuration_must_be_a_tspo_config(policy_dir, dataset, retriever, tmp_path):
    with pytest.raises(TypeError, match="must be a `TSPOConfig`, got `GRPOConfig`"):
        TSPOTrainer(policy_dir, args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), retriever=retriever)


def test_a_prompt_longer_than_the_context_of_the_model_is_refused(make_trainer, dataset):
    rows = dataset.map(lambda row: {"prompt": "Who " * 3000})
    with pytest.raises(ValueError, match="at most 2048 tokens"):
        make_trainer(train_dataset=rows).train()


# The log of trajectories


def test_the_log_and_the_metrics_agree(make_trainer, dataset):
    trainer = make_trainer(max_steps=2, per_device_train_batch_size=16)
    trainer.train()
    (path,) = (Path(trainer.args.output_dir) / "trajectories").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for step, entry in zip((0, 1), [e for e in trainer.state.log_history if "reward" in e], strict=True):
        rows = [line for line in lines if line["step"] == step]
        assert len(rows) == 16
        assert sorted((r["group"], r["rollout"]) for r in rows) == [(g, i) for g in range(4) for i in range(4)]
        assert all(len({r["question"] for r in rows if r["group"] == g}) == 1 for g in range(4))
        found = [
            any(
                contains_answer(f"{p['title']}\n{p['text']}", row["golden_answers"])
                for turn in row["trajectory"]["turns"]
                for p in turn["passages"]
            )
            for row in rows
        ]
        assert entry["search/hit"] == pytest.approx(sum(found) / 16)
        assert entry["reward"] == pytest.approx(sum(row["outcome"] for row in rows) / 16)
        assert [row["first_occurrence"] is not None for row in rows] == found


def test_the_log_can_be_switched_off(make_trainer, tmp_path):
    make_trainer(log_trajectories=False, max_steps=1).train()
    assert not (tmp_path / "run" / "trajectories").exists()


def test_few_methods_are_overridden():
    """The methods of TRL's and transformers' trainers that TSPOTrainer and its mixins override. Each calls `super`."""
    ours = TSPOTrainer.__mro__[: TSPOTrainer.__mro__.index(GRPOTrainer)]
    overridden = [
        (name, value)
        for cls in ours
        for name, value in vars(cls).items()
        if (callable(value) or isinstance(value, (property, classmethod))) and hasattr(GRPOTrainer, name)
    ]
    assert {name for name, _ in overridden} == {
        # TSPOTrainer
        "__init__",
        "_generate",
        "_set_signature_columns_if_needed",
        # TurnCreditMixin
        "_calculate_rewards",
        "_generate_and_score_completions",
        # EvaluationMixin
        "evaluation_loop",
        "get_eval_dataloader",
        "get_test_dataloader",
        # ExactResumeMixin
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_save_checkpoint",
        "_save_rng_state",
        "train",
        # CompactForwardMixin
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
        "_prepare_inputs",
        # SharingMixin
        "_push_from_checkpoint",
        "create_model_card",
        "push_to_hub",
        "save_model",
    }
    assert len(overridden) == 21  # no method is overridden twice
    assert all("__class__" in method.__code__.co_freevars for _, method in overridden)
    mixins = (TurnCreditMixin, ExactResumeMixin, EvaluationMixin, SharingMixin, CompactForwardMixin)
    assert ours == (TSPOTrainer, *mixins)
    assert issubclass(TSPOConfig, GRPOConfig)


def test_turns_are_generated_under_one_autocast_and_searched_without_it(make_trainer, retriever):
    """Otherwise every forward would convert all weights again. A dense retriever must not change its precision."""
    searching, calling = [], []

    class Watched(type(retriever)):
        def search(self, queries, k):
            searching.append(torch.is_autocast_enabled("cpu"))
            return super().search(queries, k)

    watched = copy.copy(retriever)
    watched.__class__ = Watched
    trainer = make_trainer(bf16=True, max_steps=1, retriever=watched)
    engine = trainer.search_loop.engine
    generate = engine._generate
    engine._generate = lambda *args: (calling.append(torch.is_autocast_enabled("cpu")), generate(*args))[1]
    trainer.train()
    assert len(calling) > 1
    assert all(calling)
    assert searching
    assert not any(searching)


def test_training_generates_by_continuous_batching(make_trainer):
    trainer = make_trainer(
        reward_funcs=varied_reward,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=SMALL_CACHE,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert isinstance(trainer.search_loop.engine, ContinuousBatchingEngine)
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True))
    steps = [entry for entry in trainer.state.log_history if "search/calls" in entry]
    assert len(steps) == 2
    assert all(step["retrieval/searches"] > 0 and step["turns/mean"] > 1 for step in steps)
    assert not getattr(
        trainer.model, "_cached_continuous_batching_manager", None
    )  # a cached manager would use old weights
