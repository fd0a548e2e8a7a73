"""The model card: training data, search settings, results and usage. It extends the model card of TRL."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard

from .._version import __version__
from ..rollout.limits import SearchLimits
from ..rollout.search_config import SearchConfig
from ..support.markdown import markdown_table
from .training_facts import (
    METRICS,
    Evaluation,
    TrainingFacts,
    evaluations,
    hub_datasets,
    hub_id,
    non_default_options,
    read_metrics,
    without_addresses,
)

_QUICK_START = """\
## Quick start

    pip install tspo-trl

```python
from tspo_trl import BM25Retriever, Passage, SearchAgent

passages = [
    Passage(id="0", title="Emma (novel)", text="Emma is a novel by the English author Jane Austen."),
    Passage(id="1", title="Jane Austen", text="Jane Austen was born in Steventon, Hampshire, in 1775."),
]
agent = SearchAgent.from_pretrained({arguments}, retriever=BM25Retriever(passages))

trajectory = agent("Where was the author of Emma born?")
print(trajectory.queries)
print(trajectory.answer)
```

This example searches two passages. To search your own, `BM25Retriever.from_jsonl("passages.jsonl")` reads a JSON Lines
file with `id`, `title` and `text`; any object with a method `search(queries, k)` can also be the retriever. Decoding is
greedy. The settings of the search loop are those of training, read from `search_config.json`.

