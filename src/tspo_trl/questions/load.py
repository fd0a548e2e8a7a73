"""Questions from files, folders, the Hub and memory."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from glob import escape
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    NamedSplit,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json
from huggingface_hub.errors import RepositoryNotFoundError

from .files import FORMATS, explain_file, file_format, root_cause, row_of_file
from .json_files import JsonFiles, code_hash, read_files
from .mix import draw, mix
from .rows import READ_COLUMNS, AnyDataset, check_mapping, to_questions
from .table_files import TableFiles

Source: TypeAlias = str | Path | Dataset | IterableDataset | dict[str, Any]
Opened: TypeAlias = tuple[AnyDataset, Callable[[int], str], Features | None, bool]


def load_questions(
    source: Source | Sequence[Source],
    *,
    name: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    max_questions: int | None = None,
    seed: int = 0,
) -> AnyDataset:
    """
    Load questions and their golden answers: the data of Search-R1, FlashRAG, verl, MuSiQue and PopQA as they are
    published, JSONL, JSON, CSV, TSV and parquet files, and any other data set with a column mapping.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of splits, or a list of these):
            A file, a folder (of files named after their splits, of `save_to_disk`, or a copy of a data set on the Hub),
            the name of a data set on the Hub, or a loaded data set. Several are mixed: they are concatenated or, if one
            is a stream, interleaved until all are exhausted.
        name (`str`, *optional*):
            Configuration of a data set on the Hub, or the subfolder of a folder of files.
        split (`str`, *optional*):
            Name of the split. A file is the split `"train"`. Required if there are several splits.
        columns (`dict[str, str]`, *optional*):
            Columns of the source for `id`, `question`, `golden_answers` and `data_source`, if they have other names, for
            instance `{"question": "query", "golden_answers": "answers.text"}`. A dot selects a field of a struct, or
            of a list of structs. `{"prompt": "prompt"}` keeps prompts that are already written.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an [`~datasets.IterableDataset`], whose rows are read and checked when they are needed.
        max_questions (`int`, *optional*):
            Number of questions to draw, stratified by `data_source`; they keep their order. Of a stream, the first ones
            are taken. Defaults to all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Questions, golden answers and ids are text, even if they look like numbers, booleans or dates. Numbers, booleans and
    dates become text.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The columns `id` (a string; by default
        the number of the row), `question`, `golden_answers` (a list of strings, blank ones left out) and `data_source` (by
        default the name of the configuration, data set or file), and the other columns of the source. A `prompt` is
        dropped: the protocol writes its own.

    Raises:
        `FileNotFoundError`: If there is no such file or data set.
        `TypeError`: If `source` or an option has another type.
        `ValueError`: If it is empty or cannot be read, or a split, a column or a value is not as described. The message
            names the file, the line (from 1, in JSONL) or the row (from 0), the column, the value found and the value
            expected.

    Example:

    ```python
    >>> train = load_questions("PeterJinGo/nq_hotpotqa_train", split="train")
    >>> dev = load_questions("rajpurkar/squad", split="validation", columns={"golden_answers": "answers.text"})
    >>> mine = load_questions(["questions.jsonl", "more.csv"], max_questions=500)
    ```
    """
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    if not sources:
        raise ValueError("`source` is an empty list.")
    split = str(split) if isinstance(split, NamedSplit) else split
    for option, value in (("name", name), ("split", split)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"`{option}` must be a string, got {value!r}.")
    for option, number in (("max_questions", 1 if max_questions is None else max_questions), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"`{option}` must be an integer, got {number!r}.")
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"`max_questions` must be at least 1, got {max_questions}.")
    check_mapping({} if columns is None else columns)
    labels = ["`source`"] if len(sources) == 1 else [f"`source[{i}]`" for i in range(len(sources))]
    data_sources = [source_name(one, name) for one in sources]
    repeated = {value for value, count in Counter(data_sources).items() if count > 1}
    parts = []
    for i, (one, label, data_source) in enumerate(zip(sources, labels, data_sources, strict=True)):
        if data_source in repeated:
            data_source = str(one) if isinstance(one, (str, Path)) else f"{data_source}[{i}]"
        dataset, where, features, cells = _open(one, label, name, split, columns or {}, streaming)
        try:
            parts.append(to_questions(dataset, where, columns or {}, data_source, features, cells=cells))
        except pa.ArrowInvalid as error:  # a stream is read late
            raise ValueError(explain_file(where(-1), "parquet", error)) from error
        except UnicodeDecodeError as error:  # Arrow reads any bytes as text, and decodes them late
            raise ValueError(f"{where(-1)}: not UTF-8 text ({error.reason}).") from error
    dataset = parts[0] if len(parts) == 1 else mix(parts)
    return dataset if max_questions is None else draw(dataset, max_questions, seed)


def question_splits(source: Source, name: str | None = None) -> list[str]:
    """
    The names of the splits that [`load_questions`] finds in a source.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of splits):
            See [`load_questions`].
        name (`str`, *optional*):
            Configuration of a data set on the Hub, or the subfolder of a folder of files.

    Returns:
        `list[str]`: The names; `["train"]` for a single file.
    """
    if isinstance(source, dict):
        return list(source)
    if isinstance(source, (Dataset, IterableDataset)):
        return [str(source.split or "train")]
    if file_format(source):
        return ["train"]
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        return list(json.loads((folder / "dataset_dict.json").read_text())["splits"])
    return list(_files_of_folder(folder, name)) or get_dataset_split_names(str(source), name)


def source_name(source: Source, name: str | None = None) -> str:
    """
    The name of a source. Rows without a `data_source` get it.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of splits):
            See [`load_questions`].
        name (`str`, *optional*):
            Configuration of a data set on the Hub, or the subfolder of a folder of files.

    Returns:
        `str`: The configuration, or the last part of a name or path; of a file that is named after its split, the folder.
    """
    if isinstance(source, dict):
        source = next(iter(source.values()), "")
    if isinstance(source, (Dataset, IterableDataset)):
        return source.info.dataset_name or "questions"
    path = Path(str(source))
    stem = path.name.split(".")[0] if file_format(source) else path.name
    if stem in ("train", "dev", "validation", "test") and path.parent.name:
        stem = path.parent.name
    return name or stem


def _open(
    source: Source, label: str, name: str | None, split: str | None, columns: Mapping[str, str], streaming: bool
) -> Opened:
    """
    The unchanged data set, a function that names a row in error messages, types that the data set lacks, and whether it
    is a table, in whose cells lists are written as JSON.
    """
    dataset: Any
    if isinstance(source, (Dataset, IterableDataset)) or _is_splits(source):
        dataset, where = source, partial(_row, label)
    elif not isinstance(source, (str, Path)):
        raise TypeError(
            f"{label} must be a file, a folder, the name of a data set on the Hub, a `Dataset` or an `IterableDataset`, "
            f"got `{type(source).__name__}`. Convert rows in memory with `Dataset.from_list(rows)`."
        )
    elif not str(source).strip():
        raise ValueError(f"{label} is an empty text: give a file, a folder or the name of a data set on the Hub.")
    elif file_format(source):
        return _open_file(label, str(source), split, columns, streaming)
    elif Path(source).is_file():
        raise ValueError(f"{source}: a file of questions ends in {', '.join(FORMATS)}, optionally with .gz.")
    elif Path(source).is_dir():
        folder = Path(source)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset, where = load_from_disk(folder), partial(_row, str(source))
        elif files := _files_of_folder(folder, name):
            part, bracket, rows = (split or "").partition("[")
            part = _check_split(str(folder / (name or "")), part or None, list(files))
            return _open_file(label, str(files[part]), f"train{bracket}{rows}", columns, streaming)
        else:
            return _open_hub(str(source), name, split, columns, streaming)
    else:
        return _open_hub(str(source), name, split, columns, streaming)
    if isinstance(dataset, dict):
        dataset = dataset[_check_split(where(-1), split, list(dataset))]
    elif isinstance(source, (Dataset, IterableDataset)) and split not in (None, *question_splits(source)):
        raise ValueError(f"{label} is a single split, {question_splits(source)[0]!r}, but `split` is {split!r}.")
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset.with_format(None), where, None, False


def _open_file(label: str, file: str, split: str | None, columns: Mapping[str, str], streaming: bool) -> Opened:
    kind = file_format(file)
    assert kind is not None
    if "://" not in file:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{label}: there is no file {file!r}.")
        if Path(file).stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty.")
    if split is not None and not re.match(r"train(\[|$)", split):
        raise ValueError(f"{file}: a file is the split 'train', but `split` is {split!r}.")
    data_files = file if "://" in file else escape(file)  # the name of a file is not a pattern
    # The rows of a slice are not counted as in the file
    where = partial(_row, f"{file} ({split})") if split and "[" in split else partial(row_of_file, file)
    try:
        if kind == "parquet":
            dataset = load_dataset(kind, data_files=data_files, split=split or "train", streaming=streaming)
            return dataset, where, None, False
        options = {"data_files": data_files, "labels": {"train": [file]}, "columns": columns, "hash": code_hash()}
        if kind == "json":
            builder = JsonFiles(**options, dataset_name=kind)
        else:
            is_tsv = file.removesuffix(".gz").lower().endswith(".tsv")
            builder = TableFiles(**options, dataset_name=kind, separator="\t" if is_tsv else ",")
        dataset, features = read_files(builder, split or "train", streaming)
    except ImportError as error:  # `datasets` installs no client for URLs
        raise ImportError(f"{file}: {error}. Run `pip install requests aiohttp`, or download the file.") from error
    except (DatasetGenerationError, ValueError, EOFError, StopIteration) as error:
        raise ValueError(explain_file(file, kind, error)) from error
    return dataset, where, features, kind == "csv"


def _csv_options(columns: Mapping[str, str]) -> dict[str, Any]:
    """Options with which answers are not converted: "1952" is not a number, and "NA" is not a missing value."""
    text = {path.split(".")[0] for path in (*READ_COLUMNS, *columns.values())} | set(columns.values())
    return {"keep_default_na": False, "converters": dict.fromkeys(sorted(text), str)}


def _open_hub(source: str, name: str | None, split: str | None, columns: Mapping[str, str], streaming: bool) -> Opened:
    from .catalogue import BENCHMARKS

    label = f"{source} ({name})" if name else source
    where = partial(_row, label)
    features = None
    cells = False
    try:
        builder = load_dataset_builder(source, name)
        files = builder.config.data_files
        if split is None and files is not None and len(files) > 1:
            _check_split(label, split, list(files))  # before anything is downloaded
        options: dict[str, Any] = {
            "dataset_name": builder.dataset_name,
            "config_name": builder.config.name,
            "base_path": builder.base_path,
            "repo_id": builder.repo_id,
            "hash": code_hash(builder.hash, dict(columns)),
        }
        if isinstance(builder, Json) and builder.config.field is None:
            # With the name of the configuration as id, `datasets` finds the cached tables again without a connection
            builder = JsonFiles(data_files=files, columns=columns, config_id=builder.config.name, **options)
            dataset, features = read_files(builder, split, streaming)
        elif isinstance(builder, Csv) and _is_plain(builder.config):
            cells = True
            builder = TableFiles(
                data_files=files,
                columns=columns,
                separator=builder.config.sep,
                config_id=builder.config.name,
                **options,
            )
            dataset, features = read_files(builder, split, streaming)
        else:
            if cells := isinstance(builder, Csv):
                builder = type(builder)(**options)
                vars(builder.config).update(_csv_options(columns))
            if not streaming:
                builder.download_and_prepare()
            dataset = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
    except (DatasetNotFoundError, RepositoryNotFoundError, ConnectionError) as error:
        near = get_close_matches(source.lower(), BENCHMARKS, n=1)
        hint = f" The benchmark is `load_benchmark({near[0]!r})`." if near else ""
        raise FileNotFoundError(
            f"{source!r} is neither a file nor a folder here, and was not found on the Hub: {error}{hint}"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{label} cannot be read: {root_cause(error)}") from error
    except ValueError as error:  # an unknown configuration or split: the message lists the known ones
        raise ValueError(f"{label}: {error}") from error
    if isinstance(dataset, dict):
        dataset = dataset[_check_split(label, split, list(dataset))]
    return dataset.with_format(None), where, features, cells


def _is_plain(config: CsvConfig) -> bool:
    """Whether a table has the names of its columns on the first line, and no other options than its separator."""
    plain = CsvConfig(sep=config.sep)
    return config.features is None and config.pd_read_csv_kwargs == plain.pd_read_csv_kwargs


def _is_splits(source: object) -> bool:
    """Whether a source is a dictionary of splits, and not a row."""
    return isinstance(source, dict) and all(isinstance(split, (Dataset, IterableDataset)) for split in source.values())


def _check_split(label: str, split: str | None, splits: list[str]) -> str:
    """The split, or the only one; an error if there is no such split."""
    if not splits:
        raise ValueError(f"{label} has no splits.")
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise ValueError(f"{label} has several splits: say which one with `split`, one of {splits}.")
    if split not in splits:
        raise ValueError(f"{label} has no split {split!r}, only {splits}.")
    return split


def _files_of_folder(folder: Path, name: str | None) -> dict[str, Path]:
    """The files named after their splits, as in copies of FlashRAG's and Search-R1's repositories."""
    files = sorted((folder / (name or "")).glob("*.*")) if folder.is_dir() else []
    named = {path.name.split(".")[0]: path for path in files if file_format(path)}
    return {split: path for split, path in named.items() if split.isidentifier()}  # no train-00000-of-00002


def _row(label: str, index: int) -> str:
    return label if index < 0 else f"{label}, row {index} (from 0)"
