import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tspo_trl import BM25Retriever
from tspo_trl.demo import demonstrate, make_model, make_tokenizer, make_world, supervise
from tspo_trl.demo.warmup import demonstrate_world, sample
from tspo_trl.rollout.tags import HINT


def test_the_tokenizer_knows_every_word_of_every_world(tokenizer):
    for seed in range(3):
        world = make_world(seed)
        texts = [p.text for p in world.passages] + [str(q.row()["prompt"]) for q in world.train_questions]
        assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in [*texts, HINT])


def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path, tokenizer):
    text = "Question: Who wrote Silent Harbor?\n<search> Silent Harbor</search> (Title: Mira Talvek)"
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() < 2e6


def test_models_with_the_same_seed_are_equal_and_the_random_state_is_unchanged(tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = make_model(tokenizer, seed=3), make_model(tokenizer, seed=3), make_model(tokenizer, seed=4)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_demonstrations_without_mistakes_find_the_answer(tokenizer, world):
    questions = [*world.train_questions, *world.heldout_questions]
    for trajectory, question in zip(demonstrate_world(tokenizer, world), questions, strict=True):
        assert trajectory.status == "answered"
        assert trajectory.answer == question.answer
        assert tuple(q for q in trajectory.queries if q) == question.queries
        assert question.answer in trajectory.passage_texts[-2]


def test_mistakes_have_the_requested_frequency(tokenizer):
    world = make_world(0)
    questions = [*world.train_questions, *world.heldout_questions]
    trajectories = demonstrate_world(tokenizer, world, wrong_query=0.5, wrong_answer=0.8)
    wrong = sum(t.answer != q.answer for t, q in zip(trajectories, questions, strict=True)) / len(questions)
    assert 0.7 < wrong < 0.85
    first = sum(t.queries[0] != q.queries[0] for t, q in zip(trajectories, questions, strict=True)) / len(questions)
    assert 0.4 < first < 0.6


def test_supervision_trains_on_turns_only(tokenizer, world):
    """A model trained on demonstrations with a constant query and answer repeats them, and reads real passages."""
    model = make_model(tokenizer, hidden_size=32, num_layers=1)
    prompts = [str(q.row()["prompt"]) for q in world.train_questions]
    scripts = [["<search> Golden Mirror</search>", "<answer> Iron Tower</answer>"]] * len(prompts)
    demonstrations = demonstrate(tokenizer, BM25Retriever(world.passages), prompts, scripts)
    steps = supervise(model, demonstrations, steps=60, batch_size=16)
    assert steps == 60
    trajectories = sample(model, tokenizer, world, world.heldout_questions[:8], greedy=True)
    assert [t.queries[0] for t in trajectories] == ["Golden Mirror"] * 8
    assert [t.answer for t in trajectories] == ["Iron Tower"] * 8


def test_supervision_ends_when_its_condition_is_met(tokenizer, world):
    model = make_model(tokenizer, hidden_size=32, num_layers=1)
    demonstrations = demonstrate_world(tokenizer, world)
    assert supervise(model, demonstrations, steps=50, batch_size=4, until=lambda: True, check_every=3) == 3


def test_the_tokenizer_can_include_words_of_other_texts():
    tokenizer = make_tokenizer(["Zyzzogeton haenschi"])
    assert tokenizer.unk_token_id not in tokenizer("Zyzzogeton haenschi")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("qwertyuiop")["input_ids"]
