# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Convert the data of the OpenKBP challenge to NIfTI with a data list, the form in which the studies read them.

python -m evidence.openkbp PROVIDED_DATA FOLDER [--all]

The challenge (Babier et al., Medical Physics 2021, doi 10.1002/mp.14845; MIT by its repository, github.com/ababier/open-kbp)
stores a patient as CSV files: ``ct.csv`` with the index and value of each voxel that is not 0, a file with the indices of each
structure, and ``voxel_dimensions.csv`` in mm. An index counts the voxels of a 128 x 128 x 128 array in C order, with rows
from front to back, columns from right to left and slices from head to feet; each axis of the NIfTI files runs the other way
round. Values are HU + 1024.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import write_text
from bundles.common.run.progress import with_progress
from bundles.common.scans.nifti_writing import write_nifti
from bundles.common.words import sentence

SIZE = 128
AIR = -1024  # HU of the value 0
#: Files of the structures in the order of their label values; where two overlap, the later one counts.
STRUCTURES = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")
NAMES = ("brainstem", "spinal_cord", "right_parotid", "left_parotid", "esophagus", "larynx", "mandible")
SECTIONS = {"training": "train-pats", "validation": "valid-pats"}
PREFIXES = {"training": "train", "validation": "validation"}
#: Patients of the two sections that are not in the figures of docs/explanation/evidence.md.
NOT_IN_FIGURES = frozenset(
    [8, 19, 23, 32, 44, 46, 51, 56, 63, 69, 73, 75, 81, 85, 94, 102, 107, 110, 117, 125, 134, 135, 138, 142, 143, 145]
    + [153, 161, 170, 174, 175, 179, 186, 191, 203, 205, 217, 220, 223, 228, 234, 240]
)


def convert(source: Path, folder: Path, *, all_patients: bool = False) -> dict[str, int]:
    """Convert the training and validation patients.

    Files that are there stay. The data list is written last.

    Args:
        source: the folder ``provided-data`` of the challenge.
        folder: created if it does not exist; gets ``imagesTr``, ``labelsTr`` and ``dataset.json``.
        all_patients: also those of `NOT_IN_FIGURES`.

    Returns:
        Number of patients in each section.

    Raises:
        InputError: a folder or file is missing, or is not in the challenge's form.
    """
    patients = {section: _patients(source / name, all_patients) for section, name in SECTIONS.items()}
    todo = [(section, patient) for section, found in patients.items() for patient in found]
    for _ in with_progress((_convert_patient(*each, folder) for each in todo), len(todo), doing="converting"):
        pass
    content = {
        "name": "OpenKBP: organs at risk in CT of the head and neck",
        "licence": "MIT (repository of the challenge); patients from The Cancer Imaging Archive",
        "modality": {"0": "CT"},
        "labels": {"0": "background"} | {str(value): name for value, name in enumerate(NAMES, 1)},
    }
    content |= {section: [_entry(section, patient) for patient in found] for section, found in patients.items()}
    write_text(folder / "dataset.json", json.dumps(content, indent=1) + "\n")
    return {section: len(found) for section, found in patients.items()}


def _patients(folder: Path, all_patients: bool) -> list[Path]:
    """Return the folders of the patients of a section, by number."""
    numbers = {int(path.name[3:]): path for path in folder.glob("pt_*") if path.name[3:].isdecimal()}
    found = [numbers[number] for number in sorted(numbers) if all_patients or number not in NOT_IN_FIGURES]
    if not found:
        raise InputError(f"{folder} has no patients (pt_1, ...): pass the folder provided-data of the challenge.")
    return found


def _entry(section: str, patient: Path) -> dict[str, str]:
    name = f"{PREFIXES[section]}_{patient.name}.nii.gz"
    return {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}", "patient": patient.name}


def _convert_patient(section: str, patient: Path, folder: Path) -> None:
    files = {key: folder / file for key, file in _entry(section, patient).items() if key != "patient"}
    if all(file.is_file() for file in files.values()):
        return
    spacing = _numbers(patient / "voxel_dimensions.csv", columns=1, skip=0)[:, 0]
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise InputError(f"{patient / 'voxel_dimensions.csv'} must hold three sizes in mm above 0, got {spacing}.")
    ct = np.zeros(SIZE**3, np.int16)
    index, value = _numbers(patient / "ct.csv", columns=2, skip=1).T
    ct[_indices(index, patient / "ct.csv")] = value
    label = np.zeros(SIZE**3, np.uint8)
    for number, structure in enumerate(STRUCTURES, 1):
        file = patient / f"{structure}.csv"
        if file.is_file():  # not every structure was contoured in every patient
            label[_indices(_numbers(file, columns=1, skip=1)[:, 0], file)] = number
    affine = np.diag([*spacing, 1.0])
    write_nifti(files["image"], voxels=_oriented(ct + np.int16(AIR)), affine=affine)
    write_nifti(files["label"], voxels=_oriented(label), affine=affine)


def _oriented(flat: np.ndarray) -> np.ndarray:
    """Return (X, Y, Z), each in the direction of RAS, of the challenge's order: rows, columns, slices, each reversed."""
    return np.ascontiguousarray(flat.reshape(SIZE, SIZE, SIZE)[::-1, ::-1, ::-1].transpose(1, 0, 2))


def _indices(values: np.ndarray, file: Path) -> np.ndarray:
    indices = values.astype(np.int64)
    if len(values) and not ((indices == values).all() and 0 <= indices.min() and indices.max() < SIZE**3):
        raise InputError(f"{file} has an index that is no voxel of {SIZE} x {SIZE} x {SIZE}.")
    return indices


def _numbers(file: Path, *, columns: int, skip: int) -> np.ndarray:
    """Return the first columns of a CSV file, (rows, columns), after ``skip`` lines."""
    try:
        with open(file, "rb") as stream:
            text = stream.read()
        if not text.endswith(b"\n"):  # the last number may have lost digits
            raise ValueError("its last line has no end: it is cut short. Get it again")
        if len(text.splitlines()) <= skip:
            raise ValueError("it has no rows. Get it again")
        return np.loadtxt(
            file, delimiter="," if skip else None, skiprows=skip, usecols=range(columns), ndmin=2, encoding="utf-8"
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {sentence(str(error))}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.openkbp", description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="the folder provided-data of the challenge's repository")
    parser.add_argument("folder", type=Path, help="gets imagesTr, labelsTr and dataset.json")
    parser.add_argument(
        "--all", action="store_true", help="also the patients that the figures of evidence.md are not of"
    )
    options = parser.parse_args(arguments)
    try:
        counts = convert(options.source, options.folder, all_patients=options.all)
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    print(f"{options.folder}: {counts['training']} training and {counts['validation']} validation patients")
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
