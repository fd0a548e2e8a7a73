"""For tests only: what keeps vLLM's build for CPUs from taking new weights, and from starting beside numba."""

import sys

import torch
from vllm.model_executor.layers import utils
from vllm.triton_utils import dispatcher


def keep_weights(layer, remove_weight):
    """It packs the weights of linear layers and drops the originals, so that no new ones can be loaded."""
    layer.cpu_linear = torch.nn.functional.linear


def rebind_without_llvmlite(overrides, rebind=dispatcher._rebind_kernels):
    """It looks into every object of every module, and those of llvmlite are no plain objects."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    try:
        rebind(overrides)
    finally:
        sys.modules.update(hidden)


def patch():
    utils.dispatch_cpu_unquantized_gemm = keep_weights
    dispatcher._rebind_kernels = rebind_without_llvmlite
