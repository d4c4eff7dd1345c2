# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Hold a bundle to what the model zoo, MONAI and MONAI Label demand, as far as it needs no network.

    python -m zoo.verify zoo/out/swin_unetr_btcv_seg_v0.1.0.zip
    python -m zoo.verify swin_unetr_msd --task Task09_Spleen --models /runs/spleen/models
    python -m zoo.verify swin_unetr_btcv_seg.zip --model_info model_info.json

A name is verified as it would be packed, a folder and a zip as they are. Exit status 0: all checks passed that could be made.
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

from bundles.common.errors import InputError

from .checks import file_checks as bundle_checks
from .checks.bundle_process import run_checks
from .checks.file_checks import NotChecked, check_schema, read_metadata
from .pack import stage
from .package.archive import extract_archive, file_hash
from .package.release_index import INDEX, read_index, released

STYLES = {"ok": "green", "FAILED": "bold red", "not checked": "yellow"}
EXPORT = "scripting fails for Swin UNETR, MONAI's own too: the zoo's exclusion list is for that. Export with --use_trace True and --input_shape"
TORCHRUN = "no two processes are started: train with multi_gpu_train is built in one"
FORMAT = "this project is formatted by ruff, and has longer lines in comments and texts than the zoo's 120"


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check.

    Attributes:
        check: what was checked.
        outcome: ``ok``, ``FAILED`` or ``not checked``.
        reason: why it failed or was not checked; "" otherwise.
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
    """Check a bundle's folder, and yield each verdict as it is known.

    Args:
        folder: the bundle.
        archive: the zip that it was unpacked from, if so.
        schema: copy of the schema of the metadata; None: the one that `schema_copy` finds.
        model_info: list of releases. A zip, a download, must stand in it, under whatever name it was saved; of a folder the version must not.
        build: also build networks and workflows, which takes half a minute.
    """
    checks = {name: partial(check, folder) for name, check in bundle_checks.CHECKS.items()}
    checks["schema of the metadata"] = lambda: check_schema(folder, schema or schema_copy(folder))
    if archive is not None and model_info is not None:
        checks["bytes as released"] = lambda: check_bytes(folder, archive, model_info)
    elif archive is not None:
        checks["name of the zip, and its release"] = lambda: check_archive(folder, archive)
    else:
        checks["version not released yet"] = lambda: check_unreleased(folder, model_info)
    for name, check in checks.items():
        try:
            check()
            yield Verdict(name, "ok")
        except NotChecked as reason:
            yield Verdict(name, "not checked", str(reason))
        except InputError as error:
            yield Verdict(name, "FAILED", str(error))
        except Exception as error:  # whatever a broken file leads to; the other checks go on
            yield Verdict(name, "FAILED", f"{type(error).__name__}: {error}")
    for name, failure in run_checks(folder) if build else ():
        yield Verdict(name, "FAILED" if failure else "ok", failure or "")
    for name, why in {"ckpt_export": EXPORT, "torchrun on 2 GPUs": TORCHRUN, "flake8, black, isort": FORMAT}.items():
        yield Verdict(name, "not checked", why)


def schema_copy(folder: Path) -> Path | None:
    """The schema that the metadata name, where a copy lies in ``schema`` of torch's folder of downloads; None where not."""
    try:
        name = Path(str(read_metadata(folder).get("schema"))).name
    except InputError:
        return None
    path = Path(torch.hub.get_dir()) / "schema" / name
    return path if path.is_file() else None


def check_archive(folder: Path, archive: Path) -> None:
    """The zip is called ``NAME_vVERSION.zip``, and the list of releases beside it, if there is one, has its checksum."""
    package = f"{folder.name}_v{read_metadata(folder).get('version')}"
    if archive.name != f"{package}.zip":
        raise InputError(
            f"{archive.name} holds {folder.name}, version {read_metadata(folder).get('version')}: it must be called {package}.zip."
        )
    index = archive.with_name(INDEX)
    if not released(index, package=package, checksum=file_hash(archive, "sha1")):
        raise NotChecked(f"{package} is not in {index}")


def check_unreleased(folder: Path, model_info: Path | None) -> None:
    """A list of releases does not name the version of a folder, which has no checksum to compare.

    Raises:
        InputError: if it does.
    """
    if model_info is None:
        raise NotChecked("name the list of what is released by --model_info FILE")
    package = f"{folder.name}_v{read_metadata(folder).get('version')}"
    if package in read_index(model_info):
        raise InputError(
            f"{model_info} names {package} already: to release anything else, raise version in configs/metadata.json. If this is the "
            f"released bundle, verify {package}.zip: a folder has no sha1 to compare."
        )


def check_bytes(folder: Path, archive: Path, model_info: Path) -> None:
    """A downloaded zip has the checksum that a list of releases says; `monai.bundle download` compares none.

    Raises:
        InputError: if it has not, or the list does not name it.
    """
    package = f"{folder.name}_v{read_metadata(folder).get('version')}"
    index = read_index(model_info)
    if package not in index:
        raise InputError(f"{model_info} does not name {package}; it names {', '.join(index) or 'nothing'}.")
    checksum = file_hash(archive, "sha1")
    if index[package]["checksum"] != checksum:
        raise InputError(
            f"{archive} has sha1 {checksum}, but {model_info} says {index[package]['checksum']} of {package}: it is damaged, or not what was "
            "released. Do not use it; download it again."
        )


@contextmanager
def opened(bundle: str, *, task: str | None = None, models: Path | None = None) -> Iterator[tuple[Path, Path | None]]:
    """The folder to check, and the zip that it came from or None.

    Args:
        bundle: a zip, a bundle's folder, or the name of a bundle of this repository, which is put together as for packing.
        task, models: see `pack.stage`; for a name alone.

    Raises:
        InputError: see `archive.extract_archive` and `pack.stage`; or ``task`` or ``models`` go with a folder or zip.
    """
    path = Path(bundle)
    packed = path.is_dir() or re.fullmatch(r".+\.zip", bundle)
    if packed and (task or models):
        raise InputError(f"--task and --models go with a bundle's name; {bundle} is verified as it is.")
    if path.is_dir():
        yield path.resolve(), None
        return
    with tempfile.TemporaryDirectory(prefix="zoo_verify_") as work:
        if packed:
            yield extract_archive(path, Path(work)), path.resolve()
        else:
            yield stage(bundle, folder=Path(work), task=task, models=models), None


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify from the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zoo.verify", description="Verify a bundle as the model zoo does.")
    add = parser.add_argument
    add(
        "bundle",
        metavar="NAME|FOLDER|ZIP",
        help="bundle of this repository, as it would be packed; or a folder or zip as it is",
    )
    add("--task", help="of swin_unetr_msd, by its name: the task to make a bundle of")
    add("--models", type=Path, metavar="DIR", help="by its name: folder with model.pt (the bundle's own models/)")
    add("--schema", type=Path, metavar="FILE", help="copy of the schema of the metadata")
    add(
        "--model_info",
        type=Path,
        metavar="FILE",
        help="list of releases: has the sha1 of a downloaded zip, and not yet the version of a name or folder",
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    counts = dict.fromkeys(STYLES, 0)
    try:
        if given.schema and not given.schema.is_file():
            raise InputError(f"--schema {given.schema} is not there.")
        if given.model_info and not given.model_info.is_file():
            raise InputError(f"--model_info {given.model_info} is not there.")
        with opened(given.bundle, task=given.task, models=given.models) as (folder, archive):
            for verdict in verify(folder, archive=archive, schema=given.schema, model_info=given.model_info):
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
    sys.exit(main())
