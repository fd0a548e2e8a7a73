"""The functions of PyTorch, accelerate and transformers that a virtual device replaces while it is in use."""

from __future__ import annotations

import collections
import contextlib
import types
from unittest import mock

import torch
import torch.autograd.graph as graph
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils import import_utils
from trl.kernels import chunked_logprob

from .functions import Functions
from .tensors import DispatchMode, VirtualTensor, full_device, grouped, restore, state

MEMORY = 80 * 2**30
PROPERTIES = types.SimpleNamespace(
    name="Virtual H100",
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    uuid="virtual",
    warp_size=32,
    gcnArchName="",
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
)


def enter_all(owner, enter) -> None:
    """Replace everything, by calls of `enter` of an exit stack."""
    for name, stub in {**_state_of(owner), **_random_of(owner)}.items():
        enter(mock.patch.object(torch.cuda, name, stub, create=True))
        for module in (torch.cuda.random, torch.cuda.memory):
            if hasattr(module, name):
                enter(mock.patch.object(module, name, stub))
    enter(mock.patch.object(torch.version, "cuda", "13.0"))
    enter(mock.patch.object(chunked_logprob, "_TRITON_AVAILABLE", False))  # kernels need a real device
    stream = types.SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None, wait_stream=lambda other: None)
    for name, stub in {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "is_available": lambda: True,
        "device_count": lambda: owner.devices,
        "current_stream": lambda device=None: stream,
        "current_device_index": lambda: getattr(state, "current", 0),
    }.items():
        enter(mock.patch.object(torch.accelerator, name, stub))
    enter(mock.patch.object(torch.cuda, "current_stream", return_value=stream))
    _replace_seeds(owner, enter)
    _replace_autocast(enter)
    _replace_backward(enter)
    # Parameters are exchanged as a whole: a wrapper cannot be the data of a CPU tensor
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    enter(contextlib.ExitStack()).callback(torch.__future__.set_swap_module_params_on_conversion, swap)
    # transformers remembers which devices there are
    _forget_devices()
    enter(contextlib.ExitStack()).callback(_forget_devices)
    _replace_load(owner, enter)
    enter(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
    _replace_from_pretrained(owner, enter)
    enter(DispatchMode(owner))
    enter(Functions(owner))


def _forget_devices() -> None:
    for name, function in vars(import_utils).items():
        if name.startswith("is_torch_") and hasattr(function, "cache_clear"):
            function.cache_clear()


def _number(device) -> int:
    return full_device("cuda" if device is None else device).index


def _state_of(owner) -> dict:
    """Functions of `torch.cuda` about devices and their memory."""

    @contextlib.contextmanager
    def on(device):
        before = getattr(state, "current", 0)
        index = torch.device(device).index if not isinstance(device, int) else device
        state.current = before if index is None else index
        try:
            yield
        finally:
            state.current = before

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: owner.devices,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: getattr(state, "current", 0),
        "set_device": lambda device: setattr(state, "current", _number(device)),
        "device": on,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "synchronize": lambda device=None: owner.note_wait("synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "mem_get_info": lambda device=None: (MEMORY - owner.allocated, MEMORY),
        "memory_allocated": lambda device=None: owner.allocated,
        "max_memory_allocated": lambda device=None: owner.peak,
        "memory_reserved": lambda device=None: owner.allocated,
        "max_memory_reserved": lambda device=None: owner.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(owner, "peak", owner.allocated),
        "reset_max_memory_allocated": lambda device=None: setattr(owner, "peak", owner.allocated),
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "is_current_stream_capturing": lambda: False,
        "can_device_access_peer": lambda a, b: True,
    }


def _random_of(owner) -> dict:
    """Functions of `torch.cuda` about random generators: each device has its own."""

    def plain(value):
        return value.held if isinstance(value, VirtualTensor) else value

    def set_all(states):
        for generator, value in zip(owner.generators, states, strict=True):
            generator.set_state(plain(value))

    def seed_all(seed):
        for generator in owner.generators:
            generator.manual_seed(int(seed))

    return {
        "manual_seed": lambda seed: owner.generators[getattr(state, "current", 0)].manual_seed(int(seed)),
        "manual_seed_all": seed_all,
        "get_rng_state": lambda device="cuda": owner.generators[_number(device)].get_state(),
        "set_rng_state": lambda value, device="cuda": owner.generators[_number(device)].set_state(plain(value)),
        "get_rng_state_all": lambda: [generator.get_state() for generator in owner.generators],
        "set_rng_state_all": set_all,
    }


def _replace_seeds(owner, enter) -> None:
    """`torch.manual_seed` seeds the devices too."""
    seed = torch.manual_seed

    def manual_seed(value):
        for generator in owner.generators:
            generator.manual_seed(int(value))
        return seed(value)

    enter(mock.patch.object(torch, "manual_seed", manual_seed))
    enter(mock.patch.object(torch.random, "manual_seed", manual_seed))


def _replace_autocast(enter) -> None:
    """Autocast of the CPU stands in for that of CUDA."""

    def on_cpu(function, default):
        def call(*args, **kwargs):
            if args:
                kind, *rest = args
            else:
                kind, rest = kwargs.pop("device_type", default), []
            return function(*(() if kind is None else ("cpu" if kind == "cuda" else kind,)), *rest, **kwargs)

        return call

    init = torch.autocast.__init__

    def autocast(this, device_type="cuda", *args, **kwargs):
        init(this, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    enter(mock.patch.object(torch.autocast, "__init__", autocast))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        enter(mock.patch.object(torch, name, on_cpu(getattr(torch, name), None)))


def _replace_backward(enter) -> None:
    """What C++ makes in a backward pass without a tensor at hand is on the device of the loss."""
    run = graph._engine_run_backward

    def backward(tensors, *args, **kwargs):
        before = getattr(state, "backward", None)
        state.backward = next((tensor.where for tensor in tensors if isinstance(tensor, VirtualTensor)), before)
        try:
            return run(tensors, *args, **kwargs)
        finally:
            state.backward = before

    enter(mock.patch.object(graph, "_engine_run_backward", backward))
    enter(mock.patch.object(torch.autograd, "_engine_run_backward", backward))


def _replace_load(owner, enter) -> None:
    """Wrappers are written as what they hold, and come back on their device or where `map_location` says."""
    load = torch.load

    def load_mapped(*args, map_location=None, **kwargs):
        state.map_location = map_location if isinstance(map_location, (str, torch.device)) else None
        try:
            with torch.overrides._pop_mode_temporarily(), torch.utils._python_dispatch._disable_current_modes():
                loaded = load(*args, map_location="cpu", **kwargs)
        finally:
            state.map_location = None
        if map_location is not None and torch.device(map_location).type == "cuda":
            device = full_device(map_location)
            return tree_map(lambda v: owner.move(v, device) if isinstance(v, torch.Tensor) else v, loaded)
        return loaded

    enter(mock.patch.object(torch, "load", load_mapped))
    torch.serialization.add_safe_globals([restore])


def _replace_from_pretrained(owner, enter) -> None:
    """Models are read on the CPU, without the modes (`transformers` starts on `meta`), then spread by `device_map`."""
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, device_map=None, **kwargs):
        with torch.overrides._pop_mode_temporarily(), torch.utils._python_dispatch._disable_current_modes():
            model = original(cls, *args, **kwargs)
        if device_map is None:
            return model
        if device_map == "auto":
            share = compute_module_sizes(model)[""] * 1.2 // owner.devices
            memory = dict.fromkeys(range(owner.devices), share) | {owner.devices - 1: 2**40}
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
        if not isinstance(device_map, dict):
            return model.to(device_map)
        device_map = {name: torch.device("cuda", d) if isinstance(d, int) else d for name, d in device_map.items()}
        model = dispatch_model(model, device_map, force_hooks=True)
        model.hf_device_map = device_map
        return model

    enter(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)))
