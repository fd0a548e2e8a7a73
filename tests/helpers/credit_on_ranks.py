"""Run by test_distributed.py in one or more processes: each rank saves the advantages of the same rollouts."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from tspo_trl import BM25Retriever, Passage, Trajectory, TSPOConfig, TSPOTrainer, Turn
from tspo_trl.rollout.stats import RolloutStats

GOLDS = [["gold"], ["silver", "argent"]]


class Recorded:
    """A search loop whose rollouts depend only on their position in the batch of all ranks."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.protocol = trainer.search_loop.protocol

    def run(self, prompt_ids):
        start = self.trainer.accelerator.process_index * len(prompt_ids)
        trajectories = [self.rollout(start + i, ids) for i, ids in enumerate(prompt_ids)]
        return trajectories, RolloutStats(searches=len(prompt_ids))

    @staticmethod
    def rollout(number, prompt_ids):
        found = [Passage(id="0", title="", text="the gold" if number % 3 else "the gold and silver")]
        turns = [
            Turn(
                token_ids=[10 + k, 20 + number],
                action="search",
                content=f"query {k}",
                observation_ids=[5] * (1 + number % 3),
                retrieval="ok",
                passages=found if (number % 5 == k) else [],
            )
            for k in range(1 + number % 4)
        ]
        turns.append(Turn(token_ids=[30, 31], action="answer", content="gold" if number in (9, 13) else "wrong"))
        status = "retrieval_failed" if number in (2, 14) else "answered"
        return Trajectory(prompt_ids=list(prompt_ids), turns=turns, status=status)


def main(policy, output, level):
    rows = [{"prompt": f"Question: {i}\n", "question": str(i), "golden_answers": GOLDS[i % 2]} for i in range(8)]
    batch = 16 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = TSPOTrainer(
        model=policy,
        args=TSPOConfig(
            output_dir=f"{output}/run",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            num_generations=8,
            advantage_level=level,
            folr_guard="chance",
            max_completion_length=64,
            max_observation_tokens=16,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        retriever=BM25Retriever([Passage(id="0", title="Paris", text="capital")]),
    )
    trainer.rollout_func.search_loop = Recorded(trainer)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    output_of_step = trainer._generate_and_score_completions(inputs)
    torch.save(
        {
            "num_processes": trainer.accelerator.num_processes,
            "advantages": [
                row[: len(x["trajectory"].completion_ids)].tolist()
                if row.dim()
                else [row.item()] * len(x["trajectory"].completion_ids)
                for row, x in zip(output_of_step["advantages"], inputs, strict=True)
            ],
            "metrics": {k: v for k, v in trainer._metrics["train"].items() if not k.startswith("time/")},
        },
        Path(output) / f"rank{trainer.accelerator.process_index}.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
