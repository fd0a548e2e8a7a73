"""Several processes: sharded models that are gathered once for all turns of a rollout, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from trl import GRPOConfig
from trl.distributed import DistributedBackend


@contextmanager
def gathered_fsdp2(model: torch.nn.Module, *, reshard_after_forward: Any) -> Iterator[None]:
    """
    Hold the whole parameters of an FSDP2 model. Within, a forward talks to no other process, so that processes may make
    different numbers of them; otherwise each forward gathers layer by layer, and processes that make fewer hang the
    others. A model that is not sharded by FSDP2 is left as it is.

    Args:
        model (`torch.nn.Module`):
            The model.
        reshard_after_forward (`bool` or `int`):
            What FSDP2 is configured to do in training, which is restored.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()


def check_processes(accelerator: Accelerator, args: GRPOConfig, train_dataset: Any) -> None:
    """
    Refuse what would hang or go wrong in some step, because processes need different numbers of turns.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the strategy.
        args ([`~trl.GRPOConfig`]):
            The configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The questions of this process.

    Raises:
        `ValueError`: If parameters would be gathered in every forward, or the processes have different data.
    """
    backend = DistributedBackend(accelerator)
    if backend.is_zero3 and not args.ds3_gather_for_generation:
        raise ValueError(
            "`ds3_gather_for_generation=False` gathers the parameters in every forward, and processes whose rollouts take "
            "fewer turns would hang the others. Set it to True; if the whole model does not fit a device, use fewer "
            "rollouts at a time (`per_device_train_batch_size`, `steps_per_generation`) or a smaller model."
        )
    if backend.fsdp_version == 1:
        raise ValueError(
            "FSDP1 gathers its parameters in every forward, and processes whose rollouts take fewer turns would hang the "
            "others. Set `fsdp_version: 2` in the configuration of accelerate."
        )
    if isinstance(train_dataset, Dataset):
        sizes = gather(torch.tensor([len(train_dataset)], device=accelerator.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`train_dataset` must be the same in every process, their sizes are {sizes}. Load the same file "
                "everywhere; the questions are distributed afterwards."
            )
