"""The server under test: that of `pytest tests/conformance --server URL`, or our own server without the option."""

import pytest
from httpx2 import Client

from helpers.servers import Server


def pytest_addoption(parser):
    parser.addoption("--server", help="the address of a retrieval server, for instance http://localhost:8000")
    parser.addoption(
        "--query", default="Who wrote Silent Harbor?", help="a query for which the server finds several passages"
    )


@pytest.fixture(scope="session")
def server_url(request, tmp_path_factory):
    """Address of the server under test. The options do not exist if all tests are run together."""
    url = request.config.getoption("--server", default=None)
    if url is not None:
        yield url.rstrip("/").removesuffix("/retrieve")
        return
    with Server("--corpus", "demo") as server:
        yield server.url


@pytest.fixture(scope="session")
def query(request):
    return request.config.getoption("--query", default="Who wrote Silent Harbor?")


@pytest.fixture(scope="session")
def client(server_url):
    with Client(base_url=server_url, timeout=60) as client:
        yield client
