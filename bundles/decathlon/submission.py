# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The archive that the Decathlon's leaderboard takes: a mask for every test image of each task, checked before it is written.

The leaderboard allows a team 1 submission a day and 15 in all (its page, decathlon-10.grand-challenge.org), so what it
would refuse is found here. Its evaluation reads a folder for each task, such as ``Task01_BrainTumour``, at the top of the
archive (its own error message, in issue 2 of Ziyan-Huang/FLARE22); that each mask is named as its test image was not checked.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser, ConfigWorkflow

from ..common.data.case_names import case_name
from ..common.data.data_list import first_file, inference_scans
from ..common.data.nifti_files import is_nifti
from ..common.errors import InputError, RefusedScan
from ..common.files import atomic_path
from ..common.scans.nifti import open_scan, stored_voxels
from ..segmentation.models.ensemble import model_files
from ..segmentation.tasks.tasks import check_dataset, choose_task

logger = logging.getLogger(__name__)

MASK = re.compile(r"(?P<case>.+)_seg\.nii\.gz")  # as inference.yaml names them
LINES = 20  # of a message about faults
# How far a corner of the mask may lie from where the image has it: float32 headers round by less.
MAX_SHIFT_MM = 0.01
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold: equal masks give an equal archive


def submit(
    *,
    tasks: Mapping[str, str],
    data_dirs: Mapping[str, str] | str,
    archive: str,
    bundle_root: str,
    models: Mapping[str, str | Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Predict the test images of the tasks that a model is named for, check the masks of all tasks, and pack them.

    Every scan of a data list's ``test`` section must have its mask ``SCAN_seg.nii.gz``, and no other NIfTI file may lie
    beside them. A mask has the shape and affine of its image (of one of its channels), an integer type, and no value that
    is none of the task's labels. It is packed as it is, as ``Task09_Spleen/spleen_1.nii.gz``; equal masks give equal bytes.

    Args:
        tasks: task to the folder of its masks.
        data_dirs: task to the folder of its data, with ``dataset.json``; or the one folder in which each task's has its
            name, as MSD unpacks.
        archive: the zip file.
        bundle_root: the bundle's folder, for ``configs/tasks.yaml`` and ``configs/inference.yaml``.
        models: task to ``pretrained_model`` of ``inference.yaml``. Masks that an earlier run made are kept.
        options: more options of ``inference.yaml``, for all tasks.

    Returns:
        The names in the archive.

    Raises:
        InputError: before anything is predicted, if a task, a folder, a model or an option is unknown, or data or model are
            of another task; what ``inference.yaml`` refuses; or if anything is wrong with a mask: all faults at once, as far as
            `LINES` go. Nothing is written then.
    """
    models, options, configs = models or {}, options or {}, Path(bundle_root) / "configs"
    if not tasks:
        example = "--tasks \"{'Task09_Spleen': 'runs/spleen/masks'}\""
        raise InputError(f"--tasks names no task: give each task's folder of masks, {example}.")
    if unknown := sorted(set(models) - set(tasks)):
        raise InputError(f"--models names {', '.join(unknown)}, but --tasks has no folder for its masks. Add it there.")
    if not str(archive).endswith(".zip"):
        raise InputError(f"--archive {archive} must end in .zip, the format that it is written in.")
    _check_options(options, configs / "inference.yaml")
    rows = {task: choose_task(task=task, file=str(configs / "tasks.yaml"), preset="official") for task in sorted(tasks)}
    folders = {task: _data_dir(data_dirs, task) for task in rows}
    images = {task: _test_images(folders[task], rows[task], configs / "tasks.yaml") for task in rows}
    for task, model in models.items():
        _check_model(task, model, configs / "tasks.yaml")

    for task, model in models.items():
        logger.info("%s: predicting %d test images", task, len(images[task]))
        _predict(
            configs / "inference.yaml", task, model, folders[task], tasks[task], {**options, "bundle_root": bundle_root}
        )
    members: dict[str, Path] = {}
    faults: list[str] = []
    for task in rows:
        masks = _masks_in(tasks[task], task)
        faults += _faults(task, masks, images[task], [int(value) for value in rows[task]["labels"]])
        members |= {f"{task}/{case}.nii.gz": mask for case, mask in masks.items()}
        logger.info("%s: %d masks checked", task, len(masks))
    if faults:
        raise InputError(_message(faults, archive))
    _write(archive, members)
    if absent := sorted(set(ConfigParser.load_config_file(str(configs / "tasks.yaml"))) - set(tasks)):
        logger.warning("%s lacks %d of the leaderboard's tasks: %s", archive, len(absent), ", ".join(absent))
    logger.info("wrote %s: %d masks, %.1f MB", archive, len(members), os.path.getsize(archive) / 1e6)
    return sorted(members)


# ---- test images and their masks -----------------------------------------------------------------------------------


def _data_dir(data_dirs: Mapping[str, str] | str, task: str) -> str:
    if not isinstance(data_dirs, Mapping):
        return str(Path(data_dirs) / task)
    if task not in data_dirs:
        named = ", ".join(data_dirs) or "none"
        raise InputError(f"--data_dirs names no folder for {task}, only for {named}: add where its dataset.json lies.")
    return str(data_dirs[task])


def _test_images(folder: str, row: Mapping[str, Any], table: Path) -> dict[str, str]:
    """The files of a task's test section, by case."""
    scans = inference_scans(str(Path(folder) / "dataset.json"))
    check_dataset(dataset_dir=folder, data_list=None, row=row, file=str(table))
    files = [first_file(scan) for scan in scans]
    return {case_name(file): file for file in files}


def _masks_in(folder: str, task: str) -> dict[str, Path]:
    """The NIfTI files of a folder, by case; one that is not named as a mask goes by its whole name, and so fits no image."""
    if not os.path.isdir(folder):
        raise InputError(
            f"--tasks: the folder of masks of {task}, {folder}, does not exist. Run configs/inference.yaml first, or name the model in --models."
        )
    files = [Path(folder) / name for name in sorted(os.listdir(folder)) if is_nifti(name)]
    matches = {file: MASK.fullmatch(file.name) for file in files}
    return {match["case"] if match else file.name: file for file, match in matches.items()}


# ---- prediction ----------------------------------------------------------------------------------------------------


def _check_options(options: Mapping[str, Any], inference_file: Path) -> None:
    """MONAI takes an option that a config does not have without a word."""
    own = {"task", "dataset_dir", "pretrained_model", "output_dir", "bundle_root"}
    known = {str(key) for key in ConfigParser.load_config_file(str(inference_file))} - own
    if unknown := sorted(set(options) - known):
        raise InputError(
            f"--inference names {', '.join(unknown)}, which is no option of {inference_file} or is set by --tasks, --models and --data_dirs."
        )


def _check_model(task: str, model: str | Sequence[str], table: Path) -> None:
    """Find a missing model, or that of another task, before hours go into the tasks ahead of it."""
    try:
        for file in model_files(model):
            choose_task(task=task, file=str(table), preset="official", checkpoint=file)
    except InputError as error:
        raise InputError(f"--models, {task}: {error}") from None


def _predict(config_file: Path, task: str, model: Any, data: str, masks: str, options: Mapping[str, Any]) -> None:
    workflow = ConfigWorkflow(
        str(config_file),
        workflow_type="inference",
        **{
            "resume": True,
            **options,
            "task": task,
            "pretrained_model": model,
            "dataset_dir": str(Path(data) / "dataset.json"),
            "output_dir": str(masks),
        },
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


# ---- checks --------------------------------------------------------------------------------------------------------


def _faults(task: str, masks: Mapping[str, Path], images: Mapping[str, str], labels: list[int]) -> list[str]:
    """A line for each test image without a mask, each mask without a test image, and each mask that is wrong."""
    missing, surplus = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    both = sorted(images.keys() & masks.keys())
    faults = [f"{task}: {case} has no mask: {case}_seg.nii.gz is not in its folder" for case in missing]
    faults += [f"{task}: {masks[case]} is the mask of no test image" for case in surplus]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda case: _fault(masks[case], images[case], labels), both)
        return faults + [f"{task}: {fault}" for fault in found if fault]


def _fault(mask_file: Path, image_file: str, labels: Iterable[int]) -> str | None:
    """What is wrong with a mask, or with its image; None where nothing is."""
    file: str | Path = image_file
    try:
        image = open_scan(image_file)
        file = mask_file
        mask = open_scan(str(mask_file))
        if mask.shape != image.shape[:3]:
            return f"{mask_file} has shape {mask.shape}, its image {image_file} {image.shape[:3]}"
        corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in mask.shape))]).T
        shift = np.linalg.norm(((mask.affine - image.affine) @ corners)[:3], axis=0).max()
        if shift > MAX_SHIFT_MM:
            return f"{mask_file} lies up to {shift:.3g} mm from its image {image_file}: their affines differ"
        fault = _fault_of_values(mask, labels)
        return fault and f"{mask_file} {fault}"
    except RefusedScan as error:
        return f"{file} {error}"
    except Exception as error:  # nibabel, gzip, zlib and numpy have a dozen ways to say that a file is broken
        return f"{file} cannot be read, perhaps damaged or cut short ({type(error).__name__}: {error})"


