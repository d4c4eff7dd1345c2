# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write data sets of synthetic patients (`synthetic_patient`), so that demo and tests need no download."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from rich.progress import track

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import atomic_path, write_text

from .synthetic_patient import ORGANS, draw_patient, render

GENERATOR_VERSION = 4  # increase it when the same seed gives other voxels, so that old files are written again


class DataLists(NamedTuple):
    """The data lists that `write_dataset` writes."""

    unlabelled: Path
    labelled: Path
    shuffled: Path | None


def write_dataset(
    folder: str | Path,
    *,
    unlabelled: int = 24,
    training: int = 8,
    validation: int = 2,
    test: int = 1,
    seed: int = 0,
    shuffled: bool = True,
    progress: bool = True,
) -> DataLists:
    """Write scans without labels for pre-training, and labelled scans in the layout of BTCV.

    ``folder/unlabelled`` contains ``imagesTr`` and ``dataset.json``. ``folder/labelled`` contains ``imagesTr``,
    ``labelsTr``, ``imagesTs``, ``labelsTs`` and ``dataset.json`` in the form of the Medical Segmentation Decathlon.
    With ``shuffled``, ``dataset_shuffled.json`` assigns to each training scan the label map of the next training
    patient, on the scan's own grid, and true labels to all other scans. It is a control from which no network can learn
    anatomy.

    Files are written atomically. A second call writes only what is missing or was written with other parameters.

    Args:
        folder: created if it does not exist.
        unlabelled: number of scans without labels. One in eight, but at least one of two or more, is for validation.
        training: number of labelled training scans.
        validation: number of labelled validation scans.
        test: number of labelled test scans.
        seed: another seed gives other patients. Larger numbers with the same seed add patients and keep the others.
        shuffled: also write the control with shuffled labels.
        progress: show a progress bar.

    Returns:
        Paths of the data lists.

    Raises:
        InputError: a number is out of range, or the folder contains files that this generator did not write.
    """
    counts = {"unlabelled": unlabelled, "training": training, "validation": validation, "test": test}
    for name, count in counts.items():
        if not 0 <= count <= 1000:
            raise InputError(f"{name}={count}: the number of synthetic scans must be between 0 and 1000.")
    if seed < 0:
        raise InputError(f"seed={seed}: the seed must not be negative.")
    if shuffled and training < 2:
        raise InputError(
            f"training={training}: the control with shuffled labels exchanges label maps between patients. Use two or "
            "more training scans, or no control."
        )
    folder = Path(folder)
    lists = DataLists(
        unlabelled=folder / "unlabelled" / "dataset.json",
        labelled=folder / "labelled" / "dataset.json",
        shuffled=folder / "labelled" / "dataset_shuffled.json" if shuffled else None,
    )
    made_by = {"generator": GENERATOR_VERSION, "seed": seed, **counts, "shuffled": shuffled}
    for path in (lists.unlabelled, lists.labelled, folder / "labelled" / "dataset_shuffled.json"):
        drop_other_list(path, made_by)

    first = seed * 10_000  # each purpose has its own range of patients, so that the numbers can grow
    # Files of each patient: path, and the patient whose label map it contains (None: the scan).
    patients: dict[int, dict[Path, int | None]] = {}
    for i in range(unlabelled):
        patients[first + i] = {lists.unlabelled.parent / scan_name(i): None}
    purposes = [("Tr", first + 2000 + i) for i in range(training)]
    purposes += [("Tr", first + 4000 + i) for i in range(validation)]
    purposes += [("Ts", first + 6000 + i) for i in range(test)]
    for i, (part, patient) in enumerate(purposes):
        patients[patient] = {
            lists.labelled.parent / scan_name(i, part): None,
            lists.labelled.parent / label_name(i, part): patient,
        }
        if shuffled and i < training:
            other = first + 2000 + (i + 1) % training
            patients[patient][lists.labelled.parent / label_name(i, "Shuffled")] = other

    for patient, files in track(patients.items(), "Synthetic CT", disable=not progress):
        write_patient(patient, files)
    wanted = {path for files in patients.values() for path in files}
    for path in sorted(folder.glob("*labelled/*/*.nii.gz")):
        if path not in wanted and mark_of(path).startswith("synthetic CT"):
            path.unlink()  # from a larger data set, or unfinished

    held_out = max(1, unlabelled // 8) if unlabelled > 1 else 0
    scans = [{"image": f"./{scan_name(i)}"} for i in range(unlabelled)]
    about = {
        "description": "Synthetic abdominal CT, drawn by tools/synthetic_ct.py; no real patient",
        "modality": {"0": "CT"},
        "synthetic": made_by,
    }
    write_json(
        lists.unlabelled,
        {
            "name": "Synthetic abdominal CT without labels",
            **about,
            "numTraining": unlabelled - held_out,
            "numTest": 0,
            "training": scans[: unlabelled - held_out],
            "validation": scans[unlabelled - held_out :],
            "test": [],
        },
    )
    cases = [
        {"image": f"./{scan_name(i, part)}", "label": f"./{label_name(i, part)}"}
        for i, (part, _) in enumerate(purposes)
    ]
    labelled = {
        "name": "Synthetic abdominal CT",
        **about,
        "labels": {"0": "background", **{str(organ): name for organ, name in ORGANS.items()}},
        "numTraining": training,
        "numTest": test,
        "training": cases[:training],
        "validation": cases[training : training + validation],
        "test": cases[training + validation :],
    }
    if lists.shuffled:
        swapped = [{**case, "label": f"./{label_name(i, 'Shuffled')}"} for i, case in enumerate(cases[:training])]
        name = "Synthetic abdominal CT, training labels of other patients"
        write_json(lists.shuffled, {**labelled, "name": name, "training": swapped})
    write_json(lists.labelled, labelled)
    return lists


def scan_name(i: int, part: str = "Tr") -> str:
    """Return the path of scan number ``i`` (from 0) inside its data set."""
    return f"images{part}/img{i + 1:04d}.nii.gz"


def label_name(i: int, part: str = "Tr") -> str:
    """Return the path of label map number ``i`` (from 0) inside its data set."""
    return f"labels{part}/label{i + 1:04d}.nii.gz"


def drop_other_list(path: Path, made_by: dict) -> None:
    """Remove a data list that was written with other parameters.

    Raises:
        InputError: the list was not written by this generator.
    """
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text()).get("synthetic")
    except (ValueError, AttributeError):
        found = None
    if found is None:
        raise InputError(f"{path} is not a list of synthetic scans and would be overwritten. Choose another folder.")
    if found != made_by:
        path.unlink()


