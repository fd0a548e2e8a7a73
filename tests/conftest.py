"""A tiny model, a small data set and a trainer. They are created locally, so that no test needs a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset

from helpers.limits import LIMITS
from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_model, make_tokenizer, make_world, supervise
from tspo_trl.demo.warmup import demonstrate_world

torch.set_num_threads(1)  # tests run in several processes


@pytest.fixture(autouse=True)
def one_thread():
    """A command that runs in this process uses all cores, on which the last digits of later results would depend."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def world():
    return make_world(0, train_books=12, heldout_books=6)


@pytest.fixture(scope="session")
def retriever(world):
    return BM25Retriever(world.passages)


@pytest.fixture(scope="session")
def dataset(world):
    return Dataset.from_list([question.row() for question in world.train_questions])


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory, tokenizer, world):
    """A tiny policy whose actions are mostly well-formed and rarely correct."""
    folder = tmp_path_factory.mktemp("policy")
    model = make_model(tokenizer, hidden_size=48, num_layers=2)
    demonstrations = demonstrate_world(tokenizer, world, wrong_query=0.3, wrong_answer=0.9)
    supervise(model, demonstrations, steps=60, batch_size=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(tmp_path, policy_dir, dataset, retriever):
    """A function that creates a trainer of the tiny policy. By default, a step has 2 questions with 4 rollouts each."""

    def make(trainer_class=TSPOTrainer, **options):
        arguments = {"train_dataset": dataset, "retriever": retriever}
        names = ("model", "train_dataset", "eval_dataset", "retriever", "reward_funcs", "peft_config", "callbacks")
        for name in (*names, "processing_class", "quantization_config"):
            if name in options:
                arguments[name] = options.pop(name)
        arguments.setdefault("model", policy_dir)
        config = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "max_completion_length": 160,
            **LIMITS,
            **options,
        }
        return trainer_class(args=TSPOConfig(**config), **arguments)

    return make
