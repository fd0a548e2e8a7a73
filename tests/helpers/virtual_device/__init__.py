"""
Virtual CUDA devices: PyTorch on the CPU behaves as if tensors lived on devices of their own.

    with VirtualCuda(devices=2) as cuda:      # torch.cuda.is_available() is now True
        model.to("cuda")                      # any code for CUDA

A tensor "on" `cuda:0` is a wrapper that holds a CPU tensor and says that it is elsewhere. Operations compute on the CPU, and

- raise where CUDA would: if they mix devices (CPU scalars, CPU tensors that index, and copies are allowed), if an operation
  in place would move its result, and, with `torch.use_deterministic_algorithms`, if CUDA has no deterministic implementation;
- are counted, about one kernel launch each, and so are the waits of the host for a device, under the line that waits;
- draw from the random generator of their device.

Not imitated: streams, kernels (results are the CPU's), NCCL, alignment and shape limits of fused kernels. An operation may be
split otherwise than CUDA splits it, so counts are approximate.
"""

from .device import VirtualCuda
from .tensors import VirtualTensor

__all__ = ["VirtualCuda", "VirtualTensor"]