def write_patient(patient: int, files: dict[Path, int | None]) -> None:
    """Write the missing files of one patient.

    Args:
        patient: seed of the patient. All files have the grid of its scan.
        files: for each path, the patient whose label map it contains; None: the scan itself.

    Raises:
        InputError: a file exists that was not written by this generator.
    """
    marks = {}
    for path, label_of in files.items():
        marks[path] = f"synthetic CT {GENERATOR_VERSION}, patient {patient}"
        if label_of not in (None, patient):
            marks[path] += f", label {label_of}"
        found = mark_of(path)
        if found == marks[path]:
            del marks[path]
        elif found and not found.startswith("synthetic CT"):
            raise InputError(f"{path} is not a synthetic scan and would be overwritten. Choose another folder.")
    if not marks:
        return
    image, label, affine = render(draw_patient(patient))
    for path, mark in marks.items():
        if files[path] is None:
            voxels = image
        elif files[path] == patient:
            voxels = label
        else:
            voxels = stamp(render(draw_patient(files[path]))[1], image.shape)
        volume = nib.Nifti1Image(voxels, affine)
        volume.set_sform(affine, code="scanner")
        volume.set_qform(affine, code="scanner")
        volume.header.set_xyzt_units("mm")
        volume.header["descrip"] = mark
        with atomic_path(path) as temporary:
            nib.save(volume, temporary)


def mark_of(path: Path) -> str:
    """Return the description in the header of a NIfTI file; empty if the file does not exist or is incomplete."""
    if not path.exists():
        return ""
    try:
        volume = nib.load(path)
        np.asanyarray(volume.dataobj)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error):
        return ""
    return volume.header["descrip"].item().decode("latin-1") or "(no description)"


def stamp(label: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Crop or pad a label map about its centre to a shape."""
    stamped = np.zeros(shape, label.dtype)
    source, target = [], []
    for have, want in zip(label.shape, shape, strict=True):
        common = min(have, want)
        source.append(slice((have - common) // 2, (have - common) // 2 + common))
        target.append(slice((want - common) // 2, (want - common) // 2 + common))
    stamped[tuple(target)] = label[tuple(source)]
    return stamped


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Write a synthetic data set from the command line."""
    parser = argparse.ArgumentParser(description="Write synthetic abdominal CT with the 13 organs of BTCV.")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    for name, default in (("unlabelled", 24), ("training", 8), ("validation", 2), ("test", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"number of {name} scans (default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the patients (default: 0)")
    options = vars(parser.parse_args(arguments))
    try:
        lists = write_dataset(options.pop("out"), **options)
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    for path in lists:
        print(path)


if __name__ == "__main__":
    report_input_errors()
    main()
