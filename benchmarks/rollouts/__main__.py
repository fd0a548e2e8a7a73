"""How fast are rollouts, beside TRL's own tool loop? Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.rollouts                                # batches of 16, 64 and 256 rollouts; 1 to 6 turns
    python -m benchmarks.rollouts --batch 64 --turns 3 --longest 160 --json results.json
    python -m benchmarks.rollouts --model docs/models/qwen2.5-3b --dtype bfloat16   # on a GPU

A tiny Qwen2, or one of another shape, with random weights, whose tokens are forced: every rollout has a script that says how many turns it takes, and
what it writes. So all loops generate the same number of tokens in the same turns, with the same model and the same passages,
and differ in nothing but what they do around it. As in training, several rollouts (`--group`) are of one question; with
`--group 1` all questions differ. All turns are of the same length, unless `--longest` lets them be longer, each as drawn.

`GRPOTrainer(tools=[search])` of TRL and `TSPOTrainer` with both of its protocols are timed in the method that both have,
`_generate`, by turns. "× TRL" compares rollouts/s within a table; tokens/s counts what the rollouts wrote. "reading" is the
time in `generate` of the model until the first token of a turn is known, "writing" that for the others, "retrieval" that in
the retriever; the rest is templates, parsing, tokenising and the loop. "of bare" compares the time in `generate` with that of
calling `model.generate` on the same contexts for the same number of steps: over 1, the loop saves the model work.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer

from tspo_trl import TSPOTrainer
from tspo_trl.engines.shared_prefix import shared_length

from .scripts import MOST_TURNS, ROLLOUTS, TURN_TOKENS, Scripts, force
from .trainers import PASSAGES, Timed, make_trainers


@contextmanager
def recorded(model: Qwen2ForCausalLM, calls: list[dict[str, Any]]) -> Iterator[None]:
    """Time the calls of `generate`, and keep what they were asked for."""
    generate = type(model).generate

    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        output = generate(model, *args, **kwargs)
        seconds, forced = time.perf_counter() - start, model.forced
        calls.append({"seconds": seconds, "reading": forced.read_at - start, "inputs": kwargs, "tokens": forced.tokens})
        return output

    model.generate = timed
    yield
    del model.generate


def bare(model: Qwen2ForCausalLM, calls: list[dict[str, Any]]) -> float:
    """Seconds to generate the same turns by nothing but `generate`, each batch of contexts read from its beginning."""
    seconds = 0.0
    for call in calls:
        inputs = {name: call["inputs"][name] for name in ("input_ids", "attention_mask")}
        tokens = call["tokens"]
        start = time.perf_counter()
        with torch.no_grad():
            type(model).generate(
                model,
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=None,
                pad_token_id=0,
            )
        seconds += time.perf_counter() - start
    return seconds


def measure(trainer: GRPOTrainer, batch: int, group: int, scripts: Scripts, retriever: Timed) -> dict[str, float]:
    """One generation phase: `batch` rollouts, of which each `group` are of one question."""
    rows = trainer.train_dataset.select([i // group for i in range(batch)])
    prompts = [row["prompt"] for row in rows]
    if not isinstance(trainer, TSPOTrainer):  # what it prepares for its tools in `_generate_and_score_completions`
        trainer._sync_tool_dicts = [{tool.__name__: tool for tool in trainer.tools} for _ in prompts]
        trainer._async_tool_dicts = [{} for _ in prompts]
    calls: list[dict[str, Any]] = []
    retriever.seconds = 0.0
    trainer.model.train()
    with recorded(trainer.model, calls):
        start = time.perf_counter()
        _, completion_ids, mask, *_ = trainer._generate(prompts)
        seconds = time.perf_counter() - start
    tokens = sum(map(sum, mask)) if mask else sum(map(len, completion_ids))
    expected = sum(scripts.lengths[i, turn] for i in range(batch) for turn in range(scripts.turns[i]))
    assert tokens == expected, f"{tokens} tokens were written instead of {expected}"
    return {
        "seconds": seconds,
        "tokens": tokens,
        "model": sum(call["seconds"] for call in calls),
        "reading": sum(call["reading"] for call in calls),
        "retrieval": retriever.seconds,
        "bare": bare(trainer.model, calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256], help="rollouts at once")
    parser.add_argument("--group", type=int, default=8, help="rollouts of one question")
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 3, 6], help="most turns of a rollout")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0.0, 0.02], help="seconds a call of the retriever waits"
    )
    parser.add_argument(
        "--longest", type=int, default=TURN_TOKENS, help=f"turns have between {TURN_TOKENS} and so many tokens"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder with the config.json of a Qwen2; a tiny one by default")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    if max(arguments.batch) > ROLLOUTS or max(arguments.turns) > MOST_TURNS or arguments.longest < TURN_TOKENS:
        parser.error(f"at most {ROLLOUTS} rollouts of {MOST_TURNS} turns, and --longest at least {TURN_TOKENS}")

    trainers, scripts, retriever = make_trainers(arguments, mkdtemp())
    protocols = {name: "tags" if name.endswith("tags") else "tool_call" for name in trainers}
    for name, trainer in trainers.items():
        trainer.model.eval()
        force(trainer.model, scripts, protocols[name])
    parameters = next(iter(trainers.values())).model.num_parameters()
    turn_tokens = TURN_TOKENS if arguments.longest == TURN_TOKENS else f"{TURN_TOKENS}–{arguments.longest}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    print(
        f"Qwen2 with {parameters / 1e6:.2f} M parameters ({arguments.dtype}), groups of {arguments.group}, {turn_tokens} tokens "
        f"a turn, {PASSAGES} passages a search, on {machine}; medians of {arguments.repeats}.\n"
    )
    for name, trainer in trainers.items():
        if isinstance(trainer, TSPOTrainer):
            prompts = trainer.search_loop.protocol.encode_prompts([row["prompt"] for row in trainer.train_dataset])
            longest, common = max(map(len, prompts)), shared_length(trainer.model, prompts)
            print(f"{name}: prompts of up to {longest} tokens, of which the first {common} are the same.")
    print()
    print(
        "| rollouts | turns | retriever waits | loop | rollouts/s | × TRL | tokens/s | of bare | reading | writing | retrieval | rest |"
    )
    print("|" + "---|" * 12)
    results = []
    for batch in arguments.batch:
        for most in arguments.turns:
            for delay in arguments.delays:
                if most == 1 and delay:
                    continue  # nothing is searched
                scripts.draw_turns(most, arguments.seed)
                retriever.delay = delay
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
                for repeat in range(arguments.repeats + 1):
                    for name, trainer in trainers.items():
                        run = measure(trainer, batch, arguments.group, scripts, retriever)
                        if repeat:  # the first warms up
                            runs[name].append(run)
                base = 0.0
                for name in trainers:
                    value = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
                    rate = batch / value["seconds"]
                    base = base or rate
                    rest = value["seconds"] - value["model"] - value["retrieval"]
                    parts = (value["reading"], value["model"] - value["reading"], value["retrieval"], rest)
                    shares = [100 * part / value["seconds"] for part in parts]
                    print(
                        f"| {batch} | 1–{most} | {1000 * delay:.0f} ms | {name} | {rate:.1f} | {rate / base:.1f} | "
                        f"{value['tokens'] / value['seconds']:.0f} | {value['bare'] / value['model']:.2f} | "
                        + " | ".join(f"{share:.0f} %" for share in shares)
                        + " |",
                        flush=True,
                    )
                    results.append({"batch": batch, "turns": most, "delay": delay, "loop": name, **value})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
