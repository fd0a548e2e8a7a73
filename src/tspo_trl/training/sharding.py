"""Training on several processes: gathering sharded models for a rollout, and the check of unsupported settings."""

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
    Gather all parameters of an FSDP2 model. Inside the context, a forward does not communicate, so processes can make
    different numbers of forwards. Outside, each forward gathers its layers, and a process that makes fewer forwards makes
    the others hang. A model that FSDP2 does not shard is not changed.

    Args:
        model (`torch.nn.Module`):
            The model.
        reshard_after_forward (`bool` or `int`):
            The setting of FSDP2 in training, which is restored afterwards.
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
    Refuse settings that would hang or fail because processes need different numbers of turns.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator, which knows the parallel strategy.
        args ([`~trl.GRPOConfig`]):
            The configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set of this process.

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
