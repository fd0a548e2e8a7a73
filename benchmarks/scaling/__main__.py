"""Measure the cost of a rollout and how it scales. Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.scaling                     # takes five minutes of CPU time
    python -m benchmarks.scaling --groups 8 32 --searches 2 --turn_tokens 16 64 --processes 1 2 --json results.json

The benchmark runs training steps of `TSPOTrainer` on the fictional encyclopedia, with the model and the settings of the
demo (`recipes/configs/demo.yaml`), on a CPU in a single thread. The weights are random, and the ends of turns are
fixed, so every rollout has the same number of turns and tokens. The last turn of a rollout is an answer. All other
turns are searches with queries sampled by the model. One setting is varied at a time: rollouts per question, searches
per rollout, tokens per turn, or processes.

The columns and parts of the tables:

- "generate": time in the model's `generate`. "prefill" is its forward passes over several tokens, "decode" its forward
  passes over one token, and "sampling" the remaining time.
- "retrieval": time in the retriever.
- "loss and optimizer": forward and backward pass of the loss, and the optimizer step.
- "rest": everything else (parsing, rewards, credit, logging and the trainer).
"""

import argparse
import contextlib
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from tspo_trl.demo import make_model, make_tokenizer

from .cost import PARTS, Cost, Setting, measure, measure_in_processes
from .stages import STAGES


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sweep_table(name: str, costs: Sequence[tuple[int, Setting, Cost]]) -> str:
    """Format the cost of a rollout for each value of one setting."""
    header = [name, "rollouts", "completion tokens", "ms a rollout", "µs a token", *(f"{part} %" for part in PARTS)]
    rows = []
    for value, setting, cost in costs:
        seconds = cost.step_seconds / setting.rollouts
        shares = [f"{100 * cost.part(part) / cost.step_seconds:.1f}" for part in PARTS]
        tokens = f"{cost.completion_tokens:.0f}"
        per_token = f"{1e6 * seconds / cost.completion_tokens:.0f}"
        rows.append([str(value), str(setting.rollouts), tokens, f"{1e3 * seconds:.2f}", per_token, *shares])
    return table(header, rows)


def stage_table(setting: Setting, cost: Cost) -> str:
    """Format the time of each stage of a step."""
    rows = [
        [stage, part, f"{1e3 * cost.stages[stage]:.1f}", f"{100 * cost.stages[stage] / cost.step_seconds:.1f}"]
        for stage, part in STAGES.items()
    ]
    rows.append(["step", "", f"{1e3 * cost.step_seconds:.1f}", "100.0"])
    return table(["stage", "part", "ms a step", "%"], rows)


def process_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """Format the cost of the same step with different numbers of processes."""
    rates = [setting.rollouts / cost.step_seconds for setting, cost in costs]
    rows = []
    for (setting, cost), rate in zip(costs, rates, strict=True):
        each, speed = setting.rollouts // cost.processes, f"{rate / rates[0]:.2f}"
        rows.append([str(cost.processes), str(each), f"{1e3 * cost.step_seconds:.0f}", f"{rate:.1f}", speed])
    return table(["processes", "rollouts of each", "ms a step", "rollouts/s", "× the first"], rows)


def memory_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """Format the memory that a rollout needs."""
    rows = []
    first_setting, first = costs[0]
    for setting, cost in costs:
        more = setting.rollouts - first_setting.rollouts
        rows.append(
            [
                str(setting.rollouts),
                f"{cost.completion_tokens:.0f}",
                f"{cost.trajectory_bytes / 1024:.1f}",
                f"{cost.record_bytes / 1024:.1f}",
                f"{cost.peak_bytes / 2**20:.0f}",
                f"{(cost.peak_bytes - first.peak_bytes) / more / 2**20:.2f}" if more else "–",
            ]
        )
    header = ["rollouts", "completion tokens", "KiB of a trajectory", "KiB of its record", "peak MiB"]
    return table([*header, "MiB a further rollout"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Setting()
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="rollouts per question")
    parser.add_argument("--searches", type=int, nargs="+", default=[0, 1, 2, 4, 6], help="searches per rollout")
    parser.add_argument("--turn_tokens", type=int, nargs="+", default=[8, 16, 32, 64], help="tokens per turn")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, each with one thread"
    )
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[8, 16, 32], help="rollouts per question in the table of memory"
    )
    parser.add_argument("--questions", type=int, default=default.questions, help="questions per step")
    parser.add_argument("--steps", type=int, default=default.steps, help="measured steps per setting")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    disable_progress_bar()
    if arguments.worker:
        text, folder = arguments.worker
        cost = measure(Setting(**json.loads(text)))
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(cost)))
        return
    if min(arguments.turn_tokens) < 4:
        parser.error(
            f"`--turn_tokens` must be at least 4, got {min(arguments.turn_tokens)}, because an action has 4 tokens"
        )

    results: list[dict[str, Any]] = []

    def record(name: str, setting: Setting, cost: Cost) -> Cost:
        results.append({"table": name, **asdict(setting), **asdict(cost)})
        return cost

    common = {"questions": arguments.questions, "steps": arguments.steps}
    base = Setting(**common)
    print(
        f"{make_model(make_tokenizer()).num_parameters() / 1e6:.2f} M parameters. Unless varied: {base.questions} "
        f"questions per step, groups of {base.group}, {base.searches} searches, {base.turn_tokens} tokens per turn. "
        f"Means of {base.steps} steps on {os.cpu_count()} cores ({platform.machine()}) with one thread.\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its own log
        measure(Setting(questions=base.questions, steps=1))  # a warm-up run
    print("## Stages of a step\n")
    print(stage_table(base, record("stages", base, measure(base))), flush=True)
    for title, name, values in (
        ("Group size", "group", arguments.groups),
        ("Searches", "searches", arguments.searches),
        ("Tokens of a turn", "turn_tokens", arguments.turn_tokens),
    ):
        costs = []
        for value in values:
            setting = Setting(**{**common, name: value})
            costs.append((value, setting, record(name, setting, measure(setting))))
        print(f"## {title}\n")
        print(sweep_table(title.lower(), costs), flush=True)
    print("## Processes\n")
    costs_by_processes = [(base, record("processes", base, measure_in_processes(base, n))) for n in arguments.processes]
    print(process_table(costs_by_processes), flush=True)
    print("## Memory\n")
    settings = [Setting(**common, group=group) for group in arguments.memory]
    print(memory_table([(s, record("memory", s, measure_in_processes(s))) for s in settings]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
