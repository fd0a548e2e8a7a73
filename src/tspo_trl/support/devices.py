"""The device of a model, and the states of random generators on devices of every kind."""

from typing import Any

import torch


def check_device(device: Any, label: str = "`device`") -> None:
    """
    Check that a device can be used.

    Args:
        device (`str`, `torch.device` or `None`):
            The device. `None` is the default device.
        label (`str`, *optional*, defaults to `` "`device`" ``):
            What the device is called in error messages.

    Raises:
        `ValueError`: If there is no such device.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{label}: {str(device)!r} cannot be used here ({reason}). This machine has {['cpu', *all_accelerators()]}."
        ) from error


def check_dtype(dtype: Any, label: str = "`dtype`") -> None:
    """
    Check the name of a type of weights.

    Args:
        dtype (`str` or `Any`):
            The name. Other objects are not checked.
        label (`str`, *optional*, defaults to `` "`dtype`" ``):
            What the type is called in error messages.

    Raises:
        `ValueError`: If it is neither `"auto"` nor the name of a floating-point type of PyTorch.
    """
    if not isinstance(dtype, str) or dtype == "auto":
        return
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(
            f"{label} must be 'auto' or a floating-point type of PyTorch, for instance 'bfloat16', got {dtype!r}."
        )


def default_device() -> torch.device:
    """The accelerator, if this machine has one. Otherwise the CPU, even where PyTorch is built for an accelerator."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None else device


def all_accelerators() -> list[str]:
    """The names of all accelerators of this machine, for instance `["cuda:0", "cuda:1"]`. Empty if there are none."""
    kind = default_device().type
    return [] if kind == "cpu" else [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]


def get_rng_state(device: torch.device) -> list[torch.Tensor]:
    """The states of the random generators that sampling uses: of the CPU, and of all devices of the given kind."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        module = torch.get_device_module(device)  # one device at a time, because MPS has no function for all
        states += [module.get_rng_state(index) for index in range(module.device_count())]
    return states


def set_rng_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restore the states returned by [`get_rng_state`], of as many devices as there are now."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        module = torch.get_device_module(device)
        for index, state in zip(range(module.device_count()), states[1:], strict=False):
            module.set_rng_state(state, index)
