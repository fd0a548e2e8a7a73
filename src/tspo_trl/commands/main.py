"""The command `tspo`, which calls one of its subcommands."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from .errors import run_command

COMMANDS = {
    "train": "Train a search agent; without arguments, the embedded demo.",
    "cold_start": "Teach a model to search by demonstrations, before it is trained.",
    "evaluate": "Evaluate models on questions with golden answers, and compare them.",
    "audit": "Check whether a retriever and its corpus support training on given questions.",
    "serve": "Serve a retriever over HTTP.",
    "inspect": "Write the rollouts of a run as one page, with rewards and advantages.",
    "wiki18": "Get the Wikipedia of 2018, with its published vectors, and serve it.",
    "memory": "Estimate the peak GPU memory of training.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Call a subcommand. Only its module is imported.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Name of the subcommand and its arguments. Defaults to the arguments of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="tspo",
        usage="tspo COMMAND ...",
        description="Train, evaluate and inspect search agents.",
        epilog="commands:\n"
        + "".join(f"  {name:<{width}}  {text}\n" for name, text in COMMANDS.items())
        + "\n`tspo COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    name = parser.parse_args(arguments[:1]).command.replace("-", "_")
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        parser.error(f"unknown command {name!r}: did you mean {nearest!r}? The commands are {', '.join(COMMANDS)}.")
    program, sys.argv[0] = sys.argv[0], f"tspo {name}"  # the subcommand's usage line shows it
    try:
        run_command(lambda rest: import_module(f"{__package__}.{name}").main(rest), arguments[1:])
    finally:
        sys.argv[0] = program
