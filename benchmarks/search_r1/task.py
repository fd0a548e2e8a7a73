"""The inputs of both loops: a model, prompts, and drawn ends of turns."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2ForCausalLM

from tspo_trl import BM25Retriever, Passage
from tspo_trl.rollout.tags import TagProtocol

from .. import tiny_qwen
from ..drawn_turns import FREE, DrawnTurns
from .token_counts import SampledTurn

PASSAGES = 3
MAX_ROLLOUTS = 256


def make_tokenizer(passages: Sequence[Passage]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the passages. Tags are plain text, as in Search-R1. Each rollout has a marker token."""
    texts = (f"{p.title}\n{p.text}" for p in passages)
    return tiny_qwen.make_tokenizer(texts, 4000, added=[f"<q{i}>" for i in range(MAX_ROLLOUTS)])


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """Make a tiny Qwen2 with random weights."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return tiny_qwen.make_model(tokenizer, hidden_size, layers, seed, **special).eval()


def teach(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], steps: int
) -> float:
    """Train a model on the tokenised passages, and return its final loss in nats per token."""
    ids = torch.tensor(tokenizer("\n".join(p.text for p in passages), add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - 128, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return statistics.mean(losses[-20:])


@dataclass(frozen=True, slots=True)
class Task:
    """
    The inputs of both loops.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        retriever ([`BM25Retriever`]):
            The retriever.
        titles (`list[str]`):
            Titles from which queries and answers are drawn.
        max_response (`int`):
            Maximum number of tokens per turn: `max_response_length` and `max_turn_tokens`.
        max_observation (`int`):
            Maximum number of tokens per observation: `max_obs_length` and `max_observation_tokens`.
        batch (`int`):
            Number of rollouts.
        turns (`int`):
            Maximum number of turns per rollout.
        after (`int`):
            Number of tokens that the model writes after a closing tag, if the loop does not stop there.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the drawn turns.
    """

    tokenizer: PreTrainedTokenizerBase
    retriever: BM25Retriever
    titles: list[str]
    max_response: int
    max_observation: int
    batch: int
    turns: int
    after: int
    seed: int = 0

    def num_turns(self, rollout: int) -> int:
        """Draw the number of turns of a rollout, between 1 and `turns`."""
        return random.Random(f"{self.seed} turns {rollout}").randint(1, self.turns)

    def plan(self, rollout: int, turn: int) -> list[int]:
        """Plan a turn: free tokens, a forced action, and again free tokens."""
        rng = random.Random(f"{self.seed} {rollout} {turn}")
        title = rng.choice(self.titles)
        final = turn == self.num_turns(rollout) - 1
        text = f"<answer> {title}</answer>" if final else f"<search> {title}</search>"
        action = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        free = rng.randint(4, max(4, self.max_response - len(action) - 1))
        return [FREE] * free + action + [FREE] * self.after

    def draw(self) -> DrawnTurns:
        """Make the logits processor that forces the planned turns."""
        first = int(self.tokenizer.convert_tokens_to_ids("<q0>"))
        # A free token must neither write a tag nor end the message
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        banned = torch.tensor([bool({"<", ">"} & set(token)) for token in tokens])
        return DrawnTurns(self.plan, self.batch, banned, int(self.tokenizer.eos_token_id), first)

    def prompts(self) -> list[list[int]]:
        """Encode one prompt per rollout."""
        protocol = TagProtocol(self.tokenizer, self.turns - 1)
        texts = [str(protocol.prompt(f"<q{i}> {self.titles[i]}?")) for i in range(self.batch)]
        return protocol.encode_prompts(texts)


def sampling(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Return the settings for plain sampling at temperature 1."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        disable_compile=True,
    )


def check_turns(task: Task, rollouts: Sequence[Sequence[SampledTurn]]) -> None:
    """Check that every rollout has its drawn number of turns."""
    expected = [task.num_turns(i) for i in range(task.batch)]
    found = [len(turns) for turns in rollouts]
    if found != expected:
        raise RuntimeError(f"Rollouts of {expected} turns were drawn, but the loop made rollouts of {found} turns.")
