# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read a data list: the JSON file that the Medical Segmentation Decathlon (MSD) ships as ``dataset.json``.

::

    {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}, ...],
     "validation": [...], "test": ["imagesTs/b.nii.gz", ...], "labels": {"0": "background", "1": "spleen"}}

Paths are relative to the folder of the list. An entry may carry ``fold`` (its cross-validation fold) and ``patient``
(a drawn split never has a patient on both sides; one that the list says is taken as it is, with a warning), ``weight`` and ``carried`` (see `carried_labels`), and
``labelled`` (see `partial_labels`). A folder without a data list gets one from the names of its files (see
`labelled_folder`); nnU-Net's ``dataset.json`` is read as one (see `nnunet_folder`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from ...errors import InputError
from ...files import absolute_path
from ...words import sentence
from ..carried_labels import check_notes, refuse_carried
from ..nifti_files import _content, is_mask_folder
from ..partial_labels import check_labelled
from .labelled_folder import folder_data_list, nifti_in
from .nnunet_folder import is_nnunet, nnunet_data_list, with_channel_files

UNLABELLED_SECTIONS = ("unlabeled", "unlabelled")
SECTIONS = ("training", "validation", "test", *UNLABELLED_SECTIONS)

#: What programs write for a patient that they do not know.
NO_PATIENT = frozenset({"", "none", "null", "nan", "n/a", "<na>"})

StrPath = str | os.PathLike


def data_list_path(dataset_dir: StrPath, data_list: StrPath | None) -> Path:
    """Return the file of a data list: ``data_list``, else ``dataset_dir`` itself or its ``dataset.json``.

    Raises:
        InputError: ``dataset_dir`` is not a path, such as a list of folders.
    """
    if not isinstance(dataset_dir, (str, os.PathLike)):
        raise InputError(
            f"--dataset_dir {dataset_dir!r} must be a single folder: labelled scans come from one data list."
        )
    folder = absolute_path(dataset_dir)
    if data_list is not None:
        return folder / Path(data_list).expanduser()
    is_list = folder.is_file() or (folder.suffix == ".json" and not folder.is_dir())
    return folder if is_list else folder / "dataset.json"


def parse_data_list(path: Path) -> dict:
    """Read a data list, or make one for a folder without one (`folder_data_list`); paths become absolute.

    Files may be missing. nnU-Net's ``dataset.json`` is read as a data list, too (`nnunet_data_list`). A ``patient`` that
    says nothing (null, empty text, ``nan``) is removed: its scans are not of one patient.
    """
    content = folder_data_list(path.parent) if path.name == "dataset.json" and not path.is_file() else None
    if content is None and not path.is_file():
        raise InputError(
            f"Data list {path} not found. {_content(path.parent)}{_way_on(path.parent)} Images and masks without a list are "
            "known by their names: imagesTr and labelsTr as in BTCV, images and masks, a_ct.nii.gz and a_mask.nii.gz in one "
            "folder, or a folder for each case with ct.nii.gz and label.nii.gz."
        )
    try:
        content = content or json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a JSON data list: it is not UTF-8 text.") from None
    except RecursionError:
        raise InputError(f"{path} is not a JSON data list: its brackets are nested too deeply.") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise InputError(f"{path} is not a JSON data list: {sentence(str(error))}") from None
    if is_nnunet(content):
        content = nnunet_data_list(path, content)
    keys = list(content) if isinstance(content, dict) else f"none, it is a {type(content).__name__}"
    if not isinstance(content, dict) or not any(content.get(section) for section in SECTIONS):
        raise InputError(
            f"{path} has no scans: none of its sections {', '.join(SECTIONS)} has entries; its keys: {keys}. "
            'It must look like {"training": [{"image": ..., "label": ...}, ...]}. To use all NIfTI files of a folder, '
            "pass the folder of the images itself."
        )
    content = with_channel_files(content, path)
    for section in SECTIONS:
        if section not in content:
            continue
        if not isinstance(content[section], list):
            raise InputError(f"{path}: section '{section}' must be a list of entries, got {content[section]!r:.80}")
        content[section] = [_entry(entry, f"{path}: {section}[{i}]", path) for i, entry in enumerate(content[section])]
        if section in ("validation", "test"):
            refuse_carried(content[section], where=f"{path}: section '{section}'")
    return content


