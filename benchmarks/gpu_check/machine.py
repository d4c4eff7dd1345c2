# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 1: what the card and the software are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from .parts import PARTS, Settings, missing, tell

PACKAGES = (
    *("torch", "triton", "monai", "numpy", "nibabel", "pytorch-ignite", "einops", "scipy", "blosc2", "pydicom"),
    *("highdicom", "safetensors", "tensorboard", "matplotlib", "mlflow"),
)
LEAST_FREE = 30 * 2**30  # bytes; parts 4 and 5 at base size


def run(settings: Settings) -> None:
    """Report the card, its memory, and the versions."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        facts = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory": total,
            "free": free,
            "driver": _driver(),
            "bf16": torch.cuda.is_bf16_supported(),
        }
        text = f"{card.name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), driver {facts['driver']}"
        enough = free >= LEAST_FREE or settings.dry_run
        text += "" if enough else f": below the {LEAST_FREE / 2**30:.0f} GiB free that base size needs"
        tell("GPU", ok=enough, text=text, **facts)
    else:
        why = "" if torch.version.cuda else f"; PyTorch {torch.__version__} is built without CUDA"
        tell("GPU", ok=settings.dry_run, text=f"PyTorch finds no GPU{why}", name=None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tell("CPU", ok=None, text=f"{cores} cores, {memory / 2**30:.0f} GiB", cores=cores, memory=memory)
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": _cudnn()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    tell("software", ok=None, text=found, versions=versions)
    lacking = sorted({module for part in PARTS.values() for module in missing(part)})
    text = f"missing: {', '.join(lacking)}" if lacking else "all that the parts import is here"
    tell("modules", ok=not lacking, text=text, missing=lacking)


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()
    return None if version is None else str(version)
