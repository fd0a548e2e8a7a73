"""The regimes of the study: initial policies for the fictional encyclopedia. Each seed has its own world and policy."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tspo_trl import Trajectory
from tspo_trl.demo import World, make_tokenizer, make_world, supervise, warm_start
from tspo_trl.demo.warmup import answer_rate, demonstrate_world, sample
from tspo_trl.demo.world import Question

#: Answers of a single letter. A is left out, because it is an article and its normalised form is empty.
ZONES = "BCDEFG"
WORLDS = 8  # number of worlds with demonstrations
ADAPT_STEPS = 300  # steps to adapt a strong policy to the passages of the control


def mislead(world: World, seed: int) -> World:
    """
    Add misleading answers to an encyclopedia. Every passage gets its own zone, and two countries and two languages that
    are unrelated to it. Only questions with a country or a language as answer are kept, and questions for the zones of
    cities are added.

    Args:
        world ([`World`]):
            The encyclopedia.
        seed (`int`):
            Seed of the additions.
    """
    rng = random.Random(seed)
    passages, zones = [], {}
    for passage in world.passages:
        zones[passage.title] = zone = rng.choice(ZONES)
        others = [*rng.sample(world.names["country"], 2), *rng.sample(world.names["language"], 2)]
        rng.shuffle(others)
        passages.append(replace(passage, text=f"{passage.text} Zone {zone}. Also: {', '.join(others)}."))

    def ask(questions: list[Question]) -> list[Question]:
        kept = [question for question in questions if question.kind in ("country", "language")]
        cities = sorted({question.queries[0] for question in questions if question.kind == "language"})
        asked = kept + [Question(f"In which zone is {city}?", zones[city], (city,), "zone") for city in cities]
        rng.shuffle(asked)
        return asked

    return World(
        passages, ask(world.train_questions), ask(world.heldout_questions), world.names | {"zone": list(ZONES)}
    )


def plain_world(seed: int) -> World:
    """Make the encyclopedia of the demo."""
    return make_world(seed)


def misleading_world(seed: int) -> World:
    """Make the encyclopedia of the control."""
    return mislead(make_world(seed), seed)


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
            Makes the worlds for demonstrations and training, from a seed.
    """

    title: str
    wrong_query: float
    wrong_answer: float
    steps: int
    make_world: Callable[[int], World] = plain_world


REGIMES = {
    "weak": Regime("weak search, weak answers", 0.5, 0.8, 60),
    "weak_answers": Regime("good search, weak answers", 0.05, 0.9, 30),
    "weak_search": Regime("weak search, good answers", 0.5, 0.0, 35),
    "nearly_solved": Regime("nearly solved", 0.1, 0.1, 20),
    "misleading": Regime("control: misleading near misses", 0.25, 0.3, 50, misleading_world),
}


def cut_at_wrong_query(demonstration: Trajectory, question: Question) -> Trajectory:
    """Cut a demonstration after its first wrong query: its later turns do not follow from the retrieved passages."""
    for place, (turn, query) in enumerate(zip(demonstration.turns, question.queries, strict=False)):
        if turn.content != query:
            return replace(demonstration, turns=demonstration.turns[: place + 1])
    return demonstration


def study_tokenizer() -> PreTrainedTokenizerBase:
    """Make the tokenizer of all regimes."""
    return make_tokenizer([f"In which zone is x? Zone {' '.join(ZONES)}. Also: x, x"])


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
    tokenizer = study_tokenizer()
    path = folder / f"{regime.make_world.__name__}-{seed}-{regime.wrong_query}-{regime.wrong_answer}"
    if not path.exists():
        model = AutoModelForCausalLM.from_pretrained(make_strong(seed, folder))
        worlds = [regime.make_world(1_000_000 * (seed + 1) + i) for i in range(WORLDS + 1)]
        if regime.make_world is not plain_world:
            supervise(
                model, _demonstrate(tokenizer, worlds[:WORLDS], seed), steps=ADAPT_STEPS, learning_rate=1e-3, seed=seed
            )
            questions = worlds[WORLDS].heldout_questions[:64]
            reached = answer_rate(sample(model, tokenizer, worlds[WORLDS], questions, greedy=True), questions)
            if reached < 0.7:
                raise RuntimeError(
                    f"The policy of seed {seed} did not learn to read the passages: it answers {reached:.0%} correctly."
                )
        mistakes = {"wrong_query": regime.wrong_query, "wrong_answer": regime.wrong_answer}
        shown = _demonstrate(tokenizer, worlds[:WORLDS], seed, **mistakes)
        supervise(model, shown, steps=80, learning_rate=1e-3, seed=seed)
        _save(model, tokenizer, path)
    return path


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
