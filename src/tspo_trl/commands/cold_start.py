"""Teach a model to search before it is trained by its own rollouts: supervised training on demonstrations.

A base model, or a small one, may never search, so that no rollout can be rewarded. From questions, golden answers and a
retriever, this command makes demonstrations in the tokens of the protocol, trains the model on them, and saves it for
`recipes/train.py`.

    accelerate launch recipes/cold_start.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name questions.jsonl \
        --corpus passages.jsonl --max_searches 2 --output_dir runs/cold_start
    accelerate launch recipes/train.py --model_name_or_path runs/cold_start --dataset_name questions.jsonl \
        --corpus passages.jsonl --max_searches 2 --output_dir runs/mine

Each row has a `question` and its `golden_answers`. With `supporting_titles` (a list of strings), several searches are
demonstrated. Every option of ColdStartConfig is a flag and a key of the YAML files; --use_peft true trains an adapter and merges
it. `tspo cold_start` is the same command on one process.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config

from ..cold_start.config import ColdStartConfig
from ..cold_start.demonstrations import Demonstration, Demonstrations
from ..cold_start.rates import search_rates
from ..cold_start.trainer import ColdStartTrainer, merge_adapter
from ..questions import load_questions
from ..questions.hints import hints_in_flags
from ..retrieval import Retriever
from ..rollout.protocol import SearchProtocol
from ..training.progress import show
from ..training.signals import StopOnSignal
from .arguments import DataArguments, load_retriever, make_output_dir
from .demo import DEMO
from .errors import keeping_tracebacks
from .options import DATA_FLAGS, check_input_files, check_model, check_question_files
from .parser import RecipeParser, split_config
from .train import check_extras, use_all_cores

Questions: TypeAlias = Dataset | IterableDataset

ADAPTER = "adapter"  # folder of the adapter in the output folder
RATES = {  # row of the table -> rate
    "Rollouts that search": "search",
    "Searches per question": "searches",
    "Rollouts without an invalid turn": "valid",
    "Rollouts that answer": "answer",
    "Gold answer found (hit)": "hit",
    "Exact match": "correct",
}
_WIDTH = 160  # of a line of the example


@dataclass
class ColdStartArguments(DataArguments):
    """
    Arguments for the questions and the passages, in addition to those of [`DataArguments`].

    Args:
        check_questions (`int`, *optional*, defaults to `16`):
            Number of questions that are held out, on which the model is tried before and after, greedily. 0 for none.
    """

    check_questions: int = field(
        default=16,
        metadata={"help": "questions that are held out, on which the model is tried before and after; 0 for none"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.check_questions < 0:
            raise ValueError(f"`check_questions` must not be negative, got {self.check_questions}.")


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[ColdStartArguments, ColdStartConfig, ModelConfig]:
    """The options of the command line and of a YAML file."""
    config, arguments = split_config(sys.argv[1:] if arguments is None else arguments)
    kinds: Any = (ColdStartArguments, ColdStartConfig, ModelConfig)
    parser = RecipeParser(kinds)
    parser.set_defaults(output_dir="runs/cold_start")
    parsed: Any = parser.parse(arguments, config)
    return parsed


def check_inputs(script_args: ColdStartArguments, training_args: ColdStartConfig, model_args: ModelConfig) -> None:
    """Check what can be checked before anything is loaded, indexed or asked for over a network."""
    name, model = script_args.dataset_name, model_args.model_name_or_path
    passages = script_args.corpus or script_args.index or script_args.retriever_url
    found = {
        "questions (--dataset_name)": name,
        "a model (--model_name_or_path)": model,
        "passages (--corpus, --index or --retriever_url)": passages,
    }
    if missing := [what for what, value in found.items() if value is None]:
        raise ValueError(f"{' and '.join(missing)} must be given.")
    names: list[str] = [name] if isinstance(name, str) else list(name or [])
    if DEMO in (*names, model):
        raise ValueError(f"The demo has a cold start of its own: run `tspo train`, or give other names than {DEMO!r}.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "`load_in_4bit` and `load_in_8bit` are for the training that follows: an adapter cannot be merged exactly into a "
            "quantised model. Set `use_peft` alone."
        )
    check_extras(training_args, model_args)
    check_input_files(
        corpus=script_args.corpus,
        index=script_args.index,
        url=script_args.retriever_url,
        backend=script_args.retriever_backend,
    )
    check_question_files(names)
    assert model is not None
    check_model(model, "--model_name_or_path", model_args.model_revision)
    make_output_dir(training_args.output_dir)


@hints_in_flags(DATA_FLAGS | {"split": "--dataset_train_split"})
def load_rows(script_args: ColdStartArguments, seed: int) -> tuple[Questions, list[dict[str, Any]]]:
    """The questions to demonstrate, and those that are held out: at most a quarter of them."""
    sources: Any = script_args.dataset_name
    columns: Any = script_args.dataset_columns
    dataset = load_questions(
        sources,
        name=script_args.dataset_config,
        split=script_args.dataset_train_split,
        columns=columns,
        streaming=script_args.dataset_streaming,
    )
    count = script_args.check_questions
    if not isinstance(dataset, Dataset):
        return dataset.skip(count), list(islice(dataset, count))
    count = min(count, len(dataset) // 4)
    order = Random(seed).sample(range(len(dataset)), len(dataset))
    return dataset.select(sorted(order[count:])), list(dataset.select(order[:count]))


def find_checkpoint(resume: str | bool | None, output_dir: Path) -> str | None:
    """The checkpoint to resume from: a path, or "true" for the last one of the output folder."""
    resume = None if resume is None else str(resume)  # a file holds `true`
    if resume is None or resume.lower() == "false":
        return None
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    path = last if resume.lower() == "true" else resume
    if path is None or not Path(path).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {resume!r}, but there is no such checkpoint. With `save_strategy` 'steps' or 'epoch', "
            f"they are saved in {str(output_dir)!r}."
        )
    return path


def report_demonstrations(made: Demonstrations, protocol: SearchProtocol, num_passages: int) -> None:
    """Print how many demonstrations there are, and an example."""
    items, console = made.items, Console(soft_wrap=True, highlight=False)
    failed = sum(one.num_failed > 0 for one in items)
    learned = sum(label >= 0 for one in items for label in one.labels) / len(items)
    length = sum(len(one.input_ids) for one in items) / len(items)
    console.print(
        f"Questions: {made.questions} searched for, {made.with_evidence} with evidence in the first {num_passages} passages"
    )
    console.print(
        f"Demonstrations: {len(items)} ({sum(one.by_titles for one in items)} find all supporting titles, {failed} begin with "
        f"a failed search); left out: {made.too_long} exceed a limit, {made.unwritable} would not be parsed as written"
    )
    console.print(f"Tokens: {length:.0f} in a demonstration, {learned:.0f} of them learned")
    console.print("\nAn example (▶ is learned, │ is only read):")
    for line in example_lines(next((one for one in items if one.num_failed), items[0]), protocol):
        console.print(line)
    console.print()


def example_lines(one: Demonstration, protocol: SearchProtocol) -> list[Text]:
    """The lines of a demonstration, marked as learned or as only read."""
    decode = protocol.tokenizer.decode
    parts = [(False, str(decode(one.trajectory.prompt_ids)))]
    for number, turn in enumerate(one.trajectory.turns):
        parts.append((number >= one.num_failed, str(decode(turn.token_ids))))
        parts.append((False, str(decode(turn.observation_ids))))
    lines = []
    for is_learned, text in parts:
        for line in filter(str.strip, text.split("\n")):
            short = line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
            lines.append(Text(f"{'▶' if is_learned else '│'} {short}", style="bold green" if is_learned else "dim"))
    return lines


def report_run(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, count: int, history: Sequence[Any]
) -> None:
    """Print the loss, and what the model does before and after."""
    console = Console(soft_wrap=True, highlight=False)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if losses:
        (first, start), (last, end) = losses[0], losses[-1]
        console.print(f"Loss: {start:.3f} at step {first}, {end:.3f} at step {last}")
    if before is None or after is None:
        return
    table = Table(title=f"Held-out questions ({count}, greedy)")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in RATES.items():
        table.add_row(name, show(before[key]), show(after[key]))
    console.print(table)
    if after["search"] < 0.5:
        console.print(
            "The model still does not search for most questions. Raise `num_demonstrations`, `num_train_epochs` or "
            "`learning_rate`.",
            style="yellow",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make demonstrations, train on them, and print what the model does before and after."""
    script_args, training_args, model_args = parse_arguments(arguments)
    check_inputs(script_args, training_args, model_args)
    use_all_cores()
    resume = find_checkpoint(training_args.resume_from_checkpoint, Path(str(training_args.output_dir)))
    dataset, heldout = load_rows(script_args, training_args.seed)
    retriever = load_retriever(script_args, logged=False)
    assert retriever is not None
    given: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    trainer = ColdStartTrainer(
        model=str(model_args.model_name_or_path),
        args=training_args,
        train_dataset=dataset,
        retriever=retriever,
        callbacks=[StopOnSignal()],
        peft_config=get_peft_config(model_args),
    )
    with keeping_tracebacks():
        run(trainer, resume, heldout, retriever)


