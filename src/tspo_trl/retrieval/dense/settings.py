"""How an embedding model makes a vector of a text: known families, and the files of repositories."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from transformers.utils import cached_file

Pooling = Literal["mean", "first", "last"]
#: The module of static embeddings, and the number of their tokens after which a text is cut, as `model2vec` does
STATIC, MAX_STATIC = "StaticEmbedding", 512


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """
    How an embedding model makes a vector of a text.

    Args:
        pooling (`str`):
            The hidden states that become the vector: `"mean"` (of all tokens), `"first"` or `"last"` (token).
        query_prefix (`str`, *optional*, defaults to `""`):
            Text before a query.
        passage_prefix (`str`, *optional*, defaults to `""`):
            Text before a passage.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether vectors have length 1, so that inner products are cosines.
        max_length (`int`, *optional*, defaults to `512`):
            Number of tokens after which a text is cut, special tokens included.
        append_eos (`bool`, *optional*, defaults to `False`):
            Whether the end-of-sequence token is appended to a text that lacks it.
    """

    pooling: Pooling
    query_prefix: str = ""
    passage_prefix: str = ""
    normalize: bool = True
    max_length: int = 512
    append_eos: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"`pooling` must be one of {list(get_args(Pooling))}, got {self.pooling!r}.")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")


_WEB_TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
_BGE_TASK = "Represent this sentence for searching relevant passages: "
# The beginning of a model's name (without its owner) -> its settings, from the cards of these models. The first one counts
_KNOWN: tuple[tuple[str, EncoderSettings], ...] = (
    ("qwen3-embedding", EncoderSettings("last", query_prefix=_WEB_TASK, max_length=8192, append_eos=True)),
    ("multilingual-e5-large-instruct", EncoderSettings("mean", query_prefix=f"{_WEB_TASK} ")),
    ("multilingual-e5", EncoderSettings("mean", query_prefix="query: ", passage_prefix="passage: ")),
    ("e5-", EncoderSettings("mean", query_prefix="query: ", passage_prefix="passage: ")),
    ("bge-m3", EncoderSettings("first", max_length=8192)),
    ("bge-small-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("bge-base-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("bge-large-en", EncoderSettings("first", query_prefix=_BGE_TASK)),
    ("gte-qwen2", EncoderSettings("last", query_prefix=f"{_WEB_TASK} ", max_length=8192, append_eos=True)),
    ("gte-multilingual", EncoderSettings("first", max_length=8192)),
    ("gte-base-en-v1.5", EncoderSettings("first", max_length=8192)),
    ("gte-large-en-v1.5", EncoderSettings("first", max_length=8192)),
    ("gte-", EncoderSettings("mean")),
)


def find_settings(model: str | Path, **options: Any) -> EncoderSettings:
    """
    Find out how an embedding model is used: from a list of known families (E5, BGE, GTE, Qwen3-Embedding), else from the
    files of its repository that sentence-transformers reads.

    Args:
        model (`str` or `Path`):
            Name of a repository on the Hub, or a local folder.
        **options:
            Settings to use instead of those found, see [`EncoderSettings`].

    Returns:
        [`EncoderSettings`]: The settings.

    Raises:
        `ValueError`: If the model is not known, has no such files, and `pooling` is not given.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else str(model).rpartition("/")[2]
    for start, settings in _KNOWN:
        if name.lower().startswith(start):
            return replace(settings, **options)
    found = _read_repository(str(model))
    if found is not None:
        return replace(found, **options)
    if "pooling" in options:
        return EncoderSettings(**options)
    raise ValueError(
        f"How {str(model)!r} makes a vector of a text is not known: it is not of the families E5, BGE, GTE or "
        "Qwen3-Embedding, and has no file `modules.json` of sentence-transformers. Give `pooling` ('mean', 'first' or "
        "'last') and, if its card names them, `query_prefix` and `passage_prefix`."
    )


def _read_repository(model: str) -> EncoderSettings | None:
    """The settings in the files of sentence-transformers. `None` if there are none."""
    kinds = read_modules(model)
    about = read_json(model, "config_sentence_transformers.json") or {}
    prompts: Mapping[str, str] = about.get("prompts") or {}
    settings = EncoderSettings(
        "mean",
        query_prefix=prompts.get("query") or "",
        passage_prefix=prompts.get("document") or prompts.get("passage") or "",
        normalize="Normalize" in kinds or about.get("similarity_fn_name") == "cosine",
    )
    if STATIC in kinds and set(kinds) <= {STATIC, "Normalize"}:
        return replace(settings, max_length=MAX_STATIC)
    if not kinds and (config := read_json(model, "config.json") or {}).get("model_type") == "model2vec":
        return replace(settings, normalize=bool(config.get("normalize")), max_length=MAX_STATIC)
    if "Pooling" not in kinds and STATIC not in kinds:
        return None
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"The embedding model {model!r} has modules that are not supported: {sorted(unknown)}. Write an encoder of your "
            "own with sentence-transformers, see `Encoder`."
        )
    pooling = read_json(model, f"{kinds['Pooling']}/config.json") or {}
    # Older versions write one flag for each mode, newer ones the name of the mode
    flags = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    names = {"mean": "mean", "cls": "first", "lasttoken": "last"}
    given = [name for flag, name in flags.items() if pooling.get(f"pooling_mode_{flag}")]
    given = given or [names[mode] for mode in [pooling.get("pooling_mode")] if mode in names]
    if len(given) != 1:
        raise ValueError(f"The pooling of the embedding model {model!r} is not supported: {pooling}.")
    length = (read_json(model, "sentence_bert_config.json") or {}).get("max_seq_length") or 512
    return replace(settings, pooling=cast(Pooling, given[0]), max_length=int(length))


def read_modules(model: str) -> dict[str, str]:
    """The kinds of modules in a repository of sentence-transformers, with their folders in it. Empty for other repositories."""
    modules = read_json(model, "modules.json")
    if not isinstance(modules, list):
        return {}
    return {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}


def read_json(model: str, name: str) -> Any:
    """A file of a repository, from a local folder or the Hub. `None` if it is not available."""
    optional = ("gated_repo", "missing_entries", "connection_errors")
    try:
        path = cached_file(model, name, **{f"_raise_exceptions_for_{kind}": False for kind in optional})
    except OSError:  # not the name of a repository: loading the model says so
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
