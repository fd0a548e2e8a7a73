"""Evaluations: metrics, resuming after a kill, errors and comparisons."""

import csv
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from helpers.fake_endpoint import FakeEndpoint
from helpers.limits import LIMITS
from helpers.paths import TESTS
from helpers.slow_evaluation import slow_evaluation
from tspo_trl import (
    EvaluationResults,
    Passage,
    SearchAgent,
    SearchLoop,
    TagProtocol,
    Trajectory,
    compare_results,
    evaluate,
    read_rollouts,
)
from tspo_trl.engines.base import BatchEngine, Generation
from tspo_trl.evaluation.evaluate import EvaluationStopped
from tspo_trl.evaluation.folder import model_fingerprint
from tspo_trl.evaluation.intervals import bootstrap_means, interval, mcnemar_test, permutation_test
from tspo_trl.evaluation.results import Scores
from tspo_trl.evaluation.tables import comparison_table, results_table
from tspo_trl.rollout.limits import SearchLimits
from tspo_trl.rollout.log import append_rollouts
from tspo_trl.scoring import search_r1_exact_match

PROMPT = "Question: {question}\n"
FOUND = Passage(id="7", title="Silent Harbor", text="Silent Harbor is a novel by Mira Talvek.")


class ScriptedEngine(BatchEngine):
    """Writes the scripted texts of the question in the prompt, turn by turn."""

    def __init__(self, tokenizer, scripts):
        super().__init__()
        self.tokenizer, self.scripts = tokenizer, scripts

    def generate(self, contexts, max_new_tokens):
        generations = []
        for context, budget in zip(contexts, max_new_tokens, strict=True):
            text = self.tokenizer.decode(context)
            question = next(q for q in self.scripts if q in text.split("?")[0] + "?")
            turn = text.count("</information>") + text.count("My last action")
            ids = self.tokenizer(self.scripts[question][turn])["input_ids"][:budget]
            generations.append(Generation(ids, [-0.1] * len(ids)))
        return generations


class OneRetriever:
    fingerprint = "one"

    def __init__(self, fails=lambda queries: False):
        self.fails = fails

    def search(self, queries, k):
        if self.fails(queries):
            raise TimeoutError("too slow")
        return [[FOUND] for _ in queries]


@pytest.fixture
def scripted(tokenizer):
    """A function that creates an agent which writes scripted texts."""

    def make(scripts, retriever=None, batch_size=4, **options):
        loop = SearchLoop(
            ScriptedEngine(tokenizer, scripts),
            retriever or OneRetriever(),
            TagProtocol(tokenizer, prompt_template=PROMPT),
            eos_token_ids=[tokenizer.eos_token_id],
            limits=SearchLimits(**{**LIMITS, **options}),
        )
        return SearchAgent(loop, batch_size=batch_size)

    return make


def rows(**golds):
    return Dataset.from_list([{"id": q, "question": f"Who wrote {q}?", "golden_answers": g} for q, g in golds.items()])


