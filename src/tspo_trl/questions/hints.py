"""Error messages of `load_questions` in the words of a command: flags instead of arguments."""

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_ARGUMENT = re.compile(r"`(?P<name>\w+)(?:\[[^`\]]*\])?(?:=(?P<value>[^`]*)|\((?P<argument>'[^`]*')\))?`")


@contextmanager
def hints_in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """
    Rewrite the errors of `load_questions` for the users of a command, who type flags.

    Args:
        flags (`dict[str, str]`):
            The flag of each argument of `load_questions`. The one of `columns` may end in `=JSON`, if the command reads
            only JSON. `load_benchmark` stands for the flag that takes the name of a benchmark.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if len(error.args) == 1:
            error.args = (in_flags(str(error), flags),)
        raise


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """
    Replace arguments by flags in a message.

    Args:
        message (`str`):
            Names arguments in backticks, with or without a value.
        flags (`dict[str, str]`):
            See [`hints_in_flags`].

    Returns:
        `str`: The message with flags.
    """

    def replace(match: re.Match[str]) -> str:
        flag = flags.get(match["name"])
        if flag is None:
            return match[0]
        flag, as_json, _ = flag.partition("=JSON")
        value = match["value"] or match["argument"]
        if value is None:
            return f"`{flag}`"
        value = ast.literal_eval(value)
        if not isinstance(value, dict):
            words = [str(value)]
        elif as_json:
            words = [json.dumps(value, ensure_ascii=False)]
        else:
            words = [f"{ours}={theirs}" for ours, theirs in value.items()]
        return f"`{flag} {shlex.join(words)}`"

    return _ARGUMENT.sub(replace, message)
