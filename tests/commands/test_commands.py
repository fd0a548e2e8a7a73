"""The command `tspo` and its subcommands."""

import pytest

from tspo_trl.commands.main import COMMANDS, main

OPTIONS = {
    "train": ["--corpus", "--index", "--retriever_url", "--retriever_backend", "--max_searches"],
    "evaluate": ["--corpus", "--index", "--retriever_url", "--retriever_backend", "--max_searches", "--compare"],
    "audit": ["--corpus", "--index", "--retriever_url", "--retriever_backend", "--backend", "--top_k"],
    "serve": ["--corpus", "--index", "--retriever_backend", "--backend", "--port"],
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
