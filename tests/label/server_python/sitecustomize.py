# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make a torchvision built for CUDA importable with a CPU-only torch.

MONAI Label needs none of the operations that are missing then.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # operator torchvision::nms does not exist
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
