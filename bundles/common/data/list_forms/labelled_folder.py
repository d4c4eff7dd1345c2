# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make the data list of a folder that has none, from the names of its files: images with their masks.

Known layouts: folders of images next to folders of masks (BTCV, ``imagesTr`` and ``labelsTr``, ``images`` and
``masks``), one folder of masks next to or below images of the same names, one folder for each case (``case/ct.nii.gz``
and ``case/label.nii.gz``), and both kinds of files in one folder.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...words import counted
from ..nifti_files import (
    IMAGE_WORDS,
    MASK_WORDS,
    _first,
    is_mask_folder,
    is_mask_name,
    is_nifti,
    is_scan,
    without_suffix,
    words,
)

logger = logging.getLogger(__name__)

# Folders of images, labels and test images. The first is the Decathlon's layout, which users of BTCV have adopted. The
# next two are the challenge's own download (Synapse syn3193805), with and without its top folder.
LAYOUTS = (
    ("imagesTr", "labelsTr", "imagesTs"),
    ("RawData/Training/img", "RawData/Training/label", "RawData/Testing/img"),
    ("Training/img", "Training/label", "Testing/img"),
    ("img", "label", "imgTs"),
)
IMAGE_FOLDERS = ("imagestr", "images", "image", "imgs", "img")
HELD_OUT = r"(Ts|Va|Val|Validation)$"  # folders of test and validation cases
#: Words that name folders of validation cases, in addition to the word for images or masks: ``imagesVa`` (AMOS),
#: ``ValidationImg``.
VALIDATION = ("va", "val", "validation")
TEST = ("ts", "test", "testing")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net: CASE_0000 is the first channel
RESULTS = "volumes.csv"  # the table next to masks that these bundles wrote, which are not labels

Image = str | list[str]  # a file, or one for each channel


@dataclass(frozen=True)
class Pairs:
    """Images with their masks.

    Attributes:
        labelled: an image and its mask.
        unlabelled: images without a mask.
        lost: masks without an image.
    """

    labelled: list[tuple[Image, str]]
    unlabelled: list[Image]
    lost: list[str]

    @property
    def channels(self) -> int:
        """Largest number of files of an image with a mask, at least 1."""
        return max((len(image) for image, _ in self.labelled if isinstance(image, list)), default=1)


@dataclass(frozen=True)
class _Case:
    folder: Path
    images: list[Path]
    masks: list[Path]


def find_layout(folder: Path) -> tuple[Path, Path, Path] | None:
    """Return the folders of images, labels and test images (may be missing); None if the layout is not known.

    Raises:
        InputError: several folders could hold the images, or the labels.
    """
    for layout in LAYOUTS:
        images, labels, test = (folder / part for part in layout)
        if images.is_dir() and labels.is_dir():
            return images, labels, test
    names = _subfolders(folder)
    images = [name for name in names if name.lower() in IMAGE_FOLDERS]
    labels = [name for name in names if is_mask_folder(name) and not re.search(HELD_OUT, name)]
    # A folder of annotations beside one of labels often has other formats, such as contours.
    labels = [name for name in labels if not words(name)[0].startswith("annotation")] or labels
    if not images or not labels:
        prefixed = _prefixed(names)
        if len(prefixed) != 1:
            return _beside_masks(folder, labels)
        images, labels = ([one] for one in prefixed[0])
    if len(images) > 1 or len(labels) > 1:
        raise InputError(
            f"{folder} has no dataset.json, and it is not clear which of its folders belong together: images in "
            f"{' or '.join(images)}, masks in {' or '.join(labels)}. Keep one of each there, or write a dataset.json."
        )
    return folder / images[0], folder / labels[0], folder / "imagesTs"


def _beside_masks(folder: Path, labels: list[str]) -> tuple[Path, Path, Path] | None:
    """Return the only folder whose files have masks in the only folder of masks: any other one, or the one above."""
    if len(labels) != 1:
        return None
    masks = nifti_in(folder / labels[0])
    others = [folder, *(folder / name for name in _subfolders(folder) if not is_mask_folder(name))]
    found = [other for other in others if _have_pairs(nifti_in(other), masks)]
    return (found[0], folder / labels[0], folder / "imagesTs") if len(found) == 1 else None