"""


def extend_model_card(card: ModelCard, facts: TrainingFacts) -> None:
    """
    Describe the search agent in a model card of TRL: replace the quick start, and add sections and metadata.

    Args:
        card ([`~huggingface_hub.ModelCard`]):
            The card, changed in place.
        facts ([`TrainingFacts`]):
            The facts of the run.
    """
    # Metadata
    base, results = hub_id(facts.base_model), evaluations(facts)
    data: Any = card.data
    data.pop("licence", None)  # a placeholder of TRL: the author must choose the licence
    data.base_model, data.pipeline_tag = base, "text-generation"
    if facts.adapter is not None:
        data.library_name = "peft"
    data.tags = list(
        dict.fromkeys(
            [
                *(data.tags or []),
                "search-agent",
                *([_peft_type(facts.adapter).lower()] if facts.adapter is not None else []),
            ]
        )
    )
    names = [*map(hub_id, facts.dataset_names), *hub_datasets(facts.train_dataset)]
    data.datasets = list(dict.fromkeys(name for name in names if name)) or None
    if results:
        data.model_name = facts.model.rpartition("/")[2]
        data.eval_results = [result for evaluation in results for result in evaluation.results]
        data.metrics = sorted({result.metric_type for result in data.eval_results} & {"exact_match", "f1"}) or None

    # Sections: those of TRL are kept, except its quick start
    title, *sections = re.split(r"(?m)^(?=## )", card.text)
    by_name = {re.match(r"## (.*)", section)[1]: section for section in sections}  # type: ignore[index]
    by_name.pop("Quick start", None)
    about = re.match(r"\s*# .*\n", title)
    training = by_name.pop("Training procedure", "## Training procedure\n\n")
    before, heading, versions = training.partition("### Framework versions")
    versions = re.sub(r"(?m)^- TRL:", f"- tspo_trl: {__version__}\n- TRL:", versions)
    card.text = "".join(
        [
            about[0] if about else f"# {facts.model}\n",
            _introduction(facts, base),
            _QUICK_START.replace("{arguments}", _arguments(facts, base)),
            _results_section(facts, results),
            _search_section(facts.search_config),
            re.sub(r"\n\s*\n", "\n\n", before).rstrip() + "\n\n",
            _data_section(facts),
            _retriever_section(facts.retriever),
            _options_section(facts),
            heading + versions,
            *by_name.values(),
        ]
    )


def _introduction(facts: TrainingFacts, base: str | None) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the Hub"
    adapter = facts.adapter
    kind = "It is a fine-tuned version of" if adapter is None else f"It is a {_peft_type(adapter)} adapter for"
    return (
        "\nThis language model searches before it answers: it writes queries, reads the passages of a retriever, and "
        f"answers from them. {kind} {origin}, trained with [TRL](https://github.com/huggingface/trl) and `tspo_trl`.\n\n"
    )


def _peft_type(adapter: Any) -> str:
    name = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    return {"LORA": "LoRA"}.get(name, name)


def _arguments(facts: TrainingFacts, base: str | None) -> str:
    name = json.dumps(facts.model)
    return name if facts.adapter is None or base else f'{name}, base_model="path/to/the/base/model"'


def _results_section(facts: TrainingFacts, results: list[Evaluation]) -> str:
    if not results:
        return _training_metrics(facts)
    samples = facts.args.num_generations_eval or facts.args.num_generations
    text = (
        f"## Results\n\nMeasured during training with {samples} sampled rollouts per question (temperature "
        f"{facts.args.temperature:g}), without greedy decoding.\n\n"
    )
    for evaluation in results:
        if len(results) > 1:
            text += f"### {evaluation.name}\n\n"
        header = ["", *(["before training"] if evaluation.before else []), f"step {evaluation.step}"]
        rows = []
        for result in evaluation.results:
            before = evaluation.before.get(result.metric_type)
            rows.append(
                [
                    result.metric_name,
                    *(["-" if before is None else f"{before:.3f}"] if evaluation.before else []),
                    f"{result.metric_value:.3f}",
                ]
            )
        text += _table(header, rows)
    return text


def _training_metrics(facts: TrainingFacts) -> str:
    """The training metrics of the last steps, for a run without evaluation."""
    logged = [
        read_metrics(entry, "") for entry in facts.log_history if "reward" in entry and entry["step"] <= facts.step
    ]
    last = [values for values in logged if values][-10:]
    if not last:
        return ""
    rows = []
    for kind, label, _ in METRICS:
        if values := [metrics[kind] for metrics in last if kind in metrics]:
            rows.append([label, f"{sum(values) / len(values):.3f}"])
    when = "the last log entry" if len(last) == 1 else f"the mean of the last {len(last)} log entries"
    return f"## Results\n\nNo evaluation was run. On the training questions, {when}:\n\n" + _table(
        ["", f"step {facts.step}"], rows
    )


def _search_section(config: SearchConfig) -> str:
    actions = {
        "tags": "`tags`: the model searches with `<search>query</search>` and answers with `<answer>…</answer>`; passages "
        "are inserted between `<information>` and `</information>`",
        "tool_call": "`tool_call`: the model calls a tool `search(query)` in the format of its chat template; passages are "
        "the response of the tool, and a message without a call is the answer",
    }
    limits = asdict(SearchLimits.of(config))
    rows = [["`protocol`", actions[config.protocol]], *([f"`{name}`", f"{value}"] for name, value in limits.items())]
    if config.chat_template_kwargs:
        rows.append(["`chat_template_kwargs`", _value(config.chat_template_kwargs)])
    if config.prompt_template is None:
        prompt = "The training data contained the prompts. Use prompts of the same form: `agent.rollout_prompts([prompt])`.\n\n"
    else:
        fence = "```" if "```" not in config.prompt_template else "~~~~~~"
        prompt = f"The prompt template is\n\n{fence}text\n{config.prompt_template.rstrip()}\n{fence}\n\n"
    return "## How it searches\n\n" + _table(["setting", "value"], rows) + prompt


def _data_section(facts: TrainingFacts) -> str:
    rows = [["training", *_describe(facts.train_dataset, facts.dataset_names)]]
    sets = facts.eval_dataset if isinstance(facts.eval_dataset, Mapping) else {"": facts.eval_dataset}
    rows += [[f"evaluation `{k}`" if k else "evaluation", *_describe(v)] for k, v in sets.items() if v is not None]
    return "### Data\n\n" + _table(["", "data set", "questions"], rows)


def _describe(dataset: Any, given: Sequence[str] = ()) -> list[str]:
    """The name of a data set and its number of questions."""
    names = [hub_id(name) or Path(name).name for name in given] or hub_datasets(dataset)
    shown = ", ".join(
        f"[{n}](https://huggingface.co/datasets/{n})" if hub_id(n) and "/" in n else f"`{n}`" for n in names
    )
    if not isinstance(dataset, Dataset):
        return [shown or "not named", "streamed"]
    questions = f"{len(dataset):,}"
    if "data_source" in dataset.column_names:
        counts = Counter(map(str, dataset["data_source"]))
        listed = ", ".join(f"`{without_addresses(source)}` {count:,}" for source, count in counts.most_common(20))
        if shown and len(counts) > 1:
            questions += f" ({listed})"
        elif not shown:
            shown = listed if len(counts) > 1 else f"`{without_addresses(next(iter(counts)))}`"
    return [shown or "not named", questions]


def _retriever_section(retriever: Any) -> str:
    text = f"### Retriever\n\n- `{type(retriever).__name__}`"
    if (passages := getattr(retriever, "passages", None)) is not None and hasattr(passages, "__len__"):
        text += f", {len(passages):,} passages"
    fingerprint = getattr(retriever, "fingerprint", None)
    if isinstance(fingerprint, str) and without_addresses(fingerprint) == fingerprint:
        text += f"\n- fingerprint: `{fingerprint}`"
    if isinstance(description := getattr(retriever, "description", None), str):
        text += f"\n- {without_addresses(description)}"
    return text + "\n\n"


def _options_section(facts: TrainingFacts) -> str:
    rows = [[f"`{name}`", _value(value)] for name, value in non_default_options(facts.args).items()]
    text = f"### Options\n\n{facts.step:,} steps on {facts.processes}."
    if facts.adapter is not None:
        text += f" {_peft_type(facts.adapter)}"
        text += (
            f" of rank {facts.adapter.r}, `lora_alpha` {facts.adapter.lora_alpha}"
            if hasattr(facts.adapter, "r")
            else ""
        )
        modules = getattr(facts.adapter, "target_modules", None)
        if isinstance(modules, (list, set)):
            modules = ", ".join(f"`{name}`" for name in sorted({name.rpartition(".")[2] for name in modules}))
        text += f", on {modules}." if modules else "."
    if not rows:
        return text + " All options of `TSPOConfig` have their default values.\n\n"
    return (
        text + " Options of `TSPOConfig` that differ from their default values:\n\n" + _table(["option", "value"], rows)
    )


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return f"`{without_addresses(text)}`"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    return markdown_table(header, rows, left=len(header)) + "\n\n"
