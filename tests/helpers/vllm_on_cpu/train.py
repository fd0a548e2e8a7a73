"""A short training run that generates with vLLM, for test_vllm.py. Prints its log history and results as JSON."""

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from patches import patch
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient

from tspo_trl import BM25Retriever, TransformersEngine, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_world
from tspo_trl.training.generation import generation_model


def send_by_disk(client, metadata, named_params):
    """Send weights as a file, because TRL uses NCCL, which needs GPUs. The server is otherwise unchanged."""
    tensors = {name: param.detach().clone().contiguous() for name, param in named_params}
    assert sorted(tensors) == sorted(name for name, _, _ in metadata)
    save_file(tensors, Path(client.model) / "model.safetensors", metadata={"format": "pt"})
    client._post(f"{client.base_url}/collective_rpc", json={"method": "reload_weights"})


def greedy(trainer, prompts):
    """The margins at which greedy rollouts by vLLM and by static batching diverge, for the same prompts."""
    loop = trainer.search_loop
    loop.engine._sampling["temperature"] = 0.0
    by_vllm, _ = loop.run(prompts)
    config = trainer.model.generation_config
    config.update(
        do_sample=False, eos_token_id=trainer.eos_token_ids, pad_token_id=trainer._tokenizer.pad_token_id, top_k=None
    )
    loop.engine = TransformersEngine(
        lambda: generation_model(trainer, config), trainer._tokenizer, config, loop.protocol.stop_strings
    )
    trainer.generation_kwargs = {}
    by_transformers, _ = loop.run(prompts)
    return [margin(trainer.model, a, b) for a, b in zip(by_vllm, by_transformers, strict=True)]


@torch.no_grad()
def margin(model, one, other):
    """The difference of the logits of the first tokens that differ, or `None` if the rollouts are equal."""
    for i, pair in enumerate(zip(one.completion_ids, other.completion_ids, strict=False)):
        if pair[0] != pair[1]:
            logits = model(torch.tensor([one.prompt_ids + one.completion_ids[:i]])).logits[0, -1]
            return abs(logits[pair[0]] - logits[pair[1]]).item()
    assert one.completion_ids == other.completion_ids
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("policy")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--frozen_server", action="store_true")
    arguments = parser.parse_args()
    VLLMClient.init_communicator = lambda client, device=0: None
    VLLMClient.close_communicator = lambda client: None
    VLLMClient.update_named_params = send_by_disk
    if arguments.frozen_server:
        VLLMClient.update_named_params = lambda client, metadata, named_params: list(named_params)

    world = make_world(0, train_books=12, heldout_books=6)
    options = {
        "output_dir": "unused",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "log_trajectories": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_completion_length": 160,
        "max_searches": 3,
        "num_passages": 2,
        "max_turn_tokens": 12,
        "max_observation_tokens": 48,
        "use_vllm": True,
        **json.loads(arguments.options),
    }
    trainer = TSPOTrainer(
        model=arguments.policy,
        args=TSPOConfig(**options),
        train_dataset=Dataset.from_list([question.row() for question in world.train_questions]),
        retriever=BM25Retriever(world.passages),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = max((p - q).abs().max().item() for p, q in zip(trainer.model.parameters(), before, strict=True))
    prompts = [trainer._tokenizer(str(q.row()["prompt"]))["input_ids"] for q in world.heldout_questions]
    trainer.vllm_generation.sync_weights()  # the weights of the last step
    engine = trainer.search_loop.engine
    result = {
        "history": trainer.state.log_history,
        "moved": moved,
        "margins": greedy(trainer, prompts),
        "engine": type(engine).__name__,
        "max_context_length": engine.max_context_length,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch()
    torch.set_num_threads(1)
    main()
