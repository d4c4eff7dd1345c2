# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the archive for the Decathlon's leaderboard: a mask for every test image of each task, checked beforehand.

The leaderboard allows a team 1 submission per day and 15 in total (see decathlon-10.grand-challenge.org), so everything
that it would refuse is detected here. Its evaluation expects one folder per task, such as ``Task01_BrainTumour``, at
the top of the archive (see the error message quoted in issue 2 of Ziyan-Huang/FLARE22). That each mask must be named
like its test image is an assumption that could not be checked.
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
from ..common.data.data_list import inference_scans
from ..common.data.list_forms.list_file import first_file
from ..common.data.nifti_files import is_nifti
from ..common.errors import InputError, RefusedScan
from ..common.files import atomic_path
from ..common.scans.nifti import open_scan, stored_voxels
from ..segmentation.models.ensemble import model_files
from ..segmentation.tasks.tasks import check_dataset, choose_task

logger = logging.getLogger(__name__)

MASK = re.compile(r"(?P<case>.+)_seg\.nii\.gz")  # as named by inference.yaml
LINES = 20  # maximum number of lines of an error message about faults
# Tolerated distance between the corners of mask and image; rounding of float32 headers stays below it.
MAX_SHIFT_MM = 0.01
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest time in a zip; fixed, so that equal masks give an equal archive


def submit(
    *,
    tasks: Mapping[str, str],
    data_dirs: Mapping[str, str] | str,
    archive: str,
    bundle_root: str,
    models: Mapping[str, str | Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Predict the test images of tasks with a model, check the masks of all tasks, and pack them into the archive.

    Every scan of a data list's ``test`` section must have a mask ``SCAN_seg.nii.gz`` in the task's folder, which must
    contain no other NIfTI files. A mask must have the shape (without channels) and affine of its image, an integer
    type, and only values that are labels of the task. It is packed unchanged, as ``Task09_Spleen/spleen_1.nii.gz``.
    Equal masks give equal bytes.

    Args:
        tasks: maps each task to the folder of its masks.
        data_dirs: maps each task to the folder of its data with ``dataset.json``; or one folder that contains the
            folders of all tasks under their names, as MSD unpacks.
        archive: the zip file to write.
        bundle_root: the bundle's folder, for ``configs/tasks.yaml`` and ``configs/inference.yaml``.
        models: maps tasks to ``pretrained_model`` of ``inference.yaml``. Masks from an earlier run are kept.
        options: further options of ``inference.yaml``, for all tasks.

    Returns:
        The file names in the archive.

    Raises:
        InputError: before the first prediction, if a task, folder, model or option is unknown, or data or model belong
            to another task. During prediction, see ``inference.yaml``. Afterwards, if masks are faulty: the message
            lists all faults, up to `LINES` lines, and no archive is written.
    """
    models, options, configs = models or {}, options or {}, Path(bundle_root) / "configs"
    if not tasks:
        example = "--tasks \"{'Task09_Spleen': 'runs/spleen/masks'}\""
        raise InputError(f"--tasks names no task. Pass the folder of masks of each task, such as {example}.")
    if unknown := sorted(set(models) - set(tasks)):
        raise InputError(f"--models names {', '.join(unknown)}, but --tasks has no folder for its masks. Add it there.")
    if not str(archive).endswith(".zip"):
        raise InputError(f"--archive {archive} must end in .zip: the archive is written as a zip file.")
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
        logger.warning("%s lacks %d tasks of the leaderboard: %s", archive, len(absent), ", ".join(absent))
    logger.info("wrote %s: %d masks, %.1f MB", archive, len(members), os.path.getsize(archive) / 1e6)
    return sorted(members)


# ---- test images and their masks -----------------------------------------------------------------------------------


def _data_dir(data_dirs: Mapping[str, str] | str, task: str) -> str:
    if not isinstance(data_dirs, Mapping):
        return str(Path(data_dirs) / task)
    if task not in data_dirs:
        named = ", ".join(data_dirs) or "none"
        raise InputError(f"--data_dirs has no folder for {task}, only for {named}. Add the folder of its dataset.json.")
    return str(data_dirs[task])


def _test_images(folder: str, row: Mapping[str, Any], table: Path) -> dict[str, str]:
    """Return the files of a task's test section by case."""
    scans = inference_scans(str(Path(folder) / "dataset.json"))
    check_dataset(dataset_dir=folder, data_list=None, row=row, file=str(table))
    files = [first_file(scan) for scan in scans]
    return {case_name(file): file for file in files}


def _masks_in(folder: str, task: str) -> dict[str, Path]:
    """Return the NIfTI files of a folder by case; one not named as a mask keeps its full name, so it fits no image."""
    if not os.path.isdir(folder):
        raise InputError(
            f"--tasks: the folder of masks of {task}, {folder}, does not exist. Run configs/inference.yaml first, or "
            "pass a model for the task in --models."
        )
    files = [Path(folder) / name for name in sorted(os.listdir(folder)) if is_nifti(name)]
    matches = {file: MASK.fullmatch(file.name) for file in files}
    return {match["case"] if match else file.name: file for file, match in matches.items()}


# ---- prediction ----------------------------------------------------------------------------------------------------


def _check_options(options: Mapping[str, Any], inference_file: Path) -> None:
    """Refuse options that the config does not have; MONAI would silently ignore them."""
    reserved = {"task", "dataset_dir", "pretrained_model", "output_dir", "bundle_root"}
    known = {str(key) for key in ConfigParser.load_config_file(str(inference_file))} - reserved
    if unknown := sorted(set(options) - known):
        raise InputError(
            f"--inference names {', '.join(unknown)}, which is not an option of {inference_file} or is already set by "
            "--tasks, --models and --data_dirs."
        )


def _check_model(task: str, model: str | Sequence[str], table: Path) -> None:
    """Detect a missing model, or one of another task, before hours are spent on the preceding tasks."""
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
    workflow.run()  # not what ends a run: its status 3, for a scan that lacks something, would end all; `_faults` looks


# ---- checks --------------------------------------------------------------------------------------------------------


def _faults(task: str, masks: Mapping[str, Path], images: Mapping[str, str], labels: list[int]) -> list[str]:
    """Return one line for each test image without a mask, each mask without a test image, and each invalid mask."""
    missing, surplus = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    both = sorted(images.keys() & masks.keys())
    faults = [f"{task}: {case} has no mask: {case}_seg.nii.gz is missing from the folder" for case in missing]
    faults += [f"{task}: {masks[case]} does not belong to any test image" for case in surplus]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda case: _fault(masks[case], images[case], labels), both)
        return faults + [f"{task}: {fault}" for fault in found if fault]


def _fault(mask_file: Path, image_file: str, labels: Iterable[int]) -> str | None:
    """Describe what is wrong with a mask or its image; None if nothing is."""
    file: str | Path = image_file
    try:
        image = open_scan(image_file)
        file = mask_file
        mask = open_scan(str(mask_file))
        shape = nib.load(mask_file).shape  # with axes of one, which `open_scan` drops: the leaderboard may not
        if shape != image.shape[:3]:
            return f"{mask_file} has shape {shape}, its image {image_file} {image.shape[:3]}"
        corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in mask.shape))]).T
        shift = np.linalg.norm(((mask.affine - image.affine) @ corners)[:3], axis=0).max()
        if shift > MAX_SHIFT_MM:
            return f"{mask_file} is displaced by up to {shift:.3g} mm from its image {image_file}: their affines differ"
        fault = _fault_of_values(mask, labels)
        return fault and f"{mask_file} {fault}"
    except RefusedScan as error:
        return f"{file} {error}"
    except Exception as error:  # for a broken file, nibabel, gzip, zlib and numpy raise many different exceptions
        return f"{file} cannot be read and may be damaged or truncated ({type(error).__name__}: {error})"


