"""Loading of saved models: full models, adapters with their base model, tokenizers, and `search_config.json`."""

import logging
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..rollout.search_config import SEARCH_CONFIG_NAME, SearchConfig
from ..support.devices import default_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """
    The location of a model.

    Args:
        name (`str`):
            A folder, or a name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*, defaults to `""`):
            Subfolder of the repository.
        token (`str` or `bool`, *optional*):
            Hub token, for private repositories.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `from_pretrained` for this location."""
        options = {"revision": self.revision, "subfolder": self.subfolder, "token": self.token}
        return {key: value for key, value in options.items() if value not in (None, "")}

    def find(self, file: str) -> str | None:
        """The path of a file of the model, downloaded if necessary; `None` if the model has no such file."""
        return cached_file(
            self.name,
            file,
            _raise_exceptions_for_missing_entries=False,
            # Offline, a file that is not in the cache is treated as one that does not exist
            _raise_exceptions_for_connection_errors=not is_offline_mode(),
            **self.options,
        )


def load_search_config(place: ModelPlace, changes: dict[str, Any]) -> SearchConfig:
    """
    Load the settings saved with a model, and change some of them.

    Args:
        place ([`ModelPlace`]):
            The location of the model. Without a `search_config.json`, the defaults of [`SearchConfig`] apply.
        changes (`dict[str, Any]`):
            New values of [`SearchConfig`] by name.

    Raises:
        `TypeError`: If a name is unknown; the message suggests the closest known name.
        `ValueError`: If the file cannot be read, or a value is wrong.
    """
    known = [f.name for f in fields(SearchConfig)]
    if unknown := [key for key in changes if key not in known]:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"Unknown settings {unknown}{hint}. The settings of a search loop are {known}.")
    path = place.find(SEARCH_CONFIG_NAME)
    if path is None:
        logger.warning("%s has no %s: the defaults of `SearchConfig` apply.", place.name, SEARCH_CONFIG_NAME)
    return (SearchConfig() if path is None else SearchConfig.load(path)).replace(**changes)


def load_model(
    place: ModelPlace,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load a full model, or an adapter with its base model, and the tokenizer.

    Args:
        place ([`ModelPlace`]):
            The location of the model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Defaults to the tokenizer saved with the model, or to that of the base model if an adapter
            has none.
        base_model (`str` or `Path`, *optional*):
            The base model of an adapter. Defaults to the base model named in its `adapter_config.json`.
        device (`str` or `torch.device`, *optional*):
            Device of the model. Defaults to the accelerator if there is one, else to the CPU.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`].

    Returns:
        `tuple`: The model and its tokenizer.

    Raises:
        `ValueError`: If the base model of an adapter cannot be found.
        `OSError`: If the model cannot be found.
    """
    # Find the adapter, the base model and the tokenizer
    kwargs = model_init_kwargs or {}
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    has_adapter = place.find("adapter_config.json") is not None
    adapter = PeftConfig.from_pretrained(place.name, **place.options) if has_adapter else None
    base = _find_base(place, adapter, base_model)
    if processing_class is None:
        source = base if adapter is not None and place.find("tokenizer_config.json") is None else place
        processing_class = AutoTokenizer.from_pretrained(source.name, **source.options, **trust)
    # Load the weights
    auto_class: Any = AutoModelForImageTextToText if _adapts_whole_model(place, adapter) else AutoModelForCausalLM
    model: Any = auto_class.from_pretrained(base.name, **base.options, **kwargs)
    if adapter is not None:
        if len(processing_class) > model.get_input_embeddings().weight.shape[0]:  # training added tokens
            model.resize_token_embeddings(len(processing_class))
        model = PeftModel.from_pretrained(model, place.name, **place.options)
    if (
        "device_map" not in kwargs and getattr(model, "hf_quantizer", None) is None
    ):  # a quantised model is on its device already
        model.to(device or default_device())
    return model, processing_class


def _adapts_whole_model(place: ModelPlace, adapter: PeftConfig | None) -> bool:
    """Whether an adapter was trained on a whole multimodal model, whose text part is named `language_model`."""
    file = place.find("adapter_model.safetensors") if adapter is not None else None
    if file is None:
        return False
    with safe_open(file, framework="pt") as weights:
        return any(".language_model." in name for name in weights.keys())  # noqa: SIM118


def _find_base(place: ModelPlace, adapter: PeftConfig | None, base_model: str | Path | None) -> ModelPlace:
    """The location of the base model of an adapter, which must exist; a full model is its own base model."""
    if adapter is None:
        if base_model is not None:
            raise ValueError(f"`base_model` is for adapters, but {place.name!r} has no adapter_config.json.")
        return place
    name = str(base_model or adapter.base_model_name_or_path or "")
    if not name:
        raise ValueError(f"The adapter_config.json of {place.name!r} names no base model: set `base_model`.")
    base = ModelPlace(name, revision=None if base_model else adapter.revision, token=place.token)
    try:
        problem = "" if base.find("config.json") else "It has no config.json."
    except OSError as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"The adapter {place.name!r} needs its base model {name!r}, which cannot be loaded. Set `base_model` to its "
            f"folder or its name on the Hub. {problem}"
        )
    return base
