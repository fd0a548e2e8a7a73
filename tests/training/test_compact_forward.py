"""The compact forward: the same loss and gradients as TRL's forward of whole batches, for less work."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig

from helpers.training import prepared
from tspo_trl.training.dealing import deal

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


def half_of_the_groups(trajectories, **kwargs):
    """The outcomes of every second group of 4 differ, those of the others are equal."""
    return [float(i % 4 == 1) if i // 4 % 2 else 0.0 for i in range(len(trajectories))]


def never(trajectories, **kwargs):
    return [0.0] * len(trajectories)


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


@contextmanager
def watched(model):
    """For each forward, the shape of its input and the number of tokens that its head scores."""
    seen = []

    def record(_, args, kwargs):
        seen.append((tuple(kwargs["input_ids"].shape), kwargs["shift_labels"].numel()))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def both(make_trainer, **options):
    """A trainer with whole batches, one with the compact forward, and the inputs of the loss of both."""
    options = {"folr_alpha": 0.0, "per_device_train_batch_size": 16, "reward_funcs": half_of_the_groups, **options}
    whole, compact = (make_trainer(compact_forward=value, **options) for value in (False, True))
    (expected, trajectories), (inputs, others) = prepared(whole), prepared(compact)
    assert [t.completion_ids for t in trajectories] == [t.completion_ids for t in others]
    return whole, compact, expected, inputs


def check_equal(whole, compact, expected, inputs, steps=2):
    """Loss and gradients, also after updates of the policy."""
    for _ in range(steps):
        (loss, gradient), (compact_loss, compact_gradient) = gradients(whole, expected), gradients(compact, inputs)
        assert compact_loss == pytest.approx(loss, abs=1e-5)
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(compact_gradient, gradient, rtol=1e-3, atol=2e-6 * max(1.0, scale.item()))
        for trainer in (whole, compact):
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients_are_the_same(make_trainer, loss_type, num_iterations):
    level = "sequence" if loss_type == "luspo" else "token"
    options = {"loss_type": loss_type, "num_iterations": num_iterations, "importance_sampling_level": level}
    whole, compact, expected, inputs = both(make_trainer, **options)
    with watched(compact.model) as seen:
        gradients(compact, inputs)
    ((rows, _), scored) = seen[0]
    trained = (inputs["completion_mask"] * inputs["tool_mask"]).sum(dim=1)
    signal = inputs["advantages"].reshape(16, -1).ne(0).any(dim=1)
    assert rows == 8
    assert scored == trained[signal].sum() < trained.sum()
    check_equal(whole, compact, expected, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": True},
        {"entropy_coef": 0.01},
        {"top_entropy_quantile": 0.5},
        {"mask_truncated_completions": True, "max_completion_length": 60},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"folr_alpha": 0.5, "reward_funcs": half_of_the_groups, "advantage_level": "stage"},
        {"advantage_level": "turn"},
        {"peft_config": LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")},
        {"scale_rewards": "batch"},
    ],
    ids=",".join,
)
def test_the_same_with_other_options(make_trainer, options):
    if "peft_config" in options:  # so that the first gradient of A is not zero
        options["peft_config"].init_lora_weights = False
    whole, compact, expected, inputs = both(make_trainer, **options)
    check_equal(whole, compact, expected, inputs, steps=1)


def test_metrics_keep_their_meaning(make_trainer):
    """The entropy of the rollouts that are left out is estimated; all else is equal."""
    whole, compact, expected, inputs = both(make_trainer, num_iterations=2)
    for trainer, batch in ((whole, expected), (compact, inputs)):
        trainer._metrics["train"].clear()
        gradients(trainer, batch)
    logged, compact_logged = whole._metrics["train"], compact._metrics["train"]
    assert logged.keys() == compact_logged.keys()
    for name, values in logged.items():
        assert compact_logged[name] == pytest.approx(values, abs=0.1 if name == "entropy" else 1e-5), name


def test_a_batch_without_a_signal_still_goes_through_the_model(make_trainer):
    """Other processes may have a signal, and their collectives wait for every parameter of this one."""
    _, compact, _, inputs = both(make_trainer, reward_funcs=never)
    with watched(compact.model) as seen:
        loss, gradient = gradients(compact, inputs)
    assert seen == [((1, 2), 1)]
    assert loss == 0.0
    assert all(parameter.grad is not None for parameter in compact.model.parameters())
    assert not gradient.any()


def test_trajectory_level_computes_whole_batches_by_default(make_trainer):
    for level, expected in (("stage", True), ("turn", True), ("trajectory", False)):
        assert make_trainer(advantage_level=level)._compact is expected
    assert make_trainer(advantage_level="trajectory", compact_forward=True)._compact


def batches_of(trainer):
    """The micro-batches of a generation batch, before they are dealt and after."""
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.args.compact_forward, trainer._buffered_inputs = False, None
    trainer._prepare_inputs(rows)
    before = trainer._buffered_inputs
    after = deal(before, trainer.accelerator, accumulation=trainer.args.gradient_accumulation_steps, leave_out=True)
    trainer.args.compact_forward = True
    return before, after


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_dealt_micro_batches_have_the_same_gradient(make_trainer, loss_type):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "reward_funcs": half_of_the_groups}
    trainer = make_trainer(loss_type=loss_type, folr_alpha=0.0, **options)
    before, after = batches_of(trainer)
    trainer.current_gradient_accumulation_steps = 4
    sums = []
    for batches in (before, after):
        assert [len(batch["completion_ids"]) for batch in batches] == [4] * 4
        trainer.model.zero_grad()
        for batch in batches:
            trainer._compute_loss(trainer.model, batch).backward()
        sums.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert sums[0].abs().max() > 0
    torch.testing.assert_close(*sums, rtol=1e-3, atol=2e-6)


def test_rollouts_are_dealt_by_signal_and_length_within_their_optimizer_step(make_trainer):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer = make_trainer(reward_funcs=half_of_the_groups, folr_alpha=0.0, **options)
    before, after = batches_of(trainer)
    for step in (slice(0, 2), slice(2, 4)):
        ids, dealt = (
            torch.cat([torch.cat([b["prompt_ids"], b["completion_ids"]], dim=1) for b in batches[step]])
            for batches in (before, after)
        )
        assert sorted(ids.tolist()) == sorted(dealt.tolist())
        signal = torch.cat([b["advantages"].reshape(4, -1).ne(0).any(dim=1) for b in after[step]])
        assert signal.tolist() == sorted(signal.tolist(), reverse=True)
        masks = torch.cat([b["completion_mask"] * b["tool_mask"] for b in after[step]])
        prompts = torch.cat([b["prompt_mask"] for b in after[step]]).sum(dim=1)
        lengths = (prompts + (masks * torch.arange(1, masks.size(1) + 1)).amax(dim=1))[signal].tolist()
        assert lengths == sorted(lengths, reverse=True)
    assert before[0]["num_items_in_batch"] == after[-1]["num_items_in_batch"]
