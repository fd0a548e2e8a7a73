"""For the API page: docstrings in TRL's style are rewritten in the Google style, which mkdocstrings reads."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?=(?:Args|Attributes|Parameters|Raises|Returns|Yields):$)", re.MULTILINE)
PARAMETER = re.compile(r"^( +\w+) \((.+)\):", re.MULTILINE)
OPTIONAL = re.compile(r",? *\*optional\*(, defaults to .*)?$")  # the signature shows it
RESULT = re.compile(r"^(    (?:\[?`[^`\n]+`\]?(?: or )?)+):", re.MULTILINE)
LINK = re.compile(r"\[`(~?)([\w.]+)`\]")


def as_google(text: str, public: set[str]) -> str:
    """
    A docstring in the Google style.

    Args:
        text (`str`):
            The docstring in TRL's style: types in backticks, names to link to as [`Name`].
        public (`set[str]`):
            The names on the page, to which links lead. Other names are shown as code.
    """

    def plain(types: str) -> str:
        types = re.sub(r"(?<=`|\]), (?=\[?`)", " | ", types)
        types = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", types)
        return types.replace("`", "").replace(" or ", " | ")

    def link(match: re.Match[str]) -> str:
        name = match[2]
        if name.split(".")[0] in public:
            return f"[`{name}`][tspo_trl.{name}]"
        return f"`{name.rpartition('.')[2] if match[1] else name}`"

    description, *sections = SECTION.split(text)
    for i, section in enumerate(sections):
        if section.startswith(("Raises", "Returns", "Yields")):
            sections[i] = RESULT.sub(lambda match: f"{plain(match[1])}:", section)
        else:
            sections[i] = PARAMETER.sub(lambda match: f"{match[1]} ({plain(OPTIONAL.sub('', match[2]))}):", section)
    return LINK.sub(link, "".join([description, *sections]))


class TRLDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when the whole package is loaded."""
        self._rewrite(pkg, {name for name, member in pkg.members.items() if member.is_alias})

    def _rewrite(self, thing: griffe.Object, public: set[str]) -> None:
        if thing.docstring:
            text = thing.docstring.value
            if thing.path.endswith(".TSPOConfig"):  # its options have a page of their own
                text = text.partition("\nParameters:")[0] + "\n\nSee [configuration](configuration.md) for all options."
            thing.docstring.value = as_google(text, public)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member, public)
