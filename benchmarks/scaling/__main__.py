"""What does a rollout cost, and how does it scale? Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.scaling                     # five minutes of CPU time
    python -m benchmarks.scaling --groups 8 32 --searches 2 --turn_tokens 16 64 --processes 1 2 --json results.json

Training steps of `TSPOTrainer` on the fictional encyclopedia, with the model and the settings of the demo
(`recipes/configs/demo.yaml`), on a CPU and in a single thread. Its weights are random and where turns end is fixed, so that every rollout
has the same number of turns and of tokens: all but the last turn are searches whose queries the model samples, the last one
answers. One thing at a time is varied: rollouts of a question, searches of a rollout, tokens of a turn, processes.

"generate" is the time in `generate` of the model; of it, "prefill" and "decode" are its forward passes over several tokens and
over one, "sampling" is the rest. "retrieval" is the time in the retriever. "loss and optimizer" is forward and backward of
the loss and the step of the optimizer. "rest" is everything else: parsing, rewards, credit, logs, and the trainer.
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

from .cost import PARTS, Cost, Setting, measure, measure_apart
from .stages import STAGES


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sweep_table(name: str, costs: Sequence[tuple[int, Setting, Cost]]) -> str:
    """What a rollout costs, by one thing that varies."""
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
    """What a step consists of."""
    rows = [
        [stage, part, f"{1e3 * cost.stages[stage]:.1f}", f"{100 * cost.stages[stage] / cost.step_seconds:.1f}"]
        for stage, part in STAGES.items()
    ]
    rows.append(["step", "", f"{1e3 * cost.step_seconds:.1f}", "100.0"])
    return table(["stage", "part", "ms a step", "%"], rows)


def process_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """The same step on several processes."""
    rates = [setting.rollouts / cost.step_seconds for setting, cost in costs]
    rows = []
    for (setting, cost), rate in zip(costs, rates, strict=True):
        each, speed = setting.rollouts // cost.processes, f"{rate / rates[0]:.2f}"
        rows.append([str(cost.processes), str(each), f"{1e3 * cost.step_seconds:.0f}", f"{rate:.1f}", speed])
    return table(["processes", "rollouts of each", "ms a step", "rollouts/s", "× the first"], rows)


def memory_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """What a rollout occupies."""
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
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="rollouts of a question")
    parser.add_argument("--searches", type=int, nargs="+", default=[0, 1, 2, 4, 6], help="searches of a rollout")
    parser.add_argument("--turn_tokens", type=int, nargs="+", default=[8, 16, 32, 64], help="tokens of a turn")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes, each with one thread")
    parser.add_argument("--memory", type=int, nargs="+", default=[8, 16, 32], help="rollouts of a question")
    parser.add_argument("--questions", type=int, default=default.questions, help="questions of a step")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of each measurement")
    parser.add_argument("--json", type=Path, help="write the results there too")
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
        parser.error(f"`--turn_tokens` must be at least 4, got {min(arguments.turn_tokens)}: an action has 4 tokens")

    results: list[dict[str, Any]] = []

    def keep(name: str, setting: Setting, cost: Cost) -> Cost:
        results.append({"table": name, **asdict(setting), **asdict(cost)})
        return cost

    common = {"questions": arguments.questions, "steps": arguments.steps}
    base = Setting(**common)
    print(
        f"{make_model(make_tokenizer()).num_parameters() / 1e6:.2f} M parameters; unless it varies: {base.questions} questions "
        f"a step, groups of {base.group}, {base.searches} searches, {base.turn_tokens} tokens a turn; means of {base.steps} "
        f"steps; on {os.cpu_count()} cores ({platform.machine()}), one thread.\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says there what it found
        measure(Setting(questions=base.questions, steps=1))  # warms up the process
    print("## Stages of a step\n")
    print(stage_table(base, keep("stages", base, measure(base))), flush=True)
    for title, name, values in (
        ("Group size", "group", arguments.groups),
        ("Searches", "searches", arguments.searches),
        ("Tokens of a turn", "turn_tokens", arguments.turn_tokens),
    ):
        costs = []
        for value in values:
            setting = Setting(**{**common, name: value})
            costs.append((value, setting, keep(name, setting, measure(setting))))
        print(f"## {title}\n")
        print(sweep_table(title.lower(), costs), flush=True)
    print("## Processes\n")
    of_processes = [(base, keep("processes", base, measure_apart(base, n))) for n in arguments.processes]
    print(process_table(of_processes), flush=True)
    print("## Memory\n")
    settings = [Setting(**common, group=group) for group in arguments.memory]
    print(memory_table([(s, keep("memory", s, measure_apart(s))) for s in settings]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
