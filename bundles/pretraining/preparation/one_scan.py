# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Prepare one scan: its audit row, its files, and the record that they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Spacing

from ...common.errors import InputError, RefusedScan
from ...common.files import atomic_path, file_stamp, move_file, write_text
from ...common.run.options import check_option
from ...common.scans.contact_sheet import thumbnail
from ...common.scans.nifti_writing import write_nifti
from ...common.scans.reading import Volume, read_scan
from ...common.scans.search import PREPARED, Candidate
from ...common.value_rules import SWITCH
from ..crops.patch_store import write_scan
from .audit import LEFT_OUT, USED, audit_scan, body_box
from .patient_split import pseudonym

SAMPLE = 4096  # bytes
SET_ASIDE = "set_aside"  # in the folder of the records: files of scans that were used and are left out now
VERSION = 1  # version of the outputs; records of other versions are ignored


@dataclass(frozen=True)
class Recipe:
    """Options that determine the outputs of a scan; see prepare.yaml."""

    spacing: tuple[float, float, float] | None = None
    foreground_hu: float = -500.0
    min_body: int = 10_000
    min_slices: int = 8
    max_spacing: float = 8.0
    keep_suspect: bool = False
    straighten_tilt: bool = False
    write_store: bool = True
    write_nifti: bool = True
    keep_patient_ids: bool = False
    sheet_window: tuple[float, float] = (-400.0, 600.0)

    def __post_init__(self) -> None:
        spacing = [self.spacing] * 3 if isinstance(self.spacing, (int, float)) else self.spacing
        check_option("spacing", spacing)
        for name in ("max_spacing", "min_body", "min_slices", "foreground_hu", "sheet_window"):
            check_option(name, getattr(self, name), not_null=True)
        for name in ("keep_suspect", "straighten_tilt", "write_store", "write_nifti", "keep_patient_ids"):
            SWITCH.check(name, getattr(self, name))
        object.__setattr__(self, "spacing", spacing and tuple(map(float, spacing)))
        object.__setattr__(self, "sheet_window", tuple(map(float, self.sheet_window)))


@dataclass(frozen=True)
class Task:
    """One scan to prepare; pickled and sent to a worker process."""

    candidate: Candidate
    recipe: Recipe
    folder: str  # output folder


class Outputs:
    """The files of one scan in the output folder."""

    def __init__(self, folder: str | os.PathLike, name: str) -> None:
        self.store = Path(folder, "store", f"{name}.b2nd")
        self.nifti = Path(folder, "nifti", f"{name}.nii.gz")
        self.thumbnail = Path(folder, PREPARED, f"{name}.npy")
        self.record = Path(folder, PREPARED, f"{name}.json")
        everything = (self.store, self.nifti, self.thumbnail, self.record)  # the record last
        self._aside = {path: Path(folder, PREPARED, SET_ASIDE, path.name) for path in everything}

    def wanted(self, candidate: Candidate, recipe: Recipe) -> list[Path]:
        """Return the files that a used scan must have besides its record."""
        return (
            [self.store] * recipe.write_store
            + [self.nifti] * (recipe.write_nifti and candidate.kind != "nifti")
            + [self.thumbnail]
        )

    def remove_unwanted(self, candidate: Candidate, recipe: Recipe) -> None:
        """Delete files that only another recipe needs."""
        for path in {self.store, self.nifti} - set(self.wanted(candidate, recipe)):
            path.unlink(missing_ok=True)

    def remove_data(self) -> None:
        """Delete store and NIfTI of a scan that is not used."""
        for path in (self.store, self.nifti):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all files of a scan that no longer exists."""
        self.remove_data()
        for path in (self.thumbnail, self.record, *self._aside.values()):
            path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Move all files of a used scan out of sight: it is left out now, because of its state or another option.

        If file and options are again as they were, `take_back` finds them. Files of a scan that was not used are
        deleted.
        """
        row = (_content(self.record) or {}).get("row")
        if isinstance(row, dict) and row.get("verdict") == USED:
            for path, aside in self._aside.items():
                move_file(path, aside)
        for path in (self.store, self.nifti, self.thumbnail, self.record):
            path.unlink(missing_ok=True)

    def take_back(self) -> None:
        """Put the files that were set aside back in their places."""
        for path, aside in self._aside.items():
            move_file(aside, path)

    def forget_set_aside(self) -> None:
        """Delete what was set aside: the scan is used, with other files."""
        for aside in self._aside.values():
            aside.unlink(missing_ok=True)

    def are_complete(self, candidate: Candidate, recipe: Recipe) -> bool:
        """Return whether the files of a used scan are all there, with the sizes that the record says."""
        sizes = (_content(self.record) or {}).get("sizes")
        sizes = sizes if isinstance(sizes, dict) else {}
        for path in self.wanted(candidate, recipe):
            size = path.stat().st_size if path.is_file() else 0
            if not size or size != sizes.get(path.name, size):
                return False
        return True

    @property
    def record_aside(self) -> Path:
        """The record among the files that are set aside."""
        return self._aside[self.record]


