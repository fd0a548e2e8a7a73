"""`recipes/evaluate.py`, as a user runs it."""

import importlib
import json
import re
from pathlib import Path

import pytest

from helpers.fake_endpoint import FakeEndpoint
from tspo_trl.commands.evaluate import _named

SETTINGS = ["--max_searches", "3", "--num_passages", "2", "--max_turn_tokens", "12", "--max_observation_tokens", "48"]
PROMPT = ["--prompt_template", "Question: {question}\n"]


@pytest.fixture
def recipe():
    return importlib.import_module("tspo_trl.commands.evaluate")


@pytest.fixture
def files(tmp_path, world):
    """Questions of two sources in one file, of a third in another, and the passages."""

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    def row(i, question, **more):
        return {"id": f"q{i}", "question": question.text, "golden_answers": [question.answer], **more}

    questions = world.heldout_questions
    mixed = [row(i, q, data_source="people" if q.kind == "person" else "places") for i, q in enumerate(questions[:20])]
    return {
        "mixed": write("mixed.jsonl", mixed),
        "other": write("other.jsonl", [row(i, q) for i, q in enumerate(questions[20:26])]),
        "corpus": write("passages.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in world.passages]),
    }


def test_models_are_evaluated_compared_and_compared_again(recipe, tmp_path, policy_dir, files, capsys):
    out = tmp_path / "out"
    arguments = [
        "--model",
        f"base={policy_dir}",
        f"same={policy_dir}",
        "--dataset",
        files["mixed"],
        f"rest={files['other']}",
    ]
    arguments += ["--corpus", files["corpus"], "--output_dir", str(out), *SETTINGS, *PROMPT]
    recipe.main(arguments)
    printed = capsys.readouterr().out
    results = json.loads((out / "base" / "results.json").read_text())
    assert set(results["datasets"]) == {"mixed-people", "mixed-places", "rest"}
    assert sum(entry["questions"] for entry in results["datasets"].values()) == 26
    assert results["model"] == policy_dir
    assert results["data"]["rest"]["retriever"].startswith("bm25")
    assert results["versions"]["tspo_trl"]
    em = results["average"]["metrics"]["em"]
    cell = re.escape(f"{em['mean']:.3f} [{em['low']:.3f}, {em['high']:.3f}]")
    assert re.search(rf"\| \*\*average\*\* +\| base +\| {cell} \|", printed)
    assert "same compared with base" in printed
    assert re.search(r"\| EM +\| .* \+0.000 \[\+0.000, \+0.000\] \| +1.0000 \|", printed)
    assert (out / "results.md").read_text().strip() in printed
    assert (out / "base-same.json").is_file()

    recipe.main(["--compare", str(out / "base"), str(out / "same" / "results.json")])
    again = capsys.readouterr().out
    assert again.strip() in printed
    with pytest.raises(FileNotFoundError, match="Did you mean one of"):
        recipe.main(["--compare", str(out), str(out / "same")])


def test_a_configuration_of_a_data_set_is_chosen(recipe, tmp_path):
    for name in ("easy", "hard"):
        (tmp_path / "data" / name).mkdir(parents=True)
        row = {"question": f"{name}?", "golden_answers": ["x"]}
        (tmp_path / "data" / name / "test.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--model", "m", "--dataset", f"mine={tmp_path / 'data'}", "--corpus", "x", "--dataset_config", "hard"]
    datasets, *_ = recipe.load_datasets(recipe.parse_arguments(options))
    assert datasets["mine"]["question"] == ["hard?"]


def test_a_subset_is_drawn_with_a_seed(recipe, tmp_path, policy_dir, files):
    arguments = ["--model", policy_dir, "--dataset", f"few={files['mixed']}", "--max_questions", "10"]
    arguments += ["--corpus", files["corpus"], *SETTINGS, *PROMPT]
    for out in ("one", "two"):
        recipe.main([*arguments, "--output_dir", str(tmp_path / out)])
    model = Path(policy_dir).name
    found = [json.loads((tmp_path / out / model / "results.json").read_text()) for out in ("one", "two")]
    assert found[0] == found[1]
    people = found[0]["datasets"]["few-people"]["questions"]
    with open(files["mixed"]) as file:
        whole = sum("people" in line for line in file)
    assert abs(people - whole / 2) < 1


def test_an_endpoint_is_evaluated(recipe, tmp_path, policy_dir, files, capsys):
    with FakeEndpoint(policy_dir) as server:
        arguments = [
            "--model",
            "tiny",
            "--endpoint",
            server.url,
            "--tokenizer",
            policy_dir,
            "--dataset",
            files["other"],
        ]
        arguments += ["--corpus", files["corpus"], "--output_dir", str(tmp_path / "out"), *SETTINGS, *PROMPT]
        recipe.main(arguments)
    assert "| other (6)" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    assert about["endpoint"] == server.url


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x.jsonl"], "--model is required"),
        (["--model", "m"], "--dataset_name is required"),
        (["--model", "m", "--dataset", "x.jsonl", "--num_samples", "0"], "--num_samples must be at least 1, got 0"),
        (
            ["--model", "m", "--dataset", "x", "--num_samples", "2", "--temperature", "0"],
            "would be the same rollout each time",
        ),
        (["--model", "m", "--dataset", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["--model", "m", "--dataset", "x", "--columns", "a"], "--dataset_columns must be like OURS=THEIRS, got 'a'"),
        (["--model", "m", "--dataset", "x", "--temperature", "nan"], "--temperature must not be negative"),
        (["--model", "m", "--dataset", "x", "--temperature", "inf"], "a finite number, got inf"),
        (["--model", "m", "--dataset", "x", "--max_searches", "-1"], "--max_searches must be at least 0, got -1"),
        (["--model", "m", "--dataset", "x", "--max_turn_tokens", "0"], "--max_turn_tokens must be at least 1, got 0"),
        (
            ["--model", "m", "--dataset", "x", "--prompt_template", "x"],
            "--prompt_template must have '{question}' in it",
        ),
        (["--model", "", "--dataset", "x"], "--model must name a model, got ''"),
        (["--model", "m", "x=", "--dataset", "x"], "--model must name a model, got 'x='"),
        (["--model", "m", "--dataset", ""], "--dataset_name must name a data set, got ''"),
        (
            ["--model", "z5/checkpoint-1", "z6/checkpoint-1", "--dataset", "x"],
            "two models are called 'checkpoint-1': 'z5/checkpoint-1' and 'z6/checkpoint-1'. Rename one: "
            "NAME=z6/checkpoint-1",
        ),
        (["--model", "a=X", "a=Y", "--dataset", "x"], "two models are called 'a': 'X' and 'Y'. Rename one: NAME=Y"),
        (["--model", "tiny", "tiny", "--dataset", "x"], "two models are called 'tiny'"),
        (["--compare", "a", "b", "--model", "m"], "cannot be combined with --model"),
    ],
)
def test_bad_options_are_named(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit):
        recipe.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "hotpot", "--corpus", "CORPUS"], "no benchmark 'hotpot'.* Did you mean 'hotpotqa'"),
        (["--dataset", "nowhere.jsonl", "--corpus", "CORPUS"], "nowhere.jsonl"),
        (["--dataset", "OTHER"], "Nothing to search in: give --corpus, --index or --retriever_url"),
        (["--dataset", "OTHER", "x=OTHER", "y=OTHER", "--corpus", "CORPUS", "CORPUS"], "one for each of the 3, got 2"),
        (["--dataset", "OTHER", "OTHER", "--corpus", "CORPUS"], "two data sets are called 'other'"),
        (["--dataset", "nowhere.jsonl", "--retriever_url", "http://127.0.0.1:9"], "there is no file 'nowhere.jsonl'"),
        (["--dataset", "OTHER", "--corpus", "nowhere.jsonl"], "--corpus: 'nowhere.jsonl' does not exist"),
        (["--dataset-name", "OTHER", "--corpus", "CORPUS", "--model", "./no"], "--model: there is no folder './no'"),
        (["--dataset_name", "OTHER", "--corpus", "CORPUS", "--output_dir", "OTHER"], "other.jsonl' is a file"),
        (["--dataset_name", "OTHER", "--corpus", ""], "--corpus must name a file or folder, got ''"),
        (["--dataset_name", "OTHER", "--index", ""], "--index must name a file or folder, got ''"),
    ],
)
def test_bad_sources_are_named_before_the_model_is_loaded(recipe, tmp_path, files, arguments, message):
    known = {"CORPUS": files["corpus"], "OTHER": files["other"]}
    for name, path in known.items():
        arguments = [a.replace(name, path) for a in arguments]
    options = ["--model", "nowhere", "--output_dir", str(tmp_path / "out"), *arguments]
    with pytest.raises((ValueError, OSError), match=message):
        recipe.main(options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "foo", "--dtype must be 'auto' or a floating-point type of PyTorch.*, got 'foo'"),
        ("--dtype", "load", "--dtype must be 'auto'"),
        ("--device", "foo", "--device: 'foo' cannot be used here .*This machine has"),
        ("--device", "cuda:99", "--device: 'cuda:99' cannot be used here"),
        ("--base_model", "./no", "--base_model: there is no folder './no'"),
        ("--retriever_encoder", "./no", "--retriever_encoder: there is no folder './no'"),
        ("--tokenizer", "./no", "--tokenizer: there is no folder './no'"),
        ("--tokenizer", "", "--tokenizer must be a folder or a name on the Hub, got ''"),
        ("--endpoint", "localhost:8000", "--endpoint must be like 'http://localhost:8000', got 'localhost:8000'"),
        ("--endpoint", "http://127.0.0.1:abc", "--endpoint is not a URL"),
        ("--endpoint", "", "--endpoint must be like"),
    ],
)
def test_bad_values_are_named_before_data_and_passages_are_opened(
    recipe, tmp_path, policy_dir, monkeypatch, option, value, message
):
    monkeypatch.setattr(recipe, "load_datasets", None)
    (tmp_path / "data.jsonl").touch()
    options = ["--model", policy_dir, "--dataset_name", str(tmp_path / "data.jsonl"), "--corpus", str(tmp_path)]
    with pytest.raises((ValueError, OSError), match=message):
        recipe.main([*options, option, value, "--output_dir", str(tmp_path / "out")])


