"""The parser of `tspo train`: options of dataclasses, from flags and a YAML file."""

import argparse
import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import yaml
from trl import TrlParser

from .options import ALIASES, ShortErrors, add_spellings


class RecipeParser(ShortErrors, TrlParser):
    """[`~trl.TrlParser`] that also reads other spellings of options, and names the nearest option to an unknown one."""

    def __init__(self, kinds: Any):
        super().__init__(kinds)
        add_spellings(self)
        self._option_string_actions["--dataset_columns"].nargs = "+"  # `OURS=THEIRS ...`, as in other commands
        self._names = {action.dest for action in self._actions}

    def parse(self, arguments: Sequence[str], config: str | None) -> tuple[Any, ...]:
        """The options of a command line and of a YAML file, as dataclasses."""
        self.read_config(config)
        unknown = self.parse_known_args(arguments)[1]
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("--"):
                self.error(f"{unknown[0]!r} belongs to no option")
            self.error(f"unknown option {flag}{self._nearest(flag.removeprefix('--'), '--')}")
        parsed: tuple[Any, ...] = self.parse_args_into_dataclasses(list(arguments))
        return parsed

    def values(self, arguments: Sequence[str], config: str | None) -> argparse.Namespace:
        """The values of a command line and of a YAML file, before they are checked together."""
        self.read_config(config)
        return self.parse_known_args(arguments)[0]

    def read_config(self, config: str | None) -> None:
        """Use the values of a YAML file as defaults."""
        if config is None:
            return
        with open(config, encoding="utf-8") as file:
            values = yaml.safe_load(file)
        if not isinstance(values, dict):
            raise ValueError(f"{config} must contain a YAML mapping, for instance `max_searches: 2`.")
        names = {str(key).replace("-", "_"): key for key in values}
        values = {name: values[key] for name, key in names.items()}
        for alias, name in ALIASES.items():
            if alias in values and name in values:
                raise ValueError(f"{config}: `{alias}` and `{name}` are the same option. Give one of them.")
            if alias in values:
                values[name] = values.pop(alias)
        if unknown := [name for name in values if name not in {*self._names, "env"}]:
            raise ValueError(f"{config}: unknown option `{unknown[0]}`{self._nearest(unknown[0], '')}")
        self._set_environment(values.pop("env", {}))
        self.set_defaults_with_config(**values)

    def _nearest(self, name: str, prefix: str) -> str:
        """The question whether another option was meant, if one is similar."""
        nearest = get_close_matches(name.replace("-", "_"), [*self._names, *ALIASES], n=1)
        return f". Did you mean {prefix}{nearest[0]}?" if nearest else ""

    def _set_environment(self, variables: Any) -> None:
        """Set the environment variables of a YAML file."""
        if not isinstance(variables, dict):
            raise ValueError("`env` must be a mapping of environment variables.")
        os.environ.update({key: str(value) for key, value in variables.items()})


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of `--config`, and the other arguments."""
    parser = ShortErrors(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    options, others = parser.parse_known_args(arguments)
    return options.config, others