def read_record(task: Task) -> dict[str, Any] | None:
    """Return the row of a scan if it was already prepared from the same files with the same recipe, else None."""
    if task.candidate.fault:
        return None
    outputs = Outputs(task.folder, task.candidate.name)
    if (row := _row_of(outputs.record, task)) is not None:
        return row
    if (row := _row_of(outputs.record_aside, task)) is not None:
        outputs.take_back()
    return row


def _row_of(file: Path, task: Task) -> dict[str, Any] | None:
    try:
        record = _content(file) or {}
        made_from = record["made_from"]
        made_from["recipe"] = json.loads(json.dumps(vars(Recipe()))) | made_from["recipe"]  # options newer than it
        return record["row"] if made_from == _made_from(task) else None
    except (KeyError, TypeError):
        return None  # missing, damaged, or another file


def _content(record: Path) -> dict[str, Any] | None:
    """Return the content of a record, or None if there is none that can be read."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def prepare_scan(task: Task) -> dict[str, Any]:
    """Read, audit and store one scan. Its record is written last.

    Returns:
        The row of `audit_scan`, with ``patient`` and ``series_uid``. For a scan that cannot be read, only these two,
        the verdict and the reason. The cause may be a permission or the network: the next run tries again, and the
        files of an earlier run are set aside until then.

    Raises:
        InputError: a file cannot be written.
    """
    row = identity(task)
    try:
        if task.candidate.fault:
            raise RefusedScan(task.candidate.fault)
        return _prepared(task, row)
    except RefusedScan as error:
        reason = str(error)
    except InputError:
        raise
    except MemoryError:
        reason = "does not fit into memory: use fewer --workers, or a machine with more memory"
    except Exception as error:  # one faulty scan must not stop the others
        reason = f"cannot be prepared ({type(error).__name__}: {error})"
    with writing(task.folder):
        Outputs(task.folder, task.candidate.name).set_aside()
    return row | refused(reason)


def identity(task: Task) -> dict[str, str]:
    """Return what is known about a scan without reading it: ``patient`` and ``series_uid``."""
    candidate = task.candidate
    patient = candidate.patient or (candidate.series.patient_id if candidate.series else "")
    return {
        "patient": patient if task.recipe.keep_patient_ids else pseudonym(patient),
        "series_uid": candidate.series_uid,
    }


def source_of(record: Path) -> str:
    """Return the file or folder that a record was made from; "" if it is not recorded."""
    return str((_content(record) or {}).get("source", ""))


def _prepared(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    candidate, recipe = task.candidate, task.recipe
    made_from = _made_from(task)  # before reading: a file that changes while it is read is prepared again next time
    outputs = Outputs(task.folder, candidate.name)
    volume = read_scan(candidate, straighten_tilt=recipe.straighten_tilt)
    row |= audit_scan(
        volume,
        foreground_hu=recipe.foreground_hu,
        min_body=recipe.min_body,
        min_slices=recipe.min_slices,
        max_spacing=recipe.max_spacing,
        keep_suspect=recipe.keep_suspect,
    )
    used = row["verdict"] == USED
    ras = volume.to_ras()
    window = recipe.sheet_window if used else None
    picture = thumbnail(ras.voxels, spacing=ras.spacing, box=row["body_box"], window=window)
    stored, box = ras, row["body_box"]
    if used and recipe.write_store and recipe.spacing is not None:
        stored = _resampled(ras, recipe.spacing)
        box = body_box(stored.voxels > recipe.foreground_hu)
    with writing(task.folder):
        if not used:
            outputs.set_aside()
        if used and recipe.write_nifti and candidate.kind != "nifti":
            write_nifti(outputs.nifti, voxels=volume.voxels, affine=volume.affine)
        if used and recipe.write_store:
            details = _details(row, recipe)
            write_scan(outputs.store, voxels=stored.voxels, affine=stored.affine, body_box=box, details=details)
        outputs.remove_unwanted(candidate, recipe)
        with atomic_path(outputs.thumbnail) as temporary, open(temporary, "wb") as file:
            np.save(file, picture)
        sizes = {path.name: path.stat().st_size for path in outputs.wanted(candidate, recipe) if path.is_file()}
        record = {"made_from": made_from, "source": candidate.source, "row": row, "sizes": sizes}
        write_text(outputs.record, json.dumps(record, indent=1, ensure_ascii=False))
        if used:
            outputs.forget_set_aside()
    return row


def refused(reason: str) -> dict[str, Any]:
    """Return verdict and reason for a scan that could not be read."""
    return {"verdict": LEFT_OUT, "reason": reason}


@contextmanager
def writing(folder: str | os.PathLike) -> Iterator[None]:
    """Turn write errors into `InputError`: in most cases the disk is full, and other scans would fail as well."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # blosc2 raises the latter
        existing = next(path for path in (Path(folder), *Path(folder).parents) if os.path.exists(path))
        free = shutil.disk_usage(existing).free / 1e9
        raise InputError(
            f"Cannot write in {folder}: {getattr(error, 'strerror', None) or error} ({free:.1f} GB free). Finished "
            "scans are kept. Free some space (or choose another --dataset_dir) and run the same command again: it "
            "continues with the rest."
        ) from error


