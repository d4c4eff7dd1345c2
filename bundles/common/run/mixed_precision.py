# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Mixed precision on a GPU: bfloat16 where the GPU supports it, else float16 with a gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events

from ..errors import InputError
from ..value_rules import check_choice
from .distributed import named_device

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_type(amp_type: str) -> torch.dtype:
    """Return the dtype for `torch.autocast`.

    Args:
        amp_type: ``bf16``, ``fp16``, or ``auto``: bf16 where this GPU supports it (Ampere and later), else fp16.

    Raises:
        InputError: for any other value.
    """
    check_choice(name="amp_type", value=amp_type, choices=["auto", *TYPES])
    if amp_type == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_type = "bf16" if has_bf16 else "fp16"
    return TYPES[amp_type]


def is_gpu(device: torch.device | str) -> bool:
    """Return whether mixed precision is used by default on a device."""
    return named_device(device).type == "cuda"


def check_amp(*, amp: bool, device: torch.device | str) -> None:
    """Refuse mixed precision on a CPU, where MONAI's engines do not use it and bfloat16 overflows in some layers.

    Raises:
        InputError: ``amp`` is set and the device is not a GPU.
    """
    if amp and not is_gpu(device):
        raise InputError(f"--amp true needs a GPU, but this run is on {device}. Remove --amp, or use a GPU.")


def precision(*, amp: bool, amp_type: str) -> str:
    """Return the name of the precision that a run computes in: ``fp32``, ``bf16`` or ``fp16``."""
    return next(name for name, kind in TYPES.items() if kind is autocast_type(amp_type)) if amp else "fp32"


class NoScalingOfBfloat16:
    """Handler for `SupervisedTrainer` that turns off gradient scaling for bfloat16.

    MONAI scales the loss under any mixed precision. bfloat16 has the range of float32 and needs no scaling.

    Args:
        amp_type: see `autocast_type`.
    """

    def __init__(self, *, amp_type: str) -> None:
        self.type = autocast_type(amp_type)

    def attach(self, engine: Engine) -> None:
        """Replace the scaler before the first step."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.scaler is not None and self.type is torch.bfloat16:
            # A disabled scaler, not None: without a scaler, MONAI's trainer does not use mixed precision.
            engine.scaler = torch.amp.GradScaler("cuda", enabled=False)


def autocast_arguments(amp_type: str) -> dict[str, Any]:
    """Return the ``amp_kwargs`` of MONAI's engines."""
    return {"dtype": autocast_type(amp_type)}