def _fault_of_values(mask: nib.spatialimages.SpatialImage, labels: Iterable[int]) -> str | None:
    voxels, slope, intercept = stored_voxels(mask)
    if voxels.dtype.kind not in "iu" or (slope, intercept) != (1.0, 0.0):
        scaled = "" if (slope, intercept) == (1.0, 0.0) else f" with slope {slope:g} and intercept {intercept:g}"
        return f"is stored as {voxels.dtype}{scaled}: labels must be integers"
    strange = sorted(set(np.unique(voxels).tolist()) - set(labels))
    if strange:
        return f"holds the values {', '.join(map(str, strange[:5]))}{', ...' if len(strange) > 5 else ''}, which are none of the labels {sorted(labels)}"
    return None


def _message(faults: Sequence[str], archive: str) -> str:
    shown = faults if len(faults) <= LINES - 2 else faults[: LINES - 3]
    more = [f"and {len(faults) - len(shown)} more"] if len(shown) < len(faults) else []
    lines = [f"{archive} was not written: {len(faults)} faults in the masks:", *shown, *more]
    return "\n".join(
        [*lines, "Predict these scans again with configs/inference.yaml, and remove what belongs to no test image."]
    )


def _write(archive: str, members: Mapping[str, Path]) -> None:
    """Stored, not deflated: the masks are compressed already."""
    with atomic_path(archive) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        for name, file in sorted(members.items()):
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # whatever system it is packed on
            entry.file_size = file.stat().st_size
            with open(file, "rb") as source, packed.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