def scores_of(folder):
    with open(folder / "scores.csv", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


SCRIPTS = {
    "Silent": ["<search> Silent Harbor</search>", "<answer> Mira Talvek</answer>"],
    "Golden": ["<search> Golden Mirror</search>", "<answer> the novel by Mira Talvek</answer>"],
    "Broken": ["<search> Broken Clock</search>", "<answer> Della Brisk</answer>"],
    "Hidden": ["<search> Hidden", "<answer> Corin Pell</answer>"],
    "Crimson": ["<answer> Greta Novik</answer>"],
    "Distant": ["<search> Distant Shore</search>"] * 3 + ["<search> Distant Shore</search>"],
}
GOLDS = {
    "Silent": ["Mira Talvek"],
    "Golden": ["Mira Talvek"],
    "Broken": ["Mira Talvek"],
    "Hidden": ["Orla Quarry"],
    "Crimson": ["Orla Quarry", "Greta Novik!"],
    "Distant": ["Orla Quarry"],
}


def test_metrics_of_scripted_rollouts(tmp_path, scripted):
    results = evaluate(scripted(SCRIPTS), {"books": rows(**GOLDS)}, tmp_path, progress=False)
    found = scores_of(tmp_path / "books")

    def column(name):
        return {q: float(row[name]) for q, row in found.items()}

    assert list(found) == list(GOLDS)  # in the order of the data set, not of the batches
    assert column("em") == {"Silent": 1, "Golden": 0, "Broken": 0, "Hidden": 0, "Crimson": 1, "Distant": 0}
    assert column("contains") == {"Silent": 1, "Golden": 1, "Broken": 0, "Hidden": 0, "Crimson": 1, "Distant": 0}
    f1 = {"Silent": 1, "Golden": 2 * (2 / 4) / (2 / 4 + 1), "Broken": 0, "Hidden": 0, "Crimson": 1, "Distant": 0}
    assert column("f1") == pytest.approx(f1)  # "novel by Mira Talvek" has two of four tokens
    assert column("hit") == {"Silent": 1, "Golden": 1, "Broken": 1, "Hidden": 0, "Crimson": 0, "Distant": 0}
    assert column("near_miss") == {"Silent": 0, "Golden": 1, "Broken": 1, "Hidden": 0, "Crimson": 0, "Distant": 0}
    assert column("searches") == {"Silent": 1, "Golden": 1, "Broken": 1, "Hidden": 0, "Crimson": 0, "Distant": 3}
    assert column("invalid") == {"Silent": 0, "Golden": 0, "Broken": 0, "Hidden": 1, "Crimson": 0, "Distant": 0}
    assert set(column("truncated").values()) == {0.0}
    assert column("tokens")["Crimson"] == 4  # two tags and two words
    assert column("observation_tokens")["Crimson"] == 0
    metrics = results.summary()["datasets"]["books"]["metrics"]
    assert metrics["em"]["mean"] == pytest.approx(2 / 6)
    assert metrics["em"]["low"] < 2 / 6 < metrics["em"]["high"]


def test_truncated_rollouts_are_counted(tmp_path, scripted):
    agent = scripted(SCRIPTS, max_completion_length=50)
    evaluate(agent, {"books": rows(Distant=["Orla Quarry"], Crimson=["Greta Novik"])}, tmp_path, progress=False)
    found = scores_of(tmp_path / "books")
    assert {q: row["truncated"] for q, row in found.items()} == {"Distant": "1.0", "Crimson": "0.0"}


def test_trajectories_are_written_in_the_format_of_training(tmp_path, scripted):
    evaluate(scripted(SCRIPTS), {"books": rows(**GOLDS)}, tmp_path, progress=False)
    records = {record["id"]: record for record in read_rollouts(tmp_path / "books")}
    assert len(records) == 6
    silent = records["Silent"]
    assert silent["question"] == "Who wrote Silent?"
    assert (silent["outcome"], silent["rewards"], silent["first_occurrence"]) == (1.0, {"exact_match": 1.0}, 0)
    assert silent["turn_rewards"] == [None, None]
    assert silent["trajectory"].answer == "Mira Talvek"
    assert silent["scores"]["hit"] == 1.0


def test_every_data_set_has_the_same_weight_in_the_average(tmp_path, scripted):
    datasets = {"one": rows(Silent=["Mira Talvek"]), "five": rows(**{k: v for k, v in GOLDS.items() if k != "Silent"})}
    results = evaluate(scripted(SCRIPTS), datasets, tmp_path, progress=False)
    summary = results.summary()
    assert summary["average"]["metrics"]["em"]["mean"] == pytest.approx((1 + 1 / 5) / 2)
    # The interval is that of the mean of both, each resampled on its own
    low, high = (summary["datasets"]["five"]["metrics"]["em"][key] for key in ("low", "high"))
    average = summary["average"]["metrics"]["em"]
    assert (average["low"], average["high"]) == pytest.approx(((1 + low) / 2, (1 + high) / 2))
    text = results_table({"scripted": summary})
    assert "| one (1)" in text
    assert "| **average**" in text
    assert f"0.600 [{average['low']:.3f}, {average['high']:.3f}]" in text
    assert "| model" not in text  # with one model, the column is omitted
    assert "| other" in results_table({"scripted": summary, "other": summary})


@pytest.mark.parametrize(
    ("text", "golds", "score"),
    [
        ("in <answer> and </answer>, like <answer> Beijing </answer>. Q <answer> The  Emma! </answer>", ["emma"], 1.0),
        ("like <answer> Beijing </answer>. Q", ["Beijing"], 0.0),  # the first counts as the example
        ("<answer> Emma</answer>", ["Emma"], 0.0),
        ("no tags", ["Emma"], 0.0),
        # The whole sequence is read: the prompt of Search-R1 has two tags, so its example counts if there is no answer
        ("in <answer> and </answer>, like <answer> Beijing </answer>. Q", ["Beijing"], 1.0),
        ("<answer>a</answer> <information> <answer>Emma</answer> </information>", ["Emma"], 1.0),
        ("<answer>a</answer> <answer>Emma", ["Emma"], 0.0),
        ("<answer>a</answer> <answer>x <answer>Emma</answer>", ["Emma"], 0.0),  # the first opening tag counts
        ("<answer>a</answer> <answer> </answer>", ["The The"], 1.0),  # both normalise to the empty string
        ("<answer>a</answer> <answer>line\nbreak</answer>", ["line break"], 1.0),
    ],
)
def test_search_r1_scores_prompt_and_passages(text, golds, score):
    assert search_r1_exact_match(text, golds) == score


def test_the_exact_match_of_search_r1_is_reported_too(tmp_path, scripted, tokenizer):
    agent = scripted(SCRIPTS)
    agent.search_loop.protocol.prompt_template = "<answer> x</answer> Question: {question}\n"
    results = evaluate(agent, {"books": rows(**GOLDS)}, tmp_path, scorer="search_r1", progress=False)
    found = scores_of(tmp_path / "books")
    assert [row["em"] for row in found.values()] == [row["search_r1_em"] for row in found.values()]
    assert "EM (Search-R1)" in results_table({"scripted": results.summary()})
    again = scripted(SCRIPTS)  # a prompt without the example: an answer alone does not count
    evaluate(again, {"books": rows(**GOLDS)}, tmp_path / "without", scorer="search_r1", progress=False)
    by_question = {q: row["search_r1_em"] for q, row in scores_of(tmp_path / "without" / "books").items()}
    assert by_question["Silent"] == by_question["Crimson"] == "0.0"


def test_several_samples_give_means_and_pass_at_k(tmp_path, policy_dir, retriever, dataset):
    data = dataset.select(range(6))
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever, do_sample=True, batch_size=9, **LIMITS)
    results = evaluate(agent, {"demo": data}, tmp_path, num_samples=3, progress=False)
    correct = {str(i): 0.0 for i in range(6)}
    for record in read_rollouts(tmp_path / "demo"):
        correct[record["id"]] += record["outcome"]
    found = scores_of(tmp_path / "demo")
    assert {q: float(row["em"]) for q, row in found.items()} == pytest.approx({q: c / 3 for q, c in correct.items()})
    assert {q: float(row["pass@3"]) for q, row in found.items()} == {q: float(c > 0) for q, c in correct.items()}
    assert set(results.scores["demo"].values) >= {"pass@2", "pass@3"}
    texts = [[turn.text for turn in record["trajectory"].turns] for record in read_rollouts(tmp_path / "demo")]
    assert len({str(text) for text in texts}) > 6  # samples of a question differ


