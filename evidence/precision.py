# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a command computes in on this machine: unless the study fixes it, that depends on the GPU, and arms must not differ in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bundles.common.mixed_precision import precision


def precision_of(options: Mapping[str, Any]) -> str:
    """``fp32``, ``bf16`` or ``fp16``, as the bundles resolve it here.

    Args:
        options: of a command; without ``amp`` it is mixed where there is a GPU, without ``amp_type`` of the kind that this GPU has.
    """
    # the defaults are those of the bundles' configs
    return precision(amp=options.get("amp", torch.cuda.is_available()), amp_type=options.get("amp_type", "auto"))
