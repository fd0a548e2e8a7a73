"""The search agent: loading, agreement with the trainer, errors, and `search_config.json`."""

import copy
import json
from typing import get_args

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from helpers.chats import TOKENIZERS
from helpers.limits import LIMITS
from tspo_trl import BM25Retriever, SearchAgent, SearchConfig, TagProtocol, TSPOConfig, __version__
from tspo_trl.demo import make_tokenizer
from tspo_trl.rollout.search_config import PROTOCOLS, ProtocolName
from tspo_trl.sharing.mixin import keep_from_hub
from tspo_trl.training.datasets import find_prompt_template


@pytest.fixture(scope="module")
def questions(world):
    return [question.text for question in world.heldout_questions[:7]]


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A tiny model with the tokenizer and the chat template of Qwen3."""
    folder, tokenizer = tmp_path_factory.mktemp("chat"), TOKENIZERS["qwen3"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def plain_dataset(world):
    """Questions without prompts, which the protocol adds."""
    return Dataset.from_list([{"question": q.text, "golden_answers": [q.answer]} for q in world.train_questions[:8]])


def tokens(trajectories):
    return [(t.prompt_ids, t.completion_ids, t.status) for t in trajectories]


# Rollouts


def test_a_build_for_an_accelerator_that_is_not_there_uses_the_cpu(policy_dir, retriever, questions, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever, **LIMITS)
    assert agent(questions[0]).turns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "`temperature` must be a number of at least 0, got nan"),
        ({"temperature": -1}, "`temperature` must be a number of at least 0, got -1"),
        ({"dtype": "foo"}, "`dtype` must be 'auto' or a floating-point type of PyTorch.*, got 'foo'"),
        ({"device": "foo"}, "`device`: 'foo' cannot be used here"),
        ({"device": "cuda:99"}, "`device`: 'cuda:99' cannot be used here"),
        ({"base_model": "./no"}, "`base_model`: there is no folder './no'"),
        ({"model": "./no"}, "`model`: there is no folder './no'"),
        ({"model": "./no", "subfolder": "x"}, "`model`: there is no folder './no'"),
        ({"model": ""}, "`model` must be a folder or a name on the Hub, got ''"),
    ],
)
def test_bad_arguments_are_named_before_the_model_is_loaded(policy_dir, retriever, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        SearchAgent.from_pretrained(**{"model": policy_dir, "retriever": retriever, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("inf")}, "`temperature` must be a number of at least 0, got inf"),
        ({"tokenizer": "./no"}, "`tokenizer`: there is no folder './no'"),
        ({"url": "localhost:8000"}, "`url` must be like 'http://localhost:8000'"),
    ],
)
def test_bad_arguments_of_an_endpoint_are_named(policy_dir, retriever, options, message):
    given = {"url": "http://localhost:9", "model": "tiny", "tokenizer": policy_dir, "retriever": retriever, **options}
    with pytest.raises((ValueError, OSError), match=message):
        SearchAgent.from_endpoint(**given)


def test_order_and_results_do_not_depend_on_the_batch_size(policy_dir, retriever, questions):
    sizes = {1: None, 3: None, 32: None}
    for size in sizes:
        agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever, batch_size=size, **LIMITS)
        sizes[size] = tokens(agent.rollout(questions))
    assert sizes[1] == sizes[3] == sizes[32]
    prompts = [agent.search_loop.protocol.prompt(question) for question in questions]
    assert [ids for ids, _, _ in sizes[3]] == agent.search_loop.protocol.encode_prompts(prompts)
    assert len({len(ids) for ids, _, _ in sizes[3]}) > 1  # so that the batches are not in the order of the questions
    assert tokens([agent(questions[4])]) == [sizes[3][4]]
    assert agent.rollout([]) == []


def test_no_batch_is_larger_than_the_batch_size(policy_dir, retriever, questions, monkeypatch):
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever, batch_size=3, **LIMITS)
    batches = []
    run = agent.search_loop.run
    monkeypatch.setattr(agent.search_loop, "run", lambda ids: batches.append([len(i) for i in ids]) or run(ids))
    agent.rollout(questions)
    lengths = [length for batch in batches for length in batch]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("chat", "protocol"), [(False, "tags"), (True, "tags"), (True, "tool_call")])
def test_prompts_equal_those_of_training(
    make_trainer, plain_dataset, retriever, chat_dir, policy_dir, chat, protocol, tmp_path
):
    options = {"chat_template_kwargs": {"enable_thinking": False}} if chat else {}
    if protocol == "tool_call":
        options |= {"max_observation_tokens": 120, "max_completion_length": 400}
    trainer = make_trainer(
        model=chat_dir if chat else policy_dir, protocol=protocol, train_dataset=plain_dataset, **options
    )
    trainer.save_model(str(tmp_path / "saved"))
    trainer.tools = list(trainer.search_loop.protocol.tools)  # TRL renders prompts with tools
    expected, _, _ = trainer._tokenize_prompts([row["prompt"] for row in trainer.train_dataset])

    agent = SearchAgent.from_pretrained(tmp_path / "saved", retriever=retriever)
    assert agent.config == trainer.search_config
    assert [t.prompt_ids for t in agent.rollout(plain_dataset["question"])] == expected


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_answers_like_the_model_in_memory(make_trainer, retriever, questions, tmp_path, lora):
    def reward(completions, **kwargs):
        return [float(index % 4) for index, _ in enumerate(completions)]

    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(reward_funcs=reward, peft_config=peft_config, **options)
    config, tokenizer = trainer.search_config, trainer.processing_class

    def in_memory():
        model = trainer.accelerator.unwrap_model(trainer.model)
        return tokens(SearchAgent.from_model(model, tokenizer, retriever=retriever, config=config).rollout(questions))

    before = in_memory()
    trainer.train()
    after = in_memory()
    assert after != before
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_config.json").exists() == lora
    assert tokens(SearchAgent.from_pretrained(checkpoint, retriever=retriever).rollout(questions)) == after


def test_the_model_in_memory_is_not_changed(policy_dir, retriever, questions):
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    model.generation_config.repetition_penalty = 5.0  # would change greedy decoding
    model.generation_config.suppress_tokens = [5]
    own, before = model.generation_config, copy.deepcopy(model.generation_config.to_dict())
    model.train()
    agent = SearchAgent.from_model(model, make_tokenizer(), retriever=retriever, config=SearchConfig(**LIMITS))
    expected = SearchAgent.from_pretrained(policy_dir, retriever=retriever, **LIMITS)
    assert tokens(agent.rollout(questions)) == tokens(expected.rollout(questions))
    assert model.training
    assert model.generation_config is own
    assert own.to_dict() == before


def test_sampling_is_off_unless_requested(policy_dir, retriever, questions):
    torch.manual_seed(0)
    options = {"retriever": retriever, **LIMITS}
    agent = SearchAgent.from_pretrained(policy_dir, do_sample=True, temperature=1.5, **options)
    sampled = {tuple(t.completion_ids) for t in agent.rollout([questions[0]] * 8)}
    assert len(sampled) > 4
    greedy = SearchAgent.from_pretrained(policy_dir, **options)
    nearly = SearchAgent.from_pretrained(policy_dir, do_sample=True, temperature=1.5, top_k=1, **options)
    assert tokens(nearly.rollout(questions)) == tokens(greedy.rollout(questions))


def test_settings_are_read_and_overridden(policy_dir, retriever, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((type(tmp_path)(policy_dir) / name).read_bytes())
    SearchConfig(**LIMITS, prompt_template="Find out: {question}\n").save(tmp_path)
    agent = SearchAgent.from_pretrained(tmp_path, retriever=retriever, max_searches=1)
    assert (agent.config.max_searches, agent.config.num_passages) == (1, 2)
    assert agent.search_loop.limits.max_searches == 1
    assert agent.search_loop.protocol.prompt("Who {x}?") == "Find out: Who {x}?\n"
    trajectory = agent("Who wrote Emma?")
    assert len(trajectory.turns) <= 2
    assert SearchAgent.from_pretrained(policy_dir, retriever=retriever).config == SearchConfig()


def test_failed_searches_are_reported_by_the_status(policy_dir, questions):
    class Broken:
        def search(self, queries, k):
            raise ConnectionError("away")

    trajectories = SearchAgent.from_pretrained(policy_dir, retriever=Broken(), **LIMITS).rollout(questions)
    assert "retrieval_failed" in {trajectory.status for trajectory in trajectories}


# Adapters


@pytest.fixture(scope="module")
def adapter(policy_dir, tmp_path_factory):
    """An adapter without a tokenizer that refers to its base model by path."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    model = get_peft_model(
        model, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    return folder