def _fault_of_values(mask: nib.spatialimages.SpatialImage, labels: Iterable[int]) -> str | None:
    voxels, slope, intercept = stored_voxels(mask)
    if voxels.dtype.kind not in "iu" or (slope, intercept) != (1.0, 0.0):
        scaled = "" if (slope, intercept) == (1.0, 0.0) else f" with slope {slope:g} and intercept {intercept:g}"
        return f"is stored as {voxels.dtype}{scaled}: labels must be integers"
    undeclared = sorted(set(np.unique(voxels).tolist()) - set(labels))
    if undeclared:
        values = ", ".join(map(str, undeclared[:5])) + (", ..." if len(undeclared) > 5 else "")
        return f"contains the values {values}, which are not among the labels {sorted(labels)}"
    return None


def _message(faults: Sequence[str], archive: str) -> str:
    shown = faults if len(faults) <= LINES - 2 else faults[: LINES - 3]
    more = [f"and {len(faults) - len(shown)} more"] if len(shown) < len(faults) else []
    number = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    lines = [f"{archive} was not written: {number} in the masks:", *shown, *more]
    advice = "Predict these scans again with configs/inference.yaml, and remove files that belong to no test image."
    return "\n".join([*lines, advice])


def _write(archive: str, members: Mapping[str, Path]) -> None:
    """Write the zip without compression: the masks are already compressed."""
    with atomic_path(archive) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        for name, file in sorted(members.items()):
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
            entry.file_size = file.stat().st_size
            with open(file, "rb") as source, packed.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
