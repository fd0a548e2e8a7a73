"""A completions server with a tiny model. It supports none, some or all extensions of vLLM, and can be made to fail."""

import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tspo_trl import TransformersEngine

STANDARD = {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n"}


class FakeEndpoint:
    """
    `kind`: "vllm" returns token ids and keeps stop strings; "openai" refuses unknown keys and removes stop strings;
    "text" accepts only texts; "text with reason" is like "text", but also returns the stop string.
    """

    def __init__(self, model, kind="vllm"):
        self.kind = kind
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.requests = []
        self.fail = lambda body, count: None  # returns a status to send instead of a completion
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(200, {"data": [{"id": "tiny", "max_model_len": 2048}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    endpoint.requests.append(body)
                    status = endpoint.fail(body, len(endpoint.requests))
                    if status is None:
                        status, reply = endpoint.complete(body)
                    else:
                        reply = {"error": f"made to fail with {status}"}
                self.reply(status, reply)

            def reply(self, status, data):
                content = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def complete(self, body):
        text_only = self.kind in ("text", "text with reason")
        unknown = sorted(set(body) - STANDARD)
        if self.kind != "vllm" and unknown:
            return 400, {"error": f"unknown: {unknown}"}
        if text_only != isinstance(body["prompt"], str):
            return 400, {"error": "prompt must be a string" if text_only else "prompt must be token ids"}
        context = self.tokenizer(body["prompt"])["input_ids"] if text_only else body["prompt"]
        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(do_sample=False, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=eos)
        engine = TransformersEngine(lambda: nullcontext(self.model), self.tokenizer, config, body.get("stop", []))
        with engine.session():
            (generation,) = engine.generate([context], [body["max_tokens"]])
        ids = generation.token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        stopped = next((stop for stop in body.get("stop", []) if text.endswith(stop)), None)
        choice = {"text": text, "finish_reason": "stop" if stopped or ids[-1] == eos else "length"}
        if self.kind == "vllm":
            choice |= {"token_ids": ids, "stop_reason": stopped}
        elif stopped:
            choice["text"] = text.removesuffix(stopped)
            if self.kind == "text with reason":
                choice["stop_reason"] = stopped
        return 200, {"choices": [choice]}

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        """Stop answering requests, and interrupt those in progress."""
        self.fail = lambda body, count: 503
        self.server.shutdown()
        self.server.server_close()

    def __exit__(self, *_):
        self.stop()
