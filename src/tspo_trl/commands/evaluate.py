"""Evaluate models on questions with golden answers: exact match, F1 and retrieval, with confidence intervals.

    tspo evaluate --model my-search-agent --dataset_name benchmarks --retriever_url http://localhost:8000
    tspo evaluate --model base=Qwen/Qwen2.5-3B trained=runs/mine --dataset_name questions.jsonl --corpus passages.jsonl
    tspo evaluate --model Qwen/Qwen2.5-7B-Instruct --endpoint http://localhost:8001/v1 --dataset_name hotpotqa ...
    tspo evaluate --compare runs/evaluation/base runs/evaluation/trained

A model is a folder, a name on the Hub or a LoRA adapter; with --endpoint, the name of a model on a server with the OpenAI
interface. A data set is one of the seven benchmarks (nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle;
'benchmarks' means all of them), a file with 'question' and 'golden_answers' (JSONL, JSON, CSV, parquet), or a data set on
the Hub. NAME=MODEL and NAME=DATASET name them in the results. An evaluation can be stopped at any time: the same command
resumes it.
"""

import gc
import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from ..evaluation.results import EvaluationResults, compare_results
from ..evaluation.tables import comparison_table, results_table
from ..questions import BENCHMARKS, load_benchmark, load_questions
from ..questions.hints import hints_in_flags
from ..retrieval import BM25Retriever, CachedRetriever, Retriever, open_retriever
from ..retrieval.base import TRIAL_QUERY
from ..rollout.limits import SearchLimits
from ..support.files import replace_file
from ..support.http import check_header, check_url, without_password
from ..support.paths import check_model_path, check_place
from .options import (
    DATA_FLAGS,
    QUESTION_FILES,
    add_columns_option,
    add_output_option,
    add_retriever_options,
    check_at_least_one,
    check_input_files,
    check_model,
    check_output_dir,
    check_question_files,
    make_parser,
    read_columns,
)

if TYPE_CHECKING:  # torch and transformers are imported where they are used: `--help` is quick
    from ..agent import SearchAgent