def rename_base(adapter, folder, name):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / file).write_bytes((adapter / file).read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    return folder


def test_an_adapter_loads_its_base_model_and_tokenizer(adapter, policy_dir, retriever, questions):
    found = tokens(SearchAgent.from_pretrained(adapter, retriever=retriever, **LIMITS).rollout(questions))
    assert found != tokens(SearchAgent.from_pretrained(policy_dir, retriever=retriever, **LIMITS).rollout(questions))


def test_a_missing_base_model_is_reported(adapter, policy_dir, retriever, questions, tmp_path):
    lost = rename_base(adapter, tmp_path, "/gone/base")
    with pytest.raises(ValueError, match=r"adapter .*needs its base model '/gone/base'.*Set `base_model`") as error:
        SearchAgent.from_pretrained(lost, retriever=retriever)
    assert str(lost) in str(error.value)
    agent = SearchAgent.from_pretrained(lost, retriever=retriever, base_model=policy_dir, **LIMITS)
    expected = SearchAgent.from_pretrained(adapter, retriever=retriever, **LIMITS)
    assert tokens(agent.rollout(questions)) == tokens(expected.rollout(questions))


def test_an_adapter_that_names_no_base_model_is_reported(adapter, retriever, tmp_path):
    with pytest.raises(ValueError, match="names no base model: set `base_model`"):
        SearchAgent.from_pretrained(rename_base(adapter, tmp_path, None), retriever=retriever)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_search": 3}, r"Unknown settings \['max_search'\].*did you mean 'max_searches'"),
        ({"max_searches": -1}, "`max_searches` must be at least 0, got -1"),
        ({"max_searches": "3"}, "`max_searches` must be a whole number, got '3'"),
        ({"protocol": "xml"}, r"`protocol` must be one of \['tags', 'tool_call'\], got 'xml'"),
        ({"protocol": "tool_call"}, "needs a chat template, but the tokenizer has none"),
        ({"prompt_template": "Answer."}, r"`prompt_template` must be a text with '\{question\}' in it, got 'Answer.'"),
        ({"base_model": "other"}, "`base_model` is for adapters"),
        ({"device": "cpu", "model_init_kwargs": {"device_map": "auto"}}, "cannot both be set"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"retriever": None}, "`retriever` must be an object with a method `search"),
    ],
)
def test_wrong_options_are_reported(policy_dir, retriever, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SearchAgent.from_pretrained(policy_dir, **{"retriever": retriever, **options})


def test_from_pretrained_refuses_a_model_in_memory(policy_dir, retriever):
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    with pytest.raises(TypeError, match=r"For a model in memory, use `SearchAgent\.from_model`"):
        SearchAgent.from_pretrained(model, retriever=retriever)


def test_a_missing_model_is_reported(retriever, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        SearchAgent.from_pretrained(tmp_path / "nowhere", retriever=retriever)


def test_several_questions_are_not_one_question(policy_dir, retriever):
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever)
    with pytest.raises(ValueError, match=r"must be a text, got a list. For several questions, call `agent.rollout"):
        agent(["Who?", "Where?"])


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("Who?", "must be a list of texts"),
        (["Who?", " "], "Question 1"),
        ([None], "Question 0 must be a non-empty text"),
        (["Zoë?", "\ud800"], r"Question 1 must be valid Unicode, found a lone surrogate.*'\\ud800'"),
    ],
)
def test_wrong_questions_are_reported(policy_dir, retriever, questions, message):
    with pytest.raises(ValueError, match=message):
        SearchAgent.from_pretrained(policy_dir, retriever=retriever).rollout(questions)


