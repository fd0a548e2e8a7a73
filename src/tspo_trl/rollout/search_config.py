"""The search settings of a trained model, and their file `search_config.json` beside its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..support.files import replace_file
from .limits import SearchLimits
from .protocols import PROTOCOLS, ProtocolName

SEARCH_CONFIG_NAME = "search_config.json"
FORMAT_VERSION = 1  # of the file, of reading actions and of writing observations


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SearchLimits):
    """
    The settings of the search loop in training. They are immutable; [`SearchConfig.replace`] returns changed settings. In
    addition to the [`SearchLimits`], they are:

    Args:
        protocol (`str`, *optional*, defaults to `"tags"`):
            How the model writes its actions: `"tags"` or `"tool_call"`.
        prompt_template (`str`, *optional*, defaults to `"default"`):
            Template of the prompts, with `{question}` and optionally `{max_searches}` in it. `"default"` stands for the
            template of the protocol. `None` means that the prompts of the training data have no common template, so no
            prompt can be written from a question.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If a value has a wrong type or is too small; the message names it.
    """

    protocol: ProtocolName = "tags"
    prompt_template: str | None = "default"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"`protocol` must be one of {list(PROTOCOLS)}, got {self.protocol!r}.")
        super().__post_init__()
        self.check_room()
        if self.prompt_template == "default":
            object.__setattr__(self, "prompt_template", PROTOCOLS[self.protocol].default_prompt_template)
        template = self.prompt_template
        if template is not None and not (isinstance(template, str) and "{question}" in template):
            raise ValueError(f"`prompt_template` must be a text with '{{question}}' in it, got {template!r}.")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ValueError(f"`chat_template_kwargs` must be a dictionary, got {self.chat_template_kwargs!r}.")

    def replace(self, **changes: Any) -> "SearchConfig":
        """
        Return changed settings. A change of the protocol also changes the prompt template, unless one is given.

        Args:
            changes:
                New values by name.
        """
        if changes.get("protocol", self.protocol) != self.protocol:
            changes.setdefault("prompt_template", "default")
        return replace(self, **changes)

    def save(self, folder: str | Path) -> None:
        """
        Write `search_config.json`.

        Args:
            folder (`str` or `Path`):
                The folder of the model.
        """
        data = {"format_version": FORMAT_VERSION, "tspo_trl_version": __version__, **asdict(self)}
        replace_file(Path(folder) / SEARCH_CONFIG_NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SearchConfig":
        """
        Read `search_config.json`.

        Args:
            path (`str` or `Path`):
                The file, or its folder.

        Raises:
            `ValueError`: If the file is not a search configuration, or this version cannot read it; the message names the
                key.
        """
        file = Path(path)
        file = file / SEARCH_CONFIG_NAME if file.is_dir() else file
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{file} must hold a JSON object, found {type(data).__name__}.")
        written_by = f"It was written by tspo_trl {data.pop('tspo_trl_version', '(unknown)')}, this is {__version__}"
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file}: 'format_version' is {version!r}, this version reads {FORMAT_VERSION}. {written_by}: "
                "`pip install --upgrade tspo-trl`."
            )
        if unknown := sorted(data.keys() - {f.name for f in fields(cls)}):
            raise ValueError(
                f"{file} has keys that this version does not know: {unknown}. {written_by}: "
                "`pip install --upgrade tspo-trl`, or remove them if they were added by hand."
            )
        try:
            return cls(**data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
