"""Generated passages and questions for the benchmark of retrievers. They resemble the first paragraphs of Wikipedia."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Words of the generated text. Stems have two or more consonant-vowel syllables, so no function word is a stem
FUNCTION_WORDS = (
    "the of and in a is to was by as on for it with from an he at his that also which has or are its who their after but "
    "this had been not be they when her she all than into other"
).split()
QUESTION_WORDS = "what which who when where how is was did the of in that and by for".split()
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
SUFFIXES = ["", "s", "ed", "ing", "er", "ly", "ness", "ment", "al", "ism"]  # for stemmers to remove
VOCABULARY, STEMS = 600_000, 60_000  # 9 million words of text contain about 200,000 different words
BLOCK = 10_000  # passages that are drawn at once
TOPIC_WORDS, TOPIC_SHARE = 50, 0.2  # every 100 passages share a topic, so that passages compete in a search


def write_data(folder: Path, passages: int, queries: int, seed: int) -> None:
    """Generate `corpus.jsonl` and `queries.jsonl`. The same arguments give the same files."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(VOCABULARY)
    # Zipf's law, but steeper for rare words, as in real text
    weights = 1 / ((ranks + 2.7) * (1 + ranks / 10_000) ** 0.8)
    cumulative = np.cumsum(weights) / weights.sum()
    topics = _rare_words(rng, (max(1, passages // 100), TOPIC_WORDS), common=200)
    asked_about = rng.integers(passages, size=queries).tolist()
    remembered = set(asked_about)
    names = [_word(rank) for rank in range(VOCABULARY)]
    words_of: dict[int, np.ndarray] = {}
    with (folder / "corpus.jsonl").open("w") as file:
        for start in range(0, passages, BLOCK):
            texts = _draw_texts(rng, min(BLOCK, passages - start), cumulative, topics)
            for number, (words, title) in enumerate(texts, start):
                name = " ".join(names[rank].capitalize() for rank in title.tolist())
                text = _sentences([names[rank] for rank in words.tolist()], rng)
                # As `json.dumps` writes it: words are letters only
                file.write(f'{{"id": "{number:07d}", "title": "{name}", "text": "{text}"}}\n')
                if number in remembered:
                    words_of[number] = words.copy()  # not a view, which would keep the block
    with (folder / "queries.jsonl").open("w") as file:
        for number in asked_about:
            file.write(json.dumps({"question": _question(words_of[number], rng)}) + "\n")


def _draw_texts(
    rng: np.random.Generator, count: int, cumulative: np.ndarray, topics: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw the words of passages, and of their titles, as ranks of frequency."""
    lengths = np.clip(rng.lognormal(4.4, 0.45, count), 15, 400).astype(int)
    words = np.searchsorted(cumulative, rng.random(lengths.sum()))
    topic = np.repeat(rng.integers(len(topics), size=count), lengths)
    on_topic = np.flatnonzero(rng.random(len(words)) < TOPIC_SHARE)
    words[on_topic] = topics[topic[on_topic], (TOPIC_WORDS * rng.random(len(on_topic)) ** 2).astype(int)]
    titles = _rare_words(rng, (count, 3), common=1000)
    title_lengths = rng.integers(1, 4, count).tolist()
    for text, title, length in zip(np.split(words, np.cumsum(lengths)[:-1]), titles, title_lengths, strict=True):
        text[:length] = title[:length]  # passages start with their title, like articles of Wikipedia
        yield text, title[:length]


def _rare_words(rng: np.random.Generator, size: Any, common: int) -> np.ndarray:
    """Draw words that are rarer than the `common` most frequent words."""
    return np.exp(rng.uniform(np.log(common), np.log(VOCABULARY / 4), size)).astype(int)


def _word(rank: int) -> str:
    """Return the word with this rank of frequency."""
    if rank < len(FUNCTION_WORDS):
        return FUNCTION_WORDS[rank]
    suffix, stem = divmod(rank, STEMS)
    digits = [stem % 100, stem // 100 % 100] + ([stem // 10_000] if stem >= 10_000 else [])
    return "".join(SYLLABLES[digit] for digit in digits) + SUFFIXES[suffix]


def _sentences(words: list[str], rng: np.random.Generator) -> str:
    """Join words into sentences of 10 to 25 words."""
    ends = np.cumsum(rng.integers(10, 26, len(words) // 10 + 1)).tolist()
    sentences = (" ".join(words[start:end]) for start, end in zip([0, *ends], ends, strict=False) if start < len(words))
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _question(words: np.ndarray, rng: np.random.Generator) -> str:
    """Make a question of 3 to 10 words: moderately rare words of a passage, and question words."""
    length = int(rng.integers(3, 11))
    content = np.unique(words[(words >= 100) & (words < 100_000)])
    content = rng.permutation(content if len(content) else words)[: (length + 1) // 2].tolist()
    filling = rng.choice(QUESTION_WORDS, length - len(content)).tolist()
    return " ".join(rng.permutation([*filling, *map(_word, content)]).tolist()) + "?"
