"""Compare whole training steps with TRL's own tool loop. Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.step                                  # steps of 64 and 256 rollouts of up to 3 turns
    python -m benchmarks.step --batch 64 --shares 1 --json results.json
    python -m benchmarks.step --model docs/models/qwen2.5-0.5b --dtype bfloat16    # on a GPU

The model, the questions, the tokens of the rollouts and their turns are those of `benchmarks.rollouts`: all loops write
the same number of tokens in the same turns. The rewards are made up, so that in a given share of the groups some rollouts
are correct, and in the others none is. A step is a generation phase and a backward for each micro-batch, with one update
of the optimizer. The loops are `GRPOTrainer(tools=[search])` of TRL, and `TSPOTrainer` with each of its protocols, with
`compact_forward=False` ("whole batches") and `True`. The columns of the tables:

- "× TRL": steps/s divided by TRL's in the same setting.
- "rollouts": seconds in the search loop, with its retriever.
- "scores": seconds from the rollouts to the inputs of the loss: rewards, credit, metrics.
- "update": seconds in the forward, the backward and the optimizer, the training half of the step.
- "peak MiB": memory that the update needs beyond what was in use before it, "of TRL" divided by TRL's.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from trl import GRPOTrainer

from tspo_trl import TSPOTrainer

from ..rollouts.scripts import MAX_TURNS, ROLLOUTS, TURN_TOKENS, force
from ..rollouts.trainers import PASSAGES, make_trainers


class Memory:
    """The peak of the memory since the last start, in MiB: of the GPU, or of the process if there is none."""

    def start(self) -> None:
        """Forget the peak."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would hide the next use of it
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    def peak(self) -> float:
        """The peak beyond the memory at the start."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self._status("VmHWM") - self.before if sys.platform == "linux" else float("nan")

    def _status(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Rewards:
    """Rewards of a batch of groups. In the first ones, every fourth rollout is correct; in the others none is."""

    __name__ = "reward"

    def __init__(self, group: int):
        self.group = group
        self.share = 1.0

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        groups = len(completions) // self.group
        return [float(i // self.group < self.share * groups and i % 4 == 0) for i in range(len(completions))]


def prepare(trainer: GRPOTrainer, rewards: Rewards, batch: int, micro_batch: int) -> torch.optim.Optimizer:
    """Set the sizes of a step, and return its optimizer."""
    steps = batch // micro_batch
    trainer.reward_funcs, trainer.reward_func_names = [rewards], ["reward"]
    trainer.num_generations = rewards.group
    args = trainer.args
    args.per_device_train_batch_size, args.steps_per_generation, args.gradient_accumulation_steps = (
        micro_batch,
        steps,
        steps,
    )
    args.generation_batch_size = batch
    trainer.current_gradient_accumulation_steps = steps
    trainer.model_wrapped = trainer.model
    return torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)


def measure(trainer: GRPOTrainer, optimizer: torch.optim.Optimizer, rewards: Rewards, batch: int) -> dict[str, float]:
    """Measure one training step of `batch` rollouts."""
    rows = [dict(row) for row in trainer.train_dataset.select([i // rewards.group for i in range(batch)])]
    memory, rollouts = Memory(), 0.0
    generate = trainer._generate

    def timed(prompts: list[Any]) -> Any:
        nonlocal rollouts
        start = time.perf_counter()
        output = generate(prompts)
        rollouts = time.perf_counter() - start
        return output

    trainer.model.train()
    trainer._step, trainer._buffered_inputs, trainer._generate = 0, None, timed
    start = time.perf_counter()
    try:
        trainer._prepare_inputs(rows)
    finally:
        del trainer._generate
    prepared = time.perf_counter()
    memory.start()
    began = time.perf_counter()
    for _ in range(trainer.args.steps_per_generation):
        # The batches are buffered, so this computes a loss and its gradient
        inputs = trainer._buffered_inputs[trainer._step]
        trainer.compute_loss(trainer.model, inputs).backward()
        trainer._step += 1
    optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    update = time.perf_counter() - began
    peak = memory.peak()
    optimizer.zero_grad()
    trainer._metrics["train"].clear()
    seconds = prepared - start
    return {
        "seconds": seconds + update,
        "rollouts": rollouts,
        "scores": seconds - rollouts,
        "update": update,
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256], help="rollouts of a step")
    parser.add_argument("--micro_batch", type=int, default=16, help="rollouts of a backward (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="rollouts per question (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="maximum turns per rollout (default: %(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.5, 0.2], help="of the groups that have a signal"
    )
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds that each call of the retriever waits (default: %(default)s)"
    )
    parser.add_argument(
        "--longest",
        type=int,
        default=TURN_TOKENS,
        help=f"maximum tokens per turn; the minimum is {TURN_TOKENS} (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of measured steps (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder with the config.json of a Qwen2 (default: a tiny one)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the scripts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if max(arguments.batch) > ROLLOUTS or arguments.turns > MAX_TURNS or arguments.longest < TURN_TOKENS:
        parser.error(
            f"`--batch` must be at most {ROLLOUTS}, `--turns` at most {MAX_TURNS}, "
            f"and `--longest` at least {TURN_TOKENS}"
        )
    if any(batch % size for batch in arguments.batch for size in (arguments.micro_batch, arguments.group)):
        parser.error("each `--batch` must be a multiple of `--micro_batch` and of `--group`")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure all settings and print the table."""
    most, arguments.turns = arguments.turns, [arguments.turns]
    trainers, scripts, retriever = make_trainers(arguments, mkdtemp())
    scripts.draw_turns(most, arguments.seed)
    retriever.delay = arguments.delay
    for name, trainer in trainers.items():
        force(trainer.model, scripts, "tags" if name.endswith("tags") else "tool_call")
    loops: dict[str, tuple[GRPOTrainer, bool]] = {}
    for name, trainer in trainers.items():
        if isinstance(trainer, TSPOTrainer):
            trainer.args.folr_alpha = 0.0  # the same groups have a signal as with TRL
            loops[f"{name}, whole batches"] = (trainer, False)
        loops[name] = (trainer, True)
    describe(arguments, trainers, most)
    print("| rollouts | signal in | loop | s/step | × TRL | rollouts | scores | update | peak MiB | of TRL |")
    print("|" + "---|" * 10)
    rewards, results = Rewards(arguments.group), []
    for batch in arguments.batch:
        optimizers = {
            id(trainer): prepare(trainer, rewards, batch, arguments.micro_batch) for trainer in trainers.values()
        }
        for rewards.share in arguments.shares:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
            for repeat in range(arguments.repeats + 1):
                for name, (trainer, compact) in loops.items():
                    if isinstance(trainer, TSPOTrainer):
                        trainer.args.compact_forward = compact
                    run = measure(trainer, optimizers[id(trainer)], rewards, batch)
                    if repeat:  # the first run is a warm-up
                        runs[name].append(run)
            base: dict[str, float] = {}
            for name in loops:
                value = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
                base = base or value
                print(
                    f"| {batch} | {rewards.share:.0%} | {name} | {value['seconds']:.2f} | "
                    f"{base['seconds'] / value['seconds']:.1f} | {value['rollouts']:.2f} | {value['scores']:.2f} | "
                    f"{value['update']:.2f} | {value['peak']:.0f} | {value['peak'] / base['peak']:.2f} |",
                    flush=True,
                )
                results.append({"batch": batch, "share": rewards.share, "loop": name, **value})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def describe(arguments: argparse.Namespace, trainers: dict[str, GRPOTrainer], turns: int) -> None:
    """Print what is measured."""
    parameters = next(iter(trainers.values())).model.num_parameters()
    turn_tokens = TURN_TOKENS if arguments.longest == TURN_TOKENS else f"{TURN_TOKENS}–{arguments.longest}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    print(
        f"Qwen2 with {parameters / 1e6:.2f} M parameters ({arguments.dtype}), groups of {arguments.group}, 1–{turns} turns "
        f"of {turn_tokens} tokens, {PASSAGES} passages per search, a retriever that waits {1000 * arguments.delay:.0f} ms, "
        f"micro-batches of {arguments.micro_batch}, on {machine}; medians of {arguments.repeats} steps.\n"
    )


if __name__ == "__main__":
    main()
