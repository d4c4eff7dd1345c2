# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Claim the output folder before anything is read: no other run writes into it, and there is room."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

import torch

from ..errors import InputError
from .distributed import rank

logger = logging.getLogger(__name__)

_claims: dict[Path, IO[str]] = {}  # open as long as this process lives


def claim_output(
    output_dir: str | os.PathLike, *, use: str, network: torch.nn.Module | None = None, averaged: bool = False
) -> None:
    """Make the output folder, and refuse one that cannot be written, is too full, or that another run writes into.

    The claim ends with the process, however it ends; loading processes do not keep it. Only rank 0 claims.

    Args:
        output_dir: the folder.
        use: ``training``, ``evaluation`` or ``inference``: two runs of one use exclude each other.
        network: the network that a training will save; None: no checkpoints are written.
        averaged: whether checkpoints also hold an average of the weights.

    Raises:
        InputError: see above; the message says which, and what to do.
    """
    if rank() != 0:
        return
    folder = Path(output_dir).expanduser()
    file = folder / f".{use}.lock"
    if file.resolve() in _claims:
        return  # this process has it, as when several runs follow one another in MONAI Label
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        # A lock of the process: one of the open file would live on in loading processes that outlive a killed run.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # by the standard, either says that somebody has it
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise InputError(
            f"Another {use} writes into --output_dir {folder} ({owner}): the files of both would mix. Wait for it, stop "
            "it, or choose another --output_dir."
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no other %s into it.", folder, error.strerror, use)
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        os.fsync(lock.fileno())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    _claims[file.resolve()] = lock
    if network is not None:
        check_room(folder, network, averaged=averaged)


def check_room(folder: Path, network: torch.nn.Module, *, averaged: bool = False) -> None:
    """Refuse a folder without room for the checkpoints of a training.

    At most ``last.pt`` (weights and two moments of AdamW) is there twice while it is replaced, in addition to
    ``best.pt``, ``model.pt`` and the parts of a pre-trained network. Files already in ``models/`` count as room, since
    they are replaced.

    Args:
        folder: output folder.
        network: the network.
        averaged: whether ``last.pt`` also holds an average of the weights.

    Raises:
        InputError: there is too little room.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    copies = 2 * (4 if averaged else 3) + 4
    models = folder / "models"
    there = sum(path.stat().st_size for path in models.glob("*.pt")) if models.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if free + there < copies * weights:
        raise InputError(
            f"--output_dir {folder} has {_gigabytes(free)} free, but the checkpoints of this network need "
            f"{_gigabytes(copies * weights - there)}. Make room, or choose another --output_dir."
        )


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"Cannot write into --output_dir {folder}: {error.strerror}. Choose a folder that you may write to."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2g} GB"
