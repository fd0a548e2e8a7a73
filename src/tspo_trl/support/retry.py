"""When a failed HTTP request is sent again, and after how many seconds."""

import random

_RETRIED_STATUS = frozenset({408, 425, 429, *range(500, 600)})
_random = random.Random()  # the global generator must stay as it is: sampling has to be repeatable


def is_temporary(status: int) -> bool:
    """
    Whether a request that failed may succeed if it is sent again.

    Args:
        status (`int`):
            The HTTP status of the reply.

    Returns:
        `bool`: `True` for a timeout (408), a request that came too early (425), too many requests (429) and every error of
        the server (5xx).
    """
    return status in _RETRIED_STATUS


def retry_after_seconds(header: str | None) -> float:
    """
    The seconds that a server asks its client to wait.

    Args:
        header (`str`, *optional*):
            The value of the `Retry-After` header.

    Returns:
        `float`: The seconds. 0 if there is no header, or if it holds a date.
    """
    return float(header) if header is not None and header.isdecimal() else 0.0


def retry_delay(attempt: int, first: float, longest: float, retry_after: float = 0.0) -> float:
    """
    Seconds to wait before a request is sent again. They double with every attempt, and are drawn at random, so that
    clients that failed together do not return together.

    Args:
        attempt (`int`):
            Number of requests sent so far, at least 1.
        first (`float`):
            Maximum delay after the first attempt.
        longest (`float`):
            Maximum delay after any attempt.
        retry_after (`float`, *optional*, defaults to `0.0`):
            Minimum delay, as requested by the server, see [`retry_after_seconds`]. May exceed `longest`.

    Returns:
        `float`: The delay: between half and all of the maximum delay after this attempt, or `retry_after` if that is more.
    """
    maximum = min(first * 2 ** min(attempt - 1, 30), longest)
    return max(_random.uniform(maximum / 2, maximum), retry_after)
