"""What the searches of a rollout found, and whether its answer rests on it; evaluations of earlier versions."""

import csv
import json

import numpy as np
import pytest

from helpers.evaluations import FOUND, GOLDS, SCRIPTS, OneRetriever, rows, scores_of
from tspo_trl import EvaluationResults, Passage, Trajectory, Turn, compare_results, evaluate
from tspo_trl.evaluation.evidence import EVIDENCE, evidence_scores
from tspo_trl.evaluation.results import METRICS, Scores
from tspo_trl.evaluation.tables import comparison_table, results_table
from tspo_trl.scoring import exact_match, f1_score

OTHER = Passage(id="8", title="Golden Mirror", text="Golden Mirror is a novel by Della Brisk, who says no.")


def rollout(*searches, answer=None):
    turns = [Turn(token_ids=[1], action="search", content="q", passages=found, retrieval="ok") for found in searches]
    if answer is not None:
        turns.append(Turn(token_ids=[1], action="answer", content=answer))
    return Trajectory(prompt_ids=[], turns=turns, status="no_answer" if answer is None else "answered")


@pytest.mark.parametrize(
    ("searches", "answer", "golds", "em", "expected"),
    [
        ([[FOUND]], "Mira Talvek", ["Mira Talvek"], 1.0, (1, 0, 0, 0)),
        ([[OTHER], [FOUND], [OTHER], [OTHER, FOUND]], "x", ["Mira Talvek"], 0.0, (2, 2, 0, 0)),
        ([[FOUND], []], None, ["Mira Talvek"], 0.0, (1, 1, 0, 0)),
        ([[OTHER]], "Mira Talvek", ["Mira Talvek"], 1.0, (0, 0, 1, 1)),
        ([], "Mira Talvek", ["Mira Talvek"], 1.0, (0, 0, 1, 1)),
        ([[OTHER]], "wrong", ["Mira Talvek"], 0.0, (0, 0, 0, 1)),
        ([[OTHER]], None, ["Mira Talvek"], 0.0, (0, 0, 0, 0)),
        ([[OTHER]], "no", ["no"], 1.0, (0, 0, 1, 1)),  # a "no" in a passage is no evidence
        ([[OTHER], [FOUND]], "no", ["no", "Mira Talvek"], 1.0, (1, 0, 0, 0)),
        ([], None, ["Mira Talvek"], 0.0, (0, 0, 0, 0)),
    ],
)
def test_scores_of_evidence(searches, answer, golds, em, expected):
    assert tuple(evidence_scores(rollout(*searches, answer=answer), golds, em).values()) == expected
    assert tuple(evidence_scores(rollout(), golds, 0.0)) == EVIDENCE


@pytest.mark.parametrize(("answer", "em", "unsupported"), [("noanswer", 1, 1), ("Mira Talvek", 0, 1), (None, 0, 0)])
def test_questions_without_an_answer(answer, em, unsupported):
    """With the golden answer noanswer, the scores tell who declined, who answered all the same, and who said nothing."""
    searched = rollout([Passage("0", "noanswer", "A page about noanswer.")], answer=answer)
    golds = ["noanswer"]
    assert exact_match(searched.answer, golds) == f1_score(searched.answer, golds) == em
    scores = evidence_scores(searched, golds, em)
    assert (scores["evidence"], scores["after_evidence"], scores["unsupported"]) == (0, 0, unsupported)


