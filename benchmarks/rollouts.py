"""How fast are rollouts, beside TRL's own tool loop? Prints Markdown tables. Needs no network and no data.

    python benchmarks/rollouts.py                                # batches of 16, 64 and 256 rollouts; 1 to 6 turns
    python benchmarks/rollouts.py --batch 64 --turns 3 --longest 160 --json results.json

A tiny Qwen2 with random weights, whose tokens are forced: every rollout has a script that says how many turns it takes, and
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
import random
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_world
from tspo_trl.protocol import PROMPT

ROLLOUTS = 256
MOST_TURNS = 16
PASSAGES = 3
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAGS = ["<search>", "</search>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
END = "<|im_end|>"
TURN_TOKENS = 40


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the added tokens and the chat template of Qwen2.5, one token to mark each rollout."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    added = [*TAGS, *(f"<r{i}>" for i in range(ROLLOUTS))]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<|endoftext|>")
    fast.chat_template = qwen2_5_chat_template
    return fast


class Scripts:
    """What each rollout writes, in each protocol: turns of the same numbers of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, queries: list[str], longest: int, seed: int):
        self.tokenizer = tokenizer
        self.longest = longest
        rng = random.Random(seed)
        self.turns: dict[int, int] = {}  # rollout -> turns
        self.queries = {(i, turn): rng.choice(queries) for i in range(ROLLOUTS) for turn in range(MOST_TURNS)}
        self.lengths = {key: rng.randint(TURN_TOKENS, longest) for key in self.queries}
        self.filler = tokenizer(" so", add_special_tokens=False)["input_ids"][0]
        self.first = tokenizer.convert_tokens_to_ids("<r0>")
        self.ends = {"tool_call": "</tool_call>", "tags": "</search>"}
        self.ends = {name: tokenizer.convert_tokens_to_ids(token) for name, token in self.ends.items()}

    def draw_turns(self, most: int, seed: int) -> None:
        """Between 1 and `most` turns for each rollout."""
        rng = random.Random(seed)
        self.turns = {rollout: rng.randint(1, most) for rollout in range(ROLLOUTS)}

    def write(self, protocol: str, rollout: int, turn: int) -> list[int]:
        """The tokens of a turn; the first turn begins with the mark of its rollout."""
        final = turn == self.turns[rollout] - 1
        query = self.queries[rollout, turn]
        if protocol == "tags":
            text = "<answer> Mira</answer>" if final else f"<search> {query}</search>"
        else:
            call = json.dumps({"name": "search", "arguments": {"query": query}})
            text = f" Mira{END}" if final else f"<tool_call>\n{call}\n</tool_call>{END}"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        mark = [self.first + rollout] if turn == 0 else []
        return mark + [self.filler] * (self.lengths[rollout, turn] - len(mark) - len(ids)) + ids


class Forced(LogitsProcessor):
    """
    Lets each row write its script, from the turn that its context has come to. In the first turn a rollout is known by its
    place in the batch, and from then on by the mark that it has written: rows may be moved, and may leave.
    """

    def __init__(self, scripts: Scripts, protocol: str):
        self.scripts, self.protocol = scripts, protocol
        self.written = torch.empty(0, 0, dtype=torch.long)
        self.width = self.tokens = 0
        self.read_at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.read_at:
            self.read_at, self.width = time.perf_counter(), input_ids.shape[1]
        if len(self.written) != len(input_ids):
            scripts = [self._script(*at) for at in enumerate(input_ids.tolist())]
            most = max(map(len, scripts))
            padded = [script + [self.scripts.filler] * (most - len(script)) for script in scripts]
            self.written = torch.tensor(padded, device=scores.device)
        step = min(input_ids.shape[1] - self.width, self.written.shape[1] - 1)
        self.tokens = step + 1
        forced = torch.full_like(scores, -1e9)
        return forced.scatter_(1, self.written[:, step, None], 0.0)

    def _script(self, place: int, row: list[int]) -> list[int]:
        first = self.scripts.first
        mark = next((i for i, token in enumerate(row) if first <= token < first + ROLLOUTS), None)
        if mark is None:
            return self.scripts.write(self.protocol, place, 0)
        turn = row[mark : self.width].count(self.scripts.ends[self.protocol])
        return self.scripts.write(self.protocol, row[mark] - first, turn)