def test_a_key_that_cannot_be_sent_names_its_variable(recipe, tmp_path, policy_dir, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    options = ["--model", policy_dir, "--dataset_name", "nq", "--corpus", str(tmp_path), "--endpoint", "http://host"]
    with pytest.raises(ValueError, match="The environment variable OPENAI_API_KEY must be printable ASCII"):
        recipe.main([*options, "--output_dir", str(tmp_path / "out")])


def test_a_question_that_is_too_long_is_named_before_the_first_rollout(recipe, tmp_path, policy_dir, files):
    rows = [{"question": "Who wrote it? " * n, "golden_answers": ["x"]} for n in (1, 1, 3000)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", policy_dir, "--dataset_name", str(tmp_path / "long.jsonl"), "--corpus", files["corpus"]]
    with pytest.raises(ValueError, match=r"long, row 2: the prompt has .* tokens"):
        recipe.main([*options, "--output_dir", str(tmp_path / "out"), *SETTINGS, *PROMPT])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("data/popQA.tsv", "popQA"),
        ("data/questions.jsonl.gz", "questions"),
        ("dev.parquet", "dev"),
        ("mine=data/dev.json", "mine"),
        ("org/data-set_1.5", "data-set_1.5"),
        ("runs/demo/", "demo"),
    ],
)
def test_the_name_of_a_model_or_data_set(spec, name):
    assert _named(spec)[0] == name
