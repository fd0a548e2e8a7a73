"""The command `tspo` and its subcommands."""

import json
import re
import socket
import subprocess
import sys
from importlib import import_module

import httpx2
import pytest

from helpers.paths import ROOT
from tspo_trl.commands.errors import keeping_tracebacks, run_command
from tspo_trl.commands.main import COMMANDS, main
from tspo_trl.commands.serve import open_as_asked
from tspo_trl.commands.serve import parse_arguments as parse_serve_arguments

RETRIEVER = ["--corpus", "--index", "--retriever_backend", "--retriever_language", "--retriever_encoder"]
OPTIONS = {
    "train": [*RETRIEVER, "--retriever_url", "--max_searches", "--output_dir"],
    "cold_start": [*RETRIEVER, "--retriever_url", "--max_searches", "--num_demonstrations", "--output_dir"],
    "evaluate": [*RETRIEVER, "--backend", "--retriever_url", "--max_searches", "--compare", "--output_dir"],
    "audit": [*RETRIEVER, "--backend", "--retriever_url", "--top_k", "--output_dir"],
    "serve": [*RETRIEVER, "--backend", "--port"],
    "inspect": ["--steps", "--terminal"],
    "memory": ["--model", "--strategy", "--gpus"],
    "wiki18": ["--subset", "--backend", "--form", "--encoder"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert [option for option in OPTIONS[command] if option not in shown] == []


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert all(text in shown for text in COMMANDS.values())


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evalute"])
    assert stopped.value.code == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_columns_are_given_in_the_same_way(command, capsys):
    parse = import_module(f"tspo_trl.commands.{command}").parse_arguments
    options = [
        "--dataset",
        "x",
        "--corpus",
        str(ROOT / "README.md"),
        *(["--model", "m"] if command == "evaluate" else []),
    ]
    expected = {"question": "query", "golden_answers": "answers.text"}
    assert parse(options).columns is None
    assert parse([*options, "--columns", "question=query", "golden_answers=answers.text"]).columns == expected
    assert parse([*options, "--columns", json.dumps(expected)]).columns == expected
    for wrong in ("question", "=query", "{query}"):
        with pytest.raises(SystemExit):
            parse([*options, "--columns", wrong])
        assert f"got {wrong!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "audit"])
@pytest.mark.parametrize("dash", [False, True])
def test_the_same_thing_has_the_same_flag(command, dash):
    parse = import_module(f"tspo_trl.commands.{command}").parse_arguments
    corpus = ["--corpus", str(ROOT / "tests" / "data" / "hotpotqa" / "passages.jsonl")]
    model = [] if command == "audit" else ["--model_name_or_path", "m"]
    for names in (("dataset_name", "retriever_backend", "dataset_columns"), ("dataset", "backend", "columns")):
        values = zip(names, ("nq", "rank_bm25", "question=query"), strict=True)
        flags = [item for name, value in values for item in (f"--{name.replace('_', '-' if dash else '_')}", value)]
        args = parse([*flags, *corpus, *model])
        assert args.dataset in ("nq", ["nq"])
        assert args.retriever_backend in ("rank_bm25", ["rank_bm25"])
        assert args.columns == {"question": "query"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("audit --dataset_name nowhere.jsonl --retriever_url http://127.0.0.1:9", "there is no file 'nowhere.jsonl'"),
        ("audit --dataset_name nq --corpus README.md --retriever_url http://x", "not both"),
        ("audit --dataset_name nq --retriever_url localhost:8000", "localhost:8000"),
        ("evaluate --model m --dataset_name nq --index docs --retriever_url http://x", "not both"),
        ("train --model demo --dataset_name nq --retriever_url localhost:8000 --use_cpu true", "localhost:8000"),
        ("train --model demo --dataset_name nq --corpus README.md --backend grep --use_cpu true", "got 'grep'"),
        ("audit --dataset_name nq --corpus nowhere.jsonl", "--corpus: 'nowhere.jsonl' does not exist"),
        ("evaluate --model a --dataset_name nowhere.jsonl --corpus x", "there is no file 'nowhere.jsonl'"),
        ("evaluate --model runs/a/b --dataset_name nq --corpus tests/data", "--model: there is no folder 'runs/a/b'"),
        ("evaluate --compare nowhere elsewhere", "nowhere"),
        ("inspect nowhere", "nowhere"),
        ("serve --corpus nowhere.jsonl", "--corpus: 'nowhere.jsonl' does not exist"),
        ("serve --corpus demo --port 70000", "--port must be from 0 to 65535, got 70000"),
        ("serve --corpus demo --backend lucene", "--corpus demo is for --retriever_backend bm25"),
        ("serve --corpus demo --topk 0", "--topk must be at least 1, got 0"),
        ("memory --config nowhere.yaml", "nowhere.yaml"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code not in (0, None)
    shown = capfd.readouterr().err
    if isinstance(stopped.value.code, str):
        shown += stopped.value.code
    assert message in shown
    assert len(shown.strip().splitlines()) == 1


def test_a_fault_of_the_code_keeps_its_traceback():
    def fail(_):
        with keeping_tracebacks():
            raise ValueError("during training")

    with pytest.raises(ValueError, match="during training"):
        run_command(fail)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra_is_named(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("tspo_trl.commands.serve", "tspo_trl.retrieval.server"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--corpus", "nowhere.jsonl"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'tspo-trl[server]'" in line


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["serve", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = f"""
import sys
from tspo_trl.commands.main import main
try:
    main({arguments})
finally:
    print("torch" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout
    assert shown.startswith("usage: tspo")
    assert shown.endswith("False\n")


def test_the_server_prints_its_address():
    command = [sys.executable, "-m", "tspo_trl", "serve", "--corpus", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if " is ready" in line)
            (url,) = re.findall(r" is ready at (http://127\.0\.0\.1:[1-9]\d+)$", line.strip())
            assert httpx2.get(f"{url}/health", timeout=30).status_code == 200
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("::1", "http://[::1]:1"), ("0.0.0.0", f"http://{socket.gethostname()}:1")],
)
def test_the_address_is_one_that_clients_reach(host, url):
    assert import_module("tspo_trl.commands.serve").address(host, 1) == url


def test_the_language_of_the_retriever_is_an_option(tmp_path):
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text('{"id": "a", "title": "", "text": "Die Katzen und der Hund"}\n', encoding="utf-8")
    for options, language in (([], "english"), (["--retriever_language", "german"], "german")):
        retriever = open_as_asked(parse_serve_arguments(["--corpus", str(corpus), *options]))
        assert retriever.language == language
