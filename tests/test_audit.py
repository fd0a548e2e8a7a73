"""The audit of a data set and a retriever, and its recipe."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

from helpers.audits import OSLO, PARIS, ROME, Words, row
from helpers.paths import ROOT
from tspo_trl import BM25Retriever, load_corpus
from tspo_trl.audit import (
    Chance,
    Curve,
    Ranks,
    constant_answers,
    find_ranks,
    first_rank,
    summarize,
    unusable_reason,
    verdict,
)
from tspo_trl.scoring import contains_answer, normalize_answer

RECIPE = ROOT / "recipes" / "audit.py"
SAMPLE = ROOT / "tests" / "data" / "hotpotqa"


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("Yes", "yes_no"),
        ("no.", "yes_no"),
        ("noanswer", "yes_no"),
        ("The The", "empty"),
        ("!!!", "empty"),
        ("", "empty"),
        ("I", "one_character"),
        ("the 7", "one_character"),
        ("Rome", "in_question"),
        ("Oslo", None),
        ("Rom", None),
    ],
)
def test_golden_answers_that_folr_cannot_use(gold, reason):
    assert unusable_reason(gold, "Is yes no 7 I Rome or Paris?") == reason


def test_first_rank_is_that_of_the_first_passage_with_an_eligible_answer():
    passages = [PARIS, ROME, OSLO]
    assert first_rank(passages, ["Italy"]) == 2
    assert first_rank(passages, ["Reykjavik", "rome"]) == 2
    assert first_rank(passages, ["the Paris"]) == 1
    assert first_rank(passages, ["No"]) is None  # occurs in the text, but is degenerate
    assert first_rank(passages, ["No", "Helsinki"]) == 3
    assert first_rank(passages, ["Ital"]) is None
    assert first_rank(passages, ["France Rome"]) is None  # across two passages
    assert first_rank(passages, ["Rome capital"]) is None  # across title and text
    assert first_rank(passages, []) is None
    assert first_rank([], ["Italy"]) is None


def test_ranks_are_found_in_the_results_of_searches():
    question = row(golds=["no", "Italy"], titles=["x", "y"], ids=["oslo", "paris", "lost"])
    ranks = find_ranks(question, [[PARIS, OSLO, ROME], [OSLO, ROME], [PARIS]])
    assert ranks == Ranks(plain=3, ideal=2, supporting=(2, 1, None))
    assert find_ranks(row(golds=["Italy"]), [[]]) == Ranks(None, None, ())


def test_shares_of_constant_answers():
    golds = [["no"], ["No."], ["yes"], ["Rome", "rome!"], ["The Rome"], ["Rome", "no"], ["Oslo"], ["!!!"]]
    # "no" and "Rome" answer 3 of 8 (each row counts once), "yes" and "Oslo" 1 of 8; yes and no come first in a tie
    assert constant_answers(golds) == {"no": 3 / 8, "Rome": 3 / 8, "yes": 1 / 8, "Oslo": 1 / 8}
    assert list(constant_answers(golds)) == ["no", "Rome", "yes", "Oslo"]
    assert list(constant_answers(golds, count=1)) == ["no", "Rome", "yes"]


ROWS = [
    row("q1", ["Rome"], ["Rome"], ["rome"]),
    row("q2", ["Oslo"], ["Oslo", "Norway"], ["oslo", "norway"]),
    row("is it Paris or Rome?", ["Paris"]),
    row("q4", ["yes"], ["Oslo"], ["oslo"]),
    row("q5", ["The The", "Helsinki"]),
]
NEVER = Chance((0.0, 0.0, 0.0))
RANKS = [
    Ranks(plain=1, ideal=1, supporting=(1,), chance=NEVER),
    Ranks(plain=3, ideal=2, supporting=(3, None), chance=Chance((0.0, 0.04, 0.5), "Oslo")),
    Ranks(plain=2, ideal=None, supporting=(), chance=Chance((0.04, 0.2, 0.5), "Paris")),
    Ranks(plain=None, ideal=None, supporting=(2,), chance=NEVER),
    Ranks(plain=None, ideal=None, supporting=(), chance=NEVER),
]


def test_an_audit_equals_numbers_calculated_by_hand():
    audit = summarize(ROWS, RANKS, top_k=3, num_passages=2, max_searches=2)
    assert (audit.num_questions, audit.num_eligible, audit.num_eligible_strict) == (5, 4, 3)
    assert audit.plain == Curve(4, (1 / 4, 2 / 4, 3 / 4))
    assert audit.ideal == Curve(2, (1 / 2, 1, 1))  # two eligible questions have titles
    assert audit.chance == Curve(4, pytest.approx((0.04 / 4, 0.24 / 4, 1 / 4)))
    assert audit.chance_hits == pytest.approx([(0.04 + 0.2) / 4, (1 - 0.96**2 + 1 - 0.8**2) / 4])
    assert audit.chance_weights == pytest.approx([(1 - hits / 0.5) ** 2 for hits in audit.chance_hits])
    assert audit.supporting == Curve(3, (1 / 3, 2 / 3, 2.5 / 3))  # q4 is included although its golden answer is yes
    assert {reason: entry["questions"] for reason, entry in audit.unusable.items()} == {
        "yes_no": 1,
        "empty": 1,
        "one_character": 0,
        "in_question": 1,
        "chance": 1,  # the other one is found less often in the two passages of training
    }
    assert audit.unusable["empty"] == {
        "questions": 1,
        "share": 0.2,
        "examples": [{"gold": "The The", "question": "q5"}],
    }
    assert audit.unusable["chance"]["examples"] == [{"gold": "Paris", "question": "is it Paris or Rome?"}]
    assert audit.constant_answers["yes"] == 1 / 5
    assert [audit.at_k(c) for c in (audit.plain, audit.chance)] == [1 / 2, pytest.approx(0.06)]


def test_examples_have_different_golden_answers():
    rows = [row(f"q{i}", [gold]) for i, gold in enumerate(["yes", "no", "yes", "Yes", "NO"])]
    audit = summarize(rows, [Ranks(None, None, ())] * 5, top_k=1, num_passages=1)
    assert audit.unusable["yes_no"]["questions"] == 5
    assert [e["gold"] for e in audit.unusable["yes_no"]["examples"]] == ["yes", "no", "Yes"]


def test_curves_without_data_are_none():
    alone = summarize([row("q", ["Rome"])], [Ranks(1, None, ())], top_k=2, num_passages=1)
    assert (alone.plain, alone.ideal, alone.chance, alone.supporting) == (Curve(1, (1.0, 1.0)), None, None, None)
    closed = summarize([row("q", ["no"])], [Ranks(None, None, ())], top_k=2, num_passages=1)
    assert closed.plain is None
    assert "Warning: 100.0% of the questions have no eligible golden answer" in " ".join(verdict(closed))
    assert not any(line.startswith("Ceiling") for line in verdict(closed))


def test_an_audit_is_converted_to_json():
    audit = replace(summarize(ROWS, RANKS, top_k=3, num_passages=2), about={"dataset": "x"})
    data = json.loads(json.dumps(audit.to_dict()))
    assert data["plain"] == {"questions": 4, "rates": [0.25, 0.5, 0.75]}
    assert data["about"] == {"dataset": "x"}
    assert data["verdict"] == verdict(audit)


def test_the_verdict_states_the_ceiling():
    text = " ".join(verdict(summarize(ROWS, RANKS, top_k=3, num_passages=2)))
    # Two of the four eligible questions, and the ineligible one
    assert "in 2 passages for 50.0% of the eligible questions" in text
    assert "at most 0.600 over all questions" in text
    assert "supporting titles find a golden answer in 2 passages for 100.0%." in text


def warnings(audit, **changes):
    return {line.split(": ", 1)[1] for line in verdict(replace(audit, **changes)) if line.startswith("Warning")}


def test_warnings_at_their_thresholds():
    rows = [row(f"q{i}", [f"gold {i}"]) for i in range(100)]
    audit = summarize(rows, [Ranks(1, None, ())] * 100, top_k=1, num_passages=1)
    assert warnings(audit) == set()
    for fine, change, text in [
        ({"plain": Curve(100, (0.3,))}, {"plain": Curve(100, (0.29,))}, "does the corpus cover"),
        ({"chance": Curve(100, (0.2,))}, {"chance": Curve(100, (0.21,))}, "more than 20% of the hit rate"),
        ({"num_eligible": 90, "num_eligible_strict": 90}, {"num_eligible": 89, "num_eligible_strict": 89}, "11.0% of"),
        ({"num_eligible_strict": 90}, {"num_eligible_strict": 89}, "folr_guard='strict'"),
        ({"constant_answers": {"no": 0.05}}, {"constant_answers": {"no": 0.06}}, "the constant answer 'no'"),
        ({"supporting": Curve(9, (0.1,))}, {"supporting": Curve(9, (0.0,))}, "do the ids"),
    ]:
        assert warnings(audit, **fine) == set()
        (warning,) = warnings(audit, **change)
        assert text in warning
    (warning,) = warnings(audit, plain=Curve(100, (0.1,)), ideal=Curve(100, (0.9,)))
    assert "the policy must learn better queries" in warning


# The recipe


def audit(*arguments):
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def recipe():
    """The recipe as a module."""
    return importlib.import_module("tspo_trl.commands.audit")


def test_audit_of_real_questions_and_passages(tmp_path):
    files = ["--dataset", SAMPLE / "questions.jsonl", "--corpus", SAMPLE / "passages.jsonl"]
    result = audit(*files, "--max_searches", 2, "--output_dir", tmp_path / "new" / "folder")
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "new" / "folder" / "audit.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    data = json.loads((tmp_path / "new" / "folder" / "audit.json").read_text(encoding="utf-8"))

    # The expected numbers are computed without the code of the audit
    rows = [json.loads(line) for line in (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    retriever = BM25Retriever(load_corpus(SAMPLE / "passages.jsonl"))

    def hit(query, golds, k):
        return any(
            contains_answer(passage.title, golds) or contains_answer(passage.text, golds)
            for passage in retriever.search([query], k)[0]
        )

    usable = [r for r in rows if normalize_answer(r["golden_answers"][0]) not in ("", "yes", "no", "noanswer")]
    assert data["num_questions"] == len(rows) == 48
    assert data["num_eligible"] == len(usable)
    assert len(data["plain"]["rates"]) == 20
    for k in (1, 3, 20):
        plain = sum(hit(r["question"], r["golden_answers"], k) for r in usable)
        ideal = sum(any(hit(t, r["golden_answers"], k) for t in r["supporting_titles"]) for r in usable)
        recall = 0.0
        for r in rows:
            found = {passage.id for passage in retriever.search([r["question"]], k)[0]}
            recall += len(found & set(r["supporting_ids"])) / len(set(r["supporting_ids"]))
        assert data["plain"]["rates"][k - 1] == pytest.approx(plain / len(usable))
        assert data["ideal"]["rates"][k - 1] == pytest.approx(ideal / len(usable))
        assert data["supporting"]["rates"][k - 1] == pytest.approx(recall / len(rows))
    by_chance = []
    for r in usable:
        others = [other for other in rows if other is not r and other["golden_answers"] != r["golden_answers"]]
        by_chance.append(sum(hit(other["question"], r["golden_answers"], 3) for other in others) / len(others))
    assert data["chance"]["rates"][2] == pytest.approx(sum(by_chance) / len(usable))
    expected = [sum(1 - (1 - p) ** n for p in by_chance) / len(usable) for n in (1, 2)]
    assert data["chance_hits"] == pytest.approx(expected)
    assert data["chance_weights"] == pytest.approx([(1 - b / data["plain"]["rates"][2]) ** 2 for b in expected])
    closed = [r for r in rows if r["golden_answers"][0] in ("yes", "no")]
    named = [r for r in usable if contains_answer(r["question"], r["golden_answers"])]
    assert data["unusable"]["yes_no"]["questions"] == len(closed)
    assert data["unusable"]["in_question"]["questions"] == len(named)
    assert data["constant_answers"]["no"] == sum(r["golden_answers"] == ["no"] for r in rows) / 48
    assert data["chance"]["rates"][2] < data["plain"]["rates"][2] < data["ideal"]["rates"][2]
    assert (data["about"]["top_k"], data["about"]["retriever_backend"]) == (20, "bm25")
    printed = "".join(result.stdout.split())
    assert all("".join(line.split()) in printed for line in data["verdict"])


def test_every_query_is_searched_once_in_batches(recipe):
    retriever = Words()
    rows = [row(f"What of Rome, {i}?", ["Italy"], ["Rome", "Oslo"]) for i in range(300)]
    ranks = recipe.search_all(rows, retriever, top_k=2)
    assert ranks == [Ranks(1, 1, ())] * 300  # all look for the same answer, so there are no other questions
    batches = retriever.calls
    assert all(len(set(batch)) == len(batch) <= 256 for batch in batches)
    assert len(batches) == 4
    assert sum(query.startswith("What") for batch in batches for query in batch) == 300


def test_rows_are_checked_like_those_of_the_trainer(recipe):
    full = {"question": "q", "golden_answers": ["!!!"], "supporting_titles": ["a", " ", "a"], "supporting_ids": None}
    assert recipe.read_row(full, "here") == row("q", ["!!!"], ["a"])
    assert recipe.read_row(full | {"supporting_ids": [12, "13"]}, "here")["supporting_ids"] == ["12", "13"]
    for change, message in [
        ({"question": " "}, "here: 'question' must be a non-empty string, found ' '"),
        ({"question": None}, "here: 'question' must be a non-empty string, found None"),
        ({"golden_answers": []}, r"here: 'golden_answers' must be a non-empty list of strings, found \[\]"),
        ({"golden_answers": None}, "here: 'golden_answers' must be a non-empty list of strings, found None"),
        ({"golden_answers": "Rome"}, "here: 'golden_answers' must be a non-empty list of strings, found 'Rome'"),
        ({"golden_answers": [7]}, r"here: 'golden_answers' must be a non-empty list of strings, found \[7\]"),
        ({"supporting_ids": [None]}, r"here: 'supporting_ids' must be a list of strings, found \[None\]"),
        ({"supporting_ids": "0"}, "here: 'supporting_ids' must be a list of strings, found '0'"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe.read_row(full | change, "here")


def test_texts_with_markup_are_printed_and_drawn(recipe, tmp_path, capsys):
    """Texts with markup of the terminal or the plot, and golden answers that normalise to the empty string."""
    rows = [
        row("q1", ["[bold]x[/red]"]),
        row("q2", ["$\\frac$"]),
        row("q3", ["!!!"]),
        row("q4", ["\n\n" + "long " * 99]),
    ]
    audit = summarize(
        rows, [Ranks(1, None, (), Chance((0.5,), r["golden_answers"][0])) for r in rows], top_k=1, num_passages=1
    )
    recipe.report(audit)
    recipe.plot(audit, tmp_path / "audit.png", title="$\\frac$")
    assert "[bold]x[/red]" in capsys.readouterr().out
    closed = summarize([row("q", ["no"])], [Ranks(None, None, ())], top_k=1, num_passages=1)
    recipe.report(closed)
    recipe.plot(closed, tmp_path / "closed.png", title="")
    assert (tmp_path / "closed.png").is_file()


def run(recipe, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, arguments)])
    recipe.main()


def test_the_demo_needs_no_corpus_or_questions(recipe, monkeypatch, tmp_path):
    run(recipe, monkeypatch, "--dataset", "demo", "--max_questions", 12, "--top_k", 4, "--output_dir", tmp_path)
    data = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert data["num_questions"] == 12
    assert data["ideal"] == {"questions": 12, "rates": [1.0] * 4}


def test_questions_are_drawn_with_a_seed_from_all_sources(recipe, tmp_path):
    rows = [
        {"question": f"{name} {i}?", "golden_answers": ["x"], "data_source": name} for name in "ab" for i in range(20)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {}
    for seed in ("0", "0", "1"):
        options = ["--dataset", file, "--corpus", "x", "--max_questions", 6, "--seed", seed]
        loaded, _ = recipe.load_rows(recipe.parse_arguments(list(map(str, options))))
        questions = [row["question"] for row in loaded]
        assert drawn.setdefault(seed, questions) == questions
        assert [question[0] for question in questions] == ["a"] * 3 + ["b"] * 3
    assert drawn["0"] != drawn["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "CORPUS"], "--dataset"),
        (["--dataset", "QUESTIONS"], "give --corpus, --index or --retriever_url"),
        (["--dataset", "demo", "--corpus", "CORPUS"], "--dataset_name demo brings its own passages, got --corpus"),
        (
            ["--dataset", "QUESTIONS", "--corpus", "CORPUS", "--backend", "grep"],
            "argument --retriever_backend/--backend: invalid choice: 'grep'",
        ),
        (["--dataset", "QUESTIONS", "--corpus", "CORPUS", "--num_passages", "21"], "--num_passages must be from 1 to"),
        (
            ["--dataset", "QUESTIONS", "--corpus", "CORPUS", "--max_questions", "0"],
            "--max_questions must be at least 1",
        ),
        (
            ["--dataset", "QUESTIONS", "--corpus", "CORPUS", "--max_searches", "0"],
            "--max_searches must be at least 1, got 0",
        ),
    ],
)
def test_invalid_options_are_reported(recipe, monkeypatch, capsys, arguments, message):
    files = {"CORPUS": SAMPLE / "passages.jsonl", "QUESTIONS": SAMPLE / "questions.jsonl"}
    with pytest.raises(SystemExit):
        run(recipe, monkeypatch, *(files.get(a, a) for a in arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "the file is empty"),
        ("[]", "has no rows"),
        ('{"question": "q", oops', "line 1: not valid JSON"),
        ('{"question": "q", "answer": "a"}', "has no column 'golden_answers'.*'question', 'answer'"),
        ('{"query": "q", "golden_answers": ["a"]}', "has no column 'question'.*'query'"),
        ('{"question": "q", "golden_answers": []}', "line 1, column 'golden_answers': expected at least one answer"),
    ],
)
def test_invalid_data_sets_are_reported(recipe, monkeypatch, tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe, monkeypatch, "--dataset", path, "--corpus", SAMPLE / "passages.jsonl", "--output_dir", tmp_path)
    assert not (tmp_path / "audit.json").exists()


def test_an_unknown_split_and_a_missing_corpus_are_reported(recipe, monkeypatch, tmp_path):
    questions = ["--dataset", SAMPLE / "questions.jsonl", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=r"a file is the split 'train', but `--split` is 'dev'"):
        run(recipe, monkeypatch, *questions, "--corpus", SAMPLE / "passages.jsonl", "--split", "dev")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        run(recipe, monkeypatch, *questions, "--corpus", tmp_path / "nowhere.jsonl")


def test_the_choices_of_backends_are_complete(recipe, monkeypatch, capsys):
    from tspo_trl.retrieval.open import BackendName

    with pytest.raises(SystemExit):
        run(recipe, monkeypatch, "--help")
    assert "{" + ",".join(get_args(BackendName)) + "}" in capsys.readouterr().out
