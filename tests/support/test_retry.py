"""The retry policy that all HTTP clients share."""

import random

import pytest
import torch

from tspo_trl.support.retry import is_temporary, retry_after_seconds, retry_delay


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_temporary_statuses(status):
    assert is_temporary(status)


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 413, 422, 600])
def test_final_statuses(status):
    assert not is_temporary(status)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0.0), ("", 0.0), ("0", 0.0), ("7", 7.0), ("-7", 0.0), ("1.5", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)],
)
def test_retry_after_header(header, seconds):
    assert retry_after_seconds(header) == seconds


def test_delay_doubles_up_to_the_longest():
    for attempt, maximum in [(1, 0.25), (2, 0.5), (3, 1.0), (5, 4.0), (6, 5.0), (100_000, 5.0)]:
        delays = [retry_delay(attempt, 0.25, 5.0) for _ in range(200)]
        assert maximum / 2 <= min(delays) < max(delays) <= maximum
        assert max(delays) - min(delays) > maximum / 4  # the delay is random


def test_server_may_ask_for_a_longer_delay():
    assert retry_delay(1, 0.25, 5.0, retry_after=30.0) == 30.0
    assert retry_delay(10, 0.25, 5.0, retry_after=1.0) >= 2.5


def test_delay_leaves_the_global_random_state_unchanged():
    states = random.getstate(), torch.get_rng_state()
    retry_delay(1, 0.25, 5.0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
