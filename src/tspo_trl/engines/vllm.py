"""Generation by vLLM, in the training processes or on a server. TRL creates vLLM and updates its weights."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import torch
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from ..support.http import check_url, describe_reply, lasting_failure
from .base import BatchEngine, Engine, Generation
from .requests import RequestEngine

_ATTEMPTS = 6  # requests for one turn from a server: the delays between them add up to about half a minute
_LONGEST_RETRY_AFTER = 120.0  # seconds: a request is given up if the server asks for a longer delay
_TURN_SECONDS = 600.0  # to wait for the reply to a request


def check_vllm() -> None:
    """
    Check that a version of vLLM is installed that TRL supports.

    Raises:
        `ImportError`: If vLLM is not installed, or if TRL does not support its version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # TRL only warns about versions that it does not support
        try:
            available = is_vllm_available()
        except UserWarning as warning:
            raise ImportError(f"`use_vllm=True` needs another version of vLLM. {warning}") from warning
    if not available:
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed. Install it with `pip install 'tspo-trl[vllm]'`, or set "
            "`use_vllm=False`."
        )


def vllm_engine(
    generation: VLLMGeneration,
    stop_strings: Collection[str],
    eos_token_ids: Sequence[int],
    wait_for_everyone: Callable[[], None],
) -> Engine:
    """
    Create the engine for TRL's connection to vLLM.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's connection to vLLM.
        stop_strings (`Collection[str]`):
            A turn ends with the token that completes one of these.
        eos_token_ids (`Sequence[int]`):
            Tokens with which the model ends a message.
        wait_for_everyone (`Callable[[], None]`):
            A barrier of all processes.

    Returns:
        [`Engine`]: An engine in this process, or a client of the server.
    """
    sampling = {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": 0.0 if generation.min_p is None else generation.min_p,
        "repetition_penalty": generation.repetition_penalty,
        **generation.generation_kwargs,
        "logprobs": 0,  # only those of the sampled tokens
        "stop": list(stop_strings),
        "stop_token_ids": list(eos_token_ids),
        "skip_special_tokens": False,  # stop strings may be special tokens
    }
    if generation.mode == "server":
        if generation.server_base_url is not None:
            url = generation.server_base_url.rstrip("/")
        else:
            url = f"http://{generation.server_host}:{generation.server_port}"
        return VLLMServerEngine(url, sampling, wait_for_everyone)
    if generation.tensor_parallel_size > 1:
        return VLLMParallelEngine(generation, sampling)
    return VLLMEngine(generation, sampling)


@contextmanager
def _awake(generation: VLLMGeneration) -> Iterator[None]:
    """Wake vLLM up for a session, if it sleeps (has released its memory) during training."""
    if not generation.enable_sleep_mode:
        yield
        return
    if generation._llm_weights_sleeping:
        generation.sync_weights()
    generation.llm.wake_up(tags=["kv_cache"])
    try:
        yield
    finally:
        generation.llm.sleep(level=2)
        generation._llm_weights_sleeping = True


def _read_output(output: Any) -> Generation:
    """The turn in the only completion of a finished request."""
    (completion,) = output.outputs
    token_ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, token_ids, strict=True)]
    return Generation(token_ids=token_ids, logprobs=logprobs)


class VLLMEngine:
    """
    Generation by vLLM in this process (`vllm_mode="colocate"`).

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's connection to vLLM.
        sampling (`dict[str, Any]`):
            Arguments of `vllm.SamplingParams` that all turns share.
    """

    in_rounds = False

    def __init__(self, generation: VLLMGeneration, sampling: dict[str, Any]):
        self._generation = generation
        self._sampling = sampling
        self.max_context_length: int | None = generation.llm.llm_engine.model_config.max_model_len
        self._engine: Any = generation.llm.llm_engine
        self._open: dict[str, int] = {}  # numbers of rollouts, by the names of their requests
        self._count = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        with _awake(self._generation):
            try:
                yield
            finally:
                self._engine.abort_request(list(self._open))
                self._open.clear()

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        self._count += 1
        request_id = f"turn-{self._count}"
        params = _sampling_params(self._sampling, max_new_tokens)
        self._engine.add_request(request_id, {"prompt_token_ids": context}, params)
        self._open[request_id] = number

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        turns: list[tuple[int, Generation]] = []
        while not turns:
            for output in self._engine.step():
                if output.finished and output.request_id in self._open:
                    turns.append((self._open.pop(output.request_id), _read_output(output)))
            if not wait:
                break
        return turns


