"""Train a search agent.

Without questions, model and passages, it runs the embedded demo: a tiny model learns to search a fictional encyclopedia, in a
few minutes on two CPU cores and without a network.

    accelerate launch recipes/train.py
    accelerate launch recipes/train.py --config recipes/configs/hotpotqa_sample.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml recipes/train.py \
        --config recipes/configs/qwen2.5_3b_nq_hotpotqa.yaml \
        --retriever_url http://localhost:8000
    accelerate launch recipes/train.py --config ... --resume_from_checkpoint true
    accelerate launch recipes/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name questions.jsonl \
        --corpus passages.jsonl --output_dir runs/mine --max_searches 2
    accelerate launch recipes/train.py --dataset_name mine.jsonl PeterJinGo/nq_hotpotqa_train \
        --eval_dataset_name nq hotpotqa --max_eval_questions 500 --eval_strategy steps --eval_steps 50 ...

Every option of TSPOConfig is a flag and a key of the YAML files. `tspo train` is the same command on one process.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..cold_start.config import ColdStartConfig
from ..demo import make_world
from ..questions import BENCHMARKS, load_benchmark, load_questions, question_splits, source_name
from ..questions.hints import hints_in_flags
from ..retrieval import Retriever
from ..rollout.limits import SearchLimits
from ..training.checkpoints import last_checkpoint
from ..training.checks import check_batches, check_packages
from ..training.config import TSPOConfig
from ..training.curves import plot_curves
from ..training.progress import show
from ..training.signals import StopOnSignal
from ..training.trainer import TSPOTrainer
from .arguments import DataArguments, load_retriever, make_output_dir
from .demo import DEMO, DEMO_CONFIG, demo_datasets, demo_retriever, save_demo_model, save_tiny_model, save_world
from .errors import keeping_tracebacks
from .options import check_input_files, check_model, check_question_files
from .parser import RecipeParser, split_config
from .rewards import find_rewards

Questions: TypeAlias = Dataset | IterableDataset
EvaluatedQuestions: TypeAlias = Questions | dict[str, Questions] | None

#: Options that name questions, model or passages. The demo runs only if none of them is given.
INPUTS = ("dataset_name", "eval_dataset_name", "model_name_or_path", "corpus", "index", "retriever_url")
EVAL_FLAGS = {  # argument of `load_questions` -> the flag that errors name
    "source": "--eval_dataset_name",
    "load_benchmark": "--eval_dataset_name",
    "split": "--dataset_test_split",
    "columns": "--dataset_columns",
    "max_questions": "--max_eval_questions",
}
TRAIN_FLAGS = EVAL_FLAGS | {
    "source": "--dataset_name",
    "split": "--dataset_train_split",
    "max_questions": "--max_train_questions",
}


@dataclass
class SearchArguments(DataArguments):
    """
    Arguments for the questions and the passages, in addition to those of [`DataArguments`].

    Args:
        eval_dataset_name (`list[str]`, *optional*):
            Evaluate on these instead of `dataset_test_split`: benchmarks by name, or data sets as in `dataset_name`. Each has
            its own metrics, for instance `eval_nq_reward`.
        max_train_questions (`int`, *optional*):
            Number of training questions, drawn with a fixed seed; the first ones of the demo or of a stream. Defaults to all.
        max_eval_questions (`int`, *optional*):
            Number of evaluation questions of each data set, chosen in the same way. Defaults to all.
        reward_funcs (`list[str]`, *optional*):
            Reward functions, whose sum is the outcome: `exact_match_reward` (the default), `f1_reward`, `format_reward`, or import
            paths such as `my_module.my_reward`. `reward_weights` weights them.
        demo_seed (`int`, *optional*, defaults to `0`):
            Seed of the fictional encyclopedia and of the warm start.
        warm_start_steps (`int`, *optional*, defaults to `300`):
            Number of supervised steps that teach the model `"demo"` to search for the question, on data other than the
            demo.
    """

    eval_dataset_name: list[str] | None = field(
        default=None, metadata={"help": "evaluate on these benchmarks or data sets instead of the test split"}
    )
    max_train_questions: int | None = field(
        default=None, metadata={"help": "number of training questions; all of them if not given"}
    )
    max_eval_questions: int | None = field(
        default=None, metadata={"help": "number of evaluation questions of each data set; all of them if not given"}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "reward functions whose sum is the outcome: exact_match_reward (the default), f1_reward, format_reward, or "
            "import paths such as my_module.my_reward"
        },
    )
    demo_seed: int = field(default=0, metadata={"help": "seed of the demo's encyclopedia and of the warm start"})
    warm_start_steps: int = field(
        default=300,
        metadata={"help": "supervised steps of the model 'demo' on data other than the demo"},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.eval_dataset_name, str):  # from YAML
            self.eval_dataset_name = [self.eval_dataset_name]
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]


@hints_in_flags(EVAL_FLAGS)
def load_datasets(script_args: SearchArguments) -> tuple[Questions, EvaluatedQuestions]:
    """The training questions, and the evaluation questions: the test split of the same data, or data sets by name."""
    sources: Any
    sources, config, split = script_args.dataset_name, script_args.dataset_config, script_args.dataset_test_split
    options: dict[str, Any] = {"columns": script_args.dataset_columns, "streaming": script_args.dataset_streaming}
    count = script_args.max_eval_questions
    with hints_in_flags(TRAIN_FLAGS):
        train_dataset = load_questions(
            sources,
            name=config,
            split=script_args.dataset_train_split,
            max_questions=script_args.max_train_questions,
            **options,
        )
    if script_args.eval_dataset_name is not None:
        evaluated: dict[str, Questions] = {}
        for source in script_args.eval_dataset_name:
            title = source_name(source)
            if title in evaluated:
                raise ValueError(
                    f"`eval_dataset_name`: two data sets have the name {title!r}, but metrics are logged under this name. "
                    "Rename one."
                )
            if source in BENCHMARKS:
                evaluated[title] = load_benchmark(source, max_questions=count)
            else:
                at = split if split in question_splits(source) else None
                evaluated[title] = load_questions(source, split=at, max_questions=count, **options)
        return train_dataset, evaluated
    sources = [sources] if isinstance(sources, str) else sources
    tested = [source for source in sources if split in question_splits(source, config)]
    if not tested:
        return train_dataset, None
    return train_dataset, load_questions(tested, name=config, split=split, max_questions=count, **options)


def load_data(
    script_args: SearchArguments, training_args: TSPOConfig, output_dir: Path
) -> tuple[Questions, EvaluatedQuestions, Retriever | None]:
    """Training questions, evaluation questions and retriever, of the demo or of the data sets given."""
    if script_args.dataset_name != DEMO:
        train_dataset, eval_dataset = load_datasets(script_args)
        check_batches(training_args, train_dataset, eval_dataset)
        return train_dataset, eval_dataset, load_retriever(script_args, training_args.retrieval_log is not None)
    world = make_world(script_args.demo_seed)
    if script_args.corpus or script_args.index or script_args.retriever_url:
        retriever = load_retriever(script_args, logged=False)
    else:
        retriever = demo_retriever(world.passages, script_args.retriever_backend)
    if PartialState().is_main_process:
        save_world(world, output_dir)
    return *demo_datasets(world, script_args.max_train_questions, script_args.max_eval_questions), retriever


def make_demo_model(
    script_args: SearchArguments,
    training_args: TSPOConfig,
    retriever: Retriever | None,
    rows: Any,
    folder: Path,
    resumed: bool,
) -> None:
    """Make the tiny model `"demo"` in a folder, for the demo or for other data. One process makes it, the others wait."""
    state = PartialState()
    if state.is_main_process and not (resumed and folder.is_dir()):
        limits = SearchLimits.of(training_args)
        if script_args.dataset_name == DEMO:
            save_demo_model(folder, limits, seed=script_args.demo_seed)
        else:
            save_tiny_model(
                folder,
                limits,
                corpus=script_args.corpus,
                retriever=retriever,
                rows=rows,
                seed=script_args.demo_seed,
                steps=script_args.warm_start_steps,
            )
    state.wait_for_everyone()


def find_checkpoint(resume: str | bool | None, output_dir: Path) -> str | None:
    """The checkpoint to resume from: a path, or "true" for the last complete one of the output folder."""
    resume = None if resume is None else str(resume)  # a file holds `true`
    if resume is None or resume.lower() == "false":
        return None
    path = last_checkpoint(output_dir) if resume.lower() == "true" else resume
    if not Path(path).is_dir():
        raise ValueError(f"`resume_from_checkpoint` is {resume!r}, which is neither 'true' nor a folder.")
    return path


def report(
    before: Mapping[str, float | None], after: Mapping[str, float | None], title: str, prefix: str = "eval"
) -> None:
    """Print the held-out results before and after training."""
    table = Table(title=escape(title))
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    exact_match = "rewards/exact_match_reward/mean"
    others = any(key.startswith(f"{prefix}_rewards/") and exact_match not in key for key in after if "/mean" in key)
    rows = {
        **({"Outcome": "reward"} if others else {}),
        **({"Exact match": exact_match} if f"{prefix}_{exact_match}" in after else {}),
        "Gold answer found (hit)": "search/hit",
        "Near miss (found, answered wrong)": "search/near_miss",
        "Groups all wrong": "groups/all_wrong",
        "Groups mixed": "groups/mixed",
        "Groups all correct": "groups/all_correct",
        "Searches per question": "search/calls",
        "Invalid turns": "search/invalid",
    }
    for name, key in rows.items():
        table.add_row(name, show(before.get(f"{prefix}_{key}")), show(after.get(f"{prefix}_{key}")))
    Console().print(table)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[SearchArguments, TSPOConfig, ModelConfig]:
    """The options of the command line. Without questions, model, passages and configuration, they are those of the demo."""
    config, arguments = split_config(sys.argv[1:] if arguments is None else arguments)
    kinds: Any = (SearchArguments, TSPOConfig, ModelConfig)
    given = RecipeParser(kinds).values(arguments, config)
    if config is None and all(getattr(given, name) is None for name in INPUTS):
        config = str(DEMO_CONFIG)
    parsed: Any = RecipeParser(kinds).parse(arguments, config)
    return parsed


def check_inputs(script_args: SearchArguments, training_args: TSPOConfig, model_args: ModelConfig) -> None:
    """Check what can be checked before anything is loaded, indexed or asked for over a network."""
    name, model = script_args.dataset_name, model_args.model_name_or_path
    passages = (script_args.corpus, script_args.index, script_args.retriever_url, training_args.retrieval_log)
    found = {
        "questions (--dataset_name)": name,
        "a model (--model_name_or_path)": model,
        "passages (--corpus, --index or --retriever_url)": name == DEMO or any(passages) or None,
    }
    if missing := [what for what, value in found.items() if value is None]:
        raise ValueError(
            f"{' and '.join(missing)} must be given too. The demo runs only if questions, model and passages are all "
            f"left out. To use its parts: `--dataset_name {DEMO}`, `--model_name_or_path {DEMO}`."
        )
    if model == DEMO and training_args.protocol != "tags":
        raise ValueError(f"`protocol` of the model 'demo' is 'tags', got {training_args.protocol!r}.")
    check_extras(training_args, model_args)
    find_rewards(script_args.reward_funcs, training_args.reward_weights)  # for its errors
    check_input_files(
        corpus=script_args.corpus,
        index=script_args.index,
        url=script_args.retriever_url,
        backend=script_args.retriever_backend,
    )
    names = [name] if isinstance(name, str) else list(name or [])
    check_question_files([name for name in names if name != DEMO])
    check_question_files(script_args.eval_dataset_name or [], "--eval_dataset_name")
    if model is not None and model != DEMO:
        check_model(model, "--model_name_or_path", model_args.model_revision)
    make_output_dir(training_args.output_dir)


def check_extras(training_args: TSPOConfig | ColdStartConfig, model_args: ModelConfig) -> None:
    """Check that the packages which the options need are installed."""
    check_packages(training_args)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ImportError("`load_in_4bit` and `load_in_8bit` need bitsandbytes: pip install 'tspo-trl[quantization]'")
    if model_args.use_peft and find_spec("peft") is None:
        raise ImportError("`use_peft` needs PEFT: pip install peft")
    for name in training_args.report_to if isinstance(training_args.report_to, list) else [training_args.report_to]:
        if name != "none" and name not in get_available_reporting_integrations():
            raise ImportError(f"`report_to: {name}` needs the package {name}: pip install {name}")


def use_all_cores() -> None:
    """Use all cores: `accelerate launch` without a configuration gives a process on a CPU a single thread."""
    state = PartialState()
    if state.device.type == "cpu" and state.num_processes == 1:
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        torch.set_num_threads(len(cores))


def trainer_flags(script_args: SearchArguments) -> dict[str, str]:
    """The words of the command line for the training set of a [`TSPOTrainer`] in its errors: the flag and the files."""
    names: Any = script_args.dataset_name
    return {"train_dataset": shlex.join(["--dataset_name", *([names] if isinstance(names, str) else names)])}


def make_trainer(
    model: str, training_args: TSPOConfig, model_args: ModelConfig, data: Mapping[str, Any]
) -> TSPOTrainer:
    """The trainer of a command line. `data` holds its data sets, retriever and reward functions by argument name."""
    given: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    return TSPOTrainer(
        model=model,
        args=training_args,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[StopOnSignal()],
        **data,
    )


def report_run(
    trainer: TSPOTrainer, after: Mapping[str, float | None] | None, eval_dataset: Any, output_dir: Path
) -> None:
    """Draw the curves, and print the results of each evaluation set and where to find the files."""
    history = trainer.state.log_history
    if any("reward" in entry for entry in history):  # with few steps, `logging_steps` may log none
        plot_curves(history, output_dir / "curves.png", title=f"TSPO training: {output_dir}")
    several = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for name, evaluated in several.items():
        prefix = f"eval_{name}" if name else "eval"
        before = next((entry for entry in history if f"{prefix}_reward" in entry), None)
        if before is not None and after is not None:
            count = "streamed" if isinstance(evaluated, IterableDataset) else len(evaluated)
            samples = trainer.num_generations_eval
            report(before, after, f"{name or 'Held-out questions'} ({count}, {samples} sampled rollouts each)", prefix)
    print(f"Model: {output_dir}")  # not by `rich`: a path may hold its markup, and is not broken into lines
    if (output_dir / "curves.png").is_file():
        print(f"Curves: {output_dir / 'curves.png'}")
    if (output_dir / "trajectories").is_dir():
        page = f"tspo inspect {shlex.quote(str(output_dir))}"
        print(f"Trajectories: {output_dir / 'trajectories'}, as a page: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the held-out results before and after."""
    script_args, training_args, model_args = parse_arguments(arguments)
    check_inputs(script_args, training_args, model_args)
    use_all_cores()
    set_seed(training_args.seed)
    output_dir = Path(training_args.output_dir or ".")
    resume = find_checkpoint(training_args.resume_from_checkpoint, output_dir)

    with hints_in_flags(trainer_flags(script_args)):
        train_dataset, eval_dataset, retriever = load_data(script_args, training_args, output_dir)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "retriever": retriever}
    model: Any = model_args.model_name_or_path
    if model == DEMO:
        model = str(output_dir / "warm_start")
        make_demo_model(script_args, training_args, retriever, train_dataset, Path(model), resumed=resume is not None)
    # Evaluate within `train`: DeepSpeed cannot evaluate before it. A resumed run has the result in its history.
    training_args.eval_on_start = eval_dataset is not None and resume is None
    rewards = find_rewards(script_args.reward_funcs, training_args.reward_weights)
    with hints_in_flags(trainer_flags(script_args)):
        trainer = make_trainer(model, training_args, model_args, {"reward_funcs": rewards, **data})

    with keeping_tracebacks():
        run(trainer, resume, script_args, eval_dataset, output_dir)


def run(
    trainer: TSPOTrainer, resume: str | None, script_args: SearchArguments, eval_dataset: Any, output_dir: Path
) -> None:
    """Train, evaluate, save and report."""
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate() if eval_dataset is not None else None

    trainer.save_state()
    trainer.save_model()
    if PartialState().is_main_process:
        report_run(trainer, after, eval_dataset, output_dir)
    if trainer.args.push_to_hub:
        demo = script_args.dataset_name == DEMO  # the demo is not a data set of the Hub
        trainer.push_to_hub(dataset_name=None if demo else script_args.dataset_name)
    trainer.end()
