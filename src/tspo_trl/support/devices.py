"""The device of a model, and the states of random generators on devices of every kind."""

import torch


def default_device() -> torch.device:
    """The accelerator, if this machine has one. Otherwise the CPU, also where PyTorch is built for an accelerator."""
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
