"""The commands of the benchmarks, and small runs of the benchmarks of retrievers and rollouts."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from transformers import Qwen2Config

from benchmarks import retrieval
from helpers.paths import HOTPOTQA, ROOT

RUNNABLE = [
    *(path.stem for path in ROOT.glob("benchmarks/*.py") if "__main__" in path.read_text(encoding="utf-8")),
    *(path.parent.name for path in ROOT.glob("benchmarks/*/__main__.py")),
]
BM25S, MAPPED, HTTP = "bm25s", "bm25s, mapped", "HTTP (bm25s, mapped)"


def run(tmp_path, *arguments):
    """Run the benchmark; return the results of its corpus, and the cells of its tables by backend."""
    command = [sys.executable, "-m", "benchmarks.retrieval", *arguments, "--seconds", "0.5"]
    command += ["--json", tmp_path / "results.json"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["machine"]["bm25s"] in result.stdout
    assert "\r" not in result.stdout
    (corpus,) = content["corpora"]
    tables = {name: [] for name in ("", *corpus["backends"])}
    for line in result.stdout.splitlines():
        if line.startswith("| ") and not line.startswith("| --"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            tables[name] += cells
    return corpus, tables


def test_the_documentation_lists_all_benchmarks():
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    assert set(re.findall(r"python -m benchmarks\.(\w+)", pages)) == set(RUNNABLE)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests import them
@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_help_of_each_benchmark(name, monkeypatch, capsys):
    if name == "inspector":
        pytest.importorskip("playwright")
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks.{name} ")
    assert f"\n    python -m benchmarks.{name} " in shown.partition("options:")[0]  # with an example


def test_all_backends_are_measured_and_the_same_index_returns_the_same_passages(tmp_path):
    corpus, tables = run(tmp_path, "--passages", 300, "--max_queries", 40)
    backends = corpus["backends"]
    assert corpus["passages"] == 300
    assert set(backends) == {"rank_bm25", BM25S, MAPPED, "Lucene", HTTP}
    for name, measured in backends.items():
        assert len(tables[name]) == len(tables[""])
        if "not_installed" in measured:
            assert name == "Lucene"
            assert tables[name][0] == "not installed"
            continue
        assert measured["index_s"] > 0
        assert (measured["load_s"] is None) == (name in ("rank_bm25", BM25S))
        assert len(measured["memory_mib"]) == (2 if name == HTTP else 1)
        if sys.platform == "linux":
            assert all(20 < mib < 4000 for mib in [*measured["memory_mib"], measured["index_mib"]])
        assert len(measured["single_ms"]) >= 20
        assert 1 <= len(measured["batch_ms"]) <= 20  # of 64: the queries go round
        assert min(measured["single_ms"] + measured["batch_ms"] + [measured["queries_per_s"]]) > 0
        assert 0.3 < measured["overlap"] <= 1
        assert 0.5 < measured["same_first"] <= 1
        assert measured["queries"] == 40
        assert "recall" not in measured
    for name in (BM25S, MAPPED, HTTP):
        assert (backends[name]["overlap"], backends[name]["same_first"]) == (1.0, 1.0)
    assert tables[BM25S][tables[""].index("× bm25s")] == "1"


def test_recall_is_measured_on_data_with_supporting_passages(tmp_path, monkeypatch, capsys):
    few = {name: retrieval.BACKENDS[name] for name in ("rank_bm25", BM25S)}
    monkeypatch.setattr(retrieval, "BACKENDS", few)
    monkeypatch.setattr(retrieval, "in_own_process", lambda function, *arguments: function(*arguments))
    data = ["--corpus", HOTPOTQA / "passages.jsonl", "--queries", HOTPOTQA / "questions.jsonl", "--max_queries", 24]
    settings = ["--seconds", 0.2, "--json", tmp_path / "results.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["retrieval", *data, *settings])))
    retrieval.main()
    (corpus,) = json.loads((tmp_path / "results.json").read_text())["corpora"]
    assert corpus["passages"] == 480
    for measured in corpus["backends"].values():
        assert measured["queries"] == 24
        assert 0.5 < measured["recall"] <= 1
        assert measured["recall_of_bm25s"] == corpus["backends"][BM25S]["recall"]
    assert "| recall@3 | of bm25s | queries |" in capsys.readouterr().out


def test_only_the_chosen_backends_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "in_own_process", lambda function, *arguments: function(*arguments))
    settings = ["--passages", 100, "--max_queries", 10, "--seconds", 0.2, "--json", tmp_path / "results.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["retrieval", *settings, "--backends", MAPPED])))
    retrieval.main()
    (corpus,) = json.loads((tmp_path / "results.json").read_text())["corpora"]
    assert set(corpus["backends"]) == {MAPPED}
    assert corpus["backends"][MAPPED]["overlap"] == 1
    assert f"× {MAPPED}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["retrieval", "--backends", "Lucene"])
    with pytest.raises(SystemExit):
        retrieval.main()
    assert "--backends must contain one of 'bm25s', 'bm25s, mapped'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--batch 6 --group 1 --turns 1 3",
        "--batch 8 --group 4 --turns 1 3 --longest 120",
        "--batch 4 --group 2 --turns 1 3 --model MODEL --dtype bfloat16",
        "--batch 4 --group 2 --turns 1 3 --model gemma3",
    ],
)
def test_all_loops_of_the_rollout_benchmark_generate_the_same_number_of_tokens(tmp_path, options):
    results = tmp_path / "results.json"
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2Config(**shape, vocab_size=3000, intermediate_size=48).save_pretrained(tmp_path / "model")
    options = [
        *options.replace("MODEL", str(tmp_path / "model")).split(),
        "--delays",
        "0",
        "--repeats",
        "1",
        "--json",
        str(results),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.rollouts", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(results.read_text())
    loops = {row["loop"] for row in rows}
    assert loops == {"TRL's tool loop", "tspo_trl, tool_call", "tspo_trl, tags"}
    for most in (1, 3):
        assert len({row["tokens"] for row in rows if row["turns"] == most}) == 1
    assert all(row["retrieval"] > 0 for row in rows if row["turns"] == 3)
    assert all(0 < row["reading"] < row["model"] < row["seconds"] for row in rows)
    assert result.stdout.count(f"\n| {options[1]} | 1–3 | 0 ms |") == 3
    assert ("(bfloat16)" in result.stdout) == ("bfloat16" in options)
    named = {"gemma3": "Gemma3"}.get(options[8], "Qwen2")
    # DeepSpeed may print a line before it
    assert any(line.startswith(f"{named} with ") for line in result.stdout.splitlines())


def test_an_unknown_model_of_the_rollout_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rollouts", "--model", "gemma33"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_module("benchmarks.rollouts", run_name="__main__")
    assert "must be a folder with a config.json or one of bamba, " in capsys.readouterr().err
