"""Evaluations of scripted rollouts, in one process or (as a program) in several."""

import json
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset

from tspo_trl import BM25Retriever, Passage, Trajectory, TSPOConfig, TSPOTrainer, Turn
from tspo_trl.rewards import exact_match_reward
from tspo_trl.rollout.stats import RolloutStats


class ByQuestion:
    """A search loop whose rollouts depend only on the question and on their place in the group."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.protocol = trainer.search_loop.protocol

    def run(self, prompt_ids):
        start = self.trainer.accelerator.process_index * len(prompt_ids)
        size = self.trainer.num_generations_eval
        rollouts = [self.rollout(ids, (start + i) % size) for i, ids in enumerate(prompt_ids)]
        return rollouts, RolloutStats(searches=len(prompt_ids))

    def rollout(self, prompt_ids, place):
        rng = random.Random(f"{len(prompt_ids)} {place}")
        turns = []
        for _ in range(rng.randint(0, 3)):
            found = [Passage("0", "", "the gold")] if rng.random() < 0.4 else [Passage("1", "", "sand")]
            turns.append(
                Turn(
                    token_ids=[rng.randrange(10, 240) for _ in range(rng.randint(1, 6))],
                    action=rng.choice(["search", "search", "invalid"]),
                    content=f"query {rng.randint(0, 2)}",
                    observation_ids=[5] * rng.randint(1, 9),
                )
            )
            if turns[-1].action == "search":
                turns[-1].retrieval, turns[-1].passages = "ok", found
        ended = rng.random() < 0.7
        content = "gold" if rng.random() < 0.4 else "wrong"
        turns.append(Turn(token_ids=[rng.randrange(10, 240), 30], action="answer", content=content))
        for turn in turns:
            turn.logprobs = [-rng.random() for _ in turn.token_ids]
        return Trajectory(prompt_ids=list(prompt_ids), turns=turns, status="answered" if ended else "truncated")


def length_reward(trajectories, **kwargs):
    """A reward of another scale; some rollouts have none."""
    lengths = [sum(len(turn.token_ids) for turn in t.turns) for t in trajectories]
    return [None if length % 3 == 0 else length / 10 for length in lengths]


def questions(count, first=0):
    return [
        {"prompt": "the " * (i + 1), "question": str(i), "golden_answers": ["gold"]}  # of different lengths
        for i in range(first, first + count)
    ]


def as_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def evaluator(policy, output, eval_dataset, *, batch, generations=1, reward_funcs=None, **options):
    """A trainer of scripted rollouts. A batch of evaluation has `batch` rollouts in each process."""
    if reward_funcs is None:
        reward_funcs = [exact_match_reward, length_reward]
        options = {"reward_weights": [1.0, 0.25], **options}
    trainer = TSPOTrainer(
        model=policy,
        reward_funcs=reward_funcs,
        args=TSPOConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=batch,
            num_generations=4,
            num_generations_eval=generations,
            max_completion_length=64,
            max_observation_tokens=16,
            log_completions=True,
            disable_tqdm=True,
            report_to="none",
            **options,
        ),
        train_dataset=Dataset.from_list(questions(8)),
        eval_dataset=eval_dataset,
        retriever=BM25Retriever([Passage(id="0", title="Paris", text="capital")]),
    )
    trainer.rollout_func.search_loop = ByQuestion(trainer)
    return trainer


def main(policy, output):
    """Evaluate 5 questions, 5 as a stream, and sets of 5, 1 and 3, each in batches of 2 × processes."""
    results = {}
    rows = questions(5)
    sets = {"five": Dataset.from_list(rows), "one": Dataset.from_list(rows[:1]), "three": Dataset.from_list(rows[1:4])}
    for name, data, generations in (
        ("rows", Dataset.from_list(rows), 1),
        ("stream", as_stream(rows), 1),
        ("groups", Dataset.from_list(rows), 4),
        ("sets", sets, 2),
    ):
        trainer = evaluator(policy, Path(output) / name, data, batch=2, generations=generations)
        results[name] = trainer.evaluate()
        results["num_processes"] = trainer.accelerator.num_processes
    Path(output, f"results_{trainer.accelerator.process_index}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
