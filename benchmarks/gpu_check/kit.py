# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the kit that travels to a GPU machine without a network.

    python -m benchmarks.gpu_check.kit --out gpu-kit
    python -m benchmarks.gpu_check.kit --out gpu-kit --data DIR    the curve on your own labelled CT in MSD form

It holds wheels for Python 3.12 on x86-64 Linux of what an image with PyTorch lacks, a handful of synthetic scans, the
project's code, and ``check.py``, which runs it all. With ``--data`` it also holds these scans on a coarse grid, as a
study of the curve needs them; without, the curve draws synthetic patients where it runs, and no scan of anybody travels.
"""

from __future__ import annotations

import argparse
import configparser
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bundles.common.errors import InputError
from bundles.common.run.options import check_option
from tools.synthetic_ct import write_dataset

from .__main__ import ROOT, SCANS
from .check import PACKED
from .curve_data import COARSE, own_scans, pack_patient, write_contents

PYTHON = "3.12"
# What the parts import, and an image for PyTorch may lack; versions as pinned in setup.cfg and constraints.txt.
WANTED = (
    *("monai", "nibabel", "pytorch-ignite", "einops", "fire", "pydantic", "blosc2", "pydicom"),
    "safetensors",
)
# What such an image has: PyTorch and its own needs, and the usual scientific packages.
IN_THE_IMAGE = {
    *("torch", "numpy", "scipy", "pillow", "packaging", "typing-extensions", "httpx", "rich", "msgpack"),
    *("threadpoolctl", "importlib-resources", "matplotlib", "pyyaml", "tensorboard"),
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
MARKERS = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": "", "sys_platform": "linux"}
MARKERS |= {
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "implementation_name": "cpython",
    "os_name": "posix",
}
CODE = ("bundles", "benchmarks", "evidence", "tools", "LICENSE")
RESULTS = ("data", "models", "output")  # folders of a bundle that are not its code
LARGEST = 60 * 2**20  # bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the kit from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.kit", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-kit"), help="folder of the kit (default: %(default)s)")
    data_help = "labelled CT in MSD form for the curve (default: synthetic patients, drawn where the kit runs)"
    parser.add_argument("--data", type=Path, help=data_help)
    spacing_help = "grid of the packed scans in mm (default: %(default)s); finer takes more room"
    parser.add_argument("--spacing", type=float, nargs=3, default=COARSE, metavar=("X", "Y", "Z"), help=spacing_help)
    given = parser.parse_args(arguments)
    try:
        write_kit(given.out, data=given.data, spacing=given.spacing)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    return 0


def write_kit(out: Path, *, data: Path | None = None, spacing: Sequence[float] = COARSE) -> None:
    """Write the kit; wheels and synthetic scans that are there stay, packed scans of an earlier call do not.

    Raises:
        InputError: a wheel cannot be found, the data are unfit, or the kit is too large to travel.
    """
    check_option("spacing", list(spacing))
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / PACKED, ignore_errors=True)
    if data is not None:
        pack_data(out / PACKED, data, spacing)
    wheels = collect_wheels(pinned(), out / "wheels")
    write_dataset(out / "scans", **SCANS)
    write_code(out / "code.zip")
    shutil.copy(Path(__file__).parent / "check.py", out / "check.py")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LARGEST:
        packed = sum(path.stat().st_size for path in (out / PACKED).rglob("*")) if data else 0
        cure = (
            f" The scans of {data} take {packed / 2**20:.0f} of them: list fewer, or pass a coarser --spacing."
            if data
            else ""
        )
        raise InputError(
            f"{out} has {size / 2**20:.0f} MiB, more than the {LARGEST / 2**20:.0f} MiB that may travel.{cure}"
        )
    what = f", the scans of {data}" if data else ""
    print(
        f"wrote {out}: {len(wheels)} wheels{what}, {size / 2**20:.1f} MiB. On the GPU machine: python3 {out}/check.py"
    )


def pack_data(folder: Path, data: Path, spacing: Sequence[float]) -> None:
    """Write a user's scans for the curve.

    Raises:
        InputError: see `curve_data.own_scans` and `curve_data.pack_patient`.
    """
    contents, sources = own_scans(data, spacing=spacing)
    folder.mkdir()
    for number, source in enumerate(sources, start=1):
        print(f"\rpacking scan {number} of {len(sources)}", end="", flush=True)
        pack_patient(folder, contents, source)
    print()
    write_contents(folder, contents)


def pinned() -> list[Requirement]:
    """Return the requirements of setup.cfg that the kit carries, narrowed by constraints.txt."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    lines += [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found = {canonicalize_name(one.name): one for one in map(Requirement, lines)}
    return [found[name] for name in WANTED]


def collect_wheels(wanted: Sequence[Requirement], folder: Path) -> list[Path]:
    """Download wheels of the requirements and of all that they need in turn, except what the image has.

    Raises:
        InputError: pip finds no wheel for a requirement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Path] = {}
    todo = list(wanted)
    while todo:
        requirement = todo.pop(0)
        name = canonicalize_name(requirement.name)
        if name in kept:
            continue
        kept[name] = find_wheel(requirement, folder) or download(requirement, folder)
        for need in needs_of(kept[name]):
            if canonicalize_name(need.name) not in IN_THE_IMAGE | kept.keys():
                todo.append(need)
            if need.extras:  # such as httpx[http2]: what the extra needs is not in the image
                todo += EXTRAS.get((canonicalize_name(need.name), *sorted(need.extras)), [])
    for path in folder.glob("*.whl"):
        if path not in kept.values():
            path.unlink()
    return list(kept.values())


EXTRAS = {("httpx", "http2"): [Requirement("h2")]}


def find_wheel(requirement: Requirement, folder: Path) -> Path | None:
    """Return a wheel in the folder that satisfies the requirement."""
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        if canonicalize_name(name) == canonicalize_name(requirement.name) and requirement.specifier.contains(version):
            return path
    return None


def download(requirement: Requirement, folder: Path) -> Path:
    """Download one wheel for Python 3.12 on Linux.

    Raises:
        InputError: there is no such wheel, or the registry cannot be reached.
    """
    plain = f"{requirement.name}{requirement.specifier}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, plain], capture_output=True, text=True, check=False)
    wheel = find_wheel(requirement, folder)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise InputError(f"pip finds no wheel of {plain} for Python {PYTHON} on Linux x86-64: {lines[-1]}")
    return wheel


def needs_of(wheel: Path) -> list[Requirement]:
    """Return what a wheel needs on the GPU machine, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.count("/") == 1 and one.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=False)
    needs = metadata.requires_dist or []
    return [need for need in needs if need.marker is None or need.marker.evaluate(MARKERS)]


def write_code(file: Path) -> None:
    """Write the project's code that the check runs; links become copies, as in a packed bundle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in CODE:
            top = ROOT / name
            paths = [top] if top.is_file() else _files_below(top)
            for path in paths:
                archive.write(path, path.relative_to(ROOT))


def _files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, through links; without compiled files and results of a bundle's runs."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name != "__pycache__" and not (folder.name.startswith("swin_unetr_") and path.name in RESULTS):
                found += _files_below(path)
        elif path.suffix != ".pyc":
            found.append(path)
    return found


if __name__ == "__main__":
    sys.exit(main())
