# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Save random Swin UNETRs of MONAI 1.4.0, each with an input and its outputs: ``save_monai_1_4.py FOLDER``.

Run this with a Python that has MONAI 1.4.0.
"""

from __future__ import annotations

import sys

import monai
import torch
from monai.networks.nets import SwinUNETR

CROP = (64, 64, 64)

if __name__ == "__main__":
    assert monai.__version__ == "1.4.0", monai.__version__
    for feature_size in (12, 24, 48):
        torch.manual_seed(feature_size)
        network = SwinUNETR(CROP, 1, 3, feature_size=feature_size).eval()
        with torch.no_grad():
            for parameter in network.parameters():  # parameters initialised to zero or one would hide differences
                parameter.add_(0.02 * torch.randn_like(parameter))
            image = torch.rand(1, 1, *CROP)
            outputs = {"logits": network(image), "features": network.swinViT(image, normalize=True)}
        torch.save(
            {"state_dict": network.state_dict(), "image": image, "outputs": outputs},
            f"{sys.argv[1]}/{feature_size}.pt",
        )
