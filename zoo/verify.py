# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Verify that a bundle meets the requirements of the model zoo, MONAI and MONAI Label, without network access.

    python -m zoo.verify zoo/out/swin_unetr_btcv_seg_v0.1.0.zip --run_code
    python -m zoo.verify swin_unetr_msd --task Task09_Spleen --models /runs/spleen/models
    python -m zoo.verify swin_unetr_btcv_seg.zip --model_info model_info.json

A bundle's name is verified as it would be packed; a folder or zip is verified as it is. Building the networks and
workflows of a bundle runs its code; for a folder or zip, ``--run_code`` allows it. The exit status is 0 if no check
failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from bundles.common.errors import InputError, report_input_errors

from .checks import file_checks as bundle_checks
from .checks.bundle_process import run_checks
from .checks.config_sizes import check_config_sizes
from .checks.file_checks import NotChecked, check_schema, read_metadata
from .pack import stage
from .package.archive import extract_archive, file_hash
from .package.release_index import INDEX, read_index, released

#: After these checks failed, the bundle's code is not run: it may not be what its author released.
DECISIVE = frozenset({"only regular files", "bytes as released", "zip name and release", "weights"})
RUNS_CODE = (
    "building networks and workflows runs the bundle's code on this machine: add --run_code if you trust its author"
)
STYLES = {"ok": "green", "FAILED": "bold red", "not checked": "yellow"}
EXPORT = (
    "Swin UNETR cannot be scripted, not even MONAI's own, so the bundle belongs on the zoo's exclusion list. "
    "Export with --use_trace True and --input_shape"
)
TORCHRUN = "does not start two processes; train with multi_gpu_train is only built, in a single process"
FORMAT = "this project is formatted with ruff, and its comments and texts may exceed the zoo's 120 columns"


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check.

    Attributes:
        check: name of the check.
        outcome: ``ok``, ``FAILED`` or ``not checked``.
        reason: why it failed or was not checked, else "".
    """

    check: str
    outcome: str
    reason: str = ""


def verify(
    folder: Path,
    *,
    archive: Path | None = None,
    schema: Path | None = None,
    model_info: Path | None = None,
    build: bool = True,
) -> Iterator[Verdict]:
    """Check a bundle's folder; yield each verdict when it is known.

    Args:
        folder: the bundle.
        archive: the zip that the folder was unpacked from, if any.
        schema: copy of the metadata schema. None: the one found by `schema_copy`.
        model_info: list of releases. For a zip (a download, under any file name) it must contain the bundle's version
            with the checksum of the zip. For a folder it must not contain the version yet.
        build: also build networks and workflows, which takes half a minute and **runs the bundle's code**, in a process
            without this one's tokens. Nothing is built if a check of `DECISIVE` failed.
    """
    try:
        check_config_sizes(folder)
    except InputError as error:
        yield Verdict("sizes of the configs", "FAILED", str(error))
        yield Verdict("everything else", "not checked", "nothing is read after sizes of the configs failed")
        return
    checks = {name: partial(check, folder) for name, check in bundle_checks.CHECKS.items()}
    checks["schema of the metadata"] = lambda: check_schema(folder, schema or schema_copy(folder))
    if archive is not None and model_info is not None:
        checks["bytes as released"] = lambda: check_bytes(folder, archive, model_info)
    elif archive is not None:
        checks["zip name and release"] = lambda: check_archive(folder, archive)
    else:
        checks["version not released yet"] = lambda: check_unreleased(folder, model_info)
    failed = set()
    for name, check in checks.items():
        try:
            check()
            yield Verdict(name, "ok")
        except NotChecked as reason:
            yield Verdict(name, "not checked", str(reason))
        except Exception as error:  # a broken file can raise anything; continue with the other checks
            failed.add(name)
            yield Verdict(
                name, "FAILED", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            )
    if build and (refused := DECISIVE & failed):
        yield Verdict(
            "networks and workflows", "not checked", f"nothing is built after {', '.join(sorted(refused))} failed"
        )
        build = False
    for name, failure in run_checks(folder) if build else ():
        yield Verdict(name, "FAILED" if failure else "ok", failure or "")
    for name, why in {"ckpt_export": EXPORT, "torchrun on 2 GPUs": TORCHRUN, "flake8, black, isort": FORMAT}.items():
        yield Verdict(name, "not checked", why)


def schema_copy(folder: Path) -> Path | None:
    """Find a copy of the metadata's schema in the folder ``schema`` of torch's downloads; None if there is none."""
    try:
        name = Path(str(read_metadata(folder).get("schema"))).name
    except InputError:
        return None
    path = Path(torch.hub.get_dir()) / "schema" / name
    return path if path.is_file() else None


def check_archive(folder: Path, archive: Path) -> None:
    """Check that the zip is named ``NAME_vVERSION.zip`` and matches its entry in the list of releases beside it.

    Raises:
        InputError: if the name is wrong, or the list has another checksum for it.
        NotChecked: if the list does not contain it.
    """
    version = read_metadata(folder).get("version")
    package = f"{folder.name}_v{version}"
    if archive.name != f"{package}.zip":
        raise InputError(
            f"{archive.name} contains {folder.name}, version {version}: the file must be named {package}.zip."
        )
    index = archive.with_name(INDEX)
    if not released(index, package=package, checksum=file_hash(archive, "sha1")):
        raise NotChecked(f"{package} is not in {index}")


def check_unreleased(folder: Path, model_info: Path | None) -> None:
    """Check that the version of a folder is not in the list of releases; a folder has no checksum to compare.

    Raises:
        InputError: if it is.
        NotChecked: without a list.
    """
    if model_info is None:
        raise NotChecked("pass the list of released bundles with --model_info FILE")
    package = f"{folder.name}_v{read_metadata(folder).get('version')}"
    if package in read_index(model_info):
        raise InputError(
            f"{model_info} already contains {package}. To release a changed bundle, raise version in "
            f"configs/metadata.json. If this is the released bundle, verify {package}.zip instead: a folder has no "
            "sha1 to compare."
        )


def check_bytes(folder: Path, archive: Path, model_info: Path) -> None:
    """Check that a downloaded zip has the checksum in the list of releases; `monai.bundle download` does not.

    Raises:
        InputError: if the checksum differs, or the list does not contain the bundle.
    """
    package = f"{folder.name}_v{read_metadata(folder).get('version')}"
    index = read_index(model_info)
    if package not in index:
        raise InputError(f"{model_info} does not contain {package}, only {', '.join(index) or 'an empty list'}.")
    checksum = file_hash(archive, "sha1")
    if index[package]["checksum"] != checksum:
        raise InputError(
            f"{archive} has sha1 {checksum}, but {model_info} lists {index[package]['checksum']} for {package}: the "
            "file is damaged or is not the released one. Do not use it; download it again."
        )


@contextmanager
def opened(bundle: str, *, task: str | None = None, models: Path | None = None) -> Iterator[tuple[Path, Path | None]]:
    """Provide the folder to check, and the zip that it was unpacked from or None.

    Args:
        bundle: a zip, a bundle's folder, or the name of a bundle of this repository, which is assembled as for packing.
        task: see `pack.stage`; only for a name.
        models: see `pack.stage`; only for a name.

    Raises:
        InputError: see `archive.extract_archive` and `pack.stage`; also if ``task`` or ``models`` is set for a folder
            or zip.
    """
    path = Path(bundle)
    assembled = path.is_dir() or re.fullmatch(r".+\.zip", bundle)
    if assembled and (task or models):
        raise InputError(f"--task and --models only apply to a bundle's name; {bundle} is verified as it is.")
    if path.is_dir():
        yield path.resolve(), None
        return
    with tempfile.TemporaryDirectory(prefix="zoo_verify_") as work:
        if assembled:
            yield extract_archive(path, Path(work)), path.resolve()
        else:
            yield stage(bundle, folder=Path(work), task=task, models=models), None


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a bundle from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zoo.verify", description="Verify a bundle as the model zoo does.")
    add = parser.add_argument
    add(
        "bundle",
        metavar="NAME|FOLDER|ZIP",
        help="a bundle of this repository, verified as it would be packed; or a folder or zip, verified as it is",
    )
    add("--task", help="only with the name swin_unetr_msd: the task to make a bundle of")
    add("--models", type=Path, metavar="DIR", help="only with a name: folder with model.pt (default: its own models/)")
    add("--run_code", action="store_true", help="also build a folder's or zip's networks and workflows: runs its code")
    add("--schema", type=Path, metavar="FILE", help="copy of the metadata schema")
    add(
        "--model_info",
        type=Path,
        metavar="FILE",
        help="list of releases; must contain the sha1 of a zip, but not yet the version of a name or folder",
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    counts = dict.fromkeys(STYLES, 0)
    try:
        if given.schema and not given.schema.is_file():
            raise InputError(f"--schema {given.schema} does not exist.")
        if given.model_info and not given.model_info.is_file():
            raise InputError(f"--model_info {given.model_info} does not exist.")
        with opened(given.bundle, task=given.task, models=given.models) as (folder, archive):
            ours = archive is None and not Path(given.bundle).is_dir()  # assembled from this repository
            build = given.run_code or ours
            console.print(f"{folder.name}: {'its code will run on this machine' if build else RUNS_CODE}", markup=False)
            for verdict in verify(
                folder, archive=archive, schema=given.schema, model_info=given.model_info, build=build
            ):
                counts[verdict.outcome] += 1
                line = Text(f"{verdict.outcome:11}  ", style=STYLES[verdict.outcome]).append(
                    verdict.check, style="default"
                )
                console.print(line.append(f": {verdict.reason}" if verdict.reason else "", style="default"))
    except InputError as error:
        console.print(f"Stopped: {error}", markup=False)
        return 1
    console.print(f"{folder.name}: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
