"""The parts of a training step."""

import torch
from accelerate.utils import set_seed


def generation_batch(trainer):
    """The next batch of rows of the training loop."""
    return next(iter(trainer.get_train_dataloader()))


def prepared(trainer, seed=0):
    """The inputs of the loss for one batch of rollouts, and their trajectories."""
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = generation_batch(trainer)
    set_seed(seed)
    inputs = trainer._generate_and_score_completions(rows)
    return inputs, [row["trajectory"] for row in rows]


def varied_reward(trajectories, **kwargs):
    return [float(i % 3) / 10 for i in range(len(trajectories))]


def assert_logprobs_agree(trainer, inputs, trajectories):
    """The log-probabilities of sampling and training are equal, and TRL trains on what the model wrote."""
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
    trained = inputs["completion_mask"] * inputs["tool_mask"]
    compared = 0
    for row, t in enumerate(trajectories):
        length, sampled = len(t.completion_ids), torch.tensor(t.loss_mask) == 1
        assert inputs["completion_ids"][row, :length].tolist() == t.completion_ids
        assert trained[row, :length].tolist() == t.loss_mask
        torch.testing.assert_close(logps[row, :length][sampled], torch.tensor(t.logprobs)[sampled], atol=1e-4, rtol=0)
        compared += int(sampled.sum())
    assert compared > 20


def prompted_to_search(trainer):
    """Read every third turn as a search, because an untrained model never writes a call."""
    protocol = trainer.search_loop.protocol
    original, calls = protocol.read, []

    def read(token_ids, **context):
        text, *action = original(token_ids, **context)
        calls.append(tuple(action))
        return (text, "search", "novel") if len(calls) % 3 == 0 else (text, *action)

    protocol.read = read
    return calls
