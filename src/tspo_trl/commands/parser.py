"""The parser of `tspo train`: options of dataclasses, from flags and a YAML file."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from trl import TrlParser

from ..training.values import check_ranges, check_type
from .options import ALIASES, ShortErrors, add_spellings, nearest_option


class RecipeParser(ShortErrors, TrlParser):
    """[`~trl.TrlParser`] that also reads other spellings of options, and names the nearest option to an unknown one."""

    def __init__(self, kinds: Any):
        super().__init__(kinds)
        add_spellings(self)
        self._option_string_actions["--dataset_columns"].nargs = "+"  # `OURS=THEIRS ...`, as in other commands
        self._names = {action.dest for action in self._actions}
        self._types = {name: kind for one in kinds for name, kind in get_type_hints(one).items()}

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
        for options in parsed:
            check_ranges(options)
        _check_not_empty(parsed)
        return parsed

    def values(self, arguments: Sequence[str], config: str | None) -> argparse.Namespace:
        """The values of a command line and of a YAML file, before they are checked together."""
        self.read_config(config)
        return self.parse_known_args(arguments)[0]

    def read_config(self, config: str | None) -> None:
        """Use the values of a YAML file as defaults."""
        if config is None:
            return
        text = _read_text(config)
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError(f"{config} must contain a YAML mapping, for instance `max_searches: 2`.")
        seen: dict[str, str] = {}  # name of an option -> its spelling in the file
        node: Any = yaml.compose(text)
        for key in (str(key.value) for key, _ in node.value):  # `safe_load` keeps the last of two
            name = _name_of(key)
            if seen.get(name) == key:
                raise ValueError(f"{config}: `{key}` is given twice.")
            if name in seen:
                raise ValueError(f"{config}: `{seen[name]}` and `{key}` are the same option. Give one of them.")
            seen[name] = key
        values = {_name_of(str(key)): value for key, value in values.items()}
        if unknown := [name for name in values if name not in {*self._names, "env"}]:
            raise ValueError(f"{config}: unknown option `{unknown[0]}`{self._nearest(unknown[0], '')}")
        for name, value in values.items():
            if name != "env" and not isinstance(value, str):  # the parser converts strings as those of a command line
                try:
                    check_type(name, value, self._types.get(name, Any))
                except ValueError as error:
                    is_word = isinstance(value, bool) and "one of" in str(error)  # `eval_strategy: no`
                    hint = " Put it in quotes: YAML reads yes, no, on and off as booleans." if is_word else ""
                    raise ValueError(f"{config}: {error}{hint}") from error
        self._set_environment(values.pop("env", {}))
        self.set_defaults_with_config(**values)

    def _nearest(self, name: str, prefix: str) -> str:
        """The question whether another option was meant, if one is similar."""
        return nearest_option(name, [*self._names, *ALIASES], prefix)

    def _set_environment(self, variables: Any) -> None:
        """Set the environment variables of a YAML file."""
        if not isinstance(variables, dict):
            raise ValueError("`env` must be a mapping of environment variables.")
        os.environ.update({key: str(value) for key, value in variables.items()})


def _name_of(key: str) -> str:
    """The name of an option that a file spells in its own way."""
    name = key.replace("-", "_")
    return ALIASES.get(name, name)


def _read_text(config: str) -> str:
    """The text of the file of `--config`."""
    try:
        return Path(config).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--config: {config!r} must be a YAML file in UTF-8, but it is no such text: {error}"
        ) from error
    except IsADirectoryError as error:
        raise ValueError(f"--config: {config!r} must be a YAML file, but it is a folder.") from error
    except OSError as error:
        raise type(error)(f"--config: {config!r} cannot be read: {error.strerror}.") from error


def _check_not_empty(parsed: Sequence[Any]) -> None:
    """Refuse an empty name of data, a model or a folder, which would mean the current folder."""
    names = {*vars(parsed[0]), "model_name_or_path", "output_dir", "resume_from_checkpoint"}
    for name, value in ((name, value) for options in parsed for name, value in vars(options).items()):
        if name in names and (value == "" or (isinstance(value, list) and "" in value)):
            raise ValueError(f"`{name}` must not be empty, got {value!r}.")


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of `--config`, and the other arguments."""
    parser = ShortErrors(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    options, others = parser.parse_known_args(arguments)
    return options.config, others
