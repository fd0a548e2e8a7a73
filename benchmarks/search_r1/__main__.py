"""Compare our search loop with that of Search-R1, which decodes, cuts and re-encodes turns. Prints Markdown tables.

    git clone https://github.com/PeterGriffinJin/Search-R1
    python -m benchmarks.search_r1 --search_r1 Search-R1
    python -m benchmarks.search_r1 --search_r1 Search-R1 --batch 64 --turns 2 4 --json results.json

The loop of Search-R1 (`search_r1/llm_agent/generation.py`, run unchanged from the clone) decodes the sampled tokens
after every turn, cuts the text after the closing tag, and encodes the text again. Training uses the new tokens. Its
rollout with vLLM has no stop string: a turn continues until the model ends its message, or for `max_response_length`
tokens. `SearchLoop` stops at the closing tag and keeps the sampled tokens.

Both loops use `generate` of transformers with the same tiny Qwen2 at temperature 1, the same `BM25Retriever`, prompts
and limits. Each turn consists of tokens that the model samples, followed by a forced query or answer with its tags. Its
length is drawn in advance and is the same for both loops. Models differ after a closing tag, so two cases are measured
(`--after`): the model ends its message immediately, or continues up to the limit of the turn. Two models are measured
(`--teach_steps`): one with random weights, which rarely writes the tokens that a tokeniser would choose, and one
trained on the passages for a minute.

These parts of Search-R1 are replaced by stand-ins: its worker (which generates with vLLM on several GPUs), its data
class `DataProto` (here a dictionary of tensors), its tracking, and the HTTP request to its retriever. Its rollouts/s
therefore measure its loop, not its engine: transformers computes all rows of a batch until the last row has ended, and
reads every context from its beginning in every turn.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from tspo_trl import BM25Retriever
from tspo_trl.retrieval.corpus import iter_corpus

from .loop import import_search_r1, run_ours, run_search_r1
from .task import MAX_ROLLOUTS, PASSAGES, Task, make_model, make_tokenizer, teach
from .token_counts import Count

CORPUS = Path(__file__).parents[2] / "tests" / "data" / "hotpotqa" / "passages.jsonl"


def measure(loops: dict[str, Callable[[], Count]], repeats: int) -> dict[str, Count]:
    """Run the loops alternately, and return the sums of their counts and the medians of their times."""
    runs: dict[str, list[Count]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):
        for name, run in loops.items():
            torch.manual_seed(repeat)
            count = run()
            if repeat:  # the first run is a warm-up
                runs[name].append(count)
    combined = {}
    for name, counts in runs.items():
        values: dict[str, Any] = {}
        for item in fields(Count):
            of_runs = [getattr(count, item.name) for count in counts]
            values[item.name] = statistics.median(of_runs) if item.name.endswith("seconds") else sum(of_runs)
        combined[name] = Count(**values)
    return combined


HEADER = (
    "| rollouts | turns | after a tag | loop | sampled | thrown away | changed | rollouts changed | trained on | attended to "
    "| rollouts/s | sampled tokens/s in the model |"
)


def row(task: Task, name: str, count: Count, repeats: int) -> str:
    """Format a row of the table."""
    kept = count.generated - count.thrown_away
    after = "goes on" if task.after >= task.max_response else f"ends after {task.after}"
    cells = [
        f"{task.batch}",
        f"1–{task.turns}" if task.turns > 1 else "1",
        "ends" if task.after == 0 else after,
        name,
        f"{count.generated:,}",
        f"{count.thrown_away:,} ({count.thrown_away / count.generated:.0%})",
        f"{count.changed:,} ({count.changed / kept:.2%})",
        f"{count.rollouts_changed / count.rollouts:.0%}",
        f"{count.trained:,}",
        f"{count.attended:,}",
        f"{task.batch / count.seconds:.1f}",
        f"{count.generated / repeats / count.model_seconds:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_r1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search_r1", type=Path, required=True, help="a clone of Search-R1")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="passages as JSONL")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="rollouts per batch")
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 3, 4], help="maximum turns per rollout")
    parser.add_argument(
        "--max_response",
        type=int,
        default=64,
        help="maximum tokens per turn (500 in Search-R1's scripts, which is also our default)",
    )
    parser.add_argument("--max_observation", type=int, default=500, help="maximum tokens per observation")
    parser.add_argument(
        "--after",
        type=int,
        nargs="+",
        help="tokens after a closing tag before the model ends its message (default: 0 and the maximum)",
    )
    parser.add_argument(
        "--teach_steps",
        type=int,
        nargs="+",
        default=[0, 400],
        help="training steps on the passages, one model per value",
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of measured runs (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=64, help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if not 1 <= max(arguments.batch) <= MAX_ROLLOUTS:
        parser.error(f"`--batch` must be between 1 and {MAX_ROLLOUTS}, got {max(arguments.batch)}")

    generation = import_search_r1(arguments.search_r1)
    passages = list(iter_corpus(arguments.corpus))
    tokenizer = make_tokenizer(passages)
    retriever = BM25Retriever(passages)
    titles = [p.title for p in passages if len(tokenizer(p.title)["input_ids"]) <= 12 and not set("<>") & set(p.title)]
    results = []
    for steps in arguments.teach_steps:
        model = make_model(tokenizer, arguments.hidden_size, arguments.layers, arguments.seed)
        taught = f"taught for {steps} steps (loss {teach(model, tokenizer, passages, steps):.2f})" if steps else ""
        print(
            f"Qwen2 with {model.num_parameters() / 1e6:.2f} M parameters, {taught or 'random weights'}; at most "
            f"{arguments.max_response} tokens per turn, {PASSAGES} passages per search. Counts are sums over "
            f"{arguments.repeats} runs, times are medians, on {os.cpu_count()} cores ({platform.machine()}) with "
            f"{torch.get_num_threads()} threads.\n"
        )
        print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|")
        for batch in arguments.batch:
            for turns in arguments.turns:
                for after in arguments.after or [0, arguments.max_response]:
                    task = Task(
                        tokenizer=tokenizer,
                        retriever=retriever,
                        titles=titles,
                        max_response=arguments.max_response,
                        max_observation=arguments.max_observation,
                        batch=batch,
                        turns=turns,
                        after=after,
                        seed=arguments.seed,
                    )
                    loops: dict[str, Callable[[], Count]] = {
                        "Search-R1": lambda task=task, model=model: run_search_r1(task, model, generation),
                        "tspo_trl": lambda task=task, model=model: run_ours(task, model),
                    }
                    for name, count in measure(loops, arguments.repeats).items():
                        print(row(task, name, count, arguments.repeats), flush=True)
                        settings = {"teach_steps": steps, "batch": batch, "turns": turns, "after": after, "loop": name}
                        results.append({**settings, **asdict(count)})
        print()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
