"""The compared trainers: TRL's own, and ours with each protocol."""

import argparse
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_world
from tspo_trl.rollout.tags import PROMPT

from ..architectures import ARCHITECTURES, make_model
from ..tiny_qwen import END, PAD, START, make_tokenizer
from ..tiny_qwen import make_model as make_tiny_qwen
from .scripts import ROLLOUTS, Scripts

PASSAGES = 3
#: The tags of both protocols, with one token each.
TAGS = ["<search>", "</search>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]


class TimedRetriever:
    """A retriever that measures its time. Each call waits before it searches, like a call to another machine."""

    def __init__(self, retriever: BM25Retriever):
        self.retriever = retriever
        self.delay = self.seconds = 0.0

    def search(self, queries: list[str], k: int) -> list[Any]:
        start = time.perf_counter()
        time.sleep(self.delay)
        result = self.retriever.search(queries, k)
        self.seconds += time.perf_counter() - start
        return result


def load_model(name: str | None, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Make a model with random weights: a tiny Qwen2, a small one of an architecture, or one with the shape in a folder."""
    if name is None:
        return make_tiny_qwen(tokenizer, 64, 2, seed)
    if name in ARCHITECTURES:
        # Windows are shorter than most contexts, as in practice
        window = {"sliding_window": 128} if "sliding_window" in ARCHITECTURES[name] else {}
        return make_model(name, len(tokenizer), seed, hidden_size=64, **window)
    config = AutoConfig.from_pretrained(name).get_text_config()
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"`--model`: {name} has {config.vocab_size} tokens, but the benchmark needs {len(tokenizer)}.")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def make_trainers(arguments: argparse.Namespace, folder: str) -> tuple[dict[str, GRPOTrainer], Scripts, TimedRetriever]:
    """Make a trainer per loop, with one model. Return the trainers by name, the scripts and the shared retriever."""
    world = make_world(0)
    texts = [f"{p.title} {p.text}" for p in world.passages] + [PROMPT]
    marks = [f"<r{i}>" for i in range(ROLLOUTS)]
    tokenizer = make_tokenizer(texts, 2000, added=[*TAGS, *marks], special=(PAD, START, END))
    tokenizer.chat_template = qwen2_5_chat_template
    scripts = Scripts(tokenizer, [p.title for p in world.passages], arguments.longest, arguments.seed)
    model = load_model(arguments.model, tokenizer, arguments.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    retriever = TimedRetriever(BM25Retriever(world.passages))

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
        "router_aux_loss_coef": 0.0,  # nothing is trained
        "model_init_kwargs": {"dtype": arguments.dtype},
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
    return trainers, scripts, retriever
