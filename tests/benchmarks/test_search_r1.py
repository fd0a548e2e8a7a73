"""The comparison with Search-R1: token counts, forced turns, and our loop. The loop of Search-R1 runs only with a clone of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.drawn_turns import FREE, DrawnTurns
from benchmarks.search_r1.loop import run_ours
from benchmarks.search_r1.task import Task, make_model, make_tokenizer
from benchmarks.search_r1.token_counts import SampledTurn, count_changed, count_turns, length_to_tag
from helpers.paths import HOTPOTQA, ROOT
from tspo_trl import BM25Retriever
from tspo_trl.retrieval.corpus import iter_corpus

CLONE = os.environ.get("SEARCH_R1")  # a folder: git clone https://github.com/PeterGriffinJin/Search-R1


@pytest.fixture(scope="module")
def passages():
    return list(iter_corpus(HOTPOTQA / "passages.jsonl"))


@pytest.fixture(scope="module")
def task(passages):
    tokenizer = make_tokenizer(passages)
    titles = [p.title for p in passages if len(tokenizer(p.title)["input_ids"]) <= 6][:20]
    retriever = BM25Retriever(passages)
    return Task(tokenizer, retriever, titles, max_response=32, max_observation=120, batch=6, turns=3, after=0)


@pytest.fixture
def model(task):
    return make_model(task.tokenizer, 32, 1, 0)


def encode(task, text):
    return task.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["I look. <search> Emma</search>", "<answer> Emma</answer>"])
@pytest.mark.parametrize("rest", ["", " and so on", " and <search> more</search>", "<|im_end|>"])
def test_a_turn_ends_at_its_first_closing_tag(task, text, rest):
    ids = encode(task, text)
    assert length_to_tag(task.tokenizer, ids + encode(task, rest)) == len(ids)


def test_a_turn_without_a_closing_tag_is_kept_whole(task):
    for text in ("no action", "<search> not closed", ""):
        assert length_to_tag(task.tokenizer, encode(task, text)) == len(encode(task, text))


@pytest.mark.parametrize(
    ("sampled", "trained", "changed"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3, 4], [1, 9, 4], 2),  # two tokens became one
        ([1, 9, 4], [1, 2, 3, 4], 1),  # one became two
        ([1, 2, 3], [], 3),
        ([], [], 0),
    ],
)
def test_changed_tokens_are_those_without_a_counterpart(sampled, trained, changed):
    assert count_changed(sampled, trained) == changed


def test_noncanonical_tokens_change_when_they_are_encoded_again(task):
    tokenizer = task.tokenizer
    canonical = encode(task, " the film")
    letters = tokenizer.convert_tokens_to_ids(["Ġ", "t", "h", "e"])
    sampled = letters + canonical[1:]
    assert tokenizer.decode(sampled) == tokenizer.decode(canonical)
    assert encode(task, tokenizer.decode(sampled)) == canonical
    closing = encode(task, "<answer> x</answer>")
    end = [tokenizer.eos_token_id]
    counts = count_turns(
        tokenizer,
        [
            [SampledTurn(sampled + closing + end, canonical + closing), SampledTurn(closing, closing)],
            [SampledTurn(canonical + closing, canonical + closing)],
        ],
    )
    total = len(sampled) + len(canonical) + 3 * len(closing) + 1
    assert counts == {"rollouts": 2, "generated": total, "thrown_away": 1, "changed": 4, "rollouts_changed": 1}


def test_rows_follow_their_plans_when_the_batch_changes():
    plans = {0: [FREE, 5], 1: [6, FREE, 7]}
    banned = torch.tensor([True] + [False] * 15)
    turns = DrawnTurns(lambda rollout, turn: plans[rollout] + [turn], 2, banned, eos_token_id=9, first_mark=10)
    turns.begin_rollouts()
    turns.begin_turn()
    rows, scores = torch.tensor([[3, 11, 3], [3, 3, 10]]), torch.zeros(2, 16)

    def step(rows):
        probabilities = turns(rows, scores[: len(rows)]).softmax(dim=1)
        return [int(row.argmax()) if row.max() == 1 else row.tolist() for row in probabilities]

    free = [0.0] + [pytest.approx(1 / 15)] * 15
    assert step(rows) == [6, free]
    assert step(rows.flip(0)) == [5, free]
    assert step(rows[:1]) == [7]  # the other row has left the batch
    assert step(rows) == [0, 9]  # the turn, and the end of a turn whose plan is over
    assert step(rows) == [9, 9]
    turns.begin_turn()
    assert [step(rows) for _ in range(4)][-1] == [1, 9]


def test_our_loop_discards_and_changes_no_tokens(task, model):
    task = replace(task, after=7)
    count = run_ours(task, model)
    lengths = [len(task.plan(i, turn)) - 7 for i in range(6) for turn in range(task.num_turns(i))]
    assert len({task.num_turns(i) for i in range(6)}) > 1
    assert count.generated == count.trained == sum(lengths)
    assert (count.rollouts, count.thrown_away, count.changed, count.rollouts_changed) == (6, 0, 0, 0)
    assert count.attended > count.trained  # passages
    assert 0 < count.model_seconds < count.seconds
    assert "generate" not in vars(model)  # it is as it was


@pytest.mark.skipif(CLONE is None, reason="set SEARCH_R1 to a clone of Search-R1")
def test_the_loop_of_search_r1_discards_and_changes_tokens(tmp_path):
    results = tmp_path / "results.json"
    arguments = f"--batch 6 --turns 3 --max_response 32 --teach_steps 0 --repeats 1 --json {results}"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.search_r1", "--search_r1", Path(CLONE).resolve(), *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {(row["loop"], row["after"]): row for row in json.loads(results.read_text())}
    assert set(rows) == {(loop, after) for loop in ("Search-R1", "tspo_trl") for after in (0, 32)}
    ours = rows["tspo_trl", 0]
    for (loop, after), row in rows.items():
        kept = row["generated"] - row["thrown_away"]
        assert kept == ours["generated"]  # the same turns
        if loop == "tspo_trl":
            assert (row["thrown_away"], row["changed"], row["trained"]) == (0, 0, kept)
        else:
            assert row["changed"] > 0
            assert row["trained"] != kept
            assert (row["thrown_away"] > kept / 4) == (after == 32)
        assert row["attended"] > row["trained"]
    assert result.stdout.count("| 6 | 1–3 |") == 4
