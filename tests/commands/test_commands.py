"""The command `tspo` and its subcommands."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

from tspo_trl.commands.main import COMMANDS, main

RETRIEVER = ["--corpus", "--index", "--retriever_backend"]
OPTIONS = {
    "train": [*RETRIEVER, "--retriever_url", "--max_searches", "--output_dir"],
    "evaluate": [*RETRIEVER, "--backend", "--retriever_url", "--max_searches", "--compare", "--output_dir"],
    "audit": [*RETRIEVER, "--backend", "--retriever_url", "--top_k", "--output_dir"],
    "serve": [*RETRIEVER, "--backend", "--port"],
    "inspect": ["--steps", "--terminal"],
    "memory": ["--model", "--strategy", "--gpus"],
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
    options = ["--dataset", "x", "--corpus", "x", *(["--model", "m"] if command == "evaluate" else [])]
    expected = {"question": "query", "golden_answers": "answers.text"}
    assert parse(options).columns is None
    assert parse([*options, "--columns", "question=query", "golden_answers=answers.text"]).columns == expected
    assert parse([*options, "--columns", json.dumps(expected)]).columns == expected
    for wrong in ("question", "=query", "{query}"):
        with pytest.raises(SystemExit):
            parse([*options, "--columns", wrong])
        assert f"got {wrong!r}" in capsys.readouterr().err


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