def test_a_killed_evaluation_resumes_to_the_same_results(tmp_path, policy_dir, world, dataset):
    corpus = tmp_path / "passages.jsonl"
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in world.passages]
    corpus.write_text("".join(json.dumps(p) + "\n" for p in passages))
    dataset.select(range(24)).save_to_disk(tmp_path / "data" / "first")
    dataset.select(range(24, 36)).save_to_disk(tmp_path / "data" / "second")
    arguments = [policy_dir, str(corpus), str(tmp_path / "data")]
    slow_evaluation(*arguments, tmp_path / "whole")

    log = tmp_path / "killed" / "first" / "trajectories.jsonl"
    script = f"import torch; torch.set_num_threads(1); from helpers.slow_evaluation import slow_evaluation as s; s(*{arguments}, {str(tmp_path / 'killed')!r}, 0.3)"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, cwd=TESTS, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while (
        process.poll() is None and time.monotonic() < end and not (log.exists() and log.read_bytes().count(b"\n") > 8)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
    lines = log.read_bytes().splitlines(keepends=True)
    assert 16 <= len(lines) < 48
    assert not (tmp_path / "killed" / "results.json").exists()
    # As if it had been killed while writing: an incomplete batch, and half a line
    whole = b"".join(lines[: len(lines) // 8 * 8])
    last = (tmp_path / "whole" / "first" / "trajectories.jsonl").read_bytes().splitlines(keepends=True)[-1]
    log.write_bytes(whole + last + last[: len(last) // 2])
    slow_evaluation(*arguments, tmp_path / "killed")
    assert log.read_bytes().startswith(whole)  # finished batches were not repeated
    for name in ("results.json", "first/scores.csv", "second/scores.csv", "first/trajectories.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_evaluation_is_not_repeated(tmp_path, scripted):
    data = {"books": rows(**GOLDS)}
    before = evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    after = evaluate(scripted({}), data, tmp_path, progress=False)  # without scripts, any generation would fail
    assert after.summary() == before.summary()


@pytest.mark.parametrize(
    ("options", "agent_options", "message"),
    [
        ({"seed": 1}, {}, "seed was 0, is 1"),
        ({"num_samples": 2}, {}, "num_samples was 1, is 2"),
        ({"about": {"model": "other"}}, {}, "model was None, is 'other'"),
        ({}, {"max_searches": 2}, "search.max_searches was 3, is 2"),
        ({}, {"batch_size": 2}, "batch_size was 4, is 2"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(tmp_path, scripted, options, agent_options, message):
    data = {"books": rows(Crimson=["Greta Novik"])}
    evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    with pytest.raises(ValueError, match=f"holds another evaluation: {message}"):
        evaluate(scripted(SCRIPTS, **agent_options), data, tmp_path, progress=False, **options)
    with pytest.raises(ValueError, match=r"dataset.questions was 1, is 2; dataset.fingerprint was"):
        evaluate(scripted(SCRIPTS), {"books": rows(Crimson=["x"], Silent=["y"])}, tmp_path, progress=False)
    evaluate(
        scripted(SCRIPTS), {"more": rows(Silent=["Mira Talvek"])}, tmp_path, progress=False
    )  # another data set in the same folder


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"question": "", "golden_answers": ["x"]}], "`books`, row 0: 'question' must be a non-empty string"),
        ([{"question": "a", "golden_answers": []}], "`books`, row 0: 'golden_answers' must be a non-empty list"),
        ([{"question": "a", "answer": "x"}], "no column 'golden_answers'"),
        ([], "`books` is empty"),
    ],
)
def test_bad_rows_are_reported_before_the_first_rollout(tmp_path, scripted, data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(scripted({}), {"good": rows(Silent=["x"]), "books": Dataset.from_list(data)}, tmp_path)
    assert not (tmp_path / "good" / "trajectories.jsonl").exists()


def test_damaged_files_are_reported(tmp_path, scripted):
    data = {"books": rows(**GOLDS)}
    evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    log = tmp_path / "books" / "trajectories.jsonl"
    good = log.read_text()
    log.write_text("{oops\n" + good)
    with pytest.raises(ValueError, match=r"trajectories.jsonl, line 1: not valid JSON .* Remove that line"):
        evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    log.write_text(good.replace('"batch": 1', '"batch": 9'))
    with pytest.raises(ValueError, match="it belongs to no batch of this evaluation"):
        evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    log.write_text(good)
    (tmp_path / "books" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has trajectories.jsonl but no settings.json"):
        evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)


def test_failed_searches_count_as_failures_and_are_repeated(tmp_path, scripted):
    data = {"books": rows(**GOLDS)}
    down = OneRetriever(lambda queries: "Silent Harbor" in queries)
    before = evaluate(scripted(SCRIPTS, down, batch_size=2), data, tmp_path, progress=False)
    failed = {q for q, row in scores_of(tmp_path / "books").items() if row["retrieval_failed"] == "1.0"}
    assert "Silent" in failed
    assert before.scores["books"].failed.sum() == len(failed)
    (record,) = (r for r in read_rollouts(tmp_path / "books") if r["id"] == "Silent")
    assert (record["failure"], record["outcome"], record["scores"]["em"]) == ("retrieval", None, 0.0)
    after = evaluate(scripted(SCRIPTS, batch_size=2), data, tmp_path, progress=False)
    assert scores_of(tmp_path / "books")["Silent"]["em"] == "1.0"
    assert not after.scores["books"].failed.any()
    assert len(list(read_rollouts(tmp_path / "books"))) == 6


def test_too_many_failures_stop_the_evaluation_which_can_resume(tmp_path, scripted):
    books = [
        f"{a} {b}" for a in ("Silent", "Golden", "Broken", "Hidden") for b in ("Harbor", "Mirror", "Clock", "Letter")
    ]
    scripts = {f"Who wrote {b}?": [f"<search> {b}</search>", "<answer> Mira Talvek</answer>"] for b in books}
    data = {
        "books": Dataset.from_list(
            [{"question": f"Who wrote {b}?", "golden_answers": ["Mira Talvek"]} for b in books * 2]
        )
    }
    calls = []

    def fails(queries):
        calls.append(queries)
        return len(calls) > 1

    with pytest.raises(EvaluationStopped, match=r"16 of 16 rollouts .* 16 of 32 questions are in .*trajectories.jsonl"):
        evaluate(scripted(scripts, OneRetriever(fails), batch_size=16), data, tmp_path, progress=False)
    assert len(list(read_rollouts(tmp_path / "books"))) == 16
    results = evaluate(scripted(scripts, batch_size=16), data, tmp_path, progress=False)
    assert results.summary()["datasets"]["books"]["metrics"]["em"]["mean"] == 1.0


def test_an_evaluation_resumes_after_its_endpoint_failed(tmp_path, policy_dir, retriever, dataset):
    data = {"demo": dataset.select(range(36))}
    worst = int(np.argmin([len(prompt) for prompt in data["demo"]["prompt"]]))  # asked last

    def agent(server):
        settings = {"prompt_template": PROMPT, **LIMITS}
        agent = SearchAgent.from_endpoint(
            server.url, "tiny", tokenizer=policy_dir, retriever=retriever, batch_size=12, **settings
        )
        agent.search_loop.engine._total_timeout = 0.3
        return agent

    with FakeEndpoint(policy_dir) as server:
        made = agent(server)
        server.fail = lambda body, count: 500 if len(lines_of(tmp_path)) >= 12 else None
        with pytest.raises(
            EvaluationStopped, match=r"component is EndpointEngine\(.* HTTP 500.* 12 of 36 questions are in"
        ):
            evaluate(made, data, tmp_path, progress=False)
    with FakeEndpoint(policy_dir) as server:
        bad = data["demo"][worst]["prompt"]
        made = agent(server)
        ids = made.search_loop.protocol.tokenizer(bad)["input_ids"]
        server.fail = lambda body, count: 400 if body["prompt"][: len(ids)] == ids else None
        results = evaluate(made, data, tmp_path, progress=False)
        metrics = results.summary()["datasets"]["demo"]["metrics"]
        assert metrics["generation_failed"]["mean"] == pytest.approx(1 / 36)
        assert "failed endpoint" in results_table({"tiny": results.summary()})
    local = SearchAgent.from_pretrained(policy_dir, retriever=retriever, **LIMITS)
    expected = evaluate(local, data, tmp_path / "local", progress=False).scores["demo"]
    found = results.scores["demo"]
    others = np.arange(36) != worst
    assert found.failed.tolist() == (~others).tolist()
    assert found.values["em"][others].tolist() == expected.values["em"][others].tolist()


def lines_of(folder):
    log = folder / "demo" / "trajectories.jsonl"
    return log.read_bytes().splitlines() if log.exists() else []


def test_only_the_trajectories_of_one_batch_are_in_memory(tmp_path, scripted, monkeypatch):
    alive = []

    def append_and_count(path, records):
        append_rollouts(path, records)
        gc.collect()
        alive.append(sum(isinstance(thing, Trajectory) for thing in gc.get_objects()))

    monkeypatch.setattr("tspo_trl.evaluation.evaluate.append_rollouts", append_and_count)
    data = Dataset.from_list([{"question": "Who wrote Distant?", "golden_answers": ["x"]}] * 20)
    gc.collect()  # what other tests have left
    before = sum(isinstance(thing, Trajectory) for thing in gc.get_objects())
    evaluate(scripted(SCRIPTS), {"books": data}, tmp_path, progress=False)
    assert [count - before for count in alive] == [4] * 5


def make_results(**columns):
    """The results of a data set whose questions have these ids and scores."""
    ids = list(columns.pop("ids"))
    digests = columns.pop("digests", [f"d{i}" for i in ids])
    failed = np.array(columns.pop("failed", [False] * len(ids)))
    return EvaluationResults(
        {"nq": Scores(ids, digests, failed, {k: np.array(v, dtype=float) for k, v in columns.items()})}
    )


def test_comparison_uses_the_shared_questions():
    first = make_results(ids="abcdefgh", em=[1, 0, 0, 0, 1, 1, 0, 1], f1=[1, 0.5, 0, 0, 1, 1, 0, 1])
    second = make_results(
        ids="hgfedcbx", em=[1, 1, 0, 1, 1, 1, 0, 0], f1=[1, 1, 0.5, 1, 1, 1, 0.5, 0], failed=[False] * 6 + [True, False]
    )
    comparison = compare_results(first, second)["nq"]
    assert (comparison["questions"], comparison["left_out"]) == (
        6,
        1,
    )  # c d e f g h; b has failed, a and x are not shared
    em = comparison["metrics"]["em"]
    assert em["first"] == pytest.approx(3 / 6)
    assert em["second"] == pytest.approx(5 / 6)
    assert em["difference"] == pytest.approx(2 / 6)
    assert em["test"] == "McNemar, exact"
    assert em["p"] == mcnemar_test(1, 3)
    f1 = comparison["metrics"]["f1"]
    differences = np.array([1, 1, 0, -0.5, 1, 0])
    assert f1["difference"] == pytest.approx(differences.mean())
    assert f1["test"] == "permutation"
    assert f1["p"] == pytest.approx(permutation_test(differences, seed=0), abs=0.02)
    expected = interval(bootstrap_means(differences[:, None], seed=5))[0]
    assert (f1["low"], f1["high"]) == pytest.approx(tuple(expected), abs=0.1)
    text = comparison_table({"nq": comparison}, "base", "trained")
    assert "| nq (6)" in text
    assert "1 questions that failed in one of the evaluations are excluded" in text


def test_comparison_of_several_data_sets_has_an_average():
    names = ("one", "two")
    sizes = (30, 90)
    first, second = {}, {}
    for name, size in zip(names, sizes, strict=True):
        ids, digests = [str(i) for i in range(size)], ["d"] * size
        none = np.zeros(size, dtype=bool)
        first[name] = Scores(ids, digests, none, {"em": np.zeros(size)})
        second[name] = Scores(ids, digests, none, {"em": (np.arange(size) % 3 == 0).astype(float) * (name == "one")})
    comparison = compare_results(EvaluationResults(first), EvaluationResults(second))
    average = comparison["average"]["metrics"]["em"]
    assert average["difference"] == pytest.approx((1 / 3 + 0) / 2)
    assert average["p"] < 0.01
    assert comparison["two"]["metrics"]["em"]["p"] == 1.0
    assert comparison["average"]["questions"] == 120


def test_results_that_cannot_be_compared_are_refused(tmp_path):
    first = make_results(ids="ab", em=[1, 0])
    with pytest.raises(ValueError, match=r"have different questions .* with the id 'b'"):
        compare_results(first, make_results(ids="ab", em=[1, 0], digests=["da", "other"]))
    with pytest.raises(ValueError, match="share no question: their ids look like 'a' and 'x'"):
        compare_results(first, make_results(ids="xy", em=[1, 0]))
    other = EvaluationResults({"popqa": first.scores["nq"]})
    with pytest.raises(ValueError, match=r"share no data set: the first has \['nq'\]"):
        compare_results(first, other)
    with pytest.raises(FileNotFoundError, match=r"There is no results.json in"):
        EvaluationResults.load(tmp_path)


def test_saved_results_are_loaded_unchanged(tmp_path):
    first = make_results(ids=["a", "b,\n", "c\ud83d"], em=[1, 0, 1], f1=[1, 1 / 3, 0.1])
    first.save(tmp_path)
    loaded = EvaluationResults.load(tmp_path / "results.json")
    assert loaded.summary() == first.summary()
    assert loaded.scores["nq"].ids[:2] == ["a", "b,\n"]
    (tmp_path / "nq" / "scores.csv").write_text("id,digest\n")
    with pytest.raises(ValueError, match=r"scores.csv does not hold the scores of an evaluation"):
        EvaluationResults.load(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results.json is not the result of an evaluation"):
        EvaluationResults.load(tmp_path)


def test_fingerprints_tell_models_apart(tmp_path, policy_dir):
    before = model_fingerprint(policy_dir)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(policy_dir).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_fingerprint(copy) == before
    (copy / "README.md").write_text("notes")
    assert model_fingerprint(copy) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(copy) != before
    (tmp_path / "nothing").mkdir()
    assert model_fingerprint(tmp_path / "nothing") is None
