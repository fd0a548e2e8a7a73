"""Run by test_hub.py in separate processes: `push` trains and pushes, `use` downloads and answers questions."""

import io
import json
import logging
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import httpx2
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tspo_trl import BM25Retriever, SearchAgent, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_world

torch.set_num_threads(1)
WORLD = make_world(0, train_books=12, heldout_books=6)
RETRIEVER = BM25Retriever(WORLD.passages)
QUESTIONS = [question.text for question in WORLD.heldout_questions[:12]]


def rows(questions):
    return Dataset.from_list(
        [{"question": q.text, "golden_answers": [q.answer], "data_source": "books"} for q in questions]
    )


def length_reward(completions, **kwargs):
    """Varies within every group, so that every step changes the weights."""
    return [len(completion) / 100 + index % 4 for index, completion in enumerate(completions)]


def make_trainer(folder, model, lora=False, **options):
    config = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_completion_length": 160,
        "max_searches": 3,
        "num_passages": 2,
        "max_turn_tokens": 12,
        "max_observation_tokens": 48,
        **options,
    }
    return TSPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=TSPOConfig(output_dir=str(folder), **config),
        train_dataset=rows(WORLD.train_questions),
        eval_dataset={"books": rows(WORLD.heldout_questions[:4])},
        retriever=RETRIEVER,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def answers(agent):
    """Tokens and log-probabilities of every turn of every question."""
    return [
        [[turn.token_ids, turn.logprobs, turn.observation_ids] for turn in trajectory.turns]
        for trajectory in agent.rollout(QUESTIONS)
    ]


def in_memory(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return SearchAgent.from_model(
        model, trainer.processing_class, retriever=RETRIEVER, config=trainer.search_config, batch_size=5
    )


def fail(*failures):
    httpx2.post(f"{constants.ENDPOINT}/fake/fail", json=[{"path": path, "status": status} for path, status in failures])


def attempt(push, folder):
    """The error of a push, and the files in the folder of the run."""
    try:
        push()
    except RuntimeError as error:
        return {"error": str(error), "files": sorted(path.name for path in folder.iterdir())}
    return {"error": None}


def push(policy, folder):
    results = {}
    warnings = io.StringIO()
    logging.getLogger("tspo_trl").addHandler(logging.StreamHandler(warnings))
    saving = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}

    results["base"] = answers(SearchAgent.from_pretrained(policy, retriever=RETRIEVER, **limits()))
    trainer = make_trainer(folder / "full", policy, hub_model_id="user/full", eval_on_start=True, **saving)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset_name="books.jsonl")
    results["full"] = answers(in_memory(trainer))

    AutoModelForCausalLM.from_pretrained(policy).push_to_hub("user/base")
    AutoTokenizer.from_pretrained(policy).push_to_hub("user/base")
    # Nothing may be lost if the repository cannot be created or the commit fails
    trainer = make_trainer(folder / "adapter", "user/base", lora=True)
    trainer.train()
    fail(("/api/repos/create", 401))
    results["refused"] = attempt(trainer.push_to_hub, folder / "adapter")
    fail(("/commit/", 500))
    results["failed"] = attempt(trainer.push_to_hub, folder / "adapter")
    fail()
    trainer.push_to_hub(dataset_name="user/questions")
    results["adapter"] = answers(in_memory(trainer))

    trainer = make_trainer(
        folder / "steps", "user/base", lora=True, hub_model_id="user/steps", hub_strategy="checkpoint", **saving
    )
    fail(("/api/models/user/steps/commit/", 403))
    trainer.train()
    results["warnings"] = warnings.getvalue()
    fail()
    trainer.train(resume_from_checkpoint=True)  # no steps are left
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    results["steps"] = answers(in_memory(trainer))
    return results


def limits():
    return {"max_searches": 3, "num_passages": 2, "max_turn_tokens": 12, "max_observation_tokens": 48}


def use(policy, folder):
    results = {
        "full": answers(SearchAgent.from_pretrained("user/full", retriever=RETRIEVER)),
        "adapter": answers(SearchAgent.from_pretrained("user/adapter", retriever=RETRIEVER, batch_size=3)),
        "steps": answers(SearchAgent.from_pretrained("user/steps", retriever=RETRIEVER, subfolder="last-checkpoint")),
        "local": answers(SearchAgent.from_pretrained(folder / "full", retriever=RETRIEVER)),
        "local adapter": answers(
            SearchAgent.from_pretrained(folder / "adapter", retriever=RETRIEVER, base_model=policy)
        ),
        "files": {name: HfApi().list_repo_files(f"user/{name}") for name in ("full", "adapter", "steps")},
    }
    card = ModelCard.load("user/full")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(snippet, {})
    results["snippet"] = printed.getvalue().splitlines()

    # As on a node without network: a snapshot does not record which files are missing from the repository
    constants.HF_HUB_CACHE = str(folder / "another-cache")
    snapshot_download("user/full")
    constants.HF_HUB_OFFLINE = True
    results["offline"] = answers(SearchAgent.from_pretrained("user/full", retriever=RETRIEVER))
    return results


if __name__ == "__main__":
    step, policy, folder = sys.argv[1:]
    results = {"push": push, "use": use}[step](policy, Path(folder))
    Path(folder, f"{step}.json").write_text(json.dumps(results))
