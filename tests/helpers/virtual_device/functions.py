"""What C++ would answer by its own notion of a tensor's device, answered in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .tensors import CPU, VirtualTensor, full_device, state


class Functions(TorchFunctionMode):
    """Answers in Python what C++ would answer by its own notion of a tensor's device."""

    LIKE = {
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.full_like,
        torch.rand_like,
        torch.randn_like,
        torch.randint_like,
    }
    NEW = {
        torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full, torch.Tensor.new_tensor,
        torch.Tensor.new_empty_strided,
    }  # fmt: skip
    DATA = {torch.tensor, torch.as_tensor, torch.asarray}

    def __init__(self, owner: Any):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        owner = self.owner
        first = args[0] if args else kwargs.get("input")
        virtual = isinstance(first, VirtualTensor)
        name = getattr(func, "__name__", "")
        if func is torch.device:
            # A number alone is one of the accelerator's devices, which C++ does not know
            return (
                torch.device("cuda", first)
                if isinstance(first, int) and not isinstance(first, bool)
                else func(*args, **kwargs)
            )
        if func is torch.Tensor.backward:
            with self:  # forwards that are computed again must find the mode too
                kwargs["grad_tensors"] = kwargs.pop("gradient", None)
                return torch.autograd.backward(first, *args[1:], **kwargs)
        if func in self.LIKE or func in self.NEW:
            if virtual and kwargs.get("device") is None:
                kwargs["device"] = first.where
            if func is torch.Tensor.new_tensor:
                kwargs["device"] = full_device(kwargs.get("device")) or first.device
                return self.owner.data(torch.tensor, args[1:], kwargs)
        elif func in self.DATA:
            return self.owner.data(func, args, kwargs)
        elif func is torch.Tensor.cuda:
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            return owner.move(first, full_device("cuda" if device is None else device))
        elif func is torch.Tensor.cpu:
            return owner.move(first, CPU)
        elif func is torch.Tensor.to:
            return owner.to(*args, **kwargs)
        elif func in (torch.Tensor.type_as,):
            return owner.move(first, args[1].device, args[1].dtype)
        elif func is torch.Tensor.pin_memory or name == "pin_memory":
            return first
        elif name == "is_pinned":
            return False
        elif virtual and func in (torch.Tensor.storage, torch.Tensor.untyped_storage, torch.Tensor.data_ptr):
            return getattr(first.held, name)()
        elif func is torch.Tensor.is_meta.__get__:
            return False if virtual else func(*args, **kwargs)
        elif virtual and func is torch.Tensor.tolist:
            owner.note_wait("tolist", first)
            return first.held.tolist()
        elif virtual and name in ("quantile", "nanquantile"):
            # Their own C++ resizes a tensor in place, which a wrapper cannot follow
            other = args[1] if len(args) > 1 else kwargs["q"]
            if isinstance(other, torch.Tensor) and other.device != first.where:
                owner.mixed(name, [first.where, other.device])
            args = tuple(a.held if isinstance(a, VirtualTensor) else a for a in args)
            return owner.wrap(func(*args, **kwargs), first.where)
        elif virtual and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(
                f"can't convert {first.where} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        elif func is torch.Tensor.device.__get__:
            return first.where if virtual else func(*args, **kwargs)
        elif "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = full_device(kwargs["device"])
        state.explicit = full_device(kwargs.get("device"))
        state.python = getattr(state, "python", 0) + 1
        try:
            return func(*args, **kwargs)
        finally:
            state.python -= 1
            state.explicit = None
