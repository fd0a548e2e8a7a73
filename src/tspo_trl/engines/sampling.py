"""Reproducible sampling by a given configuration alone, even on devices that sum in no fixed order."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig


@contextmanager
def sampling_by(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    """
    Replace the generation configuration of a model inside a context. `generate` takes values that are not set from the
    model's own `generation_config.json`, which may hold penalties, a `min_p` or beams that change sampling silently.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`]):
            The configuration.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = network.generation_config
    network.generation_config = generation_config
    try:
        yield
    finally:
        network.generation_config = own


def draw(count: int, device: torch.device) -> torch.Tensor:
    """
    Draw the random numbers of one token.

    Args:
        count (`int`):
            Number B of rows.
        device (`torch.device`):
            The device whose generator is used.

    Returns:
        `torch.Tensor`: Random numbers in [0, 1), of shape (B,), in the most exact floating-point type of the device.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS does not support float64
    return torch.rand(count, dtype=dtype, device=device)


def sample(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    Sample one token from each row of scores. Probabilities are summed as multiples of 2^-52: sums of integers do not depend
    on their order, so equal scores give equal tokens in every run, and a token without probability is never sampled.

    Args:
        scores (`torch.Tensor`):
            Unnormalised log-probabilities of shape (B, V), in single precision.
        uniform (`torch.Tensor`):
            Random numbers in [0, 1) of shape (B,).

    Returns:
        `torch.Tensor`: B tokens. Each is the first token whose cumulative probability exceeds the random number.
    """
    cumulative = scores.softmax(dim=-1).mul_(2.0**52).long().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding to the next integer must not reach the sum of all probabilities
    threshold = (uniform[:, None] * (total - 1)).long()
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return tokens.clamp_(max=scores.shape[1] - 1)  # for scores that are not numbers


def deterministic_sums(device: torch.device) -> AbstractContextManager[Any]:
    """
    A context in which cumulative sums are deterministic, if PyTorch is told to use deterministic algorithms only. PyTorch
    has no deterministic cumulative sum of floating-point numbers on CUDA, which `top_p` and `typical_p` of `transformers` need.

    Args:
        device (`torch.device`):
            The device of the tensors.
    """
    needed = device.type != "cpu" and torch.are_deterministic_algorithms_enabled()
    return _DeterministicSums() if needed else nullcontext()


class _DeterministicSums(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.cumsum, torch.Tensor.cumsum) and args[0].is_floating_point():
            return _cumulative(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cumulative(values: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`cumsum` by doubling (Hillis and Steele 1986): additions of tensors, always in the same order."""
    sums, shift = values.to(dtype or values.dtype).movedim(dim, -1), 1
    while shift < sums.shape[-1]:
        sums = sums + pad(sums[..., :-shift], (shift, 0))
        shift *= 2
    return sums.movedim(-1, dim)
