"""The benchmark of dense indexes."""

import json
import subprocess
import sys

import numpy as np

from benchmarks.vectors import recall
from helpers.encoders import WORDS, make_bert
from helpers.paths import ROOT
from tspo_trl.retrieval.dense import TextEncoder, build_index


def rows(*arguments):
    """The rows of the table that the benchmark prints, by form."""
    command = [sys.executable, "-m", "benchmarks.vectors", "--seconds", "0.1", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {row[1]: row for row in cells[1:]}


def test_more_candidates_find_more(tmp_path):
    table = rows(
        "--vectors", 3000, "--dimensions", 32, "--num_queries", 64, "--candidates", 20, 3000, "--folder", tmp_path
    )
    exact, few, everything = table.values()
    assert exact[0] == "3,000 × 32"
    assert exact[-2:] == ["1.000", "1.000"]
    assert 0.2 < float(few[-1]) < float(everything[-1])
    assert float(everything[-1]) > 0.9
    assert not list(tmp_path.iterdir())


def test_real_vectors_are_those_of_an_encoder(tmp_path):
    texts = [f"{a} is the {b} of {c}" for a in WORDS[:6] for b in WORDS[6:12] for c in WORDS[12:]]
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    questions.write_text("".join(json.dumps({"question": f"who wrote {word} ?"}) + "\n" for word in WORDS))
    encoder = make_bert(tmp_path / "e5-tiny")
    table = rows("--encoder", encoder, "--corpus", corpus, "--queries", questions, "--candidates", len(texts))
    small = table[f"small, {len(texts)} candidates"]
    assert small[0] == f"{len(texts)} × 32"
    assert float(small[-1]) > 0.8
    build_index(corpus, tmp_path / "index", TextEncoder(encoder, device="cpu"), progress=False)
    of_index = rows("--index", tmp_path / "index", "--queries", questions, "--candidates", len(texts))
    assert {form: row[-2:] for form, row in of_index.items()} == {form: row[-2:] for form, row in table.items()}
    assert (tmp_path / "index" / "vectors.npy").is_file()


def test_recall_is_the_share_of_the_exact_results():
    assert recall([[1, 2, 3], [4, 5, 6]], [[2, 1, 9], [7, 8, 9]], 2) == 0.5
    assert np.isclose(recall([[1, 2, 3]], [[3, 4, 1]], 3), 2 / 3)
