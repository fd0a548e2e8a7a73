"""The regimes of the study: initial policies for the fictional encyclopedia. Each seed has its own world and policy."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tspo_trl import Trajectory
from tspo_trl.demo import World, make_model, make_tokenizer, supervise, warm_start
from tspo_trl.demo.warmup import answer_rate, demonstrate_world, sample
from tspo_trl.demo.world import Question

from .worlds import (
    ZONES,
    misleading_world,
    noisy_world,
    plain_world,
    real_passages,
    real_text_world,
    repeated_world,
    small_repeated_world,
)

WORLDS = 8  # number of worlds with demonstrations
ADAPT_STEPS = 300  # steps to adapt a strong policy to passages that are not those of the demo, up to ADAPT_TIMES times
ADAPT_TIMES = 4
EMBEDDINGS = ("model.embed_tokens", "lm_head")  # weights of the vocabulary, which are one tensor


@dataclass(frozen=True)
class Regime:
    """
    The conditions in which training starts.

    Args:
        title (`str`):
            Name of the regime in tables.
        wrong_query (`float`):
            Probability of a wrong name in a query of the last demonstrations of the warm start. Such a demonstration
            ends with the wrong query.
        wrong_answer (`float`):
            Probability of a wrong answer in demonstrations that found the correct answer.
        steps (`int`):
            Number of training steps.
        make_world (`Callable[[int], World]`, *optional*):
            Makes the world of training, from a seed.
        warm_world (`Callable[[int], World]`, *optional*):
            Makes the worlds of the warm start, from a seed. `None` stands for `make_world`.
        real_words (`bool`, *optional*, defaults to `False`):
            Whether the policy knows the words of the real passages.
        share (`float`, *optional*):
            In the sweep, the share of the passages that name answers of other questions.
    """

    title: str
    wrong_query: float
    wrong_answer: float
    steps: int
    make_world: Callable[[int], World] = plain_world
    warm_world: Callable[[int], World] | None = None
    real_words: bool = False
    share: float | None = None

    def policy_world(self, seed: int) -> World:
        """Make a world of the warm start."""
        return (self.warm_world or self.make_world)(seed)

    @property
    def policy(self) -> tuple[str, float, float]:
        """What the initial policy depends on, besides its seed. Regimes with the same value share their policies."""
        make_world: Any = self.warm_world or self.make_world
        return make_world.__name__, self.wrong_query, self.wrong_answer


#: The regimes, in the order of the tables. The new ones come last.
REGIMES = {
    "weak": Regime("weak search, weak answers", 0.5, 0.8, 60),
    "weak_answers": Regime("good search, weak answers", 0.05, 0.9, 30),
    "weak_search": Regime("weak search, good answers", 0.5, 0.0, 35),
    "nearly_solved": Regime("nearly solved", 0.1, 0.1, 20),
    "misleading": Regime("control: misleading near misses", 0.25, 0.3, 50, misleading_world),
    "many_queries": Regime("every search finds the answer", 0.4, 0.4, 40, repeated_world, small_repeated_world),
    "real_text": Regime("among real passages", 0.4, 0.6, 40, real_text_world, real_words=True),
}

#: Share of the passages that name answers of other questions, in the sweep of chance.
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def _of_share(share: float) -> Regime:
    make_world = partial(noisy_world, share=share)
    return Regime(f"share {share:.1f}", 0.25, 0.6, 40, make_world, warm_world=noisy_world, share=share)


#: The regimes of the sweep of chance. They differ only in the passages: all start from the same policies.
SWEEP = {f"chance_{round(100 * share):02}": _of_share(share) for share in SHARES}

ALL_REGIMES = REGIMES | SWEEP


def cut_at_wrong_query(demonstration: Trajectory, question: Question) -> Trajectory:
    """Cut a demonstration after its first wrong query: its later turns do not follow from the retrieved passages."""
    for place, (turn, query) in enumerate(zip(demonstration.turns, question.queries, strict=False)):
        if turn.content != query:
            return replace(demonstration, turns=demonstration.turns[: place + 1])
    return demonstration


def study_tokenizer(*, real_words: bool = False) -> PreTrainedTokenizerBase:
    """Make the tokenizer of the regimes, with the words of the real passages too if `real_words`."""
    texts = [f"In which zone is x? Zone {' '.join(ZONES)}. Also: x, x"]
    if real_words:
        texts += [f"{passage.title} {passage.text}" for passage in real_passages()]
    return make_tokenizer(texts)


def with_more_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, larger: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """
    Give a policy a larger vocabulary. What it knows stays: the known words keep their embeddings.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, from [`~tspo_trl.demo.make_model`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        larger ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with the same words and more.
        seed (`int`):
            Seed of the embeddings of the new words.
    """
    grown = make_model(larger, seed=seed)
    words, places = tokenizer.get_vocab(), larger.get_vocab()
    others = {name: value for name, value in model.state_dict().items() if not name.startswith(EMBEDDINGS)}
    grown.load_state_dict(others, strict=False)
    with torch.no_grad():
        known = model.get_input_embeddings().weight[list(words.values())]
        grown.get_input_embeddings().weight[[places[word] for word in words]] = known
    return grown


def make_strong(seed: int, folder: Path) -> Path:
    """
    Make a policy that searches and reads the plain encyclopedia without mistakes. An existing policy is reused.

    Args:
        seed (`int`):
            Seed of the weights and the demonstrations.
        folder (`Path`):
            Folder of the policies.

    Returns:
        `Path`: The folder of the policy.
    """
    path = folder / f"strong-{seed}"
    if not path.exists():
        tokenizer = study_tokenizer()
        _save(warm_start(tokenizer, seed=seed, worlds=WORLDS, max_steps=1500, weaken_steps=0), tokenizer, path)
    return path


def make_policy(regime: Regime, seed: int, folder: Path) -> Path:
    """
    Make the policy that training starts from. An existing policy is reused.

    Args:
        regime ([`Regime`]):
            The regime.
        seed (`int`):
            Seed of the weights and the demonstrations.
        folder (`Path`):
            Folder of the policies.

    Returns:
        `Path`: The folder of the policy.
    """
    made, wrong_query, wrong_answer = regime.policy
    path = folder / f"{made}-{seed}-{wrong_query}-{wrong_answer}"
    if not path.exists():
        tokenizer = study_tokenizer(real_words=regime.real_words)
        model = AutoModelForCausalLM.from_pretrained(make_strong(seed, folder))
        if regime.real_words:
            model = with_more_words(model, study_tokenizer(), tokenizer, seed)
        worlds = [regime.policy_world(1_000_000 * (seed + 1) + i) for i in range(WORLDS + 1)]
        if made != plain_world.__name__:
            _adapt(model, tokenizer, worlds, seed)
        shown = _demonstrate(tokenizer, worlds[:-1], seed, wrong_query=wrong_query, wrong_answer=wrong_answer)
        supervise(model, shown, steps=80, learning_rate=1e-3, seed=seed)
        _save(model, tokenizer, path)
    return path


def _adapt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, worlds: list[World], seed: int) -> None:
    """Teach a policy to read the passages of other worlds, without mistakes, until it does. The last world is unseen."""
    shown = _demonstrate(tokenizer, worlds[:-1], seed)
    questions = worlds[-1].heldout_questions[:64]
    reached = 0.0
    for _ in range(ADAPT_TIMES):
        supervise(model, shown, steps=ADAPT_STEPS, learning_rate=1e-3, seed=seed)
        reached = answer_rate(sample(model, tokenizer, worlds[-1], questions, greedy=True), questions)
        if reached >= 0.7:
            return
    raise RuntimeError(
        f"The policy of seed {seed} did not learn to read the passages: it answers {reached:.0%} correctly."
    )


def _demonstrate(
    tokenizer: PreTrainedTokenizerBase, worlds: list[World], seed: int, **mistakes: float
) -> list[Trajectory]:
    """Demonstrate all questions of some worlds."""
    shown = []
    for i, world in enumerate(worlds):
        questions = [*world.train_questions, *world.heldout_questions]
        demonstrations = demonstrate_world(tokenizer, world, **mistakes, seed=seed + i)
        shown += [cut_at_wrong_query(*pair) for pair in zip(demonstrations, questions, strict=True)]
    return shown


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save a policy atomically. If another process saved it first, that policy is kept."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(path)
    except OSError:
        if not path.exists():
            raise
        shutil.rmtree(unfinished)
