"""Questions with supporting titles, and a tiny model that answers without a search."""

import pytest
from datasets import Dataset

from tspo_trl.demo import demonstrate, make_model, supervise


@pytest.fixture(scope="session")
def titled(world):
    """Questions of the demo with their supporting titles. Their prompts are those of the demo."""
    questions = [*world.train_questions, *world.heldout_questions]
    return Dataset.from_list([q.row() | {"supporting_titles": list(q.queries)} for q in questions])


@pytest.fixture(scope="session")
def silent_dir(tmp_path_factory, tokenizer, world, retriever):
    """A tiny policy that has learned to answer without a search."""
    folder = tmp_path_factory.mktemp("silent")
    model = make_model(tokenizer, hidden_size=48, num_layers=2)
    prompts = [str(question.row()["prompt"]) for question in world.train_questions]
    scripts = [[f"<answer> {question.answer}</answer>"] for question in world.train_questions]
    supervise(model, demonstrate(tokenizer, retriever, prompts, scripts), steps=100, batch_size=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
