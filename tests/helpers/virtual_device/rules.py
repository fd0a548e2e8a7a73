"""What CUDA does with an operation of PyTorch: what it refuses, what the host waits for, what draws random numbers."""

import torch

aten = torch.ops.aten


def operations(*names: str) -> set:
    """Those operations that this version of PyTorch has."""
    return {getattr(aten, name) for name in names if hasattr(aten, name)}


#: Operations in which a CPU tensor may meet device tensors: copies, and CPU tensors that index
COPIES = operations(
    "copy_", "copy", "_to_copy", "_foreach_copy_",
)  # fmt: skip
INDEXING = operations(
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
)  # fmt: skip
#: Operations of several tensors that take no CPU scalar (not by TensorIterator)
NO_SCALARS = operations(
    "cat", "stack", "embedding", "gather", "index_select", "mm", "bmm", "addmm", "searchsorted",
)  # fmt: skip
#: Operations that draw random numbers
RANDOM = operations(
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_",
    "uniform_", "normal_", "normal", "exponential_", "random_", "multinomial", "native_dropout", "geometric_",
    "cauchy_", "log_normal_",
)  # fmt: skip
#: Host waits for device
SYNCS = operations(
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "is_nonzero", "equal",
)  # fmt: skip
#: No deterministic implementation on CUDA for floating point (docstring of `torch.use_deterministic_algorithms`)
NONDETERMINISTIC = operations(
    "cumsum", "cumsum_", "histc", "put_", "bincount", "kthvalue", "median",
)  # fmt: skip
#: Only metadata: no kernel
VIEWS = operations(
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "diagonal", "unfold", "lift_fresh", "chunk",
    "narrow", "view_as", "resize_", "set_",
)  # fmt: skip
#: Products of matrices, which on CUDA can have a result of another type
PRODUCTS = operations("mm", "bmm", "addmm", "baddbmm")