def test_a_model_without_a_prompt_template_needs_prompts(policy_dir, retriever):
    agent = SearchAgent.from_pretrained(policy_dir, retriever=retriever, prompt_template=None, **LIMITS)
    with pytest.raises(ValueError, match=r"'prompt_template' .*is null.*`rollout_prompts`"):
        agent("Who wrote Emma?")
    (trajectory,) = agent.rollout_prompts(["Question: Who wrote Emma?\n"])
    assert trajectory.turns


# search_config.json


def test_a_saved_config_is_loaded_unchanged(tmp_path):
    config = SearchConfig(protocol="tool_call", max_searches=2, chat_template_kwargs={"enable_thinking": False})
    config.save(tmp_path)
    data = json.loads((tmp_path / "search_config.json").read_text())
    assert data["tspo_trl_version"] == __version__
    assert "{question}" in data["prompt_template"]
    assert SearchConfig.load(tmp_path) == SearchConfig.load(tmp_path / "search_config.json") == config


def test_the_defaults_equal_those_of_training():
    args = TSPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    config = SearchConfig()
    assert {
        name: getattr(args, name) for name in vars(config) if hasattr(args, name) and name != "chat_template_kwargs"
    } == {
        name: value for name, value in vars(config).items() if name not in ("prompt_template", "chat_template_kwargs")
    }


