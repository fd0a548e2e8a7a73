"""A seeded fictional encyclopedia: people, books, cities and countries, and questions of one to three hops about them.

Every name consists of two words from small shared lists, so that a model that has seen the words can copy the name of an
entity that it has never seen. All facts are invented, so that no question can be answered without searching.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..retrieval.base import Passage

_FIRST = (
    "Mira Tovan Elska Bram Ysolde Corin Della Faro Greta Hadrin Ilka Joren Kestra Lio Maren Nadir Orla Petra Quill Rasmus "
    "Selma Thane Ulrike Vasko Wilma Xandra Yorick Zora Anselm Birgit Casimir Dagny"
).split()
_LAST = (
    "Talvek Oring Sandoval Brisk Fenwald Harrow Kiplin Lodge Marsten Novik Ostrow Pell Quarry Rivan Stolt Tamsin Underhay "
    "Varga Wexel Yarrow Zemlin Aldane Borsuk Cray Dunmore Eskel Falk Grieve Holm Isaksen Jarvin Keld"
).split()
_PLACE = "Port Old New Upper Lower Saint Fort Lake Mount Castle Glen Stone Long High Cold Green".split()
_TOWN = (
    "Kelda Marsen Brevik Dalia Orun Tessel Vandor Lumen Pirata Galen Hestia Nordal Rovia Sarn Tolmin Ulven Wister Zell "
    "Amber Corvo Dunfel Estral Foyle Gorm"
).split()
_REALM = "Kingdom Republic Union Duchy League Commonwealth".split()
_LAND = (
    "Averna Boldovia Cestria Drelund Elmaria Fostria Gelmark Hyrland Istova Jorvia Kalmar Lethia Morvan Nestria Oldenia "
    "Pelland Rushka Sylvania Turvia Ostmark"
).split()
_ADJECTIVE = (
    "Silent Golden Broken Hidden Crimson Distant Frozen Hollow Burning Gentle Iron Lonely Marble Paper Quiet Restless "
    "Silver Tangled Velvet Wandering"
).split()
_NOUN = (
    "Harbor Garden Mirror Compass Lantern Orchard Bridge Feather Letter Winter Thunder Meadow Anchor Clock Raven Shore "
    "Tower Valley Window Candle"
).split()
_TONGUE = "Arvish Belian Corsic Dorath Elvene Frisk Gallic Hestian Ivric Joltish".split()

PROMPT = "Question: {question}\n"


@dataclass(frozen=True, slots=True)
class Question:
    """
    A question about a world.

    Args:
        text (`str`):
            The question.
        answer (`str`):
            The only correct answer.
        queries (`tuple[str, ...]`):
            The names to search for, one for each hop. The last search finds the answer.
        kind (`str`):
            Type of the answer: `"person"`, `"city"`, `"country"` or `"language"`.
    """

    text: str
    answer: str
    queries: tuple[str, ...]
    kind: str

    @property
    def hops(self) -> int:
        """Number of passages needed to answer the question."""
        return len(self.queries)

    def row(self) -> dict[str, object]:
        """The question as a row for the trainer."""
        return {
            "prompt": PROMPT.format(question=self.text),
            "question": self.text,
            "golden_answers": [self.answer],
            "hops": self.hops,
        }


@dataclass(frozen=True, slots=True)
class World:
    """
    An encyclopedia.

    Args:
        passages (`list[Passage]`):
            A passage for each entity.
        train_questions (`list[Question]`):
            Training questions.
        heldout_questions (`list[Question]`):
            Questions about entities that occur in no training question or answer.
        names (`dict[str, list[str]]`):
            Names of the entities, by type.
    """

    passages: list[Passage]
    train_questions: list[Question]
    heldout_questions: list[Question]
    names: dict[str, list[str]]


def make_world(seed: int, *, train_books: int = 120, heldout_books: int = 60) -> World:
    """
    Make an encyclopedia. It has as many people as books, half as many cities, and a sixth as many countries.

    Args:
        seed (`int`):
            Seed of the world.
        train_books (`int`, *optional*, defaults to `120`):
            Number of books of the training questions.
        heldout_books (`int`, *optional*, defaults to `60`):
            Number of books of the held-out questions.

    Returns:
        [`World`]: The encyclopedia.
    """
    if min(train_books, heldout_books) < 6:
        raise ValueError(
            f"`train_books` and `heldout_books` must be at least 6, got {train_books} and {heldout_books}."
        )
    rng = random.Random(seed)
    total = train_books + heldout_books
    pools = {
        "book": _names(rng, _ADJECTIVE, _NOUN, total),
        "person": _names(rng, _FIRST, _LAST, total),
        "city": _names(rng, _PLACE, _TOWN, total // 2),
        "country": _names(rng, _REALM, _LAND, total // 6),
    }
    passages: list[Passage] = []
    questions: list[list[Question]] = []
    for begin, end in ((0, train_books), (train_books, total)):
        # The parts share words but no entity, so held-out questions need facts that no training question needs
        part = {kind: names[begin * len(names) // total : end * len(names) // total] for kind, names in pools.items()}
        part_passages, part_questions = _describe(rng, part)
        passages += part_passages
        questions.append(part_questions)
    rng.shuffle(passages)
    passages = [Passage(id=str(i), title=p.title, text=p.text) for i, p in enumerate(passages)]
    return World(passages, questions[0], questions[1], pools | {"language": list(_TONGUE)})


def _names(rng: random.Random, first: Sequence[str], second: Sequence[str], count: int) -> list[str]:
    return rng.sample([f"{a} {b}" for a in first for b in second], count)


def _describe(rng: random.Random, part: dict[str, list[str]]) -> tuple[list[Passage], list[Question]]:
    author = {book: rng.choice(part["person"]) for book in part["book"]}
    birthplace = {person: rng.choice(part["city"]) for person in part["person"]}
    country = {city: rng.choice(part["country"]) for city in part["city"]}
    language = {land: rng.choice(_TONGUE) for land in part["country"]}
    texts = (
        {book: f"{book} is a novel by {author[book]}." for book in part["book"]}
        | {person: f"{person} is a writer born in {birthplace[person]}." for person in part["person"]}
        | {city: f"{city} is a city in {country[city]}." for city in part["city"]}
        | {land: f"{land} is a country where people speak {language[land]}." for land in part["country"]}
    )
    passages = [Passage(id="", title=name, text=text) for name, text in texts.items()]

    questions = []
    for book in part["book"]:
        person = author[book]
        city = birthplace[person]
        questions += [
            Question(f"Who wrote {book}?", person, (book,), "person"),
            Question(f"Where was the author of {book} born?", city, (book, person), "city"),
            Question(
                f"In which country was the author of {book} born?", country[city], (book, person, city), "country"
            ),
        ]
    for person in part["person"]:
        city = birthplace[person]
        questions += [
            Question(f"Where was {person} born?", city, (person,), "city"),
            Question(f"In which country was {person} born?", country[city], (person, city), "country"),
        ]
    for city in part["city"]:
        land = country[city]
        questions += [
            Question(f"In which country is {city}?", land, (city,), "country"),
            Question(f"Which language do people speak in {city}?", language[land], (city, land), "language"),
        ]
    rng.shuffle(questions)
    return passages, questions
