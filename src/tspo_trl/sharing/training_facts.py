"""What is known of a run when its model is shared: its data, its results, the options that shaped it."""

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

# Where a run writes, how fast it runs and what it prints: nothing that shapes the model, and nothing to publish
_NOT_SHOWN = re.compile(
    r"(hub|save|log|logging|eval|dataloader|ddp|fsdp|trackio|include|vllm_server|retrieval)_.*"
    r"|(.*_)?(token|dir|path|url|host|port|secret|password)(_.*)?"
    r"|output_dir|run_name|project|report_to|disable_tqdm|push_to_hub|use_cpu|debug|do_(train|eval|predict)|local_rank"
    r"|accelerator_config|parallelism_config|fsdp|deepspeed|resume_from_checkpoint|skip_memory_metrics|prediction_loss_only"
    r"|per_device_eval_batch_size|batch_eval_metrics|load_best_model_at_end|metric_for_best_model|greater_is_better"
    r"|enable_jit_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint|num_completions_to_print"
    r"|remove_unused_columns|label_names|vllm_group_port|pad_to_multiple_of|generation_batch_size"
)
_ADDRESS = re.compile(r"\w+://\S+|(?<![\w.])(?:~|\.{1,2})?/\S*/")  # of a server, or the folders of a path

# What is reported of an evaluation: (type, name, the keys under which it is logged)
METRICS = (
    ("exact_match", "Exact match", ("em", "rewards/exact_match_reward/mean")),
    ("f1", "Token F1", ("f1", "rewards/f1_reward/mean")),
    ("reward", "Reward", ("reward",)),
    ("hit_rate", "Gold answer retrieved (hit)", ("hit", "search/hit")),
    ("near_miss_rate", "Retrieved, but answered wrong (near miss)", ("near_miss", "search/near_miss")),
    ("searches", "Searches per question", ("search/calls",)),
    ("invalid_turns", "Invalid turns", ("search/invalid",)),
    ("truncated", "Truncated rollouts", ("turns/truncated",)),
)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """
    What a model card says about a run.

    Args:
        model (`str`):
            Where the model is: its name on the Hub, or the name of its folder.
        base_model (`str`, *optional*):
            The name or path of the model that training began with.
        adapter ([`~peft.PeftConfig`], *optional*):
            The configuration of the adapter, if one was trained.
        args ([`TSPOConfig`]):
            The configuration of the run.
        search_config ([`SearchConfig`]):
            The settings of the search loop.
        retriever ([`Retriever`]):
            What was searched in.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The questions of training.
        eval_dataset (the same, or a `dict` of them, *optional*):
            The questions of evaluation.
        dataset_names (`Sequence[str]`):
            The names of the training data, where the caller knows them.
        log_history (`Sequence[Mapping[str, Any]]`):
            What was logged, in order.
        step (`int`):
            The step of the weights.
        processes (`str`):
            On how many processes it ran, in words.
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
    A name, if it may be that of a repository on the Hub and is no local file or folder; the Hub refuses cards with others.

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
    The data set on the Hub that this one was loaded from, as far as its files in the cache tell.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.

    Returns:
        `list[str]`: Its name, of mixed ones all names; empty if it is from elsewhere, or streamed.
    """
    if not isinstance(dataset, Dataset):
        return []
    parts = [part for file in dataset.cache_files for part in Path(file["filename"]).parts if "___" in part]
    return list(dict.fromkeys(part.replace("___", "/", 1) for part in parts))


@dataclass(frozen=True)
class Evaluation:
    """The results of one data set: the step that they were measured at, and where they stood before training."""

    name: str
    step: int
    results: list[EvalResult]
    before: dict[str, float]


def evaluations(facts: TrainingFacts) -> list[Evaluation]:
    """
    The last results of every evaluation set, up to the step of the weights.

    Args:
        facts ([`TrainingFacts`]):
            The run.
    """
    sets = facts.eval_dataset if isinstance(facts.eval_dataset, Mapping) else {"": facts.eval_dataset}
    found = []
    for name, dataset in sets.items():
        prefix = f"eval_{name}_" if name else "eval_"
        entries = [e for e in facts.log_history if any(k.startswith(prefix) for k in e) and e["step"] <= facts.step]
        measured = [(e["step"], read_metrics(e, prefix)) for e in entries]
        measured = [(step, values) for step, values in measured if values]
        if not measured:
            continue
        (first_step, first), (step, values) = measured[0], measured[-1]
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
    The metrics that are reported, from an entry of the log.

    Args:
        entry (`Mapping[str, Any]`):
            What was logged.
        prefix (`str`):
            What the keys begin with: `""` in training, `"eval_"` or `"eval_<name>_"`.

    Returns:
        `dict[str, float]`: Values by the type of the metric, as far as they were logged.
    """
    values = {}
    for kind, _, keys in METRICS:
        logged = [entry[prefix + key] for key in keys if isinstance(entry.get(prefix + key), (int, float))]
        if logged and math.isfinite(logged[0]):
            values[kind] = round(float(logged[0]), 4)
    if values.get("reward") == values.get("exact_match", math.nan):
        del values["reward"]  # the default reward is the exact match: said once
    return values


def non_default_options(args: Any) -> dict[str, Any]:
    """
    The options of a run that differ from their defaults and shape the model. Paths, addresses and tokens are left out, and
    so are the settings of the search loop, which [`SearchConfig`] has.

    Args:
        args ([`TSPOConfig`]):
            The configuration of the run.
    """
    found = {}
    for option in fields(args):
        value = getattr(args, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        # These two are calculated where they are not given
        calculated = {"steps_per_generation": args.gradient_accumulation_steps, "activation_checkpointing": True}
        elsewhere = (
            "protocol",
            "chat_template_kwargs",
            "gradient_checkpointing",
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
    A text without the addresses of servers and the folders of paths, which are nobody else's business.

    Args:
        text (`str`):
            Any text.
    """
    return _ADDRESS.sub(lambda match: "(address left out)" if "://" in match[0] else "", text)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "questions"
