# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Segment scans with a released model: python -m zoo.segment hippocampus /data/scan.nii.gz

The model's package is compared with the list of releases, unpacked once, and its ``configs/inference.yaml`` is run on
the scans. What it writes is what any run of inference writes: masks, pictures, ``volumes.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bundles.common.errors import InputError, report_input_errors
from bundles.common.run.known_lines import without_config_note

from .package.archive import extract_archive, file_hash
from .package.release_index import INDEX, read_index

RELEASED = Path(__file__).resolve().parent / "released"
UNPACKED = Path(__file__).resolve().parent / "out" / "unpacked"


def find_release(name: str, released: Path = RELEASED) -> Path:
    """Return the zip of a released model: the newest version.

    Args:
        name: name of its bundle, or a part that no other name has, such as ``hippocampus``.
        released: folder of the zips and of the list of releases.

    Raises:
        InputError: no or several models have this name, or the zip is missing or has other bytes than were released.
    """
    index = read_index(released / INDEX)
    versions: dict[str, list[str]] = {}
    for package in index:
        bundle, _, version = package.rpartition("_v")
        versions.setdefault(bundle, []).append(version)
    found = [bundle for bundle in versions if bundle == name] or [bundle for bundle in versions if name in bundle]
    if len(found) != 1:
        raise InputError(
            f"{name} is {'none' if not found else 'a part of the names'} of the released models. Released are: "
            f"{', '.join(sorted(versions)) or 'none yet'}."
        )
    newest = max(versions[found[0]], key=_in_order)
    package = f"{found[0]}_v{newest}"
    path, expected = released / f"{package}.zip", index[package]["checksum"]
    if not path.is_file():
        raise InputError(f"{path} is missing. Get it again: git checkout -- {path.name}, in {released}.")
    if (checksum := file_hash(path, "sha1")) != expected:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes with sha1 {checksum}, but {expected} was released: it is cut short or "
            f"changed. Get it again: git checkout -- {path.name}, in {released}."
        )
    return path


def _in_order(version: str) -> list[tuple[int, str]]:
    """Return what sorts versions: parts as numbers, and before them parts that are not numbers, such as rc1."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in version.split(".")]


def unpack(path: Path, target: Path = UNPACKED) -> Path:
    """Unpack a package once; return the bundle's folder.

    The folder's name ends with the hash of the zip, so that another package never runs in its place. It appears whole.

    Raises:
        InputError: see `extract_archive`.
    """
    final = target / f"{path.stem}_{file_hash(path, 'sha1')[:8]}"
    if not final.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as work:
            unpacked = Path(work) / final.name
            extract_archive(path, unpacked)
            try:
                unpacked.rename(final)
            except OSError:
                if not final.is_dir():  # else another process was faster
                    raise
    (bundle,) = (folder for folder in final.iterdir() if folder.is_dir())
    return bundle


def main(arguments: Sequence[str] | None = None, *, released: Path = RELEASED, unpacked: Path = UNPACKED) -> int:
    """Run the command line; return the exit status, that of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.segment",
        description="Segment scans with a released model. Further options are those of inference.yaml.",
    )
    parser.add_argument("model", help="name of a released model, or a part of it: hippocampus")
    parser.add_argument("scans", type=Path, help="a NIfTI file, a folder of scans, or a DICOM series")
    parser.add_argument("--output_dir", type=Path, default=Path("segmentation"), help="default: %(default)s")
    given, further = parser.parse_known_args(arguments)
    try:
        words = sys.argv[1:] if arguments is None else arguments
        if not given.scans.exists() and words and words[0].startswith("-"):
            raise InputError(f"{given.scans} does not exist. Name model and scans first, then the options.")
        if not given.scans.exists():
            raise InputError(f"{given.scans} does not exist. Pass a scan or a folder of scans.")
        bundle = unpack(find_release(given.model, released), unpacked)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    about = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    described = about["description"].removesuffix(" Research only.")
    print(f"{about['name']} {about['version']}: {described} {about['intended_use']}", flush=True)
    words = ["--config_file", str(bundle / "configs" / "inference.yaml"), "--bundle_root", str(bundle)]
    words += ["--dataset_dir", os.path.abspath(given.scans)]  # a folder called 2024 would be read as a number
    words += ["--output_dir", os.path.abspath(given.output_dir), *further]
    environment = os.environ | {"PYTHONWARNINGS": without_config_note()}  # the package was compared with the release
    return subprocess.run([sys.executable, "-m", "monai.bundle", "run", *words], env=environment).returncode


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
