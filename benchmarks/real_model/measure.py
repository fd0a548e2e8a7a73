"""Compare the log-probabilities of sampling with those of a forward over the whole rollout, in both precisions.

    python -m benchmarks.real_model.measure runs/real/cold_start

In training, the ratio of both should be 1. In float32 they differ by rounding only; with the automatic mixed precision of
`bf16=True`, each has its own rounding to bfloat16.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tspo_trl import Retriever, SearchAgent, SearchConfig, Trajectory
from tspo_trl.commands.errors import run_command
from tspo_trl.retrieval import CachedRetriever, open_retriever
from tspo_trl.support.markdown import markdown_table

from .stages import CONFIGS, heldout

CLIP = 0.2  # TRL's default `epsilon`


@dataclass(frozen=True)
class Agreement:
    """
    How well sampling and a forward agree.

    Args:
        seconds (`float`):
            Seconds of the rollouts.
        differences (`torch.Tensor`):
            Log-probability of the forward minus that of sampling, for each token that the model wrote. Shape (N,).
    """

    seconds: float
    differences: torch.Tensor


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SearchConfig,
    retriever: Retriever,
    questions: Sequence[str],
    *,
    mixed: bool,
) -> Agreement:
    """
    Sample a rollout of each question, and read it again in one forward.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in float32.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        config ([`SearchConfig`]):
            The search settings.
        retriever ([`Retriever`]):
            Executes the searches.
        questions (`Sequence[str]`):
            The questions.
        mixed (`bool`):
            Whether to compute in mixed precision (bfloat16).
    """
    agent = SearchAgent.from_model(
        model, tokenizer, retriever=retriever, config=config, sampling={"temperature": 1.0}, batch_size=len(questions)
    )
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        start = time.perf_counter()
        trajectories = agent.rollout(questions)
        seconds = time.perf_counter() - start
        differences = [read_again(model, trajectory) for trajectory in trajectories]
    return Agreement(seconds, torch.cat(differences))


def read_again(model: PreTrainedModel, trajectory: Trajectory) -> torch.Tensor:
    """
    The log-probabilities of a forward minus those of sampling, for the tokens that the model wrote. Shape (N,).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        trajectory ([`Trajectory`]):
            The rollout, sampled with a temperature of 1.
    """
    ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]], device=model.device)
    logits = model(input_ids=ids).logits[0, len(trajectory.prompt_ids) - 1 : -1]
    written = torch.tensor(trajectory.completion_ids, device=model.device)
    logps = logits.float().log_softmax(dim=-1).gather(1, written[:, None])[:, 0].cpu()
    assert trajectory.logprobs is not None
    return (logps - torch.tensor(trajectory.logprobs))[torch.tensor(trajectory.loss_mask) == 1]


def table(found: dict[str, Agreement]) -> str:
    """
    Format what was measured.

    Args:
        found (`dict[str, Agreement]`):
            By the name of the precision.
    """
    header = ["", "seconds", "tokens", "mean difference", "largest", f"ratio outside 1 ± {CLIP}"]
    rows = [
        [
            name,
            f"{one.seconds:.1f}",
            len(one.differences),
            f"{one.differences.abs().mean():.1e}",
            f"{one.differences.abs().max():.1e}",
            f"{((one.differences.exp() - 1).abs() > CLIP).float().mean():.2%}",
        ]
        for name, one in found.items()
    ]
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a model of a run on held-out questions, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of a model, for instance runs/real/cold_start")
    parser.add_argument("--rollouts", type=int, default=32, help="number of rollouts (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} has no model. Run `make real` first.")
    configured = yaml.safe_load(CONFIGS["train"].read_text(encoding="utf-8"))
    retriever = CachedRetriever(open_retriever(corpus=configured["corpus"]))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = SearchConfig.load(args.model)
    questions = heldout(False)["question"][: args.rollouts]
    found = {}
    for name, mixed in (("float32", False), ("mixed, bfloat16", True)):
        torch.manual_seed(0)
        found[name] = measure(model, tokenizer, config, retriever, questions, mixed=mixed)
    print(f"{len(questions)} rollouts of {args.model}:\n\n{table(found)}")


if __name__ == "__main__":
    run_command(main)
