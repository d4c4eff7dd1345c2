# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a bundle's training under torchrun and save the weights of every rank.

Usage: ``save_every_rank.py BUNDLE_FOLDER OUTPUT_DIR OPTIONS_JSON``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow

folder, output, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, str(folder))
files = [str(folder / "configs" / name) for name in ("train.yaml", "multi_gpu_train.yaml")]
workflow = ConfigWorkflow(files, workflow_type="train", bundle_root=str(folder), output_dir=str(output), **options)
workflow.initialize()
workflow.run()
network = workflow.parser.get_parsed_content("network_def")
torch.save(network.state_dict(), output / f"rank{torch.distributed.get_rank()}.pt")
workflow.finalize()
