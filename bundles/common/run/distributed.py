# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rank, process group and devices of a run with one or several processes."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
from monai.data import DistributedSampler
from torch.utils.data import Dataset, Sampler, SequentialSampler

from ..errors import InputError
from ..parent_process import end_with_parent


def is_distributed() -> bool:
    """Return whether this process is part of a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def start(distributed: bool) -> None:
    """Join the process group that ``torchrun`` describes: NCCL on GPUs, gloo on CPUs. End when ``torchrun`` is killed.

    Raises:
        InputError: ``torchrun`` started several processes but the config is for one, or the config is for several but
            ``torchrun`` was not used; or ``torchrun`` was killed meanwhile.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not distributed:
        if launched > 1:
            raise InputError(
                f"torchrun started {launched} processes, but this config is for one. Add the overlay after it: "
                "--config_file \"['configs/train.yaml','configs/multi_gpu_train.yaml']\"."
            )
        return
    if "RANK" not in os.environ:
        raise InputError(
            "multi_gpu_*.yaml must be started with torchrun, for example: torchrun --standalone --nproc_per_node=2 -m monai.bundle run ..."
        )
    if not is_distributed():
        end_with_parent()
        _check_launcher()
        _check_gpus()
        local_device()  # sets the current GPU, which NCCL uses, before the first collective
        # Both where there is a GPU: a run with --device cpu needs gloo there, too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def _check_gpus() -> None:
    """Check that each process of this machine has a GPU of its own, if there are any."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.cuda.is_available() and number >= gpus:
        raise InputError(
            f"torchrun started at least {number + 1} processes on this machine, which shows {gpus} GPU(s) "
            f"(CUDA_VISIBLE_DEVICES limits them). Use --nproc_per_node={gpus}."
        )


def _check_launcher() -> None:
    """Check that ``torchrun`` still serves the store of the group; joining would try for half an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=60).close()
    except OSError as error:
        raise InputError(
            f"torchrun, which started this process, does not answer at {address}:{port} ({error}). It was stopped or killed; "
            "start it again."
        ) from error


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def gather_lists(part: list) -> list:
    """Return the lists of all ranks, concatenated in the order of the ranks."""
    if not is_distributed():
        return part
    parts: list[list] = [[]] * world_size()
    dist.all_gather_object(parts, part)
    return [item for each in parts for item in each]


class _Gather(torch.autograd.Function):
    """Differentiable all_gather.

    The backward of ``torch.distributed.nn.functional.all_gather`` scrambles transposed gradients over gloo (torch
    2.13).
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[rank()]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all ranks, stacked to (ranks, ...); their shapes must be equal.

    The gradient of a rank's tensor is summed over the losses of all ranks.
    """
    return _Gather.apply(tensor.contiguous()) if is_distributed() else tensor[None]


def sum_over_ranks(tensor: torch.Tensor, *, mean: bool = False) -> torch.Tensor:
    """Return the sum over all ranks, or their mean, without gradients."""
    if not is_distributed():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size() if mean else total


def named_device(device: torch.device | str) -> torch.device:
    """Return the device of a name, whether this machine has it or not.

    Raises:
        InputError: PyTorch knows no such name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"--device {device!r} is not a device: use cpu, cuda, or cuda:1 for the second GPU."
        ) from error


def local_device() -> torch.device:
    """Return the GPU of this process (``LOCAL_RANK``), or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def wrap(network: torch.nn.Module, device: torch.device | str, distributed: bool) -> torch.nn.Module:
    """Move the network to its device, and wrap it in ``DistributedDataParallel`` if the run is distributed.

    That sends weights and buffers of the first rank to the others once; buffers again in every forward only if a layer
    keeps running statistics. The index tables of the attention never change.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        if device.index is None:  # "cuda": set_device refuses it
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # whose random state is saved, and whose memory is logged
    network = network.to(device)
    if not distributed:
        return network
    return torch.nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if on_gpu else None,
        broadcast_buffers=any(getattr(module, "track_running_stats", False) for module in network.modules()),
    )


def validation_sampler(dataset: Dataset, distributed: bool) -> Sampler | None:
    """Return a sampler that splits a validation set, in order, between the ranks; None (no split) for one process.

    No case counts twice: some ranks have one case less. With fewer cases than ranks, which each need one, every rank
    takes all of them, so that all count equally often.
    """
    if not distributed:
        return None
    if len(dataset) < world_size():
        return SequentialSampler(dataset)
    return DistributedSampler(dataset, even_divisible=False, shuffle=False)


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network without its ``DistributedDataParallel``."""
    return network.module if isinstance(network, torch.nn.parallel.DistributedDataParallel) else network
