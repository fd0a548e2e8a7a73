"""The encyclopedias of the study: that of the demo, and changed copies of it."""

import gzip
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

from tspo_trl import Passage
from tspo_trl.demo import World, make_world
from tspo_trl.demo.world import Question

#: Answers of a single letter. A is left out, because it is an article and its normalised form is empty.
ZONES = "BCDEFG"
NOISE = 6  # answers of other questions that are added to a passage
#: Real passages, of which a fixed sample is used.
REAL = Path(__file__).parents[1] / "real_model" / "hotpotqa" / "passages.jsonl.gz"
REAL_COUNT = 600
REAL_TITLE_WORDS = 4  # longer titles would fill the observation
REAL_WORDS = 12


def plain_world(seed: int) -> World:
    """Make the encyclopedia of the demo."""
    return make_world(seed)


def misleading_world(seed: int) -> World:
    """Make the encyclopedia of the control."""
    return mislead(make_world(seed), seed)


def repeated_world(seed: int) -> World:
    """Make an encyclopedia in which every search for a question finds its answer. It is large, so that answers are rare."""
    return repeat_facts(make_world(seed, train_books=240))


def small_repeated_world(seed: int) -> World:
    """Make a smaller encyclopedia of the same kind, for the warm start."""
    return repeat_facts(make_world(seed))


def real_text_world(seed: int) -> World:
    """Make an encyclopedia among real passages."""
    return add_passages(make_world(seed), real_passages())


def noisy_world(seed: int, share: float = 0.5) -> World:
    """Make an encyclopedia in which a share of the passages names answers of other questions."""
    return add_noise(make_world(seed), seed, share)


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


def add_noise(world: World, seed: int, share: float) -> World:
    """
    Add the answers of other questions to a share of the passages: six draws from the answers of all questions, so a frequent answer
    is named often. Only questions with a country or a language as answer are kept. A larger share changes the passages that a
    smaller share changes, and more.

    Args:
        world ([`World`]):
            The encyclopedia.
        seed (`int`):
            Seed of the additions.
        share (`float`):
            Share of the passages that are changed, from 0 to 1.
    """

    def ask(questions: list[Question]) -> list[Question]:
        return [question for question in questions if question.kind in ("country", "language")]

    asked = ask(world.train_questions), ask(world.heldout_questions)
    answers = [question.answer for questions in asked for question in questions]
    rng = random.Random(seed)
    order = rng.sample(range(len(world.passages)), len(world.passages))
    passages = list(world.passages)
    for place in order[: round(share * len(order))]:
        others = dict.fromkeys(rng.choices(answers, k=NOISE))
        passages[place] = replace(passages[place], text=f"{passages[place].text} Also: {', '.join(others)}.")
    return World(passages, *asked, world.names)


def repeat_facts(world: World) -> World:
    """
    Repeat facts in the passages that lead to them: of a person also in the passages of the books, and so on. Only questions
    that need several searches are kept: each of these searches finds the answer.

    Args:
        world ([`World`]):
            The encyclopedia.
    """
    questions = [*world.train_questions, *world.heldout_questions]
    added: dict[str, dict[str, None]] = {}  # by title, the answers that its passage gets, in order
    for question in questions:
        for title in question.queries[:-1]:
            added.setdefault(title, {})[question.answer] = None
    passages = []
    for passage in world.passages:
        new = [answer for answer in added.get(passage.title, ()) if answer not in passage.text]
        passages.append(replace(passage, text=f"{passage.text} Also: {', '.join(new)}.") if new else passage)

    def ask(questions: list[Question]) -> list[Question]:
        return [question for question in questions if question.hops > 1]

    return World(passages, ask(world.train_questions), ask(world.heldout_questions), world.names)


def add_passages(world: World, passages: list[Passage]) -> World:
    """Add passages that answer no question to an encyclopedia."""
    return replace(world, passages=[*world.passages, *passages])


@cache
def _read_real_passages() -> tuple[Passage, ...]:
    with gzip.open(REAL, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = [row for row in rows if len(row["title"].split()) <= REAL_TITLE_WORDS]
    drawn = random.Random(0).sample(short, REAL_COUNT)
    return tuple(Passage(row["id"], row["title"], " ".join(row["text"].split()[:REAL_WORDS])) for row in drawn)


def real_passages() -> list[Passage]:
    """Return the first words of a fixed sample of Wikipedia passages, see `benchmarks/real_model/hotpotqa`."""
    return list(_read_real_passages())
