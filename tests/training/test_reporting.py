"""Reports of a run to Weights & Biases, which is offline here, and to TensorBoard, with the completions."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.training import prompted_to_search
from tspo_trl import TagProtocol, Trajectory, Turn, read_rollouts
from tspo_trl.rewards import exact_match_reward
from tspo_trl.training.generation import as_texts

FORMS = ["tags, text", "tags, messages", "tool_call, question", "tool_call, messages"]


class SometimesDown:
    """A retriever that fails in every other call."""

    def __init__(self, retriever):
        self.retriever, self.calls = retriever, 0

    def search(self, queries, k):
        self.calls += 1
        if self.calls % 2 == 0:
            raise ConnectionError("the index is missing")
        return self.retriever.search(queries, k)


@pytest.fixture
def make_reporting_trainer(make_trainer, make_chat_trainer, dataset, retriever):
    def make(form, **options):
        protocol, prompt = form.split(", ")
        questions = dataset.select_columns(["question", "golden_answers"])
        rows = {
            "text": dataset,
            "question": questions,
            "messages": questions.map(lambda row: {"prompt": conversation(row["question"])}),
        }[prompt]
        trainer = (make_trainer if prompt == "text" else make_chat_trainer)(
            train_dataset=rows,
            eval_dataset={"first": rows.select(range(2)), "second": rows.select(range(2, 4))},
            eval_strategy="steps",
            eval_steps=3,
            retriever=SometimesDown(retriever),
            max_retrieval_failure_rate=1.0,
            reward_funcs=[exact_match_reward, only_some_reward],
            log_completions=True,
            protocol=protocol,
            max_steps=3,
            **options,
        )
        if prompt != "text":
            prompted_to_search(trainer)
        return trainer

    return make


def only_some_reward(trajectories, log_extra, **kwargs):
    log_extra("answer", [t.answer for t in trajectories])  # `None` where the model gave none
    return [None if i % 2 else 1.0 for i in range(len(trajectories))]


def conversation(question):
    """Messages with and without a name."""
    return [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": question, "name": "asker"},
    ]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No network for Weights & Biases, which reads its settings only once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.teardown()


@pytest.mark.parametrize("form", FORMS)
def test_completions_are_reported_to_wandb(make_reporting_trainer, offline, tmp_path, form):
    trainer = make_reporting_trainer(form, report_to="wandb")
    trainer.train()
    summary, folder = dict(wandb.run.summary), Path(wandb.run.dir)
    wandb.finish()
    assert {"train/search/failed", "eval/first_search/failed", "eval/second_search/calls"} <= set(summary)

    files = [json.loads(file.read_text()) for file in folder.rglob("completions_*.table.json")]
    shown = pd.concat([pd.DataFrame(table["data"], columns=table["columns"]) for table in files])
    assert set(shown.step) == {1, 2, 3}
    assert list(shown) == [
        "step",
        "prompt",
        "completion",
        "exact_match_reward",
        "only_some_reward",
        "answer",
        "advantage",
    ]
    assert shown[["prompt", "completion"]].map(lambda cell: type(cell) is str).all(axis=None)
    rollouts = list(read_rollouts(tmp_path / "run"))
    for record in rollouts:
        trajectory = record["trajectory"]
        pieces = [f"ASSISTANT\n{turn.text}" for turn in trajectory.turns]
        if form == "tags, text":
            pieces = [trainer.processing_class.decode(trajectory.completion_ids)]
        pieces += [passage.text for turn in trajectory.turns for passage in turn.passages]
        found = shown[[all(piece in cell for piece in pieces) for cell in shown.completion]]
        assert any(record["question"] in prompt for prompt in found.prompt)
    statuses = Counter(record["trajectory"].status for record in rollouts)
    assert statuses["retrieval_failed"]
    assert any(len(record["trajectory"].turns) > 2 for record in rollouts)


def test_metrics_are_reported_to_tensorboard(make_reporting_trainer, tmp_path):
    make_reporting_trainer("tags, messages", report_to="tensorboard").train()
    (events,) = (tmp_path / "run" / "runs").rglob("events.*")
    reported = EventAccumulator(str(events)).Reload()
    assert [event.step for event in reported.Scalars("train/search/calls")] == [1, 2, 3]
    assert [event.step for event in reported.Scalars("eval/second_hit")] == [3]


def test_a_conversation_is_shown_as_text(tokenizer):
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "Emma"}}}
    prompt = [
        {"role": "user", "content": "Who wrote Emma?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    ids = tokenizer("<information> Doc 1 </information>")["input_ids"]
    turns = [
        Turn(token_ids=[7], text="<search> Emma </search>", action="search", observation_ids=ids),
        Turn(token_ids=[7], text="<answer> Jane Austen </answer>", action="answer"),
    ]
    shown, completion = as_texts(prompt, Trajectory(prompt_ids=[5], turns=turns), TagProtocol(tokenizer))
    assert shown == f"USER\nWho wrote Emma?\n\nASSISTANT\n{[call]}"
    observation = tokenizer.decode(ids).strip()
    assert completion == (
        f"ASSISTANT\n<search> Emma </search>\n\nTOOL\n{observation}\n\nASSISTANT\n<answer> Jane Austen </answer>"
    )