class VLLMParallelEngine(BatchEngine):
    """
    Generation by vLLM in the training processes, with each model spread over several of them
    (`vllm_tensor_parallel_size`). The processes of a model must generate the same turns. They therefore advance in rounds,
    and a process whose rollouts have ended continues to generate for the others.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's connection to vLLM.
        sampling (`dict[str, Any]`):
            Arguments of `vllm.SamplingParams` that all turns share.
    """

    def __init__(self, generation: VLLMGeneration, sampling: dict[str, Any]):
        super().__init__()
        self._generation = generation
        self._sampling = sampling
        self.max_context_length = generation.llm.llm_engine.model_config.max_model_len

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        with super().session(), _awake(self._generation):
            yield
            # Take part in the rounds of the other processes until their rollouts have ended too
            while self._generate_together([], []) is not None:
                pass

    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """Generate one turn for each of B contexts of this process, see [`BatchEngine.generate`]."""
        generations = self._generate_together(list(contexts), list(max_new_tokens))
        assert generations is not None
        return generations

    def _generate_together(self, contexts: list[list[int]], budgets: list[int]) -> list[Generation] | None:
        """Generate for all processes of the model. Returns the turns of this process, or `None` if no process has any."""
        # Requests of all processes, in the order of their ranks
        requests: list[Any] = [None] * self._generation.tensor_parallel_size
        torch.distributed.all_gather_object(requests, (contexts, budgets), group=self._generation.tp_group)
        prompts = [{"prompt_token_ids": ids} for theirs, _ in requests for ids in theirs]
        if not prompts:
            return None
        params = [_sampling_params(self._sampling, budget) for _, theirs in requests for budget in theirs]
        outputs = self._generation.llm.generate(prompts, sampling_params=params, use_tqdm=False)

        # The part of this process
        rank = torch.distributed.get_rank(group=self._generation.tp_group)
        start = sum(len(theirs) for theirs, _ in requests[:rank])
        return [_read_output(output) for output in outputs[start : start + len(contexts)]]


def _sampling_params(sampling: dict[str, Any], max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **sampling,
        max_tokens=max_tokens,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class VLLMServerEngine(RequestEngine):
    """
    Generation by a vLLM server (`vllm_mode="server"`). Every process sends its own requests, one per turn.

    A request that fails temporarily is sent up to 6 times. If the last attempt fails too, or if the server refuses a
    request, the run ends with an error.

    Args:
        url (`str`):
            Address of the server, for instance `"http://10.0.0.5:8000"`.
        sampling (`dict[str, Any]`):
            Parameters that all requests share.
        wait_for_everyone (`Callable[[], None]`):
            A barrier of all processes. Only one process sends the weights to the server, and the others must wait for it.
        max_requests (`int`, *optional*, defaults to `256`):
            Maximum number of concurrent requests of this process.

    Raises:
        `ConnectionError`: If the server does not answer.
        `ValueError`: If the URL is not an HTTP URL, or if an environment variable names a proxy that cannot be used.
    """

    _completions_path = "/v1/completions"
    _first_delay, _longest_delay = 1.5, 30.0

    def __init__(
        self, url: str, sampling: dict[str, Any], wait_for_everyone: Callable[[], None], *, max_requests: int = 256
    ):
        check_url(
            url, "The address of the vLLM server (`vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`)"
        )
        super().__init__(url, max_requests=max_requests, timeout=_TURN_SECONDS)
        self._sampling = sampling
        self._wait_for_everyone = wait_for_everyone
        with self._open_client():
            self._model, self.max_context_length = self._find_model()

    def _find_model(self) -> tuple[str, int | None]:
        """The name and the context length of the model in the server's list of models."""
        failure: Exception | None = None
        try:
            reply = self._client.get(f"{self._address}/v1/models", timeout=30.0)
            if reply.status_code == 200:
                model = reply.json()["data"][0]
                return model["id"], model.get("max_model_len")
            reason = describe_reply(reply)
        except httpx2.HTTPError as error:
            reason, failure = lasting_failure(error) or repr(error), error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason, failure = f"its reply is not a list of models ({error!r}). {describe_reply(reply)}", error
        raise ConnectionError(
            f"The vLLM server {self.url} does not answer on this machine: {reason}. Every process asks it directly: set "
            "`vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`, to an address that all machines reach."
        ) from failure

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        self._wait_for_everyone()
        with super().session():
            yield

    def _request_body(self, number: int, context: list[int], max_new_tokens: int) -> dict[str, Any]:
        return {
            **self._sampling,
            "model": self._model,
            "prompt": context,
            "max_tokens": max_new_tokens,
            "include_stop_str_in_output": True,
            "return_token_ids": True,
        }

    def _read_choice(self, choice: Any) -> Generation:
        return Generation(token_ids=choice["token_ids"], logprobs=choice["logprobs"]["token_logprobs"])

    def _may_retry(self, attempts: int, elapsed: float, delay: float) -> bool:
        return attempts < _ATTEMPTS and delay <= _LONGEST_RETRY_AFTER

    def _refusal(self, failure: str) -> RuntimeError:
        return RuntimeError(f"The vLLM server {self.url} refuses a turn. {failure}")

    def _exhaustion(self, attempts: int, failure: str) -> ConnectionError:
        return ConnectionError(
            f"The vLLM server {self.url} failed {attempts} times. {failure}. Restart it and resume from the last "
            "checkpoint."
        )