def _made_from(task: Task) -> dict[str, Any]:
    """Return what identifies the record of a scan: names, sizes, times and samples of its files, and the recipe.

    Neither the folder nor the inode of a file counts, so that a data set can be copied (with its times) together with
    its prepared data. Samples detect files that were swapped. For DICOM the series UID is enough, since files were
    grouped by their content.
    """
    candidate = task.candidate
    try:
        stamps = json.dumps([[os.path.basename(file), *file_stamp(file)] for file in candidate.files])
        samples = [candidate.series_uid] if candidate.series else [_sample(file) for file in candidate.files]
        stamps += json.dumps(samples)
    except OSError:
        stamps = ""
    made_from = {
        "version": VERSION,
        "files": hashlib.sha256(stamps.encode()).hexdigest()[:16],
        "patient": pseudonym(task.candidate.patient),
        "recipe": vars(task.recipe),
    }
    return json.loads(json.dumps(made_from))  # tuples become lists, as in the file


def _sample(file: str) -> str:
    """Return a checksum of start, middle and end of a file. The end of a gzip file has a checksum of all its data."""
    checksum = hashlib.sha256()
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for start in (0, size // 2, max(size - SAMPLE, 0)):
            stream.seek(start)
            checksum.update(stream.read(SAMPLE))
    return checksum.hexdigest()[:16]


def _details(row: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return what the store records about a scan besides its voxels."""
    return {
        "sha256": row["sha256"],
        "foreground_hu": recipe.foreground_hu,
        "spacing": recipe.spacing,
        "quantiles": {name: value for name, value in row.items() if name.startswith("hu_")},
    }


def _resampled(ras: Volume, spacing: tuple[float, float, float]) -> Volume:
    """Resample as train.yaml does. Integer HU are rounded to integers again, which need half the space of floats."""
    image = Spacing(spacing, mode="bilinear")(MetaTensor(ras.voxels[None].astype(np.float32), affine=ras.affine))
    voxels = image[0].numpy()
    if ras.voxels.dtype == np.int16:
        voxels = np.rint(voxels).astype(np.int16)
    return Volume(voxels, image.affine.numpy())
