"""The parts of a training step."""

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
