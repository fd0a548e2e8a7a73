"""Demonstrations: their tokens, what is learned of them, their evidence, and what is refused."""

import pytest
from datasets import Dataset

from helpers.families import FAMILY, end_ids, make_family_protocol
from helpers.tag_protocols import TAG_PROTOCOLS
from tspo_trl import BM25Retriever, Passage, RetrievalError, SearchLimits, TagProtocol, make_demonstrations
from tspo_trl.rollout.loop import SearchLoop
from tspo_trl.rollout.scripted import ScriptedEngine, follow_scripts
from tspo_trl.scoring import contains_answer

PASSAGES = [
    Passage("0", "Emma (novel)", "Emma is a novel by the English author Jane Austen."),
    Passage("1", "Jane Austen", "She was born in Steventon, Hampshire, in 1775."),
    Passage("2", "Rome", "Rome is the capital of Italy, on the river Tiber."),
    Passage("3", "Paris", "Paris is the capital of France, on the river Seine."),
    Passage("4", "Winter", "Winter is the coldest season of the year."),
]
ROWS = [
    {
        "question": "Where was the author of Emma born?",
        "golden_answers": ["Steventon", "Steventon, Hampshire"],
        "supporting_titles": ["Jane Austen", "Emma (novel)"],
    },
    {
        "question": "On which river is the capital of Italy?",
        "golden_answers": ["Tiber"],
        "supporting_titles": ["Rome"],
    },
]
NOWHERE = {"question": "Who won?", "golden_answers": ["Nobody Known"], "supporting_titles": []}
LIMITS = SearchLimits(max_searches=3, num_passages=1)
EACH = [family for family in FAMILY if not family.endswith(("_v3", "_v4", "_2", "_ultra", "_super"))]


@pytest.fixture(scope="module")
def retriever():
    return BM25Retriever(PASSAGES)


def make(protocol, retriever, rows=ROWS, ends=None, **options):
    ends = ends or [protocol.tokenizer.eos_token_id]
    options = {"limits": LIMITS, **options}
    return make_demonstrations(Dataset.from_list(rows), retriever, protocol, eos_token_ids=ends, **options)


def of(made, row):
    (one,) = [one for one in made.items if one.question == row["question"]]
    return one


