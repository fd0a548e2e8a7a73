"""Generation by the real vLLM, in the training process and on a server. `make test-vllm` installs its build for CPUs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from helpers.paths import HELPERS
from helpers.servers import Server, free_port
from tspo_trl.demo import make_model, make_tokenizer, make_world, supervise
from tspo_trl.demo.warmup import demonstrate_world

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")
SCRIPTS = HELPERS / "vllm_on_cpu"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy with larger heads than in other tests, because vLLM has no kernels for very small ones."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer, world = make_tokenizer(), make_world(0, train_books=12, heldout_books=6)
    model = make_model(tokenizer, hidden_size=128, num_layers=2)
    demonstrations = demonstrate_world(tokenizer, world, wrong_query=0.3, wrong_answer=0.9)
    supervise(model, demonstrations, steps=60, batch_size=16)
    # A server that reloads its weights from a file does not update a tied head
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(policy, *arguments, **options):
    command = [sys.executable, str(SCRIPTS / "train.py"), policy, "--options", json.dumps(options), *arguments]
    result = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    run = json.loads(line.removeprefix("RESULT "))
    run["steps"] = [entry for entry in run["history"] if "sampling/sampling_logp_difference/mean" in entry]
    return run


def check(run):
    """Weights change in every step, and vLLM uses the new weights."""
    assert len(run["steps"]) == 4
    assert run["moved"] > 1e-3
    for step in run["steps"]:
        assert step["sampling/sampling_logp_difference/mean"] < 2e-2
        assert 0.8 < step["sampling/importance_sampling_ratio/mean"] < 1.2
        assert step["retrieval/searches"] > 0


def test_engine_in_the_training_process_uses_the_current_weights(policy):
    run = train(policy, vllm_max_model_length=256, vllm_gpu_memory_utilization=0.3)
    check(run)
    assert (run["engine"], run["max_context_length"]) == ("VLLMEngine", 256)
    # vLLM computes in bfloat16, whose rounding may change the order of nearly equal tokens
    assert sum(margin is None for margin in run["margins"]) > 0.7 * len(run["margins"])
    assert max(margin or 0.0 for margin in run["margins"]) < 0.1


class VLLMServer(Server):
    """vLLM's own server on a free port, with a copy of the policy."""

    def __init__(self, policy, folder):
        model = shutil.copytree(policy, folder / "served")
        options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1"]
        super().__init__(
            *("--model", model), *options, "--logprobs-mode", "processed_logprobs", script=SCRIPTS / "serve.py"
        )
        self.log = folder / "server.log"

    def start(self):
        self.port = self.port or free_port()
        command = [sys.executable, str(self.script), *self.arguments, "--port", str(self.port)]
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # children keep the patches
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
            )
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)  # including the process of its engine, which would continue to run
        self.process.wait()

    def wait_until_ready(self, seconds=300):
        try:
            return super().wait_until_ready(seconds)
        except Exception as error:
            raise RuntimeError(self.log.read_text()[-4000:]) from error


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    with VLLMServer(policy, tmp_path_factory.mktemp("server")) as server:
        yield server


def test_server_uses_the_current_weights_and_generates_the_turns_of_transformers(policy, server):
    run = train(policy, vllm_mode="server", vllm_server_base_url=server.url)
    check(run)
    assert (run["engine"], run["max_context_length"]) == ("VLLMServerEngine", 256)
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-3 for step in run["steps"])
    # Tokens are equal, except where rounding decides
    assert len(run["margins"]) > 20
    assert sum(margin is None for margin in run["margins"]) > 0.9 * len(run["margins"])
    assert max(margin or 0.0 for margin in run["margins"]) < 1e-3


def test_outdated_weights_of_a_server_are_detected_and_corrected(policy, server):
    """Shows that the checks of the other tests detect missing updates of the weights."""
    run = train(policy, "--frozen_server", vllm_mode="server", vllm_server_base_url=server.url, max_steps=2)
    difference = [step["sampling/sampling_logp_difference/mean"] for step in run["steps"]]
    ratio = [step["sampling/importance_sampling_ratio/mean"] for step in run["steps"]]
    assert min(difference) > 0.1
    assert max(ratio) < 0.8
