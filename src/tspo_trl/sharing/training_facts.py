"""The facts of a run for its model card: its data, its results, and the options that affect the model."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..rollout.limits import SearchLimits
from ..rollout.search_config import SearchConfig

# Options that do not affect the model or should not be published: paths, speed, logging
_NOT_SHOWN = re.compile(
    r"(hub|save|log|logging|eval|dataloader|ddp|fsdp|trackio|include|vllm_server|retrieval)_.*"
    r"|(.*_)?(token|dir|path|url|host|port|secret|password)(_.*)?"
    r"|output_dir|run_name|project|report_to|disable_tqdm|push_to_hub|use_cpu|debug|do_(train|eval|predict)|local_rank"
    r"|accelerator_config|parallelism_config|fsdp|deepspeed|resume_from_checkpoint|skip_memory_metrics|prediction_loss_only"
    r"|per_device_eval_batch_size|batch_eval_metrics|load_best_model_at_end|metric_for_best_model|greater_is_better"
    r"|enable_jit_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint|num_completions_to_print"
    r"|remove_unused_columns|label_names|vllm_group_port|pad_to_multiple_of|generation_batch_size"
)
_ADDRESS = re.compile(r"\w+://\S+|(?<![\w.])(?:~|\.{1,2})?/\S*/")  # the address of a server, or the folders of a path

# The reported metrics: (type, name, the possible keys in the log)
METRICS = (
    ("exact_match", "Exact match", ("em", "rewards/exact_match_reward/mean")),
    ("f1", "Token F1", ("f1", "rewards/f1_reward/mean")),
    ("reward", "Reward", ("reward",)),
    ("hit_rate", "Golden answer retrieved (hit)", ("hit", "search/hit")),
    ("near_miss_rate", "Golden answer retrieved, but wrong answer (near miss)", ("near_miss", "search/near_miss")),
    ("searches", "Searches per question", ("search/calls",)),
    ("invalid_turns", "Invalid turns", ("search/invalid",)),
    ("truncated", "Truncated rollouts", ("turns/truncated",)),
)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """
    The facts of a run that its model card states.

    Args:
        model (`str`):
            The name of the model on the Hub, or the name of its folder.
        base_model (`str`, *optional*):
            The name or path of the initial model.
        adapter ([`~peft.PeftConfig`], *optional*):
            The configuration of the adapter, if one was trained.
        args ([`TSPOConfig`]):
            The configuration of the run.
        search_config ([`SearchConfig`]):
            The settings of the search loop.
        retriever ([`Retriever`]):
            The retriever, without caches and logs around it.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training questions.
        eval_dataset (the same, or a `dict` of them, *optional*):
            The evaluation questions.
        dataset_names (`Sequence[str]`):
            The names of the training data given by the caller, possibly none.
        log_history (`Sequence[Mapping[str, Any]]`):
            The log entries, in order.
        step (`int`):
            The training step of the weights.
        processes (`str`):
            The number of processes, in words.
    """

    model: str
    base_model: str | None
    adapter: Any
    args: Any
    search_config: SearchConfig
    retriever: Any
    train_dataset: Any
    eval_dataset: Any
    dataset_names: Sequence[str]
    log_history: Sequence[Mapping[str, Any]]
    step: int
    processes: str


def hub_id(name: str | None) -> str | None:
    """
    The name, if it is a valid name of a repository on the Hub and not a local file or folder; else `None`. The Hub rejects
    cards with other names.

    Args:
        name (`str`, *optional*):
            The name or path of a model or data set.
    """
    if name is None or Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet") or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def hub_datasets(dataset: Any) -> list[str]:
    """
    The names on the Hub of the data sets from which this one was loaded, read from the paths of its cache files.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.

    Returns:
        `list[str]`: The names; several for mixed data, none if the data set is streamed or not from the Hub.
    """
    if not isinstance(dataset, Dataset):
        return []
    parts = [part for file in dataset.cache_files for part in Path(file["filename"]).parts if "___" in part]
    return list(dict.fromkeys(part.replace("___", "/", 1) for part in parts))


@dataclass(frozen=True)
class Evaluation:
    """The results on one data set, the step at which they were measured, and the metrics before training."""

    name: str
    step: int
    results: list[EvalResult]
    before: dict[str, float]


def evaluations(facts: TrainingFacts) -> list[Evaluation]:
    """
    The last results of every evaluation set, not later than the step of the weights.

    Args:
        facts ([`TrainingFacts`]):
            The run.
    """
    sets = facts.eval_dataset if isinstance(facts.eval_dataset, Mapping) else {"": facts.eval_dataset}
    found = []
    for name, dataset in sets.items():
        prefix = f"eval_{name}_" if name else "eval_"
        # The log entries with metrics of this set
        entries = [e for e in facts.log_history if any(k.startswith(prefix) for k in e) and e["step"] <= facts.step]
        measured = [(e["step"], read_metrics(e, prefix)) for e in entries]
        measured = [(step, values) for step, values in measured if values]
        if not measured:
            continue
        (first_step, first), (step, values) = measured[0], measured[-1]
        # The last of them, in the Hub's format
        source = next(iter(hub_datasets(dataset)), None)
        shown = name or source or "Held-out questions"
        results = [
            EvalResult(
                task_type="question-answering",
                task_name="Question answering with search",
                dataset_type=source or _slug(shown),
                dataset_name=shown,
                dataset_config=name if source and name else None,
                metric_type=kind,
                metric_name=label,
                metric_value=values[kind],
            )
            for kind, label, _ in METRICS
            if kind in values
        ]
        found.append(Evaluation(shown, step, results, first if first_step == 0 and step > 0 else {}))
    return found


def read_metrics(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """
    Read the reported metrics from a log entry.

    Args:
        entry (`Mapping[str, Any]`):
            The log entry.
        prefix (`str`):
            The prefix of the keys: `""` in training, else `"eval_"` or `"eval_<name>_"`.

    Returns:
        `dict[str, float]`: The logged values by type of the metric.
    """
    values = {}
    for kind, _, keys in METRICS:
        logged = [entry[prefix + key] for key in keys if isinstance(entry.get(prefix + key), (int, float))]
        if logged and math.isfinite(logged[0]):
            values[kind] = round(float(logged[0]), 4)
    if values.get("reward") == values.get("exact_match", math.nan):
        del values["reward"]  # the default reward is the exact match, which is reported already
    return values


def non_default_options(args: Any) -> dict[str, Any]:
    """
    The options of a run that differ from their defaults and affect the model. Paths, addresses and tokens are excluded, and
    so are the settings of the search loop, which are in [`SearchConfig`].

    Args:
        args ([`TSPOConfig`]):
            The configuration of the run.
    """
    found = {}
    for option in fields(args):
        value = getattr(args, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        # Defaults that are computed from other options
        calculated = {"steps_per_generation": args.gradient_accumulation_steps, "activation_checkpointing": True}
        elsewhere = (
            "protocol",
            "chat_template_kwargs",
            *(["gradient_checkpointing"] if hasattr(args, "activation_checkpointing") else []),  # its new name
            *(limit.name for limit in fields(SearchLimits)),
        )
        if option.name in elsewhere or _NOT_SHOWN.fullmatch(option.name):
            continue
        if isinstance(value, Mapping):  # for instance `model_init_kwargs`, with a token of its own
            value = {k: v for k, v in value.items() if v is not None and not _NOT_SHOWN.fullmatch(str(k))} or default
        if value not in (default, calculated.get(option.name, default)):
            found[option.name] = value
    return found


def without_addresses(text: str) -> str:
    """
    A text without addresses of servers and folders of paths, which should not be published.

    Args:
        text (`str`):
            Any text.
    """
    return _ADDRESS.sub(lambda match: "(address left out)" if "://" in match[0] else "", text)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "questions"
