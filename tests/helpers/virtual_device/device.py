"""The virtual device itself: how operations are computed, checked and counted."""

from __future__ import annotations

import collections
import contextlib
import sys
import weakref

import torch
from torch.utils._pytree import tree_map

from .environment import enter_all
from .rules import COPIES, INDEXING, NO_SCALARS, NONDETERMINISTIC, PRODUCTS, RANDOM, SYNCS, VIEWS, aten
from .tensors import CPU, Active, Moved, Token, VirtualTensor, full_device, packet_of, state


def _compute(func, packet, args, kwargs):
    """The result on the CPU, which lacks products of matrices with a result of another type."""
    dtype = next((value for value in args if isinstance(value, torch.dtype)), None)
    if packet not in PRODUCTS or dtype is None:
        return func(*args, **kwargs)
    return packet(*(value.to(dtype) for value in args if isinstance(value, torch.Tensor)), **kwargs)


class VirtualCuda:
    """
    Makes `torch.cuda` available, with virtual devices, within a `with`.

    Args:
        devices: How many.
        where: Parts of paths; places are named by the innermost frame whose file has one of them.
        memory: Whether to count bytes.
    """

    def __init__(self, devices: int = 1, *, where=("tspo_trl/", "trl/trainer"), memory: bool = False):
        self.devices, self.where, self.memory = devices, where, memory
        self.waits: collections.Counter = collections.Counter()
        self.launches: collections.Counter = collections.Counter()
        self.generators = [torch.Generator().manual_seed(1000 + i) for i in range(devices)]
        self.live: dict[int, list[int]] = {}  # storage -> [wrappers, bytes]
        self.allocated = self.peak = 0
        self._stack = contextlib.ExitStack()

    # -- moving

    def wrap(self, held: torch.Tensor, where: torch.device) -> VirtualTensor:
        if where.index is not None and where.index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({where})")
        tensor = VirtualTensor(held, where)
        if self.memory:
            storage = held.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            entry = self.live.setdefault(key, [0, size])
            if not entry[0]:
                self.allocated += size
                self.peak = max(self.peak, self.allocated)
            entry[0] += 1
            tensor.held_by = Token()  # a weak reference to the tensor itself would keep it from being swapped
            weakref.finalize(tensor.held_by, self._free, key).atexit = False
        return tensor

    def _free(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if not entry[0]:
            self.allocated -= entry[1]
            del self.live[key]

    def data(self, func, args, kwargs):
        """`torch.tensor` and the like: made on the CPU, then copied."""
        device = full_device(kwargs.pop("device", None)) or self._default()
        source = args[0] if args else kwargs.get("data")
        if isinstance(source, VirtualTensor):
            device = source.where if device is None else device
            result = source if func is not torch.tensor else source.detach().clone()
            return self.move(result, device, kwargs.get("dtype"))
        if isinstance(source, (list, tuple)):
            for value in source:
                if isinstance(value, VirtualTensor):
                    self.note_wait("tensor([device tensors])", value)
            source = tree_map(lambda v: v.held.item() if isinstance(v, VirtualTensor) and v.dim() == 0 else v, source)
            args = (source, *args[1:])
        grad = kwargs.pop("requires_grad", False) if func is torch.tensor else False
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if device is not None and device.type == "cuda":
            result = self.move(result, device)
        return result.requires_grad_() if grad else result

    def _default(self):
        device = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        return full_device(device.device) if device is not None else None

    def to(self, tensor, *args, **kwargs):
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        other = kwargs.pop("other", None)
        copy, memory_format = kwargs.pop("copy", False), kwargs.pop("memory_format", None)
        kwargs.pop("non_blocking", None)
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                other = value
            elif isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                device = value
        if other is not None:
            device, dtype = other.device, other.dtype
        return self.move(tensor, full_device(device), dtype, copy=copy, memory_format=memory_format)

    def move(self, tensor, device=None, dtype=None, *, copy=False, memory_format=None):
        device = tensor.device if device is None else device
        dtype = tensor.dtype if dtype is None else dtype
        if (
            device == tensor.device
            and dtype == tensor.dtype
            and not copy
            and memory_format in (None, torch.preserve_format)
        ):
            return tensor
        if tensor.requires_grad and device != tensor.device and torch.is_grad_enabled():
            return Moved.apply(tensor, self, device, dtype)
        options = {} if memory_format is None else {"memory_format": memory_format}
        state.target = device
        try:
            # With an explicit target: C++ takes both for CPU tensors
            return aten._to_copy.default(tensor, dtype=dtype, **options)
        finally:
            state.target = None

    # -- computing

    def place(self) -> str:
        frame, fallback = sys._getframe(1), None
        while frame is not None:
            file = frame.f_code.co_filename
            if any(part in file for part in self.where):
                return f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
            if fallback is None and "site-packages" in file and "/torch/" not in file:
                fallback = f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
            frame = frame.f_back
        return fallback or "elsewhere"

    def note_wait(self, kind: str, tensor=None) -> None:
        self.waits[(kind, self.place())] += 1

    def dispatch(self, func, args, kwargs):
        packet = packet_of(func)
        virtual, plain = [], []

        def look(value):
            if isinstance(value, VirtualTensor):
                virtual.append(value)
            elif isinstance(value, torch.Tensor):
                plain.append(value)
            return value

        tree_map(look, (args, kwargs))
        device = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        where = self._where(packet, device, virtual)
        if device is not None and torch.device(device).type == "meta":
            return func(*tree_map(lambda value: getattr(value, "held", value), args), **kwargs)
        if device is not None:
            kwargs = {**kwargs, "device": CPU}
        if not virtual and where == CPU:
            return func(*args, **kwargs)

        if virtual:
            self._check(func, packet, args, virtual, plain)
        self._count(packet, args, kwargs, virtual, plain, where)
        unwrap = lambda value: value.held if isinstance(value, VirtualTensor) else value  # noqa: E731
        held_args, held_kwargs = tree_map(unwrap, (args, kwargs))
        drawing = packet in RANDOM and where.type == "cuda" and kwargs.get("generator") is None
        with self._drawing(where.index) if drawing else contextlib.nullcontext():
            result = _compute(func, packet, held_args, held_kwargs)
        if packet is aten._local_scalar_dense:
            return result
        inputs = {id(v.held): v for v in virtual}

        def rewrap(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, VirtualTensor):
                return value
            if id(value) in inputs:  # in place
                return inputs[id(value)]
            if any(value is p for p in plain):
                return value
            return value if where.type == "cpu" else self.wrap(value, where)

        name = packet.__name__ if hasattr(packet, "__name__") else str(packet)
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor):
            first = args[0]
            if isinstance(first, VirtualTensor) and first.shape != first.held.shape:
                raise NotImplementedError(f"{func} has resized a virtual tensor.")
            return first
        return tree_map(rewrap, result)

    def _where(self, packet, device, virtual) -> torch.device:
        """The device of the result."""
        target = getattr(state, "target", None)
        if packet is aten._to_copy and target is not None:
            state.target = None
            return target
        kind = None if device is None else torch.device(device).type
        if kind == "cuda":
            return full_device(device)
        if kind == "cpu" and packet is not aten._to_copy:
            explicit = getattr(state, "explicit", None) is not None or packet is aten.scalar_tensor
            if explicit or not (virtual or getattr(state, "backward", None)):
                return CPU
            return virtual[0].where if virtual else state.backward  # C++ took its device from a wrapper
        return virtual[0].where if virtual else CPU

    @contextlib.contextmanager
    def _drawing(self, index: int):
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generators[index].get_state())
        try:
            yield
        finally:
            self.generators[index].set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)

    def _check(self, func, packet, args, virtual, plain) -> None:
        if packet in COPIES:
            return
        devices = {v.where for v in virtual}
        if packet in INDEXING:
            # self and values; indices may be on the CPU
            of = args[0]
            values = [v for v in args[2:3] if isinstance(v, torch.Tensor)]
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            wrong = [i for i in indices if i.device.type != "cpu" and i.device != of.device]
            wrong += [v for v in values if v.device != of.device and not (v.dim() == 0 and v.device.type == "cpu")]
            if wrong:
                self.mixed(func, [of.device, wrong[0].device])
            for i in indices:
                if i.dtype == torch.bool and i.device.type == "cuda" and packet in (aten.index, aten._unsafe_index):
                    self.note_wait("bool mask index", i)
                elif i.device.type == "cpu":
                    self.note_wait("index from host", i)
            return
        bad = [p for p in plain if p.dim() > 0 or packet in NO_SCALARS]
        if bad:
            self.mixed(func, [*devices, CPU], shapes=[tuple(p.shape) for p in bad])
        # Of an operation on lists, each place is an operation of its own
        if len(devices) > 1 and not str(packet).startswith("aten._foreach"):
            self.mixed(func, list(devices))
        # The result of an operation in place is where its first argument is
        name = str(packet)
        if name.endswith("_") and args and isinstance(args[0], torch.Tensor) and not isinstance(args[0], VirtualTensor):
            self.mixed(func, [CPU, *devices])

    def mixed(self, func, devices, shapes=()) -> None:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(map(str, devices))}! (virtual device: {func}, CPU shapes {list(shapes)}, at {self.place()})"
        )

    def _count(self, packet, args, kwargs, virtual, plain, where) -> None:
        if packet in VIEWS:
            return
        self.launches[str(packet)] += 1
        if packet in SYNCS:
            self.note_wait(str(packet).removeprefix("aten."), virtual[0])
        elif packet is aten._to_copy and virtual and where.type == "cpu":
            self.note_wait("device to host", virtual[0])
        elif packet is aten._to_copy and plain and where.type == "cuda" and plain[0].numel():
            self.note_wait("host to device", plain[0])
        elif packet is aten.copy_ and virtual and plain:
            self.note_wait("host to device" if isinstance(args[0], VirtualTensor) else "device to host", virtual[0])
        elif packet is aten.repeat_interleave:
            self.note_wait("repeat_interleave of a tensor", virtual[0])
        if torch.are_deterministic_algorithms_enabled() and packet in NONDETERMINISTIC:
            dtype = kwargs.get("dtype") or virtual[0].dtype
            if dtype.is_floating_point and not torch.is_deterministic_algorithms_warn_only_enabled():
                raise RuntimeError(
                    f"{str(packet).removeprefix('aten.')}_cuda_kernel does not have a deterministic implementation, but you set "
                    f"'torch.use_deterministic_algorithms(True)'. (virtual device, at {self.place()})"
                )

    def __enter__(self) -> VirtualCuda:
        assert Active.device is None
        Active.device = self
        try:
            enter_all(self, self._stack.enter_context)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception):
        try:
            return self._stack.__exit__(*exception)
        finally:
            Active.device = None
