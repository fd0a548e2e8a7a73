"""The vLLM engines without vLLM: errors, a failing server, sleep, several processes for one model."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from trl import import_utils

from helpers.paths import ROOT
from tspo_trl.engines import requests as request_engines
from tspo_trl.engines import vllm as vllm_engines
from tspo_trl.engines.vllm import VLLMEngine, VLLMServerEngine, check_vllm, vllm_engine


def test_missing_vllm_is_reported_before_the_model_is_loaded(make_trainer, monkeypatch):
    monkeypatch.setattr(vllm_engines, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"`use_vllm=True` needs vLLM.*pip install 'tspo-trl\[vllm\]'"):
        make_trainer(use_vllm=True, model="no such model")


@pytest.mark.parametrize("version", ["0.8.1", "0.21.9", "0.31.1", "0.32.0+cu130"])
def test_error_of_an_unsupported_version_names_it_and_the_supported_ones(monkeypatch, version):
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *args, **kwargs: (True, version))
    expected = (
        "`use_vllm=True` needs another version of vLLM. TRL currently supports vLLM versions from 0.22.0 to 0.31.0. "
    )
    with pytest.raises(ImportError, match=re.escape(f"{expected}You have version {version} installed.")):
        check_vllm()


def test_the_extra_and_the_docs_allow_the_versions_of_vllm_that_trl_allows(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (of_trl,) = (requirement for requirement in project["dependencies"] if requirement.startswith("trl>"))
    assert project["optional-dependencies"]["vllm"] == [of_trl.replace("trl", "trl[vllm]")]
    requirements = [Requirement(text) for text in metadata.requires("trl")]
    (vllm,) = (requirement for requirement in requirements if requirement.name == "vllm")
    lowest, newest = sorted((part.version for part in vllm.specifier), key=Version)
    assert f"vLLM {lowest} to {newest}" in (ROOT / "docs/scaling.md").read_text()
    for version in (lowest, newest, f"{newest}+cu130"):
        monkeypatch.setattr(
            import_utils, "_is_package_available", lambda *args, version=version, **kwargs: (True, version)
        )
        check_vllm()


class FakeServer(BaseHTTPRequestHandler):
    """Answers with the queued errors first. Then continues a prompt with its last token plus one, two, ..."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": "policy", "max_model_len": 99}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.errors:
            status, headers = self.server.errors.pop(0)
            self.reply(status, {"error": "the reason"}, headers)
            return
        tokens = [body["prompt"][-1] + 1 + i for i in range(body["max_tokens"])]
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-0.5] * len(tokens)}}
        self.reply(200, {"choices": [choice]})

    def reply(self, status, body, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        server.errors, server.requests = [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def delays(monkeypatch):
    """The requested delays between attempts. The engine does not wait for them."""
    waited = []

    class Closed:
        def wait(self, seconds):
            waited.append(seconds)
            return False

        def set(self):
            pass

    monkeypatch.setattr(request_engines, "Event", Closed)
    return waited


def generation(**options):
    defaults = {
        "mode": "server",
        "server_base_url": None,
        "server_host": "127.0.0.1",
        "server_port": 0,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": {"top_p": 0.9},
        "tensor_parallel_size": 1,
        "enable_sleep_mode": False,
    }
    return SimpleNamespace(**{**defaults, **options})


def collect(engine, number):
    turns = {}
    while len(turns) < number:
        turns.update(engine.collect(wait=True))
    return turns


def test_server_engine_requests_turns_one_by_one(server):
    barriers = []
    connection = generation(server_port=server.server_port)
    engine = vllm_engine(connection, ["</search>"], [2], lambda: barriers.append(True))
    assert engine.max_context_length == 99
    with engine.session():
        assert barriers == [True]
        assert engine.collect(wait=False) == []
        for number in range(20):
            engine.submit(number, [7, 10 * number], 1 + number % 3)
        turns = collect(engine, 20)
    assert {n: turn.token_ids for n, turn in turns.items()} == {
        n: [10 * n + 1 + i for i in range(1 + n % 3)] for n in range(20)
    }
    assert turns[2].logprobs == [-0.5] * 3
    request = server.requests[0]
    assert (request["temperature"], request["top_p"], request["min_p"]) == (0.7, 0.9, 0.0)
    assert (request["stop"], request["stop_token_ids"], request["include_stop_str_in_output"]) == (
        ["</search>"],
        [2],
        True,
    )


def test_request_is_repeated_after_server_errors(server, delays):
    engine = VLLMServerEngine(server.url, {}, lambda: None)
    server.errors += [(500, {}), (503, {}), (200, {})]  # the last one is a reply without a completion
    with engine.session():
        engine.submit(4, [1], 2)
        assert collect(engine, 1)[4].token_ids == [2, 3]
    assert len(server.requests) == 4
    assert len(delays) == 3


@pytest.mark.parametrize(("headers", "shortest"), [({}, 0.75), ({"Retry-After": "7"}, 7.0)])
def test_request_is_repeated_after_too_many_requests(server, delays, headers, shortest):
    engine = VLLMServerEngine(server.url, {}, lambda: None)
    server.errors += [(429, headers)] * 2
    with engine.session():
        engine.submit(4, [1], 2)
        assert collect(engine, 1)[4].token_ids == [2, 3]
    assert len(server.requests) == 3
    assert len(delays) == 2
    assert min(delays) >= shortest
    assert max(delays) <= max(shortest, 3.0)


def test_request_is_given_up_if_the_server_asks_for_a_very_long_delay(server, delays):
    engine = VLLMServerEngine(server.url, {}, lambda: None)
    server.errors += [(503, {"Retry-After": "3600"})]
    with engine.session():
        engine.submit(0, [1], 2)
        with pytest.raises(ConnectionError, match=r"HTTP 503"):
            collect(engine, 1)
    assert delays == []


def test_permanent_server_errors_end_the_run_with_the_last_error(server, delays):
    engine = VLLMServerEngine(server.url, {}, lambda: None)
    server.errors += [(500, {})] * 6
    with engine.session():
        engine.submit(0, [1], 2)
        with pytest.raises(ConnectionError, match=r"failed 6 times. HTTP 500: .*the reason.*last checkpoint"):
            collect(engine, 1)


def test_refused_request_is_not_repeated(server, delays):
    engine = VLLMServerEngine(server.url, {}, lambda: None)
    server.errors += [(400, {})]
    with engine.session():
        engine.submit(0, [1], 2)
        with pytest.raises(RuntimeError, match=r"refuses a turn. HTTP 400: .*the reason"):
            collect(engine, 1)
    assert len(server.requests) == 1


def test_constructor_reports_an_unreachable_server(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=f"{server.url} does not answer.*`vllm_server_base_url`"):
        VLLMServerEngine(server.url, {}, lambda: None)


class FakeLLM:
    """Records sleeping, waking and requests. Its engine never finishes a turn."""

    def __init__(self, events):
        self.events = events
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=50),
            abort_request=lambda ids: events.append(("abort", ids)),
            add_request=lambda name, prompt, params: events.append(("add", name)),
            step=list,
        )

    def wake_up(self, tags):
        self.events.append(("wake", tags))

    def sleep(self, level):
        self.events.append(("sleep", level))