def _have_pairs(images: list[Path], masks: list[Path]) -> bool:
    """Return whether files belong together by their names."""
    try:
        return bool(pair(by_name(images, ""), by_name(masks, ""), where="").labelled)
    except InputError:
        return False


def _prefixed(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return folders of images and of masks whose names differ only in their last word, as in FLARE21: ``TrainingImg``
    and ``TrainingMask``; but not those of test and validation."""
    found: dict[tuple[str, ...], dict[bool, str]] = {}
    for name in names:
        *prefix, last = words(name) or [""]
        if prefix and (last in IMAGE_FOLDERS or last in MASK_WORDS) and not {*prefix} & {*VALIDATION, *TEST}:
            found.setdefault(tuple(prefix), {})[last in MASK_WORDS] = name
    return [(pair[False], pair[True]) for pair in found.values() if len(pair) == 2]


def has_layout(folder: Path) -> bool:
    """Return whether a folder's subfolders hold images and masks: separate ones, or one for each case."""
    try:
        return find_layout(folder) is not None or any(case.images and case.masks for case in _cases(folder))
    except InputError:
        return True  # `folder_data_list` says what is wrong


def has_flat_pairs(folder: Path) -> bool:
    """Return whether the files of a folder are images and masks that belong together by their names."""
    return _have_pairs(*_flat(folder))


def folder_data_list(folder: Path) -> dict[str, Any] | None:
    """Make the data list of a folder without one.

    Args:
        folder: see the top of this module. Files are paired by `pair`. In a folder for each case, the mask has one of
            `MASK_WORDS` in its name.

    Returns:
        See `data_list`; None if the folder has no known layout.

    Raises:
        InputError: no image has a mask, or it is not clear which files belong together.
    """
    layout = find_layout(folder)
    if layout is not None:
        where = f"images in {layout[0]} and labels in {layout[1]}"
        images, labels, test = (by_name(nifti_in(part), where) for part in layout)
        pairs = pair(images, labels, where=where)
        tests = pair(test, {}, where=str(layout[2]), channels=pairs.channels).unlabelled
        held_out = validation_pairs(folder, channels=pairs.channels)
        return data_list(folder, pairs, validation=held_out, tests=tests, where=where)
    cases = _cases(folder)
    if any(case.images and case.masks for case in cases):
        return data_list(folder, _pairs_of(cases), where=f"the folders in {folder}, one for each case")
    images, masks = _flat(folder)
    if not images or not masks:
        return None
    where = f"images and masks in {folder}"
    return data_list(folder, pair(by_name(images, where), by_name(masks, where), where=where), where=where)


def validation_pairs(folder: Path, *, channels: int) -> Pairs:
    """Return the pairs of folders such as ``imagesVal`` and ``labelsVal``, or ``ValidationImg`` and ``ValidationMask``.

    Args:
        folder: the folder above these.
        channels: number of files of an image.
    """
    files: dict[bool, list[Path]] = {False: [], True: []}  # images and masks
    for name in _subfolders(folder):
        of_name = {*words(name)}
        kind = of_name - {*VALIDATION}
        if len(of_name) == 2 and len(kind) == 1 and (kind <= MASK_WORDS or kind <= {*IMAGE_FOLDERS}):
            files[kind <= MASK_WORDS] += nifti_in(folder / name)
    where = f"images and labels for validation in {folder}"
    return pair(by_name(files[False], where), by_name(files[True], where), where=where, channels=channels)


def data_list(
    folder: Path, pairs: Pairs, *, validation: Pairs | None = None, tests: Iterable[Image] = (), where: str
) -> dict[str, Any]:
    """Return the content of a data list; images without a mask and masks without an image are logged as a warning.

    Args:
        folder: the list's folder.
        pairs: from `pair`.
        validation: those of the validation section; its images without a mask become unlabelled.
        tests: test images.
        where: begins messages.

    Returns:
        ``{"training": [{"image", "label"}, ...], "unlabelled": [image, ...], "test": [image, ...]}``, paths relative to
        ``folder``, an image of several channels as a list; and ``validation`` like ``training`` if it has pairs.

    Raises:
        InputError: no image has a mask.
    """

    def place(file: Image) -> Image:
        return [place(one) for one in file] if isinstance(file, list) else os.path.relpath(file, folder)

    def entry(image: Image) -> str | dict[str, Image]:
        return {"image": place(image)} if isinstance(image, list) else place(image)

    if not pairs.labelled:
        raise InputError(
            f"{where}: {counted(len(pairs.unlabelled), 'image')} ({_first(_names(pairs.unlabelled), 3) or 'none'}) and "
            f"{counted(len(pairs.lost), 'mask')} ({_first(_names(pairs.lost), 3) or 'none'}), but none belong together by name. "
            "Name them alike (case.nii.gz, or case_0000.nii.gz with case.nii.gz), or write a dataset.json. Images "
            "without masks can be used for pre-training (swin_unetr_pretrain), or get masks by inference.yaml."
        )
    held_out = validation or Pairs([], [], [])
    unlabelled, lost = [*pairs.unlabelled, *held_out.unlabelled], [*pairs.lost, *held_out.lost]
    if unlabelled:
        _warn(
            f"{where}: {counted(len(unlabelled), 'image has', 'images have')} no mask, such as {_names(unlabelled)[0]}: listed as "
            "unlabelled"
        )
    if lost:
        _warn(f"{where}: {counted(len(lost), 'mask has', 'masks have')} no image, such as {lost[0]}: left out")
    content = {
        "training": [{"image": place(image), "label": place(mask)} for image, mask in pairs.labelled],
        "unlabelled": [entry(image) for image in unlabelled],
        "test": [entry(image) for image in tests],
    }
    pairs_held_out = [{"image": place(image), "label": place(mask)} for image, mask in held_out.labelled]
    return content | ({"validation": pairs_held_out} if pairs_held_out else {})


def pair(images: Mapping[str, Path], masks: Mapping[str, Path], *, where: str, channels: int | None = None) -> Pairs:
    """Pair images and masks by their names.

    A mask belongs to the image of the same name, else to the channels ``NAME_0000``, ``NAME_0001``, ..., else to the
    image whose name differs only by words such as ``ct`` and ``seg``.

    Args:
        images, masks: files by name, see `by_name`.
        where: begins messages.
        channels: number of files of an image without a mask; None: as many as images with a mask have.

    Raises:
        InputError: two images or two masks belong to one case, or a channel is missing.
    """
    images, masks = dict(images), dict(masks)
    found: dict[str, tuple[Image, str]] = {}
    for name in sorted(images.keys() & masks.keys()):
        found[name] = str(images.pop(name)), str(masks.pop(name))
    groups = _by_channel(images)
    for name in sorted(groups.keys() & masks.keys()):
        found[name] = _image_of(groups[name], images, where), str(masks.pop(name))
    by_words = _by_words(images)
    for key, theirs in sorted(_by_words(masks).items()):
        ours = by_words.get(key, [])
        if len(ours) > 1 or (ours and len(theirs) > 1):
            files = [str(images[name]) for name in ours] + [str(masks[name]) for name in theirs]
            raise InputError(
                f"{where}: it is not clear which belong together: {_first(files, 6)}. Rename or move some."
            )
        for name in ours:
            found[name] = str(images.pop(name)), str(masks.pop(theirs[0]))
    labelled = [found[name] for name in sorted(found)]
    channels = channels or Pairs(labelled, [], []).channels
    groups = {name: group for name, group in _by_channel(images).items() if len(group) == channels}
    unlabelled = {name: _image_of(group, images, where) for name, group in groups.items()}
    unlabelled |= {name: str(file) for name, file in images.items()}
    return Pairs(labelled, [unlabelled[name] for name in sorted(unlabelled)], sorted(map(str, masks.values())))


def nifti_in(folder: Path) -> list[Path]:
    """Return the NIfTI files directly in a folder, sorted; none if it does not exist or cannot be read."""
    try:
        return sorted(file for file in folder.iterdir() if is_nifti(file.name) and file.is_file())
    except OSError:
        return []


def by_name(files: Iterable[Path], where: str) -> dict[str, Path]:
    """Return files by their names, without suffix and without ``img`` or ``label`` before a number (BTCV).

    Raises:
        InputError: two files have one name, such as ``a.nii`` and ``a.nii.gz``.
    """
    named: dict[str, Path] = {}
    for file in files:
        name = re.sub(r"^(img|label)(?=\d)", "", without_suffix(file.name))
        other = named.setdefault(name, file)
        if other != file:
            raise InputError(f"{where}: {other} and {file.name} are both case '{name}'. Keep one of them.")
    return named


def _by_channel(names: Collection[str]) -> dict[str, dict[int, str]]:
    """Return the names of the channels of each case by their numbers, for cases with a first one (``CASE_0000``)."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        if match := CHANNEL.fullmatch(name):
            groups.setdefault(match[1], {})[int(match[2])] = name
    return {case: group for case, group in groups.items() if 0 in group}


def _image_of(group: Mapping[int, str], images: dict[str, Path], where: str) -> Image:
    """Take the channels of a case out of ``images``."""
    if sorted(group) != list(range(len(group))):
        raise InputError(
            f"{where}: {images[group[0]]} has the channels {', '.join(f'{number:04d}' for number in sorted(group))}: one "
            "is missing in between. Add its file, or remove the case."
        )
    files = [str(images.pop(group[number])) for number in sorted(group)]
    return files if len(files) > 1 else files[0]


def _by_words(names: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        key = tuple(word for word in words(name) if word not in MASK_WORDS and word not in IMAGE_WORDS)
        groups.setdefault(key, []).append(name)
    return groups


def _flat(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images and masks directly in a folder; none if these bundles wrote masks there."""
    files = [] if (folder / RESULTS).exists() else nifti_in(folder)
    return _images_and_masks(files)


def _images_and_masks(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    kinds: tuple[list[Path], list[Path]] = ([], [])
    for file in files:
        if is_mask_name(file.name) or is_scan(file.name):  # not a picture or reconstruction of an earlier run
            kinds[is_mask_name(file.name)].append(file)
    return kinds


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(one.name for one in os.scandir(folder) if not one.name.startswith(".") and one.is_dir())
    except OSError:
        return []


def _cases(folder: Path) -> list[_Case]:
    """Return the subfolders with NIfTI files; none if these bundles wrote masks there."""
    if (folder / RESULTS).exists():
        return []
    cases = []
    for name in _subfolders(folder):
        files = [] if is_mask_folder(name) else nifti_in(folder / name)
        if files:
            cases.append(_Case(folder / name, *_images_and_masks(files)))
    return cases


def _pairs_of(cases: Iterable[_Case]) -> Pairs:
    labelled: list[tuple[Image, str]] = []
    unlabelled: list[Image] = []
    lost = []
    for case in cases:
        images = by_name(case.images, str(case.folder))
        groups = _by_channel(images)
        if len(groups) == 1 and len(*groups.values()) == len(images):
            image: Image = _image_of(*groups.values(), images, str(case.folder))
        elif len(images) > 1 or len(case.masks) > 1:
            raise InputError(
                f"{case.folder} should hold one case, but has {counted(len(images), 'image')} and {counted(len(case.masks), 'mask')}: "
                f"{_first(_names([*case.images, *case.masks]), 6)}. It is not clear which belong together: move the "
                "others out, or write a dataset.json."
            )
        elif not images:
            lost += map(str, case.masks)
            continue
        else:
            image = str(case.images[0])
        if len(case.masks) > 1:
            raise InputError(f"{case.folder} has several masks: {_first(_names(case.masks), 6)}. Keep one of them.")
        if case.masks:
            labelled.append((image, str(case.masks[0])))
        else:
            unlabelled.append(image)
    return Pairs(labelled, unlabelled, lost)


def _names(files: Iterable[Image | Path]) -> list[str]:
    return [Path(file[0] if isinstance(file, list) else file).name for file in files]


@functools.cache
def _warn(message: str) -> None:
    """Log a warning once: a run reads its data list several times."""
    logger.warning("%s", message)
