"""The command `tspo` and its subcommands."""

import json
import re
import socket
import subprocess
import sys
from importlib import import_module

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from helpers.paths import ROOT
from tspo_trl.commands.errors import keeping_tracebacks, run_command
from tspo_trl.commands.main import COMMANDS, main
from tspo_trl.commands.options import check_model
from tspo_trl.commands.serve import open_as_asked
from tspo_trl.commands.serve import parse_arguments as parse_serve_arguments

RETRIEVER = ["--corpus", "--index", "--retriever_backend", "--retriever_language", "--retriever_encoder"]
OPTIONS = {
    "train": [*RETRIEVER, "--retriever_url", "--max_searches", "--output_dir"],
    "cold_start": [*RETRIEVER, "--retriever_url", "--max_searches", "--num_demonstrations", "--output_dir"],
    "evaluate": [*RETRIEVER, "--backend", "--retriever_url", "--max_searches", "--compare", "--output_dir"],
    "audit": [*RETRIEVER, "--backend", "--retriever_url", "--max_passages", "--output_dir"],
    "serve": [*RETRIEVER, "--backend", "--port", "--index_form", "--num_passages"],
    "inspect": ["--steps", "--terminal"],
    "memory": ["--model", "--strategy", "--gpus"],
    "wiki18": ["--subset", "--retriever_backend", "--index_form", "--retriever_encoder", "--num_passages"],
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
    ("command", "arguments", "name", "value"),
    [
        ("serve", "--corpus README.md --topk 5 --form exact", "num_passages", 5),
        ("serve", "--corpus README.md --save_index x --backend dense --encoder e --form small", "index_form", "small"),
        ("wiki18", "convert --backend bm25 --form exact", "index_form", "exact"),
        ("wiki18", "convert --backend bm25 --encoder e", "retriever_backend", "bm25"),
        ("wiki18", "serve --encoder e --topk 5", "retriever_encoder", "e"),
        ("audit", "--dataset demo --dataset_train_split heldout --top_k 9", "split", "heldout"),
        ("audit", "--dataset demo --dataset_train_split heldout --top_k 9", "top_k", 9),
        ("evaluate", "--model m --dataset nq --corpus README.md --dataset-train-split dev", "split", "dev"),
    ],
)
def test_other_spellings_of_an_option_are_read(monkeypatch, command, arguments, name, value):
    monkeypatch.chdir(ROOT)
    parse = import_module(f"tspo_trl.commands.{command}").parse_arguments
    assert getattr(parse(arguments.split()), name) == value


def test_training_reads_split_and_topk_from_flags_and_files(tmp_path):
    parse = import_module("tspo_trl.commands.train").parse_arguments
    (tmp_path / "run.yaml").write_text("split: dev\ntopk: 5\n")
    for given in (["--split", "dev", "--topk", "5"], ["--config", str(tmp_path / "run.yaml")]):
        script, args, _ = parse([*given, "--output_dir", str(tmp_path), "--use_cpu", "true"])
        assert (script.dataset_train_split, args.num_passages) == ("dev", 5)


@pytest.mark.parametrize("command", ["inspect", "memory"])
def test_unknown_options_are_named_in_one_line(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, *(["runs"] if command == "inspect" else []), "--bad", "1"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--bad" in line


@pytest.mark.parametrize(
    ("arguments", "flag", "meant"),
    [
        ("evaluate --modle a --dataset_name b", "--modle", "--model"),
        ("evaluate --model a --max-search=3", "--max-search", None),  # the beginning of a name
        ("evaluate --model a --max-serches 3", "--max-serches", "--max_searches"),
        ("audit --datset_name nq", "--datset_name", "--dataset_name"),
        ("serve --corpsu x", "--corpsu", "--corpus"),
        ("serve --top-q 3", "--top-q", "--topk"),
        ("inspect runs --stpes 3", "--stpes", "--steps"),
        ("wiki18 all --subste=3", "--subste", "--subset"),
        ("train --modle demo", "--modle", "--model"),
    ],
)
def test_a_misspelt_option_names_the_nearest(arguments, flag, meant, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    shown = capsys.readouterr().err
    assert (f"unknown option {flag}. Did you mean {meant}?" in shown) == (meant is not None)


def test_a_value_may_begin_with_dashes():
    parse = import_module("tspo_trl.commands.evaluate").parse_arguments
    args = parse(["--model", "m", "--dataset_name", "nq", "--prompt_template", "--- answer {question}"])
    assert args.prompt_template == "--- answer {question}"


def test_a_hub_that_cannot_be_reached_is_not_asked_twice(monkeypatch):
    asked = []

    def download(repo, name, **options):
        asked.append(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"not found on the Hub .*HF_HUB_OFFLINE is set"):
        check_model("who/none", "--model")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    asked.clear()
    with pytest.raises(ConnectionError, match=r"--model: 'who/none' is neither .* the Hub cannot be reached"):
        check_model("who/none", "--model")
    assert asked == ["config.json"]


def test_the_help_of_memory_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--help"])
    shown = capsys.readouterr().out
    assert "Number of rollouts for each question. (default: 8)" in " ".join(shown.split())
    assert "Args:" not in shown


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
        ("serve --corpus demo --topk 0", "--num_passages must be at least 1, got 0"),
        ("serve --corpus demo --index docs", "--index is a saved index, and --corpus demo makes one"),
        ("serve --corpus README.md --save_index x --index docs", "and --save_index makes one"),
        ("serve --corpus README.md --index_form small", "--index_form small is for --save_index with"),
        ("serve --corpus README.md --index_form small --save_index x", "is for --save_index with --retriever_backend"),
        ("serve --corpus README.md --save_index=", "--save_index must name a folder, got ''"),
        ("serve --index docs --backend dense --encoder ./no", "--retriever_encoder: there is no folder './no'"),
        ("serve --corpus demo --port 0 --host nowhere.invalid", "--host must be an address of this machine, got"),
        ("serve --corpus demo --port 0 --host 192.0.2.1", "--host must be an address of this machine, got '192.0.2.1'"),
        ("wiki18 all --port 99999", "--port must be from 0 to 65535, got 99999"),
        ("wiki18 all --encoder ./no", "--retriever_encoder: there is no folder './no'"),
        ("wiki18 all --folder=", "--folder must name a folder, got ''"),
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