def learned_parts(one):
    """The runs of tokens that are learned."""
    parts, before = [], -100
    for token, label in zip(one.input_ids, one.labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            if before == -100:
                parts.append([])
            parts[-1].append(token)
        before = label
    return parts


def test_tags_are_demonstrated_in_the_tokens_of_a_rollout(retriever):
    protocol = TAG_PROTOCOLS["bytes"]
    made = make(protocol, retriever)
    assert (made.questions, made.with_evidence, len(made.items)) == (2, 2, 2)
    one = of(made, ROWS[0])
    (prompt,) = protocol.encode_prompts([protocol.prompt(ROWS[0]["question"])])
    emma, austen = (protocol.observe([passage], 500).token_ids for passage in PASSAGES[:2])
    texts = ["<search> Emma </search>", "<search> Jane Austen </search>", "<answer> Steventon </answer>"]
    turns = [protocol.tokenizer(text)["input_ids"] for text in texts]
    assert one.input_ids == prompt + turns[0] + emma + turns[1] + austen + turns[2]
    assert learned_parts(one) == turns
    assert one.by_titles
    assert one.num_failed == 0


@pytest.mark.parametrize("name", EACH)
def test_tool_calls_are_demonstrated_in_the_tokens_of_a_rollout(retriever, name):
    protocol, family = make_family_protocol(name), FAMILY[name]
    ends = end_ids(protocol.tokenizer, name)
    made = make(protocol, retriever, ends=ends)
    assert len(made.items) == 2
    one = of(made, ROWS[0])
    (prompt,) = protocol.encode_prompts([protocol.prompt(ROWS[0]["question"])])
    assert one.input_ids[: len(prompt)] == prompt
    texts = [protocol.tokenizer.decode(part) for part in learned_parts(one)]
    calls = [family.call % query + family.call_end for query in ("Emma", "Jane Austen")]
    answer = family.answer % "Steventon" + family.answer_end
    assert len(texts) == 3
    assert [text.endswith(end) for text, end in zip(texts, [*calls, answer], strict=True)] == [True] * 3
    # Every learned part is read as the turn of a rollout is
    observed = protocol.observe([PASSAGES[0]], 500).token_ids
    parts = learned_parts(one)
    assert protocol.read(parts[0], ended=True, before=prompt)[1:] == ("search", "Emma")
    assert protocol.read(parts[1], ended=True, before=observed)[1:] == ("search", "Jane Austen")
    assert protocol.read(parts[2], ended=True, before=observed)[1:] == ("answer", "Steventon")
    # What is not learned is the prompt and the observations
    start = len(prompt) + len(parts[0])
    assert one.input_ids[start : start + len(observed)] == observed
    assert set(one.labels[start : start + len(observed)]) == {-100}


def test_only_questions_with_evidence_are_demonstrated(retriever):
    made = make(TAG_PROTOCOLS["bytes"], retriever, rows=[*ROWS, NOWHERE])
    assert (made.questions, made.with_evidence, len(made.items)) == (3, 2, 2)
    for one in made.items:
        golds = next(row["golden_answers"] for row in ROWS if row["question"] == one.question)
        texts = [turn.passage_text for turn in one.trajectory.turns if turn.passages]
        assert any(contains_answer(text, golds) for text in texts)
        assert one.trajectory.answer in golds


def test_evidence_must_be_in_the_part_of_a_passage_that_is_shown():
    long = Passage("0", "Emma", "word " * 300 + "It was written by Jane Austen.")
    rows = [{"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}]
    protocol = TAG_PROTOCOLS["bytes"]
    assert make(protocol, BM25Retriever([long]), rows, limits=SearchLimits(max_observation_tokens=2000)).items
    with pytest.raises(
        ValueError, match=r"none of the 1 questions has evidence in the first 3 passages.*hit@3 is 0.*\['Emma'\]"
    ):
        make(protocol, BM25Retriever([long]), rows, limits=SearchLimits(max_observation_tokens=100))


def test_a_failed_search_is_read_and_not_learned(retriever):
    protocol = TAG_PROTOCOLS["bytes"]
    rows = [{**ROWS[0], "question": f"Where was the author of Emma born in the year {year}?"} for year in range(12)]
    made = make(protocol, retriever, rows, failed_share=0.5)
    failed = [one for one in made.items if one.num_failed]
    assert len(made.items) == 12
    assert len(failed) == 6
    for one in failed:
        first, *others = one.trajectory.turns
        assert first.action == "search"
        assert not contains_answer(first.passage_text, ROWS[0]["golden_answers"])
        assert {p.title for p in first.passages}.isdisjoint(ROWS[0]["supporting_titles"])
        assert learned_parts(one) == [turn.token_ids for turn in others]


def test_demonstrations_depend_on_the_seed_alone(retriever):
    rows = [{**ROWS[1], "question": f"On which river is the capital of Italy, {i}?"} for i in range(20)]
    options = {"num_demonstrations": 8, "failed_share": 0.25}

    def ids(seed):
        return [one.input_ids for one in make(TAG_PROTOCOLS["bytes"], retriever, rows, seed=seed, **options).items]

    assert ids(1) == ids(1)
    assert len(ids(1)) == 8
    assert ids(1) != ids(2)


def test_a_stream_is_taken_in_order_and_no_further_than_needed(retriever):
    rows = [{**ROWS[1], "question": f"On which river is the capital of Italy, {i}?"} for i in range(600)]
    read = []

    class Counting(BM25Retriever):
        def search(self, queries, k):
            read.extend(queries)
            return super().search(queries, k)

    protocol = TAG_PROTOCOLS["bytes"]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    made = make_demonstrations(
        stream, Counting(PASSAGES), protocol, eos_token_ids=[protocol.tokenizer.eos_token_id], num_demonstrations=5
    )
    assert [one.question for one in made.items] == [row["question"] for row in rows[:5]]
    assert made.questions < 300
    assert len(read) == len(set(read))  # no query is searched for twice


def test_prompts_of_the_data_set_are_used_unchanged(retriever):
    protocol = TagProtocol(TAG_PROTOCOLS["bytes"].tokenizer)
    made = make(protocol, retriever, [{**ROWS[1], "prompt": "Tell me: river?"}])
    assert made.items[0].trajectory.prompt_ids == protocol.tokenizer("Tell me: river?")["input_ids"]


@pytest.mark.parametrize(
    ("limits", "options"),
    [
        ({"max_turn_tokens": 10}, {}),
        ({"max_query_tokens": 1}, {}),
        ({"max_completion_length": 71, "max_observation_tokens": 70}, {}),
        ({}, {"max_length": 100}),
    ],
)
def test_demonstrations_beyond_the_limits_are_left_out(retriever, limits, options):
    limits = SearchLimits(**{"max_searches": 3, "num_passages": 1, **limits})
    with pytest.raises(
        ValueError, match=r"2 of 2 questions have evidence, but 2 demonstrations of them exceed a limit"
    ):
        make(TAG_PROTOCOLS["bytes"], retriever, limits=limits, **options)


def test_a_question_that_cannot_be_written_is_left_out(retriever):
    bad = {"question": "Who </search> wrote Emma?", "golden_answers": ["Jane Austen"], "supporting_titles": []}
    made = make(TAG_PROTOCOLS["bytes"], retriever, [*ROWS, bad])
    assert (made.with_evidence, made.unwritable, len(made.items)) == (3, 1, 2)
    with pytest.raises(ValueError, match="the protocol would not parse 1 as written"):
        make(TAG_PROTOCOLS["bytes"], retriever, [bad])


def test_what_cannot_be_demonstrated_is_named(retriever):
    protocol = TAG_PROTOCOLS["bytes"]
    with pytest.raises(
        ValueError, match=r"none of the 1 questions.*'Who won\?' with the golden answers \['Nobody Known'\]"
    ):
        make(protocol, retriever, [NOWHERE])
    with pytest.raises(ValueError, match="`max_searches` must be at least 1 to demonstrate a search, got 0"):
        make(protocol, retriever, limits=SearchLimits(max_searches=0))
    with pytest.raises(ValueError, match="`num_demonstrations` must be at least 1, got 0"):
        make(protocol, retriever, num_demonstrations=0)
    with pytest.raises(ValueError, match="`failed_share` must be between 0 and 1, got 2"):
        make(protocol, retriever, failed_share=2)
    with pytest.raises(ValueError, match="row 0: 'supporting_titles' must be a list of strings, found 'Rome'"):
        make(protocol, retriever, [{**ROWS[1], "supporting_titles": "Rome"}])
    with pytest.raises(ValueError, match="no column 'golden_answers'"):
        make(protocol, retriever, [{"question": "Who?"}])

    class Down:
        def search(self, queries, k):
            raise RetrievalError("the server is down", "connection")

    with pytest.raises(RetrievalError, match="the server is down"):
        make(protocol, Down())


def test_scripts_are_followed_to_their_end(retriever):
    protocol = TAG_PROTOCOLS["bytes"]
    end = protocol.tokenizer.eos_token_id
    (prompt,) = protocol.encode_prompts([protocol.prompt("Where?")])
    search, answer = (protocol.write(action, "Rome", after_response=False) for action in ("search", "answer"))
    followed = follow_scripts(
        [prompt, prompt, prompt],
        [[search, answer], [answer], [search]],
        retriever,
        protocol,
        eos_token_ids=[end],
        limits=LIMITS,
    )
    assert [t.status for t in followed] == ["answered", "answered", "no_answer"]
    assert [len(t.turns) for t in followed] == [2, 1, 2]
    assert followed[0].turns[0].passages[0].title == "Rome"
    loop = SearchLoop(ScriptedEngine([[answer]], end), retriever, protocol, eos_token_ids=[end])
    assert loop.run([prompt])[0][0].answer == "Rome"
