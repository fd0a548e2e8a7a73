"""Write docs/configuration.md from the docstrings of `TSPOConfig` and `SearchLimits`. `make docs` runs it."""

import ast
import re
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE = ROOT / "src" / "tspo_trl", ROOT / "docs" / "configuration.md"
HEADER = """\
# Configuration

Every option that `TSPOConfig` adds to TRL's `GRPOConfig`. All of `GRPOConfig` and of `TrainingArguments` applies too: loss
types, KL, LoRA, vLLM, checkpoints, `push_to_hub`. In Python, `TSPOConfig(max_searches=2)`; with `recipes/train.py`, the flag
`--max_searches 2` or the line `max_searches: 2` of a YAML file.

This page is written by `docs/write_configuration.py` from the docstrings of `TSPOConfig` and `SearchLimits`.
"""
OPTION = re.compile(r"^(\w+) \((.*)\):$")
LIMITS = re.compile(
    r"^[\w, ]+:\n +The limits of the search loop.*\n", re.MULTILINE
)  # where those of `SearchLimits` belong


def write_page(config_source: str, limits_source: str) -> str:
    """
    The page as Markdown.

    Args:
        config_source (`str`):
            The code of training/config.py. It is parsed and not imported, so that the site needs no torch.
        limits_source (`str`):
            The code of rollout/limits.py.
    """
    _, _, parameters = _docstring(config_source, "TSPOConfig").partition("Parameters:\n")
    parameters, _, note = parameters.partition("\n> [!NOTE]\n")
    _, _, limits = _docstring(limits_source, "SearchLimits").partition("Args:\n")
    limits, _, _ = limits.partition("\nRaises:")
    parameters, count = LIMITS.subn(lambda _: dedent(limits), dedent(parameters))
    assert count == 1, "the docstring of `TSPOConfig` does not say where the limits belong"
    lines = [HEADER]
    for line in parameters.splitlines():
        if line.startswith("> Parameters that control "):
            lines += ["## " + line.removeprefix("> Parameters that control ").capitalize(), ""]
        elif option := OPTION.match(line):
            lines += [
                "",
                f"### `{option[1]}`",
                "",
                option[2].replace("*optional*, ", "").replace("*optional*", "optional"),
                "",
            ]
        else:
            lines.append(line.removeprefix("    "))
    defaults = [line.removeprefix("> ") for line in note.strip().splitlines()]
    lines += ["", "## Other defaults", "", defaults[0], "", *defaults[1:]]
    text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"`\1`", "\n".join(lines))  # the links of TRL's documentation
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _docstring(source: str, name: str) -> str:
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    return cleandoc(ast.get_docstring(found) or "")


def write_current_page() -> str:
    """The page of the code as it is."""
    sources = (PACKAGE / "training" / "config.py", PACKAGE / "rollout" / "limits.py")
    return write_page(*(source.read_text(encoding="utf-8") for source in sources))


if __name__ == "__main__":
    PAGE.write_text(write_current_page(), encoding="utf-8")