def run(trainer: ColdStartTrainer, resume: str | None, heldout: list[dict[str, Any]], retriever: Retriever) -> None:
    """Train, save and report."""
    args, is_main = trainer.args, PartialState().is_main_process
    if is_main:
        report_demonstrations(trainer.demonstrations, trainer.protocol, args.num_passages)
    # Rollouts of a sharded model would need its engine
    tried = heldout if trainer.accelerator.distributed_type == DistributedType.NO else []
    before = _rates(trainer, tried, retriever)
    trainer.train(resume_from_checkpoint=resume)
    after = _rates(trainer, tried, retriever)
    folder = Path(str(args.output_dir))
    if trainer.is_adapter:
        trainer.save_model(str(folder / ADAPTER))
        trainer.accelerator.wait_for_everyone()
        if is_main:
            given: Any = args.model_init_kwargs or {}
            merge_adapter(folder / ADAPTER, folder, model_init_kwargs={"dtype": given.get("dtype")})
        trainer.accelerator.wait_for_everyone()
    else:
        trainer.save_model()
    trainer.save_state()
    if is_main:
        report_run(before, after, len(tried), trainer.state.log_history)
        print(f"Model: {folder}\nTrain it: tspo train --model_name_or_path {folder} --protocol {args.protocol} ...")
    trainer.accelerator.end_training()


def _rates(trainer: ColdStartTrainer, rows: list[dict[str, Any]], retriever: Retriever) -> dict[str, float] | None:
    if not rows:
        return None
    tokenizer: Any = trainer.processing_class
    return search_rates(
        trainer.model,
        tokenizer,
        rows,
        retriever,
        trainer.search_config,
        batch_size=trainer.args.per_device_eval_batch_size,
    )
