# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Patch merging as in MONAI 0.9 to 1.4, which every Swin UNETR checkpoint published before 2025 expects."""

from __future__ import annotations

import torch
from monai.networks.nets.swin_unetr import PatchMerging
from torch.nn import functional as F

# Start offsets of the eight sub-lattices, in the order of concatenation. (0,1,0) and (0,0,1) appear twice, (1,1,0) and
# (0,1,1) never. MONAI 1.5.0 fixed this bug and kept the parameter names and shapes.
LEGACY_ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class LegacyPatchMerging(PatchMerging):
    """Merge 2x2x2 patches in the order of MONAI 1.4: pass it as ``SwinUNETR(downsample=LegacyPatchMerging)``.

    Input (B, D, H, W, C), output (B, ceil(D/2), ceil(H/2), ceil(W/2), 2C). Parameters are those of MONAI's
    `PatchMerging`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth, height, width = x.shape[1:4]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2, 0, depth % 2))
        x = torch.cat([x[:, i::2, j::2, k::2, :] for i, j, k in LEGACY_ORDER], dim=-1)
        return self.reduction(self.norm(x))


#: Value of a checkpoint's ``merging`` field to the ``downsample`` argument of MONAI's networks.
MERGING = {"monai": PatchMerging, "legacy": LegacyPatchMerging}
