"""Evaluations that are resumed, refused or stopped: killed runs, failures, damaged files, other settings."""

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

from helpers.evaluations import GOLDS, PROMPT, SCRIPTS, OneRetriever, rows, scores_of
from helpers.fake_endpoint import FakeEndpoint
from helpers.limits import LIMITS
from helpers.paths import TESTS
from helpers.slow_evaluation import slow_evaluation
from tspo_trl import SearchAgent, Trajectory, evaluate, read_rollouts
from tspo_trl.evaluation.evaluate import EvaluationStopped
from tspo_trl.evaluation.folder import model_fingerprint
from tspo_trl.evaluation.tables import results_table
from tspo_trl.rollout.log import append_rollouts


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
    # As if the run had been killed while writing: an incomplete batch and an incomplete line
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
    worst = int(np.argmin([len(prompt) for prompt in data["demo"]["prompt"]]))  # the last in order

    def agent(server):
        settings = {"prompt_template": PROMPT, **LIMITS}
        agent = SearchAgent.from_endpoint(
            server.url, "tiny", tokenizer=policy_dir, retriever=retriever, batch_size=12, **settings
        )
        agent.search_loop.engine._total_timeout = 0.3
        return agent

    with FakeEndpoint(policy_dir) as server:
        remote = agent(server)
        server.fail = lambda body, count: 500 if len(lines_of(tmp_path)) >= 12 else None
        with pytest.raises(
            EvaluationStopped, match=r"component is EndpointEngine\(.* HTTP 500.* 12 of 36 questions are in"
        ):
            evaluate(remote, data, tmp_path, progress=False)
    with FakeEndpoint(policy_dir) as server:
        bad = data["demo"][worst]["prompt"]
        remote = agent(server)
        ids = remote.search_loop.protocol.tokenizer(bad)["input_ids"]
        server.fail = lambda body, count: 400 if body["prompt"][: len(ids)] == ids else None
        results = evaluate(remote, data, tmp_path, progress=False)
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
    gc.collect()  # objects left by other tests
    before = sum(isinstance(thing, Trajectory) for thing in gc.get_objects())
    evaluate(scripted(SCRIPTS), {"books": data}, tmp_path, progress=False)
    assert [count - before for count in alive] == [4] * 5


def test_fingerprint_changes_with_the_weights_only(tmp_path, policy_dir):
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
