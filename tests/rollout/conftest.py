import pytest

from helpers.chats import PROTOCOLS
from helpers.tag_protocols import TAG_PROTOCOLS


@pytest.fixture
def qwen():
    return PROTOCOLS["qwen2_5"]


@pytest.fixture
def words():
    return TAG_PROTOCOLS["words"]


@pytest.fixture
def bpe():
    return TAG_PROTOCOLS["bytes"]
