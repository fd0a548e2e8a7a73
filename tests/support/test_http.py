"""How HTTP clients are opened: proxies, redirects, and the three clients of the library."""

import json
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from helpers.servers import free_port
from tspo_trl import EndpointEngine, HTTPRetriever, RetrievalError
from tspo_trl.engines.endpoint import EndpointError
from tspo_trl.engines.vllm import VLLMServerEngine
from tspo_trl.support.http import check_proxies, describe_reply, is_local, open_client

LOCAL = ["127.0.0.1", "127.8.9.1", "[::1]", "localhost", "LOCALHOST", "localhost.", "my.localhost", "0.0.0.0", "[::]"]
LOCAL += ["[::ffff:127.0.0.1]"]
REMOTE = ["example.com", "10.0.0.5", "128.0.0.1", "[fe80::1]", "localhost.example.com", "notlocalhost"]
VARIABLES = ["http_proxy", "https_proxy", "all_proxy", "no_proxy"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The environment without proxies."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


class Handler(BaseHTTPRequestHandler):
    """A server of models, completions and passages, which redirects if `server.target` is set, or sends `server.body`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply({"data": [{"id": "tiny", "max_model_len": 64}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"text": "x", "token_ids": [1], "finish_reason": "length", "logprobs": {"token_logprobs": [0.0]}}
        self.reply({"result": [[{"id": 1, "text": "x"}]], "choices": [choice]})

    def reply(self, content):
        self.server.authorizations.append(self.headers["authorization"])
        body = b"" if self.server.target else self.server.body or json.dumps(content).encode()
        self.send_response(307 if self.server.target else self.server.status)
        if self.server.target:
            self.send_header("location", self.server.target)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.target, server.status, server.body = True, None, 200, b""
    server.authorizations = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def retrieve(url, tokenizer):
    assert HTTPRetriever(url, total_timeout=5).search(["a"], 1)[0][0].text == "x"


def complete(url, tokenizer):
    EndpointEngine(url, "tiny", tokenizer, stop_strings=[], eos_token_ids=[0], total_timeout=5)


def serve_training(url, tokenizer):
    engine = VLLMServerEngine(url, {}, lambda: None)
    with engine.session():
        engine.submit(0, [1], 1)
        assert engine.collect(wait=True)[0][1].token_ids == [1]


CLIENTS = [retrieve, complete, serve_training]


# The three clients


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_proxies_do_not_apply_to_servers_on_this_machine(client, variable, scheme, server, tokenizer, environment):
    environment.setenv(variable, f"{scheme}://127.0.0.1:{free_port()}")
    client(server.url, tokenizer)
    client(server.url.replace("127.0.0.1", "localhost"), tokenizer)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_socks_proxy_without_its_package_is_explained(client, tokenizer, environment):
    environment.setattr("tspo_trl.support.http.find_spec", lambda name: None)
    environment.setenv("ALL_PROXY", "socks5://user:s3cret@10.9.9.9:1080")
    with pytest.raises(ValueError, match="ALL_PROXY names a SOCKS proxy, which needs the package socksio") as error:
        client("http://10.0.0.5:8000", tokenizer)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("client", "error"), [(retrieve, RetrievalError), (complete, EndpointError), (serve_training, ConnectionError)]
)
def test_message_of_a_redirect_names_its_target(client, error, server, tokenizer):
    for target, shown in [
        ("https://user:s3cret@example.com/login?a=b", "https://example.com/login?a=b"),
        ("/login", f"{server.url}/login"),
    ]:
        server.target = target
        with pytest.raises(error) as raised:
            client(server.url, tokenizer)
        assert f"HTTP 307: it redirects to {shown}. Redirects are not followed" in str(raised.value)
        assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:99999", "must have a port from 1 to 65535, got 'http://127.0.0.1:99999'"),
        ("http://127.0.0.1:abc", r"is not a URL \(Invalid port: 'abc'\), got 'http://127.0.0.1:abc'"),
        ("http://u:s3cret@127.0.0.1:99999", r"port from 1 to 65535, got 'http://\*\*\*@127.0.0.1:99999'"),
        ("127.0.0.1:8000", "must be like 'http://localhost:8000', got '127.0.0.1:8000'"),
        ("http://", "must be like 'http://localhost:8000', got 'http://'"),
        ("", "must be like 'http://localhost:8000', got ''"),
    ],
)
def test_impossible_addresses_are_refused(client, url, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        client(url, tokenizer)


@pytest.mark.parametrize(
    ("client", "error"), [(retrieve, RetrievalError), (complete, EndpointError), (serve_training, ConnectionError)]
)
def test_a_password_is_sent_but_not_shown(client, error, server, tokenizer):
    url = server.url.replace("//", "//user:s3cret@")
    client(url, tokenizer)
    assert set(server.authorizations) == {"Basic " + b64encode(b"user:s3cret").decode()}
    server.status = 401
    with pytest.raises(error, match=server.url) as raised:
        client(url, tokenizer)
    assert "s3cret" not in str(raised.value)
    assert "HTTP 401" in str(raised.value)


@pytest.mark.parametrize(
    ("client", "error"), [(retrieve, RetrievalError), (complete, EndpointError), (serve_training, ConnectionError)]
)
def test_https_to_a_server_without_it_fails_at_once(client, error, server, tokenizer):
    with pytest.raises(error, match="use http:// instead of https://") as raised:
        client(server.url.replace("http:", "https:"), tokenizer)
    assert getattr(raised.value, "permanent", True)


@pytest.mark.parametrize(
    ("client", "error"), [(retrieve, RetrievalError), (complete, EndpointError), (serve_training, ConnectionError)]
)
@pytest.mark.parametrize("body", [b"<html>Log in</html>", b'{"error": "Log in"}'])
def test_message_of_an_unexpected_reply_shows_it(client, error, body, server, tokenizer):
    server.body = body
    with pytest.raises(error, match="Log in"):
        client(server.url, tokenizer)


def test_message_of_a_list_of_models_without_names_shows_it(server, tokenizer):
    server.body = b'{"data": [{"name": "tiny"}]}'
    with pytest.raises(ConnectionError, match=r"not a list of models \(KeyError\('id'\)\). HTTP 200: .*tiny"):
        serve_training(server.url, tokenizer)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("certificates", ["/nonexistent", __file__])
def test_certificates_that_cannot_be_read_name_their_variable(client, certificates, server, tokenizer, environment):
    environment.setenv("SSL_CERT_FILE", certificates)
    with pytest.raises(ValueError, match=f"variable SSL_CERT_FILE .*{certificates}"):
        client(server.url, tokenizer)


def test_an_api_key_that_cannot_be_sent_is_refused(server, tokenizer):
    options = {"stop_strings": [], "eos_token_ids": [0]}
    for key in ("clé", "key\n", " "):
        with pytest.raises(ValueError, match="`api_key` must be printable ASCII") as error:
            EndpointEngine(server.url, "tiny", tokenizer, api_key=key, **options)
        assert "clé" not in str(error.value)
    EndpointEngine(server.url, "tiny", tokenizer, api_key="", **options)
    assert set(server.authorizations) == {None}


def test_an_engine_needs_a_request(server, tokenizer):
    with pytest.raises(ValueError, match="`max_requests` must be at least 1, got 0"):
        EndpointEngine(server.url, "tiny", tokenizer, stop_strings=[], eos_token_ids=[0], max_requests=0)


# Proxies


@pytest.mark.parametrize(("host", "local"), [*((host, True) for host in LOCAL), *((host, False) for host in REMOTE)])
def test_servers_on_this_machine(host, local):
    for url in (f"http://{host}", f"https://{host}:8000/retrieve"):
        assert is_local(url) == local


@pytest.mark.parametrize("kind", [httpx2.Client, httpx2.AsyncClient])
def test_proxies_apply_to_other_servers(kind, environment):
    environment.setenv("HTTP_PROXY", "http://10.9.9.9:3128")
    for host in ("example.com", "127.0.0.1"):
        client = open_client(kind, f"http://{host}:8000", limits=httpx2.Limits(max_connections=3), headers={"a": "b"})
        transport = client._transport_for_url(httpx2.URL(f"http://{host}:8000"))
        assert ("Proxy" in type(transport._pool).__name__) == (host == "example.com")
        assert transport._pool._max_connections == 3
        assert client.headers["a"] == "b"


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_other_kinds_of_proxies_are_explained(variable, environment):
    environment.setenv(variable, "socks://127.0.0.1:7890")
    with pytest.raises(ValueError, match=f"{variable} names a proxy of the kind 'socks'.* socks5, socks5h"):
        check_proxies("http://example.com")
    check_proxies("http://127.0.0.1:8000")
    environment.setenv("NO_PROXY", "a, *")
    check_proxies("http://example.com")


@pytest.mark.parametrize("value", ["http://10.9.9.9:3128", "10.9.9.9:3128", "https://10.9.9.9", ""])
def test_usual_proxies_are_accepted(value, environment):
    environment.setenv("HTTP_PROXY", value)
    check_proxies("http://example.com")


@pytest.mark.parametrize("client", CLIENTS)
def test_an_impossible_proxy_is_named(client, tokenizer, environment):
    environment.setenv("HTTP_PROXY", "http://u:s3cret@127.0.0.1:99999")
    with pytest.raises(ValueError, match="variable HTTP_PROXY must have a port from 1 to 65535") as error:
        client("http://10.0.0.5:8000", tokenizer)
    assert "s3cret" not in str(error.value)


# Replies


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"status_code": 404}, "HTTP 404: Not Found"),
        ({"status_code": 500, "content": b"oops \xff" + b"x" * 1000}, "HTTP 500: oops \ufffd" + "x" * 294),
        (
            {"status_code": 301, "headers": {"location": "new"}},
            "HTTP 301: it redirects to http://host/a/new. Redirects are not followed: use the final address.",
        ),
        ({"status_code": 304}, "HTTP 304: Not Modified"),
    ],
)
def test_descriptions_of_replies(reply, text):
    request = httpx2.Request("POST", "http://host/a/b")
    assert describe_reply(httpx2.Response(**reply, request=request)) == text