def test_evaluations_report_evidence(tmp_path, scripted):
    scripts = {**SCRIPTS, "Hollow": ["<search> Silent Harbor</search>"] * 3 + ["<answer> Mira Talvek</answer>"]}
    golds = {**GOLDS, "Hollow": ["Mira Talvek"]}
    results = evaluate(scripted(scripts), {"books": rows(**golds)}, tmp_path, progress=False)
    found = scores_of(tmp_path / "books")

    def ones(name):
        return {q: float(row[name]) for q, row in found.items() if float(row[name])}

    assert ones("evidence") == {"Silent": 1, "Golden": 1, "Broken": 1, "Hollow": 3}
    assert ones("after_evidence") == {"Hollow": 2}
    assert ones("from_memory") == {"Crimson": 1}
    assert ones("unsupported") == {"Hidden": 1, "Crimson": 1}
    metrics = results.summary()["datasets"]["books"]["metrics"]
    assert metrics["unsupported"]["mean"] == pytest.approx(2 / 7)
    # Whatever is correct is found or from memory
    for row in found.values():
        assert float(row["from_memory"]) <= min(float(row["em"]), 1 - float(row["hit"]))
    table = results_table({"scripted": results.summary()})
    for name in ("with evidence", "after evidence", "from memory", "unsupported"):
        assert name in table


def test_a_failed_rollout_has_no_unsupported_answer(tmp_path, scripted):
    retriever = OneRetriever(lambda queries: True)
    evaluate(scripted(SCRIPTS, retriever), {"books": rows(Silent=["Mira Talvek"])}, tmp_path, progress=False)
    row = scores_of(tmp_path / "books")["Silent"]
    assert row["retrieval_failed"] == "1.0"
    assert {float(row[name]) for name in EVIDENCE} == {0.0}


def without_evidence(folder):
    """Write the folder of an evaluation as earlier versions did."""
    for name in ("results.json", "books/scores.csv"):
        (folder / name).unlink()
    path = folder / "books" / "trajectories.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        for name in EVIDENCE:
            del record["scores"][name]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_an_evaluation_of_an_earlier_version_is_completed(tmp_path, scripted):
    data = {"books": rows(**GOLDS)}
    before = evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    without_evidence(tmp_path)
    after = evaluate(scripted({}), data, tmp_path, progress=False)  # without scripts, any generation would fail
    assert after.summary() == before.summary()
    assert set(EVIDENCE) < set(scores_of(tmp_path / "books")["Silent"])


def test_a_damaged_rollout_of_an_earlier_version_is_named(tmp_path, scripted):
    data = {"books": rows(**GOLDS)}
    evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)
    without_evidence(tmp_path)
    path = tmp_path / "books" / "trajectories.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"trajectory": {', '"trajectory": null, "other": {'))
    with pytest.raises(
        ValueError, match=r"trajectories.jsonl, line 1: not a rollout of this evaluation .* Remove that"
    ):
        evaluate(scripted(SCRIPTS), data, tmp_path, progress=False)


def test_results_of_an_earlier_version_are_loaded_and_compared(tmp_path, scripted):
    new = evaluate(scripted(SCRIPTS), {"books": rows(**GOLDS)}, tmp_path, progress=False)
    path = tmp_path / "books" / "scores.csv"
    table = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    kept = [name for name in table[0] if name not in EVIDENCE]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    old = EvaluationResults.load(tmp_path)
    assert set(new.scores["books"].values) - set(old.scores["books"].values) == set(EVIDENCE)
    comparison = compare_results(old, new)
    assert set(comparison["books"]["absent"]) == set(EVIDENCE)
    assert comparison["books"]["metrics"]["em"]["difference"] == 0
    text = comparison_table(comparison, "old", "new")
    assert "Only one of the evaluations has: from memory, unsupported, with evidence, after evidence." in text
    assert compare_results(new, new)["books"]["absent"] == []
    assert "Only one" not in comparison_table(compare_results(new, new), "new", "new")
    both = results_table({"old": old.summary(), "new": new.summary()})
    of_old = [line for line in both.partition("Evidence:")[2].partition("Turns:")[0].splitlines() if "| old " in line]
    assert [line.count("–") for line in of_old] == [len(EVIDENCE)]
    assert "Evidence:" not in results_table({"old": old.summary()})


def test_every_metric_of_evidence_is_compared():
    values = {name: np.array([1.0, 0.0]) for name in METRICS}
    results = EvaluationResults({"nq": Scores(["a", "b"], ["x", "y"], np.array([False, False]), values)})
    assert set(EVIDENCE) < set(compare_results(results, results)["nq"]["metrics"])
