"""Comparisons of evaluations, and saved results."""

import numpy as np
import pytest

from tspo_trl import EvaluationResults, compare_results
from tspo_trl.evaluation.intervals import bootstrap_means, interval, mcnemar_test, permutation_test
from tspo_trl.evaluation.results import Scores
from tspo_trl.evaluation.tables import comparison_table


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