def force(model: Qwen2ForCausalLM, scripts: Scripts, protocol: str) -> None:
    """Append the scripts to whatever processors `generate` makes; `model.forced` is the latest."""
    make = type(model)._get_logits_processor

    def with_script(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        model.forced = Forced(scripts, protocol)
        return LogitsProcessorList([*make(model, *args, **kwargs), model.forced])

    model._get_logits_processor = with_script


class Timed:
    """A retriever that counts its time; each call waits before it answers, as one on another machine does."""

    def __init__(self, retriever: BM25Retriever):
        self.retriever = retriever
        self.delay = self.seconds = 0.0

    def search(self, queries: list[str], k: int) -> list[Any]:
        start = time.perf_counter()
        time.sleep(self.delay)
        result = self.retriever.search(queries, k)
        self.seconds += time.perf_counter() - start
        return result


@contextmanager
def recorded(model: Qwen2ForCausalLM, calls: list[dict[str, Any]]) -> Any:
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


def make_trainers(arguments: argparse.Namespace, folder: str) -> tuple[dict[str, GRPOTrainer], Scripts, Timed, Any]:
    world = make_world(0)
    texts = [f"{p.title} {p.text}" for p in world.passages] + [PROMPT]
    tokenizer = make_tokenizer(texts)
    scripts = Scripts(tokenizer, [p.title for p in world.passages], arguments.longest, arguments.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(arguments.seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    retriever = Timed(BM25Retriever(world.passages))

    def search(query: str) -> str:
        """
        Search an encyclopedia.

        Args:
            query: What to search for.

        Returns:
            The passages found.
        """
        (passages,) = retriever.search([query], PASSAGES)
        return "\n".join(f"Doc {i}(Title: {p.title}) {p.text}" for i, p in enumerate(passages, 1))

    shared = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "temperature": 1.0,
        "report_to": "none",
        "max_completion_length": 4096,
    }
    titles = [passage.title for passage in world.passages]
    questions = [f"{titles[i % len(titles)]}, or {titles[i // len(titles)]}?" for i in range(ROLLOUTS)]
    rows = [{"question": question, "golden_answers": ["Mira"]} for question in questions]
    most = max(arguments.turns)
    ours = {
        **shared,
        "max_searches": most,
        "num_passages": PASSAGES,
        "max_turn_tokens": arguments.longest,
        "max_observation_tokens": 500,
        "retrieval_cache_size": 0,
        "log_trajectories": False,
    }
    trainers = {
        "TRL's tool loop": GRPOTrainer(
            model=folder,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=GRPOConfig(**shared, max_tool_calling_iterations=most),
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": PROMPT.format(**row, max_searches=most)}]} for row in rows]
            ),
            tools=[search],
        ),
        **{
            f"tspo_trl, {protocol}": TSPOTrainer(
                model=folder,
                args=TSPOConfig(**ours, protocol=protocol),
                train_dataset=Dataset.from_list(rows),
                retriever=retriever,
            )
            for protocol in ("tool_call", "tags")
        },
    }
    return trainers, scripts, retriever, tokenizer


def bare(model: Qwen2ForCausalLM, calls: list[dict[str, Any]], scripts: Scripts, protocol: str) -> float:
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


def measure(
    trainer: GRPOTrainer, protocol: str, batch: int, group: int, scripts: Scripts, retriever: Timed
) -> dict[str, float]:
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
    in_retriever = retriever.seconds
    return {
        "seconds": seconds,
        "tokens": tokens,
        "model": sum(call["seconds"] for call in calls),
        "reading": sum(call["reading"] for call in calls),
        "retrieval": in_retriever,
        "bare": bare(trainer.model, calls, scripts, protocol),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    if max(arguments.batch) > ROLLOUTS or max(arguments.turns) > MOST_TURNS or arguments.longest < TURN_TOKENS:
        parser.error(f"at most {ROLLOUTS} rollouts of {MOST_TURNS} turns, and --longest at least {TURN_TOKENS}")

    trainers, scripts, retriever, _ = make_trainers(arguments, mkdtemp())
    protocols = {name: "tags" if name.endswith("tags") else "tool_call" for name in trainers}
    for name, trainer in trainers.items():
        trainer.model.eval()
        force(trainer.model, scripts, protocols[name])
    parameters = next(iter(trainers.values())).model.num_parameters()
    turn_tokens = TURN_TOKENS if arguments.longest == TURN_TOKENS else f"{TURN_TOKENS}–{arguments.longest}"
    print(
        f"Qwen2 with {parameters / 1e6:.2f} M parameters, groups of {arguments.group}, {turn_tokens} tokens a turn, {PASSAGES} passages a search, on "
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads; medians of {arguments.repeats}.\n"
    )
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
                        run = measure(trainer, protocols[name], batch, arguments.group, scripts, retriever)
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
