"""For tests only: accelerate takes processes without a GPU for plain data parallel ones, also where FSDP is asked for."""

import os

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
