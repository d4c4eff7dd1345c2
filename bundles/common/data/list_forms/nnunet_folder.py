# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read a raw data set of nnU-Net (v2, and the file names of v1) as a data list.

``dataset.json`` names channels and labels, but no files::

    {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "ignore": 2},
     "numTraining": 32, "file_ending": ".nii.gz"}

The files are ``imagesTr/CASE_0000.nii.gz`` (one for each channel), ``labelsTr/CASE.nii.gz`` and ``imagesTs/``. Folders
for validation next to them (``imagesVal``, ``labelsVal``), which nnU-Net ignores, are the validation section.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...value_rules import WHOLE
from ..nifti_files import NIFTI_SUFFIXES, without_suffix
from .labelled_folder import CHANNEL, Image, Pairs, _warn, data_list, nifti_in, validation_pairs

IGNORE = "ignore"  # nnU-Net's name of the label of unknown voxels


def is_nnunet(content: Any) -> bool:
    """Return whether the content of a ``dataset.json`` is in nnU-Net's form."""
    return isinstance(content, Mapping) and "channel_names" in content and not content.get("training")


def nnunet_data_list(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Turn nnU-Net's ``dataset.json`` and the files next to it into a data list.

    Images without a label become ``unlabelled``, labels without an image are left out (both with a warning).

    Args:
        path: the file.
        content: its content.

    Returns:
        ``name``, ``modality``, ``labels`` (value as text to name), ``ignore_label`` if it has one, and the sections as
        in `labelled_folder.data_list`.

    Raises:
        InputError: it has regions, files other than NIfTI, an invalid label, or a case without all its channels.
    """
    labels, ignore_label = _labels(path, content.get("labels"))
    channels = content["channel_names"]
    if not isinstance(channels, Mapping) or set(channels) != set(map(str, range(len(channels)))) or not channels:
        raise InputError(
            f'{path}: \'channel_names\' must name each channel by its number, {{"0": "CT"}}: {channels!r}.'
        )
    ending = content.get("file_ending", ".nii.gz")
    if ending not in NIFTI_SUFFIXES:
        raise InputError(f"{path}: 'file_ending' is {ending!r}. Only NIfTI can be read: convert the files to .nii.gz.")
    folder = path.parent
    if isinstance(content.get("dataset"), Mapping):
        pairs, tests, held_out = _of_paths(path, content["dataset"]), [], None
        where = f"{path}: 'dataset'"
    else:
        held_out = validation_pairs(folder, channels=len(channels))
        where = f"{path}: images in {folder / 'imagesTr'} and labels in {folder / 'labelsTr'}"
        pairs = _paired(folder / "imagesTr", nifti_in(folder / "labelsTr"), len(channels), where)
        tests = _paired(folder / "imagesTs", [], len(channels), str(folder / "imagesTs")).unlabelled
    found = data_list(folder, pairs, validation=held_out, tests=tests, where=where)
    stated = content.get("numTraining")
    if stated is not None and stated != len(pairs.labelled):
        _warn(f"{path}: 'numTraining' is {stated}, but {len(pairs.labelled)} cases have image and label")
    names = {"name": content["name"]} if content.get("name") else {}
    unknown = {} if ignore_label is None else {"ignore_label": ignore_label}
    return {**names, "modality": {key: str(channels[key]) for key in channels}, "labels": labels, **unknown, **found}


def with_channel_files(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a data list whose images are nnU-Net's channel files, where only these exist.

    nnU-Net v1 lists ``imagesTr/CASE.nii.gz`` for the files ``imagesTr/CASE_0000.nii.gz``, ``imagesTr/CASE_0001.nii.gz``.

    Args:
        content: a data list as it was read.
        path: its file.
    """
    training = content.get("training")
    first = training[0] if isinstance(training, list) and training else None
    if not isinstance(first, dict) or not isinstance(first.get("image"), str) or not _channels(first["image"], path):
        return content

    def entry(one: Any) -> Any:
        file = one.get("image") if isinstance(one, dict) else one
        files = _channels(file, path) if isinstance(file, str) else []
        image = files if len(files) > 1 else files[0] if files else file
        return one if not files else {**one, "image": image} if isinstance(one, dict) else {"image": image}

    return {key: [entry(one) for one in value] if isinstance(value, list) else value for key, value in content.items()}


def _channels(file: str, path: Path) -> list[str]:
    """Return the channel files of an image that does not exist itself, relative like the image's path."""
    match = re.fullmatch(r"(.+?)(\.nii(?:\.gz)?)", file)
    if not match or (path.parent / file).exists():
        return []
    files: list[str] = []
    while (path.parent / (name := f"{match[1]}_{len(files):04d}{match[2]}")).is_file():
        files.append(name)
    return files


def _labels(path: Path, declared: Any) -> tuple[dict[str, str], int | None]:
    """Return the name of each value, and the value of unknown voxels."""
    if not isinstance(declared, Mapping) or not declared:
        raise InputError(
            f'{path}: \'labels\' must give names and values, {{"background": 0, "liver": 1}}: {declared!r}.'
        )
    regions = [str(name) for name, value in declared.items() if isinstance(value, list)]
    if regions:
        raise InputError(
            f"{path}: 'labels' has regions ({', '.join(regions)}), which are unions of labels: here each voxel has one "
            'label. List the labels themselves, {"background": 0, "edema": 1, "core": 2}.'
        )
    if all(str(key).isdecimal() and isinstance(name, str) and not name.isdecimal() for key, name in declared.items()):
        declared = {name: key for key, name in declared.items()}  # as in version 1
    values: dict[int, str] = {}
    for name, value in declared.items():
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if not WHOLE.holds(number) or number in values:
            raise InputError(
                f"{path}: the label {name!r} has the value {value!r}: each needs a whole number of its own, 0 or above."
            )
        values[number] = str(name)
    unknown = [value for value, name in values.items() if name == IGNORE]
    return (
        {str(value): name for value, name in sorted(values.items()) if value not in unknown},
        unknown[0] if unknown else None,
    )


def _paired(folder: Path, masks: list[Path], channels: int, where: str) -> Pairs:
    """Pair the images of a folder, ``CASE_0000`` and so on, with the masks ``CASE``."""
    images = nifti_in(folder)
    cases: dict[str, dict[int, Path]] = {}
    for image in images:
        match = CHANNEL.fullmatch(without_suffix(image.name))
        if not match:
            raise InputError(f"{where}: {image} is no channel of a case: nnU-Net's images are named CASE_0000.nii.gz.")
        other = cases.setdefault(match[1], {}).setdefault(int(match[2]), image)
        if other != image:
            raise InputError(f"{where}: {other} and {image.name} are the same channel. Keep one of them.")
    for case, files in cases.items():
        if sorted(files) != list(range(channels)):
            raise InputError(
                f"{where}: the case {case!r} has the {'channel' if len(files) == 1 else 'channels'} {', '.join(f'{number:04d}' for number in sorted(files))}, "
                f"but 'channel_names' names {channels}, from 0000 on. Add the missing files, or remove the others."
            )
    files_of: dict[str, Image] = {
        case: [str(files[number]) for number in range(channels)] if channels > 1 else str(files[0])
        for case, files in cases.items()
    }
    return _exactly(files_of, {without_suffix(mask.name): mask for mask in masks})


def _exactly(images: Mapping[str, Image], masks: Mapping[str, Path]) -> Pairs:
    """Pair images and masks of equal names."""
    return Pairs(
        [(images[case], str(masks[case])) for case in sorted(images.keys() & masks.keys())],
        [images[case] for case in sorted(images.keys() - masks.keys())],
        sorted(str(masks[case]) for case in masks.keys() - images.keys()),
    )


def _of_paths(path: Path, cases: Mapping[str, Any]) -> Pairs:
    """Return the files that ``dataset`` lists: ``{CASE: {"images": [...], "label": ...}}``, relative to the list."""
    labelled: list[tuple[Image, str]] = []
    unlabelled: list[Image] = []
    for case, files in cases.items():
        images = files.get("images") if isinstance(files, Mapping) else None
        if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
            raise InputError(f"{path}: the case {case!r} of 'dataset' needs 'images', a list of files: {files!r:.200}")
        full = [os.path.normpath(path.parent / image) for image in images]
        image: Image = full if len(full) > 1 else full[0]
        if isinstance(files.get("label"), str):
            labelled.append((image, os.path.normpath(path.parent / files["label"])))
        else:
            unlabelled.append(image)
    return Pairs(labelled, unlabelled, [])
