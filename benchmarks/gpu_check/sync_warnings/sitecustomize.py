# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Python imports this at its start if the folder is on PYTHONPATH: CUDA then warns of each wait for the device."""

import torch

if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
