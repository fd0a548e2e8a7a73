"""How a command reports a mistake of its user: in one line, without a traceback."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from ..retrieval import RetrievalError

#: What the checks of inputs raise, here and in the libraries: of values, files, addresses, memory and missing extras.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, yaml.YAMLError, RetrievalError)


def run_command(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> None:
    """
    Run a command. A mistake of the user ends the program with exit code 2 and one line on stderr.

    Args:
        main (`Callable[[Sequence[str] | None], None]`):
            The function of the command.
        arguments (`Sequence[str]`, *optional*):
            The arguments. Defaults to those of the process.
    """
    try:
        main(arguments)
    except USER_ERRORS as error:
        if getattr(error, "keeps_traceback", False):
            raise
        program = Path(sys.argv[0]).name
        print(f"{program}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def keeping_tracebacks() -> Iterator[None]:
    """
    Keep the traceback of errors inside the context: once the inputs are checked, an error is not a mistake of the user.
    Only a retriever that fails is still reported in one line, which names the checkpoint to resume from.
    """
    try:
        yield
    except USER_ERRORS as error:
        error.keeps_traceback = not isinstance(error, RetrievalError)  # type: ignore[union-attr]
        raise