def label_names(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Return the ``labels`` of the content of a data list: value to name, empty if it has none.

    Raises:
        InputError: they do not map whole numbers to names.
    """
    labels = content.get("labels") or {}
    try:
        return {int(number): str(name) for number, name in labels.items()}
    except (AttributeError, ValueError):
        raise InputError(
            f'{path}: \'labels\' must map label values to names, as in {{"0": "background", "1": "spleen"}}, '
            f"got {labels!r}"
        ) from None


def first_file(scan: dict) -> str:
    """Return the file that identifies a scan: the file of its image, or the first one if it has one per channel."""
    return image_files(scan)[0]


def image_files(scan: dict) -> list[str]:
    """Return the files of an entry's image: one, or one per channel."""
    return list(ensure_tuple(scan["image"]))


def _entry(entry: str | dict, where: str, path: Path) -> dict:
    entry = {"image": entry} if isinstance(entry, str) else entry
    image = entry.get("image") if isinstance(entry, dict) else None
    files = image if isinstance(image, list) else [image]
    for file in [*files, *([entry.get("label")] if isinstance(entry, dict) else [])]:
        if isinstance(file, str) and ("\0" in file or not _is_unicode(file)):
            raise InputError(f"{where} has {file!r:.200}, which cannot be the path of a file. Correct it.")
    if not files or not all(isinstance(file, str) and file for file in files):
        raise InputError(
            f"{where} has no usable 'image': {entry!r:.200}. An entry is {{\"image\": path or list of paths, "
            '"label": path}, or only the path of an image.'
        )
    entry = dict(
        entry, image=[_resolve(file, path) for file in files] if isinstance(image, list) else _resolve(image, path)
    )
    if entry.get("label") in (None, ""):
        entry.pop("label", None)
    elif isinstance(entry["label"], str):
        entry["label"] = _resolve(entry["label"], path)
    check_notes(entry, where)
    if "carried_from" in entry:
        entry["carried_from"] = [_resolve(file, path) for file in entry["carried_from"]]
    check_labelled(entry, where)
    patient = _patient_text(entry.pop("patient", None), where)
    entry |= {"patient": patient} if patient else {}
    if isinstance(entry.get("store"), str):
        entry["store"] = _resolve(entry["store"], path)
    return entry


def _patient_text(patient: Any, where: str) -> str:
    """Return a patient as text, or "" if none is named: numbers as they are written, 7.0 as 7."""
    if isinstance(patient, float) and patient.is_integer():
        patient = int(patient)  # what spreadsheets make of a column of whole numbers with gaps
    if isinstance(patient, bool) or not isinstance(patient, (str, int, float, type(None))):
        raise InputError(f"{where} has the patient {patient!r}: it must be text or a number, or left out.")
    text = "" if patient is None else str(patient).strip()
    return "" if text.casefold() in NO_PATIENT else text


def _resolve(file: str, list_path: Path) -> str:
    # normpath, not resolve(): links keep their names.
    path = os.path.normpath(list_path.parent / file)
    if "\\" in file and not os.path.lexists(path):  # written on Windows
        return os.path.normpath(list_path.parent / file.replace("\\", "/"))
    return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return False
    return True


def _way_on(folder: Path) -> str:
    """Return what a folder without a data list has instead, for a message."""
    lists = sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []
    if lists:
        return f" Its other JSON files, such as {lists[0]}, can be named: --data_list {lists[0]} or --task PATH/{lists[0]}."
    inside = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if any(is_mask_folder(each.name) for path in inside for each in path.iterdir() if each.is_dir()):
        return (
            " The masks are in a subfolder of each case, one for each structure: merge them into one label map a case."
        )
    if any(nifti_in(each) for each in (folder, *inside)):
        return (
            " It has images, but no masks that are known by their names. Name the folder of the masks labels or masks, and its "
            "files like the images; or name the masks like their images with _seg or _mask at the end. Images without masks: "
            "use them for pre-training (swin_unetr_pretrain), or let inference.yaml or propagate.yaml make masks."
        )
    return ""
