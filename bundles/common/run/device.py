# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check the device of a run, and say on its first line what it computes with."""

from __future__ import annotations

import glob
import logging
import os

import torch

from ..errors import InputError
from ..words import counted, sentence
from .distributed import named_device, rank, world_size
from .mixed_precision import check_amp, precision

logger = logging.getLogger(__name__)

NVIDIA = ("/proc/driver/nvidia/gpus/*", "/dev/nvidia[0-9]*", "/dev/dxg")  # the last: Windows Subsystem for Linux


def start_device(*, device: torch.device | str, amp: bool = False, amp_type: str = "auto") -> None:
    """Check that this machine has the device and its precision; log both and the number of threads.

    A GPU that PyTorch cannot use is named with the likely reason, as a WARNING if the run continues without it.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        amp: whether mixed precision is used.
        amp_type: see `mixed_precision.autocast_type`.

    Raises:
        InputError: PyTorch does not have the device here, or mixed precision is asked for on a CPU.
    """
    device = checked_device(device)
    check_amp(amp=amp, device=device)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name = f"{device} ({found.name}, {found.total_memory / 2**30:.0f} GiB)"
    else:
        name = str(device)
    several = f", process {rank() + 1} of {world_size()}" if world_size() > 1 else ""
    threads = torch.get_num_threads()
    logger.info(
        "running on %s in %s, %s, PyTorch %s%s",
        *(name, precision(amp=amp, amp_type=amp_type), counted(threads, "CPU thread"), torch.__version__, several),
    )
    if amp and amp_type == "auto" and precision(amp=amp, amp_type=amp_type) == "fp16":
        logger.warning("This GPU has no bfloat16: float16 with a gradient scaler is used.")
    if device.type == "cpu" and (reason := unusable_gpu()) is not None:
        logger.warning("This machine has an NVIDIA GPU that PyTorch cannot use: %s. The run uses the CPU.", reason)


def checked_device(device: torch.device | str) -> torch.device:
    """Return a device that PyTorch can use here.

    Raises:
        InputError: it cannot.
    """
    known = named_device(device)
    if known.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            reason = unusable_gpu() or "no NVIDIA GPU is visible"
            raise InputError(
                f"--device {device}: PyTorch has no GPU here: {sentence(reason)} Use --device cpu, or leave it out."
            )
        if known.index is not None and known.index >= count:
            raise InputError(
                f"--device {device}: this machine has {counted(count, 'GPU')}, cuda:0{f' to cuda:{count - 1}' * (count > 1)}."
            )
        return known
    try:
        torch.empty(1, device=known)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"--device {device} cannot be used here: {first_line}") from error
    return known


def unusable_gpu() -> str | None:
    """Return why PyTorch cannot use this machine's NVIDIA GPU; None if it can, or if there is none."""
    if torch.cuda.is_available() or not any(glob.glob(pattern) for pattern in NVIDIA):
        return None
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is a build for CPUs; install one for CUDA (https://pytorch.org/get-started)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it"
    try:
        torch.cuda.init()
        reason = "it is busy or its driver is not loaded; look at nvidia-smi"
    except Exception as error:  # an old driver, a driver without its kernel module
        reason = str(error).partition("\n")[0].rstrip(".")
    return f"{reason} (PyTorch {torch.__version__} needs a driver for CUDA {torch.version.cuda})"
