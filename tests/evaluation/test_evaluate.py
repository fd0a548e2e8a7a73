"""Evaluations: metrics, several samples, averages and the recorded trajectories."""

from datetime import datetime

import pytest

from helpers.evaluations import GOLDS, SCRIPTS, rows, scores_of
from helpers.limits import LIMITS
from tspo_trl import BM25Retriever, SearchAgent, evaluate, read_rollouts
from tspo_trl.evaluation.tables import results_table
from tspo_trl.scoring import search_r1_exact_match


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
    # The interval is that of the mean of both data sets, each resampled independently
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
        # The whole sequence is scored: the prompt of Search-R1 has two tags, so its example counts if there is no answer
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


def test_the_exact_match_of_search_r1_is_also_reported(tmp_path, scripted, tokenizer):
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


def test_the_exact_match_of_triviaqa_is_also_reported(tmp_path, scripted):
    golds = {**GOLDS, "Silent": ["Mira-Talvek"]}
    results = evaluate(scripted(SCRIPTS), {"books": rows(**golds)}, tmp_path, scorer="triviaqa", progress=False)
    silent = scores_of(tmp_path / "books")["Silent"]
    assert (silent["em"], silent["triviaqa_em"]) == ("0.0", "1.0")
    assert "search_r1_em" not in silent
    assert "EM (TriviaQA)" in results_table({"scripted": results.summary()})


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


def test_ids_that_are_dates_are_text(tmp_path, scripted):
    questions = rows(**GOLDS).map(lambda row, i: {"id": datetime(1952, 3, i + 1)}, with_indices=True)
    evaluate(scripted(SCRIPTS), {"books": questions}, tmp_path, progress=False)
    lines = (tmp_path / "books" / "scores.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {f"1952-03-0{day}" for day in range(1, len(GOLDS) + 1)}


def test_retrievers_are_checked_before_the_first_rollout(tmp_path, scripted):
    agent = scripted(SCRIPTS)
    with pytest.raises(ValueError, match="the class `BM25Retriever` itself"):
        evaluate(agent, {"books": rows(**GOLDS)}, tmp_path, retrievers={"books": BM25Retriever}, progress=False)
    with pytest.raises(ValueError, match="`retrievers` has the name 'boks', but `datasets` only"):
        evaluate(agent, {"books": rows(**GOLDS)}, tmp_path, retrievers={"boks": agent.search_loop.retriever})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent": None}, "`agent` must be a `SearchAgent`, .* got None"),
        ({"agent": "my-model"}, "`agent` must be a `SearchAgent`, .* got 'my-model'"),
        ({"datasets": rows(**GOLDS)}, r"`datasets` must be a mapping .* `\{'mine': dataset\}`, got `Dataset`"),
        ({"datasets": {1: rows(**GOLDS)}}, "`datasets`: names are used as folder names, .*, got 1"),
        ({"datasets": {"a": rows(**GOLDS).to_iterable_dataset()}}, r"`datasets\['a'\]` must be a `Dataset`, got `Iter"),
        ({"datasets": {"a": [GOLDS]}}, r"`datasets\['a'\]` must be a `Dataset`, got `list`"),
        ({"output_dir": None}, "`output_dir` must be the path of a folder, got None"),
        ({"num_samples": "2"}, "`num_samples` must be an integer, got '2'"),
        ({"num_samples": 1.5}, "`num_samples` must be an integer, got 1.5"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"seed": None}, "`seed` must be an integer, got None"),
        ({"max_failure_rate": "x"}, "`max_failure_rate` must be a number from 0 to 1, got 'x'"),
        ({"max_failure_rate": 5}, "`max_failure_rate` must be a number from 0 to 1, got 5"),
        ({"about": {"x": {1}}}, r"`about\['x'\]` must be a value that JSON can hold, got \{1\}"),
        ({"about": "x"}, "`about` must be a mapping with names as keys, got 'x'"),
        ({"retrievers": ["x"]}, "`retrievers` must be a mapping with names as keys"),
    ],
)
def test_arguments_are_checked_before_anything_is_computed(tmp_path, scripted, arguments, message):
    given = {"agent": scripted([]), "datasets": {"books": rows(**GOLDS)}, "output_dir": tmp_path / "out", **arguments}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        evaluate(**given, progress=False)
    assert not (tmp_path / "out").exists()
