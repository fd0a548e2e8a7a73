"""A tensor on a virtual device."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
state = threading.local()


class Active:
    """The virtual device in use, if any."""

    device: Any = None


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual device: `held` is a CPU tensor, `where` the device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, where: torch.device) -> VirtualTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="cpu"
        )
        tensor.held, tensor.where = held, where
        return tensor

    device = property(lambda self: self.where)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if Active.device is None:
            raise RuntimeError(f"{func} of a virtual tensor outside of `VirtualCuda`.")
        return Active.device.dispatch(func, args, kwargs or {})

    def get_device(self):
        return self.where.index

    # For what compares places in memory: tied weights, savers
    def storage(self):
        return self.held.storage()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self, *, tensor_contents=None):
        return f"{self.held!r} on {self.where}"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # as a CUDA tensor: it comes back on its device
        return restore, (self.held.detach(), str(self.where), self.requires_grad, getattr(self, "_is_param", False))


def restore(held, where, requires_grad, is_param):
    location = getattr(state, "map_location", None)
    if Active.device is None or (location is not None and torch.device(location).type == "cpu"):
        return held
    tensor = Active.device.wrap(held, torch.device(where))
    return torch.nn.Parameter(tensor, requires_grad) if is_param else tensor.requires_grad_(requires_grad)


def packet_of(func):
    return getattr(func, "overloadpacket", func)


def full_device(value) -> torch.device | None:
    """A device in full, `None` for none; `cuda` alone is the current one."""
    if value is None:
        return None
    if isinstance(value, int):
        return torch.device("cuda", value)
    device = torch.device(value)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", getattr(state, "current", 0))
    return device


def grouped(lists, with_indices=False):
    """Tensors by device and type, for optimizers: C++ would see one device."""
    groups: dict = {}
    for i, first in enumerate(lists[0]):
        of, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for into, values in zip(of, lists, strict=True):
            if len(values):
                into.append(values[i])
        indices.append(i)
    return groups


class Moved(torch.autograd.Function):
    """A copy to another device, whose gradient comes back: C++ would not know where to."""

    @staticmethod
    def forward(ctx, tensor, owner, device, dtype):
        ctx.owner, ctx.device, ctx.dtype = owner, tensor.device, tensor.dtype
        return owner.move(tensor.detach(), device, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.owner.move(gradient, ctx.device, ctx.dtype), None, None, None


class DispatchMode(TorchDispatchMode):
    def __init__(self, owner: Any):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.owner.dispatch(func, args, kwargs or {})


class Token:
    """Dies with the wrapper that has it."""
