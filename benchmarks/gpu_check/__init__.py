# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check all that needs a GPU in one command of under ten minutes.

    make gpu-kit                                              writes gpu-kit/, what travels to a machine without a network
    python3 gpu-kit/check.py --out results                    there, with any Python 3.12 that has PyTorch
    python -m benchmarks.gpu_check --out results              or in the project's own environment
    python -m benchmarks.gpu_check --out results --dry_run    all parts at tiny size on two CPU cores
    python -m benchmarks.gpu_check --out results --report docs/explanation/gpu.md

Each part runs in a process of its own with its own time limit (`parts.PARTS`). A part prints each result as soon as it
is known; the same moment it is in ``gpu_check.json`` of ``--out``. A part that fails, or runs out of time or memory,
does not stop the next one.
"""
