# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run the check from the kit, with any Python that has PyTorch: python3 gpu-kit/check.py --out results

It unpacks the wheels beside this file, and the project's code unless the kit is in a checkout of the project, and
passes all options on to ``python -m benchmarks.gpu_check``. Standard library only; no pip, no network.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKED = "curve"  # folder of the kit with a user's scans


def main(kit: Path, arguments: Sequence[str]) -> None:
    """Unpack the kit into a temporary folder, set PYTHONPATH, and replace this process with the check."""
    folder = Path(tempfile.mkdtemp(prefix="gpu_kit_"))
    for wheel in sorted((kit / "wheels").glob("*.whl")):
        if fits(wheel.name, minor=sys.version_info[1]):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "site")
        else:
            print(f"left out {wheel.name}: not for Python 3.{sys.version_info[1]}", flush=True)
    code = kit.parent
    if not (code / "benchmarks" / "gpu_check").is_dir():
        code = folder / "code"
        with zipfile.ZipFile(kit / "code.zip") as archive:
            archive.extractall(code)
    path = [str(code), str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    scans = [] if "--scans" in arguments else ["--scans", str(kit / "scans")]
    if (kit / PACKED).is_dir() and "--curve_data" not in arguments:
        scans += ["--curve_data", str(kit / PACKED)]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *scans, *arguments])


def fits(wheel: str, *, minor: int) -> bool:
    """Return whether a wheel is for Python 3.``minor``; ``abi3`` wheels are for their version and newer ones."""
    python, abi = wheel.removesuffix(".whl").split("-")[-3:-1]
    if abi == "abi3":
        return int(python.removeprefix("cp3")) <= minor
    return not {"py3", f"py3{minor}", f"cp3{minor}"}.isdisjoint(python.split("."))


if __name__ == "__main__":
    main(Path(__file__).resolve().parent, sys.argv[1:])
