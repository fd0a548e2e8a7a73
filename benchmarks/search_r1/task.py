"""What both loops are given: a model, prompts, and where turns end."""

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
MOST_ROLLOUTS = 256


def make_tokenizer(passages: Sequence[Passage]) -> PreTrainedTokenizerFast:
    """A tokenizer that has learned the passages. Tags are plain text, as in Search-R1; each rollout has a mark."""
    texts = (f"{p.title}\n{p.text}" for p in passages)
    return tiny_qwen.make_tokenizer(texts, 4000, added=[f"<q{i}>" for i in range(MOST_ROLLOUTS)])


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """A tiny Qwen2 with random weights."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return tiny_qwen.make_model(tokenizer, hidden_size, layers, seed, **special).eval()


def teach(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], steps: int
) -> float:
    """Fit the text of the passages as the tokeniser encodes it; the loss at the end, in nats a token."""
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
    What both loops are given.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        retriever ([`BM25Retriever`]):
            Executes the searches.
        titles (`list[str]`):
            What queries and answers are drawn from.
        max_response (`int`):
            The most tokens of a turn: `max_response_length` and `max_turn_tokens`.
        max_observation (`int`):
            The most tokens of an observation: `max_obs_length` and `max_observation_tokens`.
        batch (`int`):
            Rollouts at once.
        turns (`int`):
            The most turns of a rollout.
        after (`int`):
            Tokens that the model goes on writing after a closing tag, if it may.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is drawn.
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
        """Between 1 and `turns`."""
        return random.Random(f"{self.seed} turns {rollout}").randint(1, self.turns)

    def plan(self, rollout: int, turn: int) -> list[int]:
        """A turn: some tokens as the model likes, an action, and again as it likes."""
        rng = random.Random(f"{self.seed} {rollout} {turn}")
        title = rng.choice(self.titles)
        final = turn == self.num_turns(rollout) - 1
        text = f"<answer> {title}</answer>" if final else f"<search> {title}</search>"
        action = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        free = rng.randint(4, max(4, self.max_response - len(action) - 1))
        return [FREE] * free + action + [FREE] * self.after

    def draw(self) -> DrawnTurns:
        """What makes a model write this."""
        first = int(self.tokenizer.convert_tokens_to_ids("<q0>"))
        # A free token can neither write a tag, nor end the message
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        banned = torch.tensor([bool({"<", ">"} & set(token)) for token in tokens])
        return DrawnTurns(self.plan, self.batch, banned, int(self.tokenizer.eos_token_id), first)

    def prompts(self) -> list[list[int]]:
        """One prompt for each rollout."""
        protocol = TagProtocol(self.tokenizer, self.turns - 1)
        texts = [str(protocol.prompt(f"<q{i}> {self.titles[i]}?")) for i in range(self.batch)]
        return protocol.encode_prompts(texts)


def sampling(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Plain sampling at temperature 1."""
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
    """Check that every rollout has the turns that were drawn for it."""
    expected = [task.num_turns(i) for i in range(task.batch)]
    found = [len(turns) for turns in rollouts]
    if found != expected:
        raise RuntimeError(f"Rollouts of {expected} turns were drawn, but the loop made {found}.")
