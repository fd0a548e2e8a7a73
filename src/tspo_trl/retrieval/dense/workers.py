"""Encoding in several processes, one for each device."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..corpus import PassageFile
from .encoders import TextEncoder

#: The encoder and the passages of a worker process
_state: dict[str, Any] = {}


def encode_on(
    devices: Sequence[str], encoder: TextEncoder, folder: Path, first: int, step: int
) -> Iterator[np.ndarray]:
    """
    Encode passages on several devices, with the same vectors as on one.

    Args:
        devices (`Sequence[str]`):
            The devices, for instance `["cuda:0", "cuda:1"]`. Each gets a process, which loads the model again.
        encoder ([`TextEncoder`]):
            An encoder that was loaded by name.
        folder (`Path`):
            Folder of the [`~retrieval.corpus.PassageFile`].
        first (`int`):
            Index of the first passage to encode.
        step (`int`):
            Maximum number of passages in a block.

    Yields:
        `np.ndarray`: Vectors of shape (at most `step`, D), `float32`, in the order of the passages.
    """
    context = get_context("spawn")  # a forked process cannot use CUDA
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    options = {"dtype": encoder.dtype, "batch_tokens": encoder.batch_tokens, **asdict(encoder.settings)}
    count = len(PassageFile(folder))
    starts, waiting = iter(range(first, count, step)), deque[Future[np.ndarray]]()
    with ProcessPoolExecutor(len(devices), context, _open, (queue, encoder.name, options, folder)) as executor:
        try:
            for start in starts:
                waiting.append(executor.submit(_encode, start, start + step))
                if len(waiting) > 2 * len(devices):  # as much as keeps all devices busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)


def _open(queue: Any, name: str, options: dict[str, Any], folder: Path) -> None:
    """Load the encoder of a worker on the next device."""
    device = queue.get()
    if device == "cpu":
        torch.set_num_threads(1)  # the workers share the cores
    _state.update(encoder=TextEncoder(name, device=device, **options), passages=PassageFile(folder))


def _encode(start: int, stop: int) -> np.ndarray:
    """Encode passages in a worker."""
    vectors: np.ndarray = _state["encoder"].encode_passages(_state["passages"][start:stop])
    return vectors
