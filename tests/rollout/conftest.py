import pytest

from helpers.chats import PROTOCOLS


@pytest.fixture
def qwen():
    return PROTOCOLS["qwen2_5"]