@pytest.fixture
def colocated(monkeypatch):
    monkeypatch.setattr(vllm_engines, "_sampling_params", lambda sampling, max_tokens: None)
    events = []
    connection = generation(mode="colocate", enable_sleep_mode=True, _llm_weights_sleeping=True)
    connection.llm = FakeLLM(events)

    def sync_weights():
        events.append("sync")
        connection._llm_weights_sleeping = False

    connection.sync_weights = sync_weights
    return vllm_engine(connection, [], [2], lambda: None), connection, events


def test_sleeping_engine_is_awake_during_a_session(colocated):
    engine, connection, events = colocated
    assert isinstance(engine, VLLMEngine)
    with engine.session():
        assert events == ["sync", ("wake", ["kv_cache"])]
    assert events[2:] == [("abort", []), ("sleep", 2)]
    assert connection._llm_weights_sleeping
    del events[:]
    connection._llm_weights_sleeping = False  # TRL has just sent the weights of this step
    with engine.session():
        assert events == [("wake", ["kv_cache"])]


def fail_in_session(engine):
    with engine.session():
        engine.submit(0, [1], 5)
        assert engine.collect(wait=False) == []
        raise KeyError("mine")


def test_unfinished_turns_are_aborted_after_an_error(colocated):
    engine, _, events = colocated
    with pytest.raises(KeyError, match="mine"):
        fail_in_session(engine)
    assert events[-3:] == [("add", "turn-1"), ("abort", ["turn-1"]), ("sleep", 2)]


# One model over two processes

WORKER = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
from tspo_trl.engines import vllm as vllm_engines

dist.init_process_group("gloo")
rank = dist.get_rank()
calls = []

def generate(prompts, sampling_params, use_tqdm):
    calls.append([prompt["prompt_token_ids"] for prompt in prompts])
    outputs = []
    for prompt, budget in zip(prompts, sampling_params, strict=True):
        tokens = [prompt["prompt_token_ids"][-1] + 1] * budget
        entries = [{token: SimpleNamespace(logprob=-1.0)} for token in tokens]
        outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=entries)]))
    return outputs

vllm_engines._sampling_params = lambda sampling, max_tokens: max_tokens
config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=50))
connection = SimpleNamespace(
    llm=SimpleNamespace(generate=generate, llm_engine=config), tensor_parallel_size=2, enable_sleep_mode=False, tp_group=None
)
engine = vllm_engines.VLLMParallelEngine(connection, {})
with engine.session():
    for round in range(3 if rank else 1):  # rank 0 is done two rounds before rank 1
        engine.submit(0, [100 * rank + round], 2)
        engine.submit(1, [100 * rank + 10 + round], 1)
        turns = dict(engine.collect(wait=True))
        assert turns[0].token_ids == [100 * rank + round + 1] * 2, turns
        assert turns[1].token_ids == [100 * rank + 10 + round + 1], turns
assert len(calls) == 3, calls
gathered = [None, None]
dist.all_gather_object(gathered, calls)
assert gathered[0] == gathered[1]  # all processes of a model generate the same
print("fine")
dist.destroy_process_group()  # or its threads may still run when Python ends, which aborts the process
"""


def test_processes_that_share_a_model_generate_together_until_all_are_done(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    source = str(Path(vllm_engines.__file__).parents[2])
    result = subprocess.run(
        [*launcher, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("fine") == 2
