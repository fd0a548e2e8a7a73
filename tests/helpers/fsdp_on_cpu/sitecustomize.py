"""For tests only: enables FSDP on CPUs, where accelerate would use plain data parallelism instead."""

import os

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
