"""Devices that this machine lacks are imitated by the functions of their modules in PyTorch, and no others."""

import inspect

import pytest
import torch

from tspo_trl.support.devices import all_accelerators, default_device, get_rng_state, set_rng_state

CPU = torch.device("cpu")


def test_an_accelerator_that_pytorch_is_built_for_but_that_is_not_there_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == CPU
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")


def test_all_accelerators_have_names(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert all_accelerators() == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert all_accelerators() == []


@pytest.fixture(params=[("mps", 1), ("cuda", 2), ("xpu", 2)], ids=lambda param: param[0])
def device(request, monkeypatch):
    """A device with random generators of its own, that has the functions of its kind with their real signatures."""
    name, count = request.param
    module = getattr(torch, name)
    generators = [torch.Generator().manual_seed(index) for index in range(count)]

    def imitate(function, answer):
        signature = inspect.signature(getattr(module, function))

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return answer(**bound.arguments)

        monkeypatch.setattr(module, function, call)

    def number(index):
        return index if isinstance(index, int) else 0

    imitate("device_count", lambda: count)
    imitate("get_rng_state", lambda device: generators[number(device)].get_state())
    imitate("set_rng_state", lambda new_state, device: generators[number(device)].set_state(new_state))
    for function in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(module, function, None, raising=False)
    return torch.device(name), generators


def test_random_generators_of_every_device_are_restored(device):
    device, generators = device
    states = get_rng_state(device)
    assert len(states) == 1 + len(generators)
    drawn = [torch.rand(3), *(torch.rand(3, generator=generator) for generator in generators)]
    set_rng_state(device, states)
    again = [torch.rand(3), *(torch.rand(3, generator=generator) for generator in generators)]
    assert all(torch.equal(now, then) for now, then in zip(again, drawn, strict=True))


def test_states_of_more_devices_than_there_are_now(device):
    device, generators = device
    states = get_rng_state(device)
    torch.rand(3, generator=generators[0])
    set_rng_state(device, [*states, generators[0].get_state()])
    assert all(torch.equal(now, then) for now, then in zip(get_rng_state(device), states, strict=True))


def test_random_generator_of_the_cpu_is_restored():
    states = get_rng_state(CPU)
    drawn = torch.rand(3)
    set_rng_state(CPU, states)
    assert torch.equal(torch.rand(3), drawn)
