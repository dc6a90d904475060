"""Several processes that train as one: who is who, sums over all of them, gradients shared.

Plain DistributedDataParallel under torchrun: the loop needs nothing else that an engine such as accelerate brings.
"""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aicsd_deploy.console import silence
from aicsd_deploy.errors import InputError

T = TypeVar("T")


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun (or a scheduler that sets its variables) started; return this one's device.

    With one process nothing else happens. Otherwise all but the main one fall silent, and each takes the GPU of its local rank.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device.type == "cuda":
        if several:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if device.index >= torch.cuda.device_count():
                raise InputError(
                    f"Process {device.index} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                    "Give torchrun a smaller --nproc-per-node, or --device cpu."
                )
        torch.cuda.set_device(device)  # events, memory counters and pinned memory are those of the current GPU
    if several and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
        atexit.register(dist.destroy_process_group)
        if not is_main():
            silence()
    return device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes."""
    return rank() == 0


def from_main(value: T) -> T:
    """Return the main process's `value` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; on a GPU without waiting for it."""
    if world_size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module with gradients that are averaged over all processes."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def share_buffers(network: nn.Module) -> None:
    """Give every process the main one's statistics of batch normalisation, which it saves; each has those of its own batches."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def gradients_held_back(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes are not yet shared, for all but the last part of an accumulated step."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a small module that is not wrapped by `parallel`."""
    if world_size() > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(sum_over_processes(parameter.grad) / world_size())


def sync_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Let batch normalisation see the batches of all processes.

    Raises:
        InputError: not on a GPU; PyTorch has no such layer for the CPU.
    """
    if device.type != "cuda":
        raise InputError("--sync-bn needs GPUs: PyTorch has no synchronised batch normalisation for the CPU.")
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
