"""Run both loops: the loop of Search-R1, unchanged from a clone, with stand-ins for its imports, and our loop."""

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from tspo_trl.engines.static import TransformersEngine
from tspo_trl.rollout.limits import SearchLimits
from tspo_trl.rollout.loop import SearchLoop
from tspo_trl.rollout.tags import TagProtocol

from ..drawn_turns import drawing
from .task import PASSAGES, Task, check_turns, sampling
from .token_counts import Count, SampledTurn, count_turns


@dataclass(slots=True)
class DataProto:
    """
    Stand-in for `verl.DataProto`: named tensors and additional data.

    Args:
        batch (`dict[str, torch.Tensor]`, *optional*):
            Tensors by name, with B rows each.
        meta_info (`dict`, *optional*):
            Additional data.
    """

    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, tensors: dict[str, torch.Tensor]) -> "DataProto":
        """Create an instance from tensors by name."""
        return cls(dict(tensors))


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replace modules that are not needed here by stand-ins, while `generation.py` is imported."""
    verl, utils, tracking, requests = map(ModuleType, ("verl", "verl.utils", "verl.utils.tracking", "requests"))
    verl.DataProto, tracking.Tracking = DataProto, object
    modules = {module.__name__: module for module in (verl, utils, tracking, requests)}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def import_search_r1(folder: Path) -> ModuleType:
    """Import `search_r1.llm_agent.generation` from a clone."""
    if not (folder / "search_r1" / "llm_agent" / "generation.py").is_file():
        raise SystemExit(
            f"`--search_r1` must be a clone of https://github.com/PeterGriffinJin/Search-R1, but {str(folder)!r} has no "
            "search_r1/llm_agent/generation.py."
        )
    sys.path.insert(0, str(folder.resolve()))
    try:
        with stand_ins():
            return importlib.import_module("search_r1.llm_agent.generation")
    finally:
        sys.path.pop(0)


class Worker:
    """
    Stand-in for the workers that generate. It uses transformers, with the interface of
    `vLLMRollout.generate_sequences`. Each response has up to `max_response` tokens and no stop string, and is padded
    after its end.
    """

    def __init__(self, task: Task, model: Qwen2ForCausalLM):
        self.task, self.model = task, model
        self.sampled: list[list[list[int]]] = [[] for _ in range(task.batch)]

    @torch.no_grad()
    def generate_sequences(self, batch: DataProto) -> DataProto:
        """Generate one response per row."""
        tokenizer = self.task.tokenizer
        input_ids = batch.batch["input_ids"]
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=batch.batch["attention_mask"],
            generation_config=sampling(tokenizer, self.task.max_response),
        )
        responses = output[:, input_ids.shape[1] :]
        first = tokenizer.convert_tokens_to_ids("<q0>")
        for row, response in zip(input_ids.tolist(), responses.tolist(), strict=True):
            rollout = next(token - first for token in row if 0 <= token - first < self.task.batch)
            end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
            self.sampled[rollout].append(response[:end])
        return DataProto({"responses": responses})


def run_search_r1(task: Task, model: Qwen2ForCausalLM, generation: ModuleType) -> Count:
    """Run the rollouts with the `LLMGenerationManager` of Search-R1."""
    tokenizer, pad = task.tokenizer, task.tokenizer.pad_token_id
    worker = Worker(task, model)
    trained: list[list[list[int]]] = [[] for _ in range(task.batch)]

    class Manager(generation.LLMGenerationManager):
        def _batch_search(self, queries: list[str]) -> dict[str, Any]:
            results = task.retriever.search(queries, self.config.topk) if queries else []
            documents = [
                [{"document": {"contents": f"{p.title}\n{p.text}"}, "score": p.score} for p in r] for r in results
            ]
            return {"result": documents}

        def _postprocess_responses(self, responses: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
            encoded, texts = super()._postprocess_responses(responses)
            done = iter(encoded.tolist())
            for rollout, turns in enumerate(worker.sampled):
                if len(turns) > len(trained[rollout]):
                    trained[rollout].append([token for token in next(done) if token != pad])
            return encoded, texts

    manager = Manager(
        tokenizer,
        worker,
        generation.GenerationConfig(
            max_turns=task.turns - 1,
            max_start_length=2048,
            max_prompt_length=model.config.max_position_embeddings - task.max_response,
            max_response_length=task.max_response,
            max_obs_length=task.max_observation,
            num_gpus=1,
            topk=PASSAGES,
        ),
    )
    prompts = task.prompts()
    rows = [torch.tensor(ids) for ids in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = (input_ids != pad).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    batch = DataProto({"input_ids": input_ids, "attention_mask": mask, "position_ids": positions})
    with drawing(model, task.draw()) as calls, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        output = manager.run_llm_loop(batch, input_ids)
        seconds = time.perf_counter() - start
    rollouts = [
        [SampledTurn(*pair) for pair in zip(*turns, strict=True)] for turns in zip(worker.sampled, trained, strict=True)
    ]
    check_turns(task, rollouts)
    length = output.batch["responses"].shape[1]
    return Count(
        **count_turns(tokenizer, rollouts),
        trained=int(output.batch["info_mask"][:, -length:].sum()),
        attended=int(output.batch["attention_mask"][:, -length:].sum()),
        seconds=seconds,
        model_seconds=calls.seconds,
    )


def run_ours(task: Task, model: Qwen2ForCausalLM) -> Count:
    """Run the rollouts with [`SearchLoop`] and [`TransformersEngine`]."""
    tokenizer = task.tokenizer
    protocol = TagProtocol(tokenizer, task.turns - 1)
    config = sampling(tokenizer, task.max_response)
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, protocol.stop_strings)
    collect = engine.collect
    sampled: list[list[list[int]]] = [[] for _ in range(task.batch)]

    def collect_and_record(*, wait: bool) -> Any:
        written = collect(wait=wait)
        for number, generation in written:
            sampled[number].append(list(generation.token_ids))
        return written

    engine.collect = collect_and_record
    loop = SearchLoop(
        engine,
        task.retriever,
        protocol,
        eos_token_ids=[tokenizer.eos_token_id],
        limits=SearchLimits(
            max_searches=task.turns - 1,
            num_passages=PASSAGES,
            max_turn_tokens=task.max_response,
            max_observation_tokens=task.max_observation,
            max_completion_length=100_000,
        ),
        max_context_length=model.config.max_position_embeddings,
    )
    prompts = task.prompts()
    with drawing(model, task.draw()) as calls:
        start = time.perf_counter()
        trajectories, _ = loop.run(prompts)
        seconds = time.perf_counter() - start
    rollouts = []
    for trajectory, turns in zip(trajectories, sampled, strict=True):
        trained: list[list[int]] = [[] for _ in turns]
        for token, turn in zip(trajectory.completion_ids, trajectory.turn_index, strict=True):
            if turn >= 0:
                trained[turn].append(token)
        rollouts.append([SampledTurn(*pair) for pair in zip(turns, trained, strict=True)])
    check_turns(task, rollouts)
    return Count(
        **count_turns(tokenizer, rollouts),
        trained=sum(sum(t.loss_mask) for t in trajectories),
        attended=sum(len(t.completion_ids) for t in trajectories),
        seconds=seconds,
        model_seconds=calls.seconds,
    )
