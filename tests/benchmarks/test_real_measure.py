"""The log-probabilities of the real model's sampling, measured here with a tiny one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_model import measure as program
from benchmarks.real_model.measure import Agreement, measure, read_again, table
from helpers.paths import ROOT
from tspo_trl import SearchConfig


@pytest.fixture
def measured(policy_dir, tokenizer, world, retriever):
    """A function that measures the tiny policy in a precision."""
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()
    questions = [question.text for question in world.train_questions[:6]]
    limits = {"max_searches": 3, "num_passages": 2, "max_turn_tokens": 16, "max_observation_tokens": 64}
    config = SearchConfig(prompt_template="Question: {question}\n", **limits)

    def run(mixed):
        torch.manual_seed(0)
        return measure(model, tokenizer, config, retriever, questions, mixed=mixed)

    return run


def test_sampling_and_reading_agree_up_to_the_rounding_of_the_precision(measured):
    single, mixed = (measured(value).differences.abs().max() for value in (False, True))
    assert single < 1e-4
    assert 1e-4 < mixed < 0.3


def test_only_written_tokens_are_compared(measured, monkeypatch):
    seen = []

    def watched(model, trajectory):
        seen.append(trajectory)
        return read_again(model, trajectory)

    monkeypatch.setattr(program, "read_again", watched)
    found = measured(False)
    assert len(seen) == 6
    assert any(len(trajectory.turns) > 1 for trajectory in seen)
    assert len(found.differences) == sum(sum(trajectory.loss_mask) for trajectory in seen)


def test_the_table_counts_ratios_that_would_be_clipped():
    shown = table({"float32": Agreement(2.0, torch.tensor([0.0, 0.1, -0.5, 0.4]))})
    row = [cell.strip() for cell in shown.splitlines()[2].strip("|").split("|")]
    assert row == ["float32", "2.0", "4", "2.5e-01", "5.0e-01", "50.00%"]


def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        program.main([str(tmp_path)])
    assert "has no model. Run `make real` first" in capsys.readouterr().err
