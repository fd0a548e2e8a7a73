"""Write docs/configuration.md from the docstring of `TSPOConfig`. `make docs` runs it; a test says if it was forgotten."""

import ast
import re
from inspect import cleandoc
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE, PAGE = ROOT / "src" / "tspo_trl" / "training" / "config.py", ROOT / "docs" / "configuration.md"
HEADER = """\
# Configuration

Every option that `TSPOConfig` adds to TRL's `GRPOConfig`. All of `GRPOConfig` and of `TrainingArguments` applies too: loss
types, KL, LoRA, vLLM, checkpoints, `push_to_hub`. In Python, `TSPOConfig(max_searches=2)`; with `recipes/train.py`, the flag
`--max_searches 2` or the line `max_searches: 2` of a YAML file.

This page is written by `docs/write_configuration.py` from the docstring of `TSPOConfig`.
"""
OPTION = re.compile(r"^(\w+) \((.*)\):$")


def write_page(source: str) -> str:
    """
    The page as Markdown.

    Args:
        source (`str`):
            The code of config.py. It is parsed and not imported, so that the site needs no torch.
    """
    (config,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "TSPOConfig")
    _, _, parameters = cleandoc(ast.get_docstring(config) or "").partition("Parameters:\n")
    parameters, _, note = parameters.partition("\n> [!NOTE]\n")
    lines = [HEADER]
    for line in cleandoc(parameters).splitlines():
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


if __name__ == "__main__":
    PAGE.write_text(write_page(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
