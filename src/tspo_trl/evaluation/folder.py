"""The folder of an evaluation: its settings, and the rollouts of its finished batches."""

import json
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..support.files import replace_file, replacing

SETTINGS, TRAJECTORIES = "settings.json", "trajectories.jsonl"
REMEDY = "Remove that line: its batch is then repeated."
# The files in the folder of a model that can change an answer
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "search_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
)
_BLOCKS, _BLOCK_SIZE = 64, 1 << 16


def model_fingerprint(model: str | Path) -> str | None:
    """
    A hash of the files of a model, which differs between checkpoints. For speed, it reads only 64 evenly spaced blocks
    of 64 KiB of large files.

    Args:
        model (`str` or `Path`):
            A folder, or a name on the Hub.

    Returns:
        `str` or `None`: 16 hexadecimal digits; `None` if no file of the model is found.
    """
    folder = Path(model)
    if not folder.is_dir():  # a name on the Hub: use the folder of the downloaded snapshot
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = [cached_file(str(model), name, **quietly) for name in ("config.json", "adapter_config.json")]
        folders = {Path(path).parent for path in found if path is not None}
        if not folders:
            return None
        folder = min(folders)
    state = sha256()
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    for path in files:
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK_SIZE:
                state.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK_SIZE) // (_BLOCKS - 1))
                state.update(file.read(_BLOCK_SIZE))
    return state.hexdigest()[:16] if files else None


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Save the settings of an evaluation, or compare them with the settings already saved in the folder.

    Args:
        folder (`Path`):
            The folder of a data set.
        settings (`Mapping[str, Any]`):
            All settings on which the rollouts depend, JSON-serialisable.

    Raises:
        `ValueError`: If the settings differ; the message lists the differences.
    """
    path = folder / SETTINGS
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    if not path.is_file():
        if (folder / TRAJECTORIES).exists():
            raise ValueError(f"{folder} has {TRAJECTORIES} but no {SETTINGS}. Remove it, or choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
        return
    try:
        before = _flat(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove {folder}, or choose another folder.") from error
    now = _flat(json.loads(text))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds another evaluation: {'; '.join(changed)}. To resume that evaluation, use its settings. "
            "Otherwise remove the folder, or choose another one."
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the rollouts of an interrupted evaluation. An incomplete last line is skipped.

    Args:
        path (`Path`):
            The file, which need not exist.

    Yields:
        `tuple[str, dict]`: The position of the record in the file, for messages, and the record.

    Raises:
        `ValueError`: If a complete line is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error}). {REMEDY}") from error
            yield where, record


def keep_batches(path: Path, batches: Collection[int]) -> None:
    """
    Remove all lines of other batches from the file.

    Args:
        path (`Path`):
            The file, which need not exist.
        batches (`Collection[int]`):
            The numbers of the batches to keep.
    """
    if not path.exists():
        return
    with path.open("rb") as file, replacing(path) as copy:
        copy.writelines(line for line in file if line.endswith(b"\n") and json.loads(line)["batch"] in batches)
