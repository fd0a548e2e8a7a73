"""Tells paths from names on the Hub, so that a mistyped path is reported before any request."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any


def looks_local(name: str) -> bool:
    """
    Whether a name can only be a path. A name on the Hub is `name` or `owner/name`.

    Args:
        name (`str`):
            A path or a name on the Hub.

    Returns:
        `bool`: `True` for absolute paths, for paths that begin with `.` or `~` or end in `/`, and for paths of more than
        two parts. `runs/mine` is also a possible name on the Hub.
    """
    return (
        name.startswith((".", "~")) or name.endswith("/") or "\\" in name or len(name.split("/")) > 2 or name[:1] == "/"
    )


def suggest_path(name: str) -> str:
    """
    Suggest a path for one that does not exist.

    Args:
        name (`str`):
            The path.

    Returns:
        `str`: A question with the nearest name in the same folder, or `""` if there is none.
    """
    path = Path(name)
    parent = path.expanduser().parent
    near = get_close_matches(path.name, [p.name for p in parent.iterdir()] if parent.is_dir() else [], n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def check_place(name: Any, label: str) -> None:
    """
    Refuse the path of a folder that is not there. Names on the Hub are not checked.

    Args:
        name (`str` or `Any`):
            A folder or a name on the Hub. Other objects are not checked.
        label (`str`):
            What it is called in error messages.

    Raises:
        `FileNotFoundError`: If the path does not exist, or is a file.
    """
    if not isinstance(name, str):
        return
    if not name.strip():  # `Path("")` is the current folder
        raise FileNotFoundError(f"{label} must be a folder or a name on the Hub, got {name!r}.")
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"{label} must be a folder or a name on the Hub, but {name!r} is a file.")
    if not path.exists() and looks_local(name):
        raise FileNotFoundError(f"{label}: there is no folder {name!r}.{suggest_path(name)}")


def check_model_path(model: Any, label: str = "`model`") -> None:
    """
    Refuse the path of a model that is not there, or a folder without a model. Names on the Hub are not checked.

    Args:
        model (`str` or `Any`):
            A folder or a name on the Hub. Other objects are loaded models, which are not checked.
        label (`str`, *optional*, defaults to `` "`model`" ``):
            What the path is called in error messages.

    Raises:
        `FileNotFoundError`: If the path does not exist, or the folder has no `config.json` and no `adapter_config.json`.
    """
    if not isinstance(model, str):
        return
    check_place(model, label)
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = sorted(folder.parent.name for folder in path.glob("*/config.json"))
        hint = f" Its folders {inside[-3:]} have one." if inside else ""
        raise FileNotFoundError(f"{label}: the folder {model!r} has no model (no config.json).{hint}")
