"""Compare the speed of rollouts with TRL's own tool loop. Prints Markdown tables. Needs no network and no data.

    python -m benchmarks.rollouts                                # batches of 16, 64 and 256 rollouts, 1 to 6 turns
    python -m benchmarks.rollouts --batch 64 --turns 3 --longest 160 --json results.json
    python -m benchmarks.rollouts --model docs/models/qwen2.5-3b --dtype bfloat16   # on a GPU
    python -m benchmarks.rollouts --model gemma3 --batch 64 --turns 3   # a small model of another architecture

The model has random weights. It is a tiny Qwen2, or what `--model` says: a small model of an architecture of
`benchmarks/architectures.py`, or one with the shape in a folder. The chat template is Qwen2.5's. Its tokens are forced:
every rollout has a script of its turns and their tokens. All loops therefore generate the same number of tokens in the
same turns, with the same model and the same passages, and differ only in the work around the model. As in training,
several rollouts (`--group`) have the same question. With `--group 1`, all questions differ. All turns have the same
length, unless `--longest` is given: then the length of each turn is drawn at random.

The loops are `GRPOTrainer(tools=[search])` of TRL, and `TSPOTrainer` with each of its two protocols. The method
`_generate`, which all of them have, is timed for each loop in turn. The columns of the tables:

- "× TRL": rollouts/s divided by TRL's in the same setting.
- "tokens/s": tokens written by the rollouts per second.
- "of bare": time of `model.generate` on the same contexts for the same number of steps, divided by the loop's time in
  `generate`. A value over 1 means that the loop saves work of the model.
- "reading": time in `generate` until the first token of each turn.
- "writing": time in `generate` for the other tokens.
- "retrieval": time in the retriever.
- "rest": templates, parsing, tokenising and the loop.
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
from transformers import PreTrainedModel
from trl import GRPOTrainer

from tspo_trl import TSPOTrainer
from tspo_trl.engines.shared_prefix import shared_length

from ..architectures import ARCHITECTURES
from .scripts import MAX_TURNS, ROLLOUTS, TURN_TOKENS, Scripts, force
from .trainers import PASSAGES, TimedRetriever, make_trainers


@contextmanager
def recorded(model: PreTrainedModel, calls: list[dict[str, Any]]) -> Iterator[None]:
    """Time the calls of `generate` and record their inputs."""
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


def bare(model: PreTrainedModel, calls: list[dict[str, Any]]) -> float:
    """Measure the seconds of plain `generate` for the same turns. Every context is read from its beginning."""
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


def measure(
    trainer: GRPOTrainer, batch: int, group: int, scripts: Scripts, retriever: TimedRetriever
) -> dict[str, float]:
    """Measure one generation phase of `batch` rollouts, with `group` rollouts per question."""
    rows = trainer.train_dataset.select([i // group for i in range(batch)])
    prompts = [row["prompt"] for row in rows]
    if not isinstance(trainer, TSPOTrainer):  # TRL sets these in `_generate_and_score_completions`
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
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256], help="rollouts per batch")
    parser.add_argument("--group", type=int, default=8, help="rollouts per question")
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 3, 6], help="maximum turns per rollout")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0.0, 0.02], help="seconds that each call of the retriever waits"
    )
    parser.add_argument(
        "--longest",
        type=int,
        default=TURN_TOKENS,
        help=f"maximum tokens per turn; the minimum is {TURN_TOKENS} (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of measured runs (default: %(default)s)")
    parser.add_argument(
        "--model",
        help=f"folder with a config.json, or one of {', '.join(ARCHITECTURES)} (default: a tiny Qwen2)",
    )
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the scripts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if max(arguments.batch) > ROLLOUTS or max(arguments.turns) > MAX_TURNS or arguments.longest < TURN_TOKENS:
        parser.error(
            f"`--batch` must be at most {ROLLOUTS}, `--turns` at most {MAX_TURNS}, "
            f"and `--longest` at least {TURN_TOKENS}"
        )
    if arguments.model not in (None, *ARCHITECTURES) and not Path(arguments.model, "config.json").is_file():
        parser.error(
            f"`--model` must be a folder with a config.json or one of {', '.join(ARCHITECTURES)}, got {arguments.model!r}"
        )

    trainers, scripts, retriever = make_trainers(arguments, mkdtemp())
    protocols = {name: "tags" if name.endswith("tags") else "tool_call" for name in trainers}
    for name, trainer in trainers.items():
        trainer.model.eval()
        force(trainer.model, scripts, protocols[name])
    model = next(iter(trainers.values())).model
    turn_tokens = TURN_TOKENS if arguments.longest == TURN_TOKENS else f"{TURN_TOKENS}–{arguments.longest}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    print(
        f"{type(model).__name__.removesuffix('ForCausalLM')} with {model.num_parameters() / 1e6:.2f} M parameters ({arguments.dtype}), groups of {arguments.group}, "
        f"{turn_tokens} tokens per turn, {PASSAGES} passages per search, on {machine}; "
        f"medians of {arguments.repeats} runs.\n"
    )
    for name, trainer in trainers.items():
        if isinstance(trainer, TSPOTrainer):
            prompts = trainer.search_loop.protocol.encode_prompts([row["prompt"] for row in trainer.train_dataset])
            longest, common = max(map(len, prompts)), shared_length(trainer.model, prompts)
            print(f"{name}: prompts have up to {longest} tokens and share the first {common}.")
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
                    continue  # the only turn is the answer, so delays have no effect
                scripts.draw_turns(most, arguments.seed)
                retriever.delay = delay
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
                for repeat in range(arguments.repeats + 1):
                    for name, trainer in trainers.items():
                        run = measure(trainer, batch, arguments.group, scripts, retriever)
                        if repeat:  # the first run is a warm-up
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
