"""Weights whose names in a saved model differ from those in memory."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_renamed(model: Any, folder: str | Path) -> bool:
    """
    Load weights that a checkpoint holds under other names. `transformers` saves some models (mixtures of experts,
    Nemotron-H) in the format in which they were published, but its trainer reads a checkpoint by the names in memory, and
    leaves out weights that it does not find.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model in memory, with other weights.
        folder (`str` or `Path`):
            The checkpoint.

    Returns:
        `bool`: Whether a name differed. If not, nothing is loaded.
    """
    saved = _saved_names(Path(folder))
    if not saved or not isinstance(model, PreTrainedModel):
        return False
    own = model.state_dict()
    read = {own[name].data_ptr() for name in saved & set(own)}  # tied weights are saved once
    if all(name in saved or tensor.data_ptr() in read for name, tensor in own.items()):
        return False
    loaded: Any = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True


def _saved_names(folder: Path) -> set[str]:
    """The names of the weights in a folder; none for an adapter."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if (file := folder / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    return set()