ALL = "benchmarks"
API_KEY = "OPENAI_API_KEY"
SEARCH_LIMITS = tuple(limit.name for limit in fields(SearchLimits))


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of the evaluation, with models and columns as dictionaries."""
    parser = make_parser(__doc__)
    _add_model_options(parser.add_argument_group("models"))
    _add_question_options(parser.add_argument_group("questions"))
    group = parser.add_argument_group("passages: one value for all data sets, or one for each data set in their order")
    add_retriever_options(group, several=True)
    _add_rollout_options(
        parser.add_argument_group("rollouts (search settings default to those in the model's search_config.json)")
    )
    _add_result_options(parser.add_argument_group("results"))
    args = parser.parse_args(arguments)
    if args.compare:
        if args.model or args.dataset:
            parser.error("--compare reads finished evaluations: it cannot be combined with --model or --dataset_name")
        return args
    for flag, value, kind in (("--model", args.model, "model"), ("--dataset_name", args.dataset, "data set")):
        if not value:
            parser.error(f"{flag} is required")
        if empty := [spec for spec in value if not _named(spec)[1].strip()]:
            parser.error(f"{flag} must name a {kind}, got {empty[0]!r}")
    check_at_least_one(parser, args, "num_samples", "batch_size", "max_questions", "max_requests")
    for limit in fields(SearchLimits):
        value, minimum = getattr(args, limit.name), limit.metadata["minimum"]
        if value is not None and value < minimum:
            parser.error(f"--{limit.name} must be at least {minimum}, got {value}")
    if args.prompt_template not in (None, "default") and "{question}" not in args.prompt_template:
        parser.error(f"--prompt_template must have '{{question}}' in it, got {args.prompt_template!r}")
    _set_sampling(parser, args)
    read_columns(parser, args)
    args.model = _name_models(parser, args.model)
    return args


def _name_models(parser: ArgumentParser, specs: Sequence[str]) -> dict[str, str]:
    """The place of each model by its name, which must be unique: it is also the name of the folder of its results."""
    models: dict[str, str] = {}
    for name, where in map(_named, specs):
        if name in models:
            parser.error(
                f"--model: two models are called {name!r}: {models[name]!r} and {where!r}. Rename one: NAME={where}"
            )
        models[name] = where
    return models


def _add_model_options(group: Any) -> None:
    """Add the options that load a model or reach it."""
    add = group.add_argument
    add(
        "--model",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="one or several models; the first is compared with each of the others",
    )
    add("--endpoint", metavar="URL", help=f"server that has the models; {API_KEY} gives its API key")
    add(
        "--tokenizer",
        help="tokenizer of the endpoint's model: a folder or a name on the Hub (default: the model's name)",
    )
    add("--base_model", help="base model of an adapter (default: the one named by the adapter)")
    add("--dtype", default="auto", help="type of the weights (default: %(default)s)")
    add("--device", help="device of the model (default: the accelerator if there is one)")


def _add_question_options(group: Any) -> None:
    """Add the options that choose the questions."""
    add = group.add_argument
    add(
        "--dataset_name",
        "--dataset",
        dest="dataset",
        nargs="+",
        metavar="[NAME=]DATASET",
        help=f"one or several data sets, or '{ALL}' for all seven benchmarks",
    )
    add("--dataset_config", help="configuration of the data sets on the Hub, or a subfolder of folders of files")
    add("--split", help="split of data sets that have several")
    add_columns_option(group)
    add("--max_questions", type=int, metavar="N", help="draw N questions of each data set (default: all)")


def _add_rollout_options(group: Any) -> None:
    """Add the search settings and how rollouts are sampled."""
    add = group.add_argument
    for limit in fields(SearchLimits):
        add(f"--{limit.name}", type=int, metavar="N", help=limit.metadata["help"])
    add("--protocol", choices=("tags", "tool_call"), help="format of the model's actions")
    add("--prompt_template", help="template of the prompts, which contains '{question}'")
    add("--num_samples", type=int, default=1, metavar="N", help="rollouts of each question (default: %(default)s)")
    add("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 1 for several)")
    add("--batch_size", type=int, metavar="N", help="rollouts at a time (default: 64, at an endpoint 256)")
    add("--max_requests", type=int, default=64, metavar="N", help="requests at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the questions drawn and of sampling (default: %(default)s)")


def _add_result_options(group: Any) -> None:
    """Add the options of scores and results."""
    add = group.add_argument
    add(
        "--scorer",
        default="tspo",
        choices=("tspo", "search_r1", "triviaqa"),
        help="also score as Search-R1 or TriviaQA does",
    )
    add_output_option(group, "runs/evaluation")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two finished evaluations: folders of models in OUT")


def _set_sampling(parser: ArgumentParser, args: Namespace) -> None:
    """Set temperature and batch size, whose defaults depend on other options, and refuse what cannot be combined."""
    if args.temperature is None:
        args.temperature = 0.0 if args.num_samples == 1 else 1.0
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature must not be negative, and a finite number, got {args.temperature}")
    if args.temperature == 0 and args.num_samples > 1:
        parser.error(f"--num_samples {args.num_samples} at --temperature 0 would be the same rollout each time")
    if args.endpoint and args.base_model:
        parser.error("--base_model applies to adapters loaded here, not to an --endpoint")
    args.batch_size = args.batch_size or (256 if args.endpoint else 64)


def _named(spec: str) -> tuple[str, str]:
    """The name of a model or data set, which is also the name of a folder, and its place."""
    name, separator, where = spec.partition("=")
    if not separator or "/" in name or "\\" in name:
        name, where = Path(spec.rstrip("/")).name, spec
        if name.endswith(QUESTION_FILES):
            name = name.split(".")[0] or name
    return re.sub(r"[^\w.@+-]", "_", name).lstrip(".") or "model", where


@hints_in_flags(DATA_FLAGS)
def load_datasets(args: Namespace) -> tuple[dict[str, Dataset], dict[str, int], dict[str, str]]:
    """The data sets by name, the place of each in `--dataset`, and the note on each benchmark that has one."""
    specs = [name for spec in args.dataset for name in (BENCHMARKS if spec == ALL else [spec])]
    datasets: dict[str, Dataset] = {}
    places: dict[str, int] = {}
    notes: dict[str, str] = {}
    options: dict[str, Any] = {"max_questions": args.max_questions, "seed": args.seed}
    for place, spec in enumerate(specs):
        name, where = _named(spec)
        if Path(where).exists() or "/" in where or Path(where).suffix:
            dataset = load_questions(where, name=args.dataset_config, split=args.split, columns=args.columns, **options)
        else:
            dataset = load_benchmark(where, **options)
            if BENCHMARKS[where.lower()].note:
                notes[name] = BENCHMARKS[where.lower()].note
        parts = by_source(name, dataset)
        if taken := [part for part in parts if part in datasets]:
            raise ValueError(f"--dataset_name: two data sets are called {taken[0]!r}. Rename one: NAME={where}.")
        datasets |= parts
        places |= dict.fromkeys(parts, place)
    return datasets, places, notes


def by_source(name: str, dataset: Dataset) -> dict[str, Dataset]:
    """Each part of a mixed data set as a separate data set."""
    rows: dict[str, list[int]] = {}
    for i, source in enumerate(dataset["data_source"]):
        rows.setdefault(str(source), []).append(i)
    if len(rows) == 1:
        return {name: dataset}
    return {re.sub(r"[^\w.@+-]", "_", f"{name}-{source}"): dataset.select(part) for source, part in rows.items()}


def retriever_options(args: Namespace, count: int) -> list[dict[str, str | None]]:
    """The options of [`open_retriever`] for each of the data sets."""
    given: list[dict[str, str | None]] = [{} for _ in range(count)]
    for option, key in (("corpus", "corpus"), ("index", "index"), ("retriever_url", "url")):
        values = getattr(args, option) or [None]
        if len(values) not in (1, count):
            raise ValueError(
                f"--{option}: give one for all data sets, or one for each of the {count}, got {len(values)}."
            )
        for i in range(count):
            given[i][key] = values[i] if len(values) == count else values[0]
    return given


def open_retrievers(args: Namespace, places: dict[str, int]) -> dict[str, Retriever]:
    """The retriever of each data set."""
    given = retriever_options(args, len(set(places.values())))
    opened: dict[tuple[str | None, ...], Retriever] = {}
    for options in given:
        if not any(options.values()):
            raise ValueError("Nothing to search in: give --corpus, --index or --retriever_url.")
        if (which := tuple(options.values())) not in opened:
            retriever = CachedRetriever(
                open_retriever(
                    **options,
                    backend=args.retriever_backend,
                    language=args.retriever_language,
                    encoder=args.retriever_encoder,
                )
            )
            if not isinstance(retriever.retriever, BM25Retriever):
                retriever.retriever.search([TRIAL_QUERY], k=1)  # fail now if the server does not answer
            opened[which] = retriever
    return {name: opened[tuple(given[place].values())] for name, place in places.items()}


def load_agent(args: Namespace, where: str, retriever: Retriever) -> tuple["SearchAgent", dict[str, Any]]:
    """A model, and the description of it that is written with the results."""
    from ..agent import SearchAgent
    from ..evaluation.folder import model_fingerprint

    names = (*SEARCH_LIMITS, "protocol", "prompt_template")
    settings = {name: value for name in names if (value := getattr(args, name)) is not None}
    sampling = {"do_sample": args.temperature > 0, "temperature": args.temperature or 1.0}
    about: dict[str, Any] = {"model": where, "temperature": args.temperature}
    if args.endpoint:
        agent = SearchAgent.from_endpoint(
            args.endpoint,
            where,
            tokenizer=args.tokenizer or where,
            retriever=retriever,
            temperature=args.temperature,
            seed=args.seed,
            batch_size=args.batch_size,
            max_requests=args.max_requests,
            api_key=os.environ.get(API_KEY),
            **settings,
        )
        endpoint = without_password(args.endpoint)
        return agent, about | {"endpoint": endpoint, "tokenizer": args.tokenizer or where}
    agent = SearchAgent.from_pretrained(
        where,
        retriever=retriever,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        base_model=args.base_model,
        **sampling,
        **settings,
    )
    about |= {"fingerprint": model_fingerprint(where), "dtype": args.dtype}
    return agent, about | ({"base_model": args.base_model} if args.base_model else {})


def evaluate_model(
    args: Namespace,
    where: str,
    datasets: dict[str, Dataset],
    retrievers: dict[str, Retriever],
    output_dir: Path,
    about: dict[str, Any],
) -> EvaluationResults:
    """Evaluate a model, and free its memory on return."""
    from ..evaluation.evaluate import evaluate

    agent, of_model = load_agent(args, where, next(iter(retrievers.values())))
    check_lengths(agent, datasets)
    return evaluate(
        agent,
        datasets,
        output_dir,
        retrievers=retrievers,
        num_samples=args.num_samples,
        seed=args.seed,
        scorer=args.scorer,
        about=of_model | about,
    )


def check_lengths(agent: "SearchAgent", datasets: dict[str, Dataset]) -> None:
    """Refuse questions that are too long for the model before the first rollout."""
    from ..training.datasets import check_length

    loop = agent.search_loop
    lengths = [n for n in (loop.max_context_length, loop.engine.max_context_length) if n is not None]
    for name, dataset in datasets.items() if lengths else ():
        for i, question in enumerate(dataset["question"]):
            check_length(loop.protocol.prompt(question), f"{name}, row {i}", loop.protocol, min(lengths))


def compare_models(
    first: EvaluationResults, second: EvaluationResults, names: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """The comparison of two models, and its table."""
    comparison = compare_results(first, second)
    return comparison, comparison_table(comparison, *names)


def compare_finished(paths: Sequence[str]) -> None:
    """Print the comparison of two finished evaluations."""
    names = [str(Path(path).parent.name if Path(path).is_file() else Path(path).name) for path in paths]
    if names[0] == names[1]:
        names = list(paths)
    first, second = (EvaluationResults.load(path) for path in paths)
    _, text = compare_models(first, second, names)
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the models of a command line, or compare two evaluations."""
    args = parse_arguments(arguments)
    from ..engines.endpoint import EndpointError
    from ..evaluation.evaluate import EvaluationStopped

    try:
        run(args)
    except (EvaluationStopped, EndpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def check_inputs(args: Namespace) -> None:
    """Check the inputs before anything is loaded, indexed or asked for over a network."""
    from ..support.devices import check_device, check_dtype

    check_output_dir(args.output_dir)
    check_question_files([where for _, where in map(_named, args.dataset)])
    if not (args.corpus or args.index or args.retriever_url):
        raise ValueError("Nothing to search in: give --corpus, --index or --retriever_url.")
    check_input_files(corpus=args.corpus, index=args.index, url=args.retriever_url, backend=args.retriever_backend)
    check_place(args.retriever_encoder, "--retriever_encoder")
    check_place(args.tokenizer, "--tokenizer")
    if args.endpoint is not None:
        check_url(args.endpoint, "--endpoint")
        check_header(os.environ.get(API_KEY, ""), f"The environment variable {API_KEY}")
        return
    check_dtype(args.dtype, "--dtype")
    check_device(args.device, "--device")
    for where in args.model.values():
        check_model_path(where, "--model")
    check_model_path(args.base_model, "--base_model")


def run(args: Namespace) -> None:
    """Evaluate and compare the models, or compare two finished evaluations."""
    if args.compare:
        compare_finished(args.compare)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "The evaluation runs as one process. To use several GPUs, serve the model on all of them and give its --endpoint."
        )
    import torch
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    output_dir = Path(args.output_dir)
    check_inputs(args)
    datasets, places, notes = load_datasets(args)
    retriever_options(args, len(set(places.values())))  # checks their number before a model is looked for
    for where in () if args.endpoint else args.model.values():
        check_model(where, "--model")
    retrievers = open_retrievers(args, places)
    about = {"notes": notes} if notes else {}
    results: dict[str, EvaluationResults] = {}
    for name, where in args.model.items():
        if len(args.model) > 1:
            print(f"Model {name}: {where}", file=sys.stderr)
        results[name] = evaluate_model(args, where, datasets, retrievers, output_dir / name, about)
        gc.collect()  # the next model needs the memory
        torch.cuda.empty_cache()
    report(results, notes, output_dir)


def report(results: dict[str, EvaluationResults], notes: dict[str, str], output_dir: Path) -> None:
    """Print and write the table of results and the comparisons with the first model."""
    parts = [results_table({name: result.summary() for name, result in results.items()})]
    for note in dict.fromkeys(notes.values()):
        parts.append(f"{', '.join(name for name in notes if notes[name] == note)}: {note}")
    base = next(iter(results))
    for name in list(results)[1:]:
        comparison, text = compare_models(results[base], results[name], (base, name))
        parts.append(f"{name} compared with {base}:\n\n{text}")
        replace_file(output_dir / f"{base}-{name}.json", json.dumps(comparison, indent=2, ensure_ascii=False) + "\n")
    text = "\n\n".join(parts)
    replace_file(output_dir / "results.md", text + "\n")
    print(text)
    print(
        f"\nWritten: {output_dir / 'results.md'}, and for each model a folder with results.json, scores and trajectories"
    )
