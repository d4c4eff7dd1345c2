# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The parts of the check, and how a part reports its results. It imports only the standard library."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "\x1e"  # starts a line of output that is a result
STARTED = time.monotonic()  # start of this process, before PyTorch was imported


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        title: what it checks.
        seconds: its time limit.
        needs: modules that it imports, apart from the standard library and PyTorch.
        gpu: whether it is left out without a GPU (except in a dry run).
    """

    title: str
    seconds: int
    needs: tuple[str, ...] = ()
    gpu: bool = True


NETWORK = ("monai", "numpy", "einops")
ENGINE = (*NETWORK, "ignite", "yaml", "rich", "matplotlib", "scipy", "safetensors", "tensorboard", "pydantic")
PARTS = {
    "machine": Part("Card and software", 30, gpu=False),
    "bias_gradient": Part("The attention and the Triton kernel of its bias", 75),
    "parity": Part("Fast path against stock MONAI in float64", 50, NETWORK),
    "workflows": Part(
        "The bundles through python -m monai.bundle run",
        *(200, (*ENGINE, "nibabel", "fire", "pydicom", "blosc2")),
    ),
    "steps": Part("Time and memory of a training step", 180, ENGINE),
    "kernels": Part("The ten slowest kernels of a step", 45, ENGINE),
    "curve": Part("Dice over the number of labelled patients", 560, (*ENGINE, "nibabel", "blosc2", "pydicom")),
}


@dataclass(frozen=True)
class Settings:
    """Settings that the parts get.

    Attributes:
        scans: folder with ``unlabelled`` and ``labelled`` of `tools.synthetic_ct`.
        work: folder for the files of the runs.
        dry_run: tiny sizes on the CPU.
        seconds: how long the part may take.
        curve_data: folder of packed scans for the curve; None: synthetic patients are drawn.
    """

    scans: Path
    work: Path
    dry_run: bool
    seconds: float
    curve_data: Path | None = None

    @property
    def left(self) -> float:
        """Return the seconds that the part has left."""
        return self.seconds - (time.monotonic() - STARTED)

    @property
    def device(self) -> str:
        """Return ``cuda``, or ``cpu`` in a dry run."""
        return "cpu" if self.dry_run else "cuda"


def tell(name: str, /, *, ok: bool | None, text: str, **values: Any) -> None:
    """Print a result for the parent process.

    Args:
        name: what was checked; unique in its part.
        ok: whether it is as it should be; None: a figure that cannot be wrong.
        text: one line for people.
        values: figures, as JSON.
    """
    line = json.dumps({"check": name, "ok": ok, "text": text, **values}, allow_nan=True)
    print(f"{MARK}{line}", flush=True)


def attempt(name: str, check: Callable[[], None]) -> None:
    """Run a check that calls `tell`; an exception becomes a failed result, so that the next check runs."""
    import torch

    try:
        check()
    except torch.OutOfMemoryError as error:
        tell(name, ok=False, text=f"{name}: too little GPU memory ({str(error).partition('.')[0]})")
    except Exception as error:  # whatever a library raises: one failure must not cost the other results
        first = str(error).strip().partition("\n")[0]
        tell(name, ok=False, text=f"{name}: {type(error).__name__}: {first}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def missing(part: Part) -> list[str]:
    """Return the modules that the part needs and this Python lacks."""
    return [name for name in ("torch", *part.needs) if importlib.util.find_spec(name) is None]


def run_part(name: str, settings: Settings) -> int:
    """Run a part in this process; return the exit status."""
    part = PARTS[name]
    if lacking := missing(part):
        advice = "add their wheels to gpu-kit/wheels, or install them"
        tell("modules", ok=False, text=f"left out: this Python has no {', '.join(lacking)}; {advice}", missing=lacking)
        return 0
    if part.gpu and not settings.dry_run:
        import torch

        if not torch.cuda.is_available():
            tell("GPU", ok=False, text="left out: PyTorch finds no GPU (--dry_run runs all parts on the CPU)")
            return 0
    sys.stdout.flush()
    importlib.import_module(f"benchmarks.gpu_check.{name}").run(settings)
    return 0