def test_another_protocol_has_its_own_prompt_template():
    tags = SearchConfig()
    calls = tags.replace(protocol="tool_call")
    assert calls.prompt_template == SearchConfig(protocol="tool_call").prompt_template != tags.prompt_template
    assert tags.replace(protocol="tool_call", prompt_template="{question}").prompt_template == "{question}"
    assert tags.replace(max_searches=1).prompt_template == tags.prompt_template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "search_config.json is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        (
            '{"format_version": 2, "tspo_trl_version": "9.0"}',
            r"'format_version' is 2.*written by tspo_trl 9\.0.*upgrade",
        ),
        ('{"format_version": 1, "tspo_trl_version": "9.0", "max_pages": 3}', r"does not know: \['max_pages'\].*9\.0"),
        ('{"format_version": 1, "max_searches": "many"}', "search_config.json: `max_searches` must be a whole number"),
        (
            '{"format_version": 1, "chat_template_kwargs": 3}',
            "search_config.json: `chat_template_kwargs` must be a dictionary",
        ),
    ],
)
def test_an_unusable_file_is_reported(tmp_path, text, message):
    (tmp_path / "search_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        SearchConfig.load(tmp_path)


def prompts(*rows):
    return [{"question": question, "prompt": prompt} for question, prompt in rows]


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        ([{"question": "Who?"}], "default"),
        (prompts(("Who?", None), ("Where?", None)), "default"),
        (prompts(("Who?", "Q: Who?\nA:"), ("Where {x}?", "Q: Where {x}?\nA:")), "Q: {question}\nA:"),
        (prompts(("Who?", "Q: Who?\nA:"), ("Where?", "Another: Where?")), None),
        (prompts(("Who?", "Q: Who?\nA:"), ("Where?", None)), None),
        (prompts(("Who?", "Q: something else")), None),
        (prompts((None, "Q: Who?")), None),
        (prompts(("Who?", [{"role": "user", "content": "Who?"}])), None),  # this tokenizer has no chat template
    ],
)
def test_the_template_is_inferred_from_prompts(tokenizer, rows, template):
    protocol = TagProtocol(tokenizer)
    expected = protocol.prompt_template if template == "default" else template
    assert find_prompt_template(Dataset.from_list(rows), protocol) == expected
    assert find_prompt_template(IterableDataset.from_generator(lambda: iter(rows)), protocol) == expected


def test_the_template_is_inferred_from_conversations():
    protocol = TagProtocol(TOKENIZERS["qwen3"])

    def row(question, *before):
        messages = [*before, {"role": "user", "content": f"Q: {question}"}]
        return {"question": question, "prompt": messages}

    assert find_prompt_template([row("Who?"), row("Where?")], protocol) == "Q: {question}"
    assert find_prompt_template([row("Who?", {"role": "system", "content": "Be brief."})], protocol) is None


def test_every_protocol_has_a_name():
    assert set(PROTOCOLS) == set(get_args(ProtocolName))


def test_failure_to_write_the_model_card_does_not_stop_training(make_trainer, world, caplog, tmp_path):
    class Unreachable(BM25Retriever):
        @property
        def description(self):
            raise ConnectionError("the server is down")

    trainer = make_trainer(retriever=Unreachable(world.passages), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    assert "README.md is that of TRL" in caplog.text
    assert (tmp_path / "run" / "checkpoint-1" / "search_config.json").is_file()
    assert "# Model Card for run" in (tmp_path / "run" / "README.md").read_text()


def test_rollouts_are_not_pushed_to_the_hub(tmp_path):
    (tmp_path / "run").mkdir()
    run = tmp_path / "run"
    keep_from_hub(run, [run / "trajectories", run / "logs" / "retrieval", tmp_path / "elsewhere", run])
    lines = (run / ".gitignore").read_text().splitlines()
    assert lines[1:] == ["training_args.bin", "/trajectories/", "/logs/retrieval/"]
    (run / ".gitignore").write_text("mine")
    keep_from_hub(run, [run / "trajectories"])
    assert (run / ".gitignore").read_text() == "mine"
