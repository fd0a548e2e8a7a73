"""Generation by servers with and without extensions of the API, and by servers that fail."""

import pytest
from transformers import AutoTokenizer, GenerationConfig

from helpers.fake_endpoint import FakeEndpoint
from helpers.limits import LIMITS
from tspo_trl import EndpointEngine, SearchAgent, TagProtocol
from tspo_trl.engines.endpoint import EndpointError

PROMPT = "Question: {question}\n"


@pytest.fixture(scope="module")
def questions(world):
    return [question.text for question in world.heldout_questions[:10]]


@pytest.fixture
def serve(policy_dir, retriever):
    """A function that serves the tiny policy, and returns the server and an agent that uses it."""
    servers = []

    def start(kind="vllm", **options):
        server = FakeEndpoint(policy_dir, kind).__enter__()
        servers.append(server)
        options = {"tokenizer": policy_dir, "prompt_template": PROMPT, **LIMITS, **options}
        return server, SearchAgent.from_endpoint(server.url, "tiny", retriever=retriever, **options)

    yield start
    for server in servers:
        server.stop()


def actions_of(trajectories):
    return [(t.status, [(turn.action, turn.content, turn.text) for turn in t.turns]) for t in trajectories]


@pytest.mark.parametrize("kind", ["vllm", "openai", "text", "text with reason"])
def test_rollouts_of_every_kind_of_server_equal_those_of_the_local_model(serve, policy_dir, retriever, questions, kind):
    local = SearchAgent.from_pretrained(policy_dir, retriever=retriever, prompt_template=PROMPT, **LIMITS)
    expected = local.rollout(questions)
    _, agent = serve(kind)
    found = agent.rollout(questions)
    if kind != "vllm":  # a removed closing tag can only be restored if the tags are balanced
        fitting = [i for i, t in enumerate(expected) if all(turn.action != "invalid" for turn in t.turns)]
        assert len(fitting) > len(questions) // 2
        expected, found = [expected[i] for i in fitting], [found[i] for i in fitting]
    if kind in (
        "text",
        "text with reason",
    ):  # decoding and encoding does not preserve the tokens of this tokenizer in later turns
        assert [t[1][0] for t in actions_of(found)] == [t[1][0] for t in actions_of(expected)]
    else:
        assert actions_of(found) == actions_of(expected)
    assert {turn.action for t in found for turn in t.turns} >= {"search", "answer"}
    if kind in ("vllm", "openai"):
        assert [t.completion_ids for t in found] == [t.completion_ids for t in expected]
    assert agent.search_loop.engine.failures == {}


def test_removed_tags_and_eos_tokens_are_restored(serve, policy_dir):
    _, agent = serve("openai")
    engine, eos = agent.search_loop.engine, agent.search_loop.protocol.tokenizer.eos_token_id
    tokenizer = agent.search_loop.protocol.tokenizer

    def read(text, reason, **more):
        return tokenizer.decode(engine._read_choice({"text": text, "finish_reason": reason, **more}).token_ids)

    assert read("I do not know", "stop").endswith("<eos>")
    assert read("I do", "length") == "I do"
    assert read("<search> Silent Harbor", "stop") == "<search> Silent Harbor</search>"
    assert read("<search> a <answer> Mira", "stop", stop_reason="</answer>").endswith("</answer>")
    assert (
        read("<answer> Mira</answer> and more", "length") == "<answer> Mira</answer>"
    )  # the server does not support stop strings
    assert engine._read_choice({"text": "", "finish_reason": "stop"}).token_ids == [eos]
    assert engine._read_choice({"text": "", "finish_reason": "length"}).token_ids == [eos]


def test_parameters_of_requests(serve, questions):
    server, agent = serve(temperature=0.7, seed=5)
    agent.rollout(questions[:2])
    body = server.requests[-1]
    assert body["model"] == "tiny"
    assert body["temperature"] == 0.7
    assert body["stop"] == list(TagProtocol.stop_strings)
    assert body["max_tokens"] == 12
    # Spelled out, because servers fill what is missing from the model's generation_config.json
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: body[name] for name in neutral} == neutral
    assert {request["seed"] for request in server.requests[1:]} == {5, 6}  # one per rollout
    assert agent.search_loop.engine.max_context_length == 2048


def test_temporary_failures_do_not_change_rollouts(serve, questions):
    server, agent = serve()
    undisturbed = actions_of(agent.rollout(questions))
    server.fail = lambda body, count: 500 if count % 3 == 0 else None
    assert actions_of(agent.rollout(questions)) == undisturbed
    assert agent.search_loop.engine.failures == {}


def test_permanent_failure_affects_only_its_rollout(serve, questions):
    server, agent = serve()
    undisturbed = actions_of(agent.rollout(questions))
    tokenizer = agent.search_loop.protocol.tokenizer
    bad = tokenizer(PROMPT.format(question=questions[3]))["input_ids"]
    server.fail = lambda body, count: 400 if body["prompt"][: len(bad)] == bad else None
    trajectories = agent.rollout(questions)
    ((number, message),) = agent.search_loop.engine.failures.items()
    order = sorted(range(len(questions)), key=lambda i: -len(tokenizer(questions[i])["input_ids"]))
    assert order[number] == 3
    assert "refuses completions of 'tiny'. HTTP 400" in message
    assert trajectories[3].answer is None
    assert actions_of(trajectories[:3] + trajectories[4:]) == undisturbed[:3] + undisturbed[4:]


def test_all_rollouts_fail_if_the_server_stops(serve, questions):
    server, agent = serve()
    agent.search_loop.engine._total_timeout = 0.6
    server.stop()
    trajectories = agent.rollout(questions[:4])
    assert [t.status for t in trajectories] == ["no_answer"] * 4
    assert len(agent.search_loop.engine.failures) == 4
    assert f"{server.url}/v1 failed" in agent.search_loop.engine.failures[0]


def test_constructor_reports_unusable_servers(serve, policy_dir, tokenizer):
    server, _ = serve()
    arguments = {"stop_strings": ("</search>",), "eos_token_ids": [2]}
    with pytest.raises(EndpointError, match=r"has no model 'huge', only \['tiny'\]"):
        EndpointEngine(server.url, "huge", tokenizer, **arguments)
    server.fail = lambda body, count: 401
    with pytest.raises(EndpointError, match=r"refuses completions of 'tiny'. HTTP 401"):
        EndpointEngine(server.url, "tiny", tokenizer, **arguments)
    server.fail = lambda body, count: 500
    with pytest.raises(EndpointError, match=r"failed 2 times. HTTP 500"):
        EndpointEngine(server.url, "tiny", tokenizer, total_timeout=0.3, **arguments)
    server.stop()
    with pytest.raises(EndpointError, match="cannot be reached"):
        EndpointEngine(server.url, "tiny", tokenizer, **arguments)
    with pytest.raises(ValueError, match="must be like 'http://localhost:8000', got 'localhost:8000'"):
        EndpointEngine("localhost:8000", "tiny", tokenizer, **arguments)


def test_the_generation_configuration_beside_the_tokenizer_gives_further_ends(serve, policy_dir, tmp_path):
    AutoTokenizer.from_pretrained(policy_dir).save_pretrained(tmp_path)
    _, agent = serve("vllm", tokenizer=str(tmp_path))
    (eos,) = agent.search_loop.eos_token_ids
    GenerationConfig(eos_token_id=[eos, eos + 1]).save_pretrained(tmp_path)
    _, agent = serve("vllm", tokenizer=str(tmp_path))
    assert agent.search_loop.eos_token_ids == {eos, eos + 1}
