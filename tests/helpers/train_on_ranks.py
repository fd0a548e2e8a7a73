"""A short training run that tests launch in several processes, kill and resume."""

import argparse
import faulthandler
import json
import os
import random
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from tspo_trl import BM25Retriever, Passage, Trajectory, TSPOConfig, TSPOTrainer, Turn
from tspo_trl.demo import make_world
from tspo_trl.rollout.stats import RolloutStats
from tspo_trl.training.signals import StopOnSignal

OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 8,  # groups span four ranks of 4 rollouts
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_completion_length": 160,
    "max_searches": 3,
    "num_passages": 2,
    "max_turn_tokens": 12,
    "max_observation_tokens": 48,
}


def length_reward(trajectories, **kwargs):
    """Varies within every group, so that every step changes the weights."""
    return [float(len(t.turns[0].token_ids) % 4) for t in trajectories]


def length_reward_of_others(idle_rank):
    """As above, but groups of one rank have no signal."""
    return lambda trajectories, **kwargs: (
        [0.0] * len(trajectories) if int(os.environ["RANK"]) == idle_rank else length_reward(trajectories)
    )


def length_reward_of_some(trajectories, question, **kwargs):
    """As above, but most questions give no signal."""
    rewards = length_reward(trajectories)
    return [reward if len(text) % 3 == 0 else 0.0 for reward, text in zip(rewards, question, strict=True)]


class Uneven:
    """Makes rollouts of rank 0 end after one turn, while those of the other ranks use all their turns."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, text, *, ended=False):
        return ("answer", "x") if self.rank == 0 else ("invalid", "")


class Recorded:
    """A search loop whose rollouts depend only on the step and on their position in the batch of all ranks."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.protocol = trainer.search_loop.protocol
        self.calls = 0

    def run(self, prompt_ids):
        start = self.trainer.accelerator.process_index * len(prompt_ids)
        self.calls += 1
        return [self.rollout(start + i, ids) for i, ids in enumerate(prompt_ids)], RolloutStats(
            searches=len(prompt_ids)
        )

    def rollout(self, number, prompt_ids):
        rng = random.Random(f"{self.calls} {number}")
        turns = [
            Turn(
                token_ids=[rng.randrange(10, 240) for _ in range(rng.randint(1, 6))],
                action="search",
                observation_ids=[rng.randrange(10, 240) for _ in range(rng.randint(1, 9))],
                retrieval="ok",
                passages=[Passage("0", "", "of the")] if rng.random() < 0.5 else [],
            )
            for _ in range(rng.randint(1, 4))
        ]
        turns.append(Turn(token_ids=[rng.randrange(10, 240), 2], action="answer", content="x"))
        status = "retrieval_failed" if rng.random() < 0.1 else "answered"
        return Trajectory(prompt_ids=list(prompt_ids), turns=turns, status=status)


class Broken:
    def search(self, queries, k):
        raise ConnectionError("down")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output_dir")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--uneven", action="store_true", help="rollouts of rank 0 end after one turn")
    parser.add_argument(
        "--recorded", action="store_true", help="rollouts that do not depend on the number of processes"
    )
    parser.add_argument("--broken_rank", type=int, help="the rank whose retriever always fails")
    parser.add_argument("--shorter_rank", type=int, help="the rank with one question fewer")
    parser.add_argument("--idle_rank", type=int, help="the rank whose groups have no signal")
    parser.add_argument("--few_signals", action="store_true", help="most questions give no signal")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(900, exit=True)  # a hang ends with a traceback of all threads

    world = make_world(0, train_books=12, heldout_books=6)
    options = {**OPTIONS, "output_dir": arguments.output_dir, **arguments.options}
    rows = [question.row() for question in world.train_questions]
    reward = length_reward if options.pop("length_reward", True) else None
    if arguments.idle_rank is not None:
        reward = length_reward_of_others(arguments.idle_rank)
    if arguments.few_signals:
        reward = length_reward_of_some
    config = TSPOConfig(**options)
    if plugin := getattr(config, "deepspeed_plugin", None):  # otherwise ZeRO-3 does not partition a tiny model
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False  # compiling its Adam takes minutes
        plugin.set_deepspeed_weakref()
    trainer = TSPOTrainer(
        model=arguments.model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows[:-1] if config.process_index == arguments.shorter_rank else rows),
        retriever=BM25Retriever(world.passages),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if arguments.lora else None,
        callbacks=[StopOnSignal()],
    )
    rank = trainer.accelerator.process_index
    if arguments.uneven:
        trainer.search_loop.protocol.parse = Uneven(rank)
    if rank == arguments.broken_rank:
        trainer.search_loop.retriever = Broken()
    if arguments.recorded:
        trainer.rollout_func.search_loop = Recorded(trainer)
    gathers, generations, turns = count_gathers(), [], []
    run = trainer.search_loop.run
    trainer.search_loop.run = lambda prompts: generations.append(1) or run(prompts)
    if not arguments.recorded:
        engine = trainer.search_loop.engine
        name = "collect" if engine.in_rounds else "submit"  # called once per round or once per turn
        function = getattr(engine, name)
        setattr(engine, name, lambda *a, **kw: turns.append(len(gathers)) or function(*a, **kw))
    trainer.train(resume_from_checkpoint=arguments.resume and any(Path(arguments.output_dir).glob("*/complete.json")))
    if getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
        assert not any(p.ds_persist for p in trainer.model.parameters() if p.requires_grad)
    trainer.save_model(f"{arguments.output_dir}/final")
    state = trainer.accelerator.state
    about = {
        "distributed_type": str(state.distributed_type.value),
        "num_processes": state.num_processes,
        "zero_stage": state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else None,
        "fsdp_version": getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", None),
        "gathers_before_each_turn": turns,
        "generations": len(generations),
        "history": trainer.state.log_history,
    }
    Path(arguments.output_dir, f"about_{rank}.json").write_text(json.dumps(about))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # threads of other libraries may abort the interpreter at exit


def count_gathers():
    """A list that gets one more item each time all parameters are gathered."""
    gathers = []
    if find_spec("deepspeed") is not None:
        import deepspeed

        enter = deepspeed.zero.GatheredParameters.__enter__
        deepspeed.zero.GatheredParameters.__enter__ = lambda self: gathers.append(1) or enter(self)
    # FSDP2 gathers one group of parameters after another, so only the first group is counted
    first = []
    unshard = FSDPParamGroup.unshard

    def counting(self, *args, **kwargs):
        first[:] = first or [self]
        if self is first[0] and not self.is_unsharded:
            gathers.append(1)
        return unshard(self, *args, **kwargs)

    FSDPParamGroup.unshard = counting
    return gathers


if __name__ == "__main__":
    main()
