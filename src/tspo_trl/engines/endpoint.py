"""Generation by any server with OpenAI's completions API: vLLM, SGLang, llama.cpp, a hosted model."""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import deepcopy
from threading import Lock
from typing import Any

import httpx2
from transformers import PreTrainedTokenizerBase

from ..support.http import check_header, check_url, describe_reply, lasting_failure
from .base import Generation
from .requests import RequestEngine

# Extensions of OpenAI's API by vLLM and SGLang: replies contain closing tags and the sampled tokens, and neither
# the model's generation_config.json nor the server's own defaults change sampling
_EXTENSIONS = {
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "top_k": -1,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


class EndpointError(RuntimeError):
    """
    The server cannot be reached, or it refused a request.

    Args:
        message (`str`):
            The failure and the address of the server.
        refused (`bool`, *optional*, defaults to `False`):
            Whether the server refused the request, so that sending it again would not help.
    """

    def __init__(self, message: str, *, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class EndpointEngine(RequestEngine):
    """
    An [`Engine`] that requests completions from a server (`POST /v1/completions`), one request per turn.

    The constructor requests one token to find out which features the server supports. Contexts are sent as token ids if the server
    accepts them, otherwise as text. If the server returns the sampled tokens, turns consist of them. Otherwise, the text
    of a turn is encoded, after a closing tag that the server has removed is added again. Such turns may differ from the
    sampled tokens, so they are suitable for evaluation, but not for training.

    A request that fails temporarily is sent again until `total_timeout` has passed. A turn that fails permanently raises no
    exception: it is empty, which ends its rollout, and `failures` holds the reason.

    Args:
        url (`str`):
            Address of the server, for instance `"http://10.0.0.5:8000"` or `"https://api.example.com/v1"`.
        model (`str`):
            Name of the model on the server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        stop_strings (`Collection[str]`):
            A turn ends with one of these.
        eos_token_ids (`Sequence[int]`):
            Tokens with which the model ends a message, at least one.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature. `0` selects the most probable token.
        seed (`int`, *optional*, defaults to `0`):
            Requests have this seed plus the number of their rollout. Servers that support seeds sample the same turns again.
        max_requests (`int`, *optional*, defaults to `32`):
            Maximum number of concurrent requests.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for the reply to a request.
        total_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after the first failure of a turn during which its request may be sent again.
        api_key (`str`, *optional*):
            API key, sent as a bearer token. An empty one is not sent.

    Attributes:
        failures (`dict[int, str]`): Reasons of failed turns in the current session, by the number of their rollout.

    Raises:
        [`EndpointError`]: If the server cannot be reached, does not have the model, or refuses completions.
        `ValueError`: If the URL is not an HTTP URL, if the API key cannot be sent, if `max_requests` is below 1, or if an
            environment variable names a proxy that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_strings: Collection[str],
        eos_token_ids: Sequence[int],
        temperature: float = 0.0,
        seed: int = 0,
        max_requests: int = 32,
        timeout: float = 600.0,
        total_timeout: float = 120.0,
        api_key: str | None = None,
    ):
        check_url(url)
        address = url.rstrip("/")
        address = address if address.endswith("/v1") else f"{address}/v1"
        check_header(api_key or "", "`api_key`")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        super().__init__(address, max_requests=max_requests, timeout=timeout, headers=headers)
        self.model = model
        self.failures: dict[int, str] = {}
        # Turns are read in threads, and a tokenizer may refuse two calls at a time
        self._tokenizer, self._encoding = deepcopy(tokenizer), Lock()
        self._stop_strings = list(stop_strings)
        self._eos_token_ids = list(eos_token_ids)
        self._sampling = {
            "temperature": temperature,
            "top_p": 1.0,
            **({"stop": self._stop_strings} if stop_strings else {}),
        }
        self._seed = seed
        self._total_timeout = total_timeout
        with self._open_client():
            self._find_model()
            self._as_text, self._extensions = self._find_request_form()

    def __repr__(self) -> str:
        return f"EndpointEngine({self.url!r}, {self.model!r})"

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        self.failures = {}
        with super().session():
            yield

    def _result(self, number: int, future: Future[Generation]) -> Generation:
        """The turn of a finished request, which is empty if the request failed."""
        try:
            return super()._result(number, future)
        except EndpointError as error:
            self.failures[number] = str(error)
            return Generation(self._eos_token_ids[:1])

    def _find_model(self) -> None:
        """Check that the server has the model, if it lists its models."""
        try:
            reply = self._client.get(f"{self._address}/models", timeout=30.0)
        except httpx2.TransportError as error:
            reason = lasting_failure(error) or f"{error!r}."
            raise EndpointError(f"The endpoint {self.url} cannot be reached: {reason}") from error
        if reply.status_code in (401, 403):
            raise EndpointError(f"The endpoint {self.url} requires another API key. {describe_reply(reply)}")
        try:
            models = {model["id"]: model for model in reply.json()["data"]}
        except (ValueError, LookupError, TypeError):  # no list of models
            return
        if self.model not in models:
            raise EndpointError(f"The endpoint {self.url} has no model {self.model!r}, only {sorted(models)}.")
        length = models[self.model].get("max_model_len")
        self.max_context_length = length if isinstance(length, int) else None

    def _find_request_form(self) -> tuple[bool, dict[str, Any]]:
        """The first form of request that the server accepts: whether contexts are text, and the extensions of OpenAI's API."""
        context = self._tokenizer("Question:", add_special_tokens=False)["input_ids"]
        forms: list[tuple[bool, dict[str, Any]]] = [(False, _EXTENSIONS), (False, {}), (True, _EXTENSIONS), (True, {})]
        for self._as_text, self._extensions in forms:
            try:
                self._request_turn(0, context, 1)
                return self._as_text, self._extensions
            except EndpointError as error:
                if not error.refused:
                    raise
                refusal = error
        raise refusal

    def _request_body(self, number: int, context: list[int], max_new_tokens: int) -> dict[str, Any]:
        return {
            **self._sampling,
            **self._extensions,
            "model": self.model,
            "prompt": self._decode_context(context) if self._as_text else context,
            "max_tokens": max_new_tokens,
            "seed": self._seed + number,
        }

    def _may_retry(self, attempts: int, elapsed: float, delay: float) -> bool:
        return elapsed + delay < self._total_timeout

    def _refusal(self, failure: str) -> EndpointError:
        message = f"The endpoint {self.url} refuses completions of {self.model!r}. {failure}"
        return EndpointError(message, refused=True)

    def _exhaustion(self, attempts: int, failure: str) -> EndpointError:
        return EndpointError(f"A request to the endpoint {self.url} failed {attempts} times. {failure}")

    def _decode_context(self, context: list[int]) -> str:
        """The context as text."""
        if context and context[0] == self._tokenizer.bos_token_id:  # the server adds it to a text
            context = context[1:]
        return str(self._tokenizer.decode(context, skip_special_tokens=False))

    def _read_choice(self, choice: dict[str, Any]) -> Generation:
        """The turn. Adds a closing tag or an end-of-sequence token that the server has removed."""
        text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"expected a string under 'text', found {text!r}")
        token_ids = choice.get("token_ids")

        # End the turn at the first stop string, or add the one that the server has removed
        ends = [text.index(stop) + len(stop) for stop in self._stop_strings if stop in text]
        if ends and min(ends) < len(text):  # the server does not support stop strings
            text, token_ids = text[: min(ends)], None
        stopped = bool(ends)
        if not ends and choice.get("finish_reason") == "stop" and (tag := self._removed_tag(text, choice)):
            text, token_ids, stopped = text + tag, None, True

        # Encode the text if the sampled tokens are unknown, and add a missing end-of-sequence token
        if not token_ids:
            with self._encoding:
                token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = choice.get("finish_reason") == "stop" and not stopped
        if not token_ids or (ended and token_ids[-1] not in self._eos_token_ids):
            token_ids = [*token_ids, self._eos_token_ids[0]]
        return Generation(list(token_ids))

    def _removed_tag(self, text: str, choice: dict[str, Any]) -> str | None:
        """The closing tag at which the server stopped: as reported by vLLM and SGLang, or that of the last open tag."""
        for key in ("stop_reason", "matched_stop"):
            if choice.get(key) in self._stop_strings:
                return str(choice[key])
        opened = {stop: text.rfind(stop.replace("</", "<", 1)) for stop in self._stop_strings}
        last = max(opened, key=lambda stop: opened[stop], default=None)
        return last if last is not None and opened[last] >= 0 else None
