"""For tests only: lets vLLM's CPU build load new weights, and start when numba is installed."""

import sys

import torch
from vllm.model_executor.layers import utils
from vllm.triton_utils import dispatcher


def keep_weights(layer, remove_weight):
    """Keep the original weights. vLLM would pack and drop them, so that no new weights could be loaded."""
    layer.cpu_linear = torch.nn.functional.linear


def rebind_without_llvmlite(overrides, rebind=dispatcher._rebind_kernels):
    """Hide llvmlite while vLLM inspects all objects of all modules, because those of llvmlite are not plain objects."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    try:
        rebind(overrides)
    finally:
        sys.modules.update(hidden)


def patch():
    utils.dispatch_cpu_unquantized_gemm = keep_weights
    dispatcher._rebind_kernels = rebind_without_llvmlite
