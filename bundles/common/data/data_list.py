# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""List the scans of one section, from a folder, a data list (see `list_forms`) or a NIfTI file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from ..errors import InputError
from ..files import absolute_path
from ..value_rules import SHARE_INSIDE, WHOLE, check_choice
from ..words import counted
from .carried_labels import refuse_carried
from .case_names import names_of
from .list_forms.labelled_folder import folder_data_list
from .list_forms.list_file import (
    SECTIONS,
    UNLABELLED_SECTIONS,
    StrPath,
    data_list_path,
    first_file,
    label_names,
    parse_data_list,
)
from .nifti_files import (
    _content,
    _first,
    _nifti_below,
    _one_nifti,
    is_nifti,
    is_scan,
    masks_beside_images,
    without_suffix,
)
from .partial_labels import LABELLED, with_values
from .splits import draw_validation, split_entries, warn_of_missing_patients, warn_of_shared_patients

logger = logging.getLogger(__name__)


def segmentation_scans(
    dataset_dir: StrPath,
    *,
    data_list: StrPath | None = None,
    section: str,
    fold: int | str | None = 0,
    folds: int | None = None,
    seed: int = 0,
    may_be_empty: bool = False,
    labels: Mapping[Any, str] | None = None,
    may_be_missing: bool = False,
) -> list[dict]:
    """List the scans of one section for fine-tuning or evaluation.

    Training and validation are split by the first rule that applies:

    1. ``fold="all"``: every scan is in training, validation is empty.
    2. ``fold=None`` and the list has a ``validation`` section: the sections of the list. Without one, as fold 0.
    3. Every entry has a ``fold``: the entries of that fold are the validation.
    4. Training and validation sections together are split into ``folds`` folds by patient (the entry's ``patient``,
       else its image). The split depends only on ``seed`` and the patients, not on the order of the list or on the
       location of the data set.

    By rules 3 and 4, cases with carried labels are never in validation and do not affect the draw. They are in
    training, except for those of the fold or of a patient in validation, which are left out.

    Args:
        dataset_dir: folder with ``dataset.json``.
        data_list: another JSON file instead, absolute or relative to ``dataset_dir``.
        section: ``training``, ``validation``, ``test``, or ``all`` (training and validation, whatever the fold).
        fold: see above.
        folds: number of folds for rule 4; None: `FOLDS`, or one per patient if there are fewer patients.
        seed: seed of the split of rule 4.
        may_be_empty: with ``fold="all"``, return an empty validation instead of raising an error.
        labels: label names of this run by value; ``labelled`` of an entry then holds label values (`partial_labels`).
        may_be_missing: also list scans whose files do not exist, unless no scan has all of its files.

    Returns:
        Entries ``{"image": path or list of paths, "label": path, ...}``.

    Raises:
        InputError: see `parse_data_list` and `partial_labels.with_values`; files of these scans do not exist; a label
            is missing; there are fewer patients than folds; the fold does not exist; the section is empty.
    """
    check_choice(name="section", value=section, choices=("training", "validation", "test", "all"))
    path = data_list_path(dataset_dir, data_list)
    content = parse_data_list(path)
    if section == "test":
        scans = content.get("test", [])
    elif section == "all":
        scans = content.get("training", []) + content.get("validation", [])
    else:
        training, validation = split_entries(content, path, fold=fold, folds=folds, seed=seed)
        scans = training if section == "training" else validation
        both = {str(scan["image"]) for scan in training} & {str(scan["image"]) for scan in validation}
        if both:
            logger.warning(
                "%s: %s in both training and validation, e.g. %s: scores will be too high",
                path,
                counted(len(both), "scan is", "scans are"),
                min(both),
            )
        elif section == "training":
            warn_of_shared_patients(training, validation, path)
    if not scans and section == "validation" and fold == "all":
        if may_be_empty:
            return []
        raise InputError(
            f"{path}: with fold 'all' every scan is in training, none is left for validation. Use --section training."
        )
    if not scans:
        raise InputError(f"{path} has no scans for section '{section}'. {_sections_of(content)}")
    unlabelled = [scan for scan in scans if "label" not in scan]
    if unlabelled:
        raise InputError(
            f"{path}: {len(unlabelled)} of {len(scans)} scans of section '{section}' have no 'label', e.g. "
            f"{unlabelled[0]['image']}. Add their labels to the list, or remove these entries from it."
        )
    _check_files(scans, section, path, keys=("image", "label"), may_be_missing=may_be_missing)
    if section == "training":
        warn_of_missing_patients(scans, path)
    return scans if labels is None else with_values(scans, labels=labels, declared=_names_of(content), where=str(path))


def _names_of(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the label names of a list by value; none if they are invalid, which `data_list_labels` reports."""
    labels = content.get("labels")
    pairs = labels.items() if isinstance(labels, dict) else ()
    return {int(value): str(name) for value, name in pairs if str(value).isdecimal()}


def unlabelled_scans(
    dataset_dir: StrPath | Sequence[StrPath],
    *,
    data_list: StrPath | None = None,
    section: str,
    validation_share: float = 0.05,
    seed: int = 0,
    stored: bool = False,
) -> list[dict]:
    """List the scans of one section for pre-training: images only.

    For a folder with a ``dataset.json``, these are its training, unlabelled and validation sections (never its test
    section). For a folder without one, every NIfTI file below it, except masks and results (`is_mask_folder`,
    `RESULT_NAMES`). If any source has a validation section, its scans are the validation and all others are for
    training. Otherwise ``validation_share`` of the patients (an entry's ``patient``, else each scan counts as one), at
    least one, are drawn for validation.

    Args:
        dataset_dir: a folder, a JSON data list or a NIfTI file, or several of them. A file found twice counts once.
        data_list: name of the list in a folder, instead of ``dataset.json``.
        section: ``training``, ``validation``, or ``all`` for both.
        validation_share: above 0 and below 1.
        seed: seed of the draw.
        stored: return the file of the patch store instead of the image (``store`` of an entry, see `prepare`).

    Returns:
        Items ``{"image": path or list of paths}``, sorted by path.

    Raises:
        InputError: with ``stored``, a source is not a data list of stored scans.
        InputError: a source does not exist or has no scans; there are fewer than two scans; no scan is left for
            training.
    """
    check_choice(name="section", value=section, choices=("training", "validation", "all"))
    sources = [dataset_dir] if isinstance(dataset_dir, (str, os.PathLike)) else list(dataset_dir)
    if data_list is not None and len(sources) > 1 and Path(data_list).is_absolute():
        raise InputError(
            f"data_list {data_list} is one absolute path, but dataset_dir names {len(sources)} sources: it would "
            "replace the others. Pass the list itself as one of the sources in dataset_dir."
        )
    SHARE_INSIDE.check("validation_share", validation_share)
    key = "store" if stored else "image"
    training: dict[tuple, dict] = {}
    validation: dict[tuple, dict] = {}
    for source in sources:
        listed, held_out = _unlabelled_source(absolute_path(source), data_list, key)
        training |= {_identity(scan["image"]): scan for scan in listed}
        validation |= {_identity(scan["image"]): scan for scan in held_out}
    pool = training | validation
    if section != "validation":
        warn_of_missing_patients(list(pool.values()), ", ".join(map(str, sources)))
    if len(pool) < 2:
        raise InputError(
            f"Pre-training needs at least 2 scans, one of them for validation; {len(pool)} found in "
            f"{', '.join(map(str, sources)) or 'dataset_dir, which is empty'}. Add scans, or pass more folders."
        )
    order = sorted(pool)  # by image, even for a store: it gives the same draws as its scans
    if validation:
        held_out = set(validation)
        if len(held_out) == len(pool):
            raise InputError(
                f"All {len(pool)} scans of {', '.join(map(str, sources))} are in a 'validation' section: none is left "
                "for training. Add a 'training' section."
            )
        if section != "validation":
            kept = [scan for each, scan in pool.items() if each not in held_out]
            warn_of_shared_patients(kept, validation.values(), ", ".join(map(str, sources)))
    else:
        held_out = draw_validation(pool, share=validation_share, seed=seed)
    return [
        {"image": pool[each][key]}
        for each in order
        if section == "all" or (each in held_out) == (section == "validation")
    ]


def inference_scans(
    source: StrPath | Sequence[StrPath], *, equal_names: bool = False, may_be_missing: bool = False
) -> list[dict]:
    """List the scans to predict: images only.

    Args:
        source: one or several of: a NIfTI file; a JSON data list (its ``test`` section); a folder (the NIfTI files in
            it, else the ``test`` section of its ``dataset.json``, else the NIfTI files below it, except for masks).
        equal_names: allow scans with the same file name in different folders (see `case_names`). A scan that is found
            twice counts once.
        may_be_missing: also list the scans of a data list whose files do not exist.

    Returns:
        Items ``{"image": path or list of paths}``.

    Raises:
        InputError: the source does not exist or has no scans; two scans have the same name, so that one mask would
            overwrite the other.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    scans = [scan for one in sources for scan in _inference_scans(one, may_be_missing)]
    if equal_names:
        return list({first_file(scan): scan for scan in scans}.values())
    files: dict[str, str] = {}
    for scan in scans:
        file = first_file(scan)
        other = files.setdefault(without_suffix(os.path.basename(file)), file)
        if other != file:
            raise InputError(
                f"{other} and {file} have the same name, and so would their masks: one would overwrite the other. "
                "Predict them in two runs with different --output_dir, or rename one."
            )
    return scans


def _inference_scans(source: StrPath, may_be_missing: bool) -> list[dict]:
    source = absolute_path(source)
    if not source.exists():
        raise InputError(f"{source} not found. {_content(source.parent)}")
    if source.is_dir():
        direct = sorted(str(path) for path in source.iterdir() if is_scan(path.name) and path.is_file())
        direct = sorted({*direct} - masks_beside_images(direct))
        if direct or not (source / "dataset.json").is_file():
            return [{"image": image} for image in direct or _images_below(source)]
        source = source / "dataset.json"
    if is_nifti(source.name):
        return [{"image": image} for image in _one_nifti(source)]
    content = parse_data_list(source)
    scans = content.get("test", [])
    if not scans:
        raise InputError(
            f"{source} has no 'test' section to predict. {_sections_of(content)} "
            "To predict other scans, pass a folder of NIfTI files or one file."
        )
    if not may_be_missing:
        _check_files(scans, "test", source, keys=("image",))
    return [{"image": scan["image"]} for scan in scans]


def data_list_names(dataset_dir: StrPath, data_list: StrPath | None = None, *, section: str) -> dict[str, str]:
    """Return the unique name of each image: one name for a case in all folds, and whichever cases fail a check.

    Args:
        dataset_dir, data_list: see `segmentation_scans`.
        section: ``test``: names of the test section; any other: those of training and validation together.

    Raises:
        InputError: see `parse_data_list`.
    """
    content = parse_data_list(data_list_path(dataset_dir, data_list))
    return names_of(
        content.get("test", []) if section == "test" else content.get("training", []) + content.get("validation", [])
    )


def data_list_labels(dataset_dir: StrPath, data_list: StrPath | None = None) -> dict[int, str]:
    """Return the ``labels`` of the data list, e.g. ``{0: "background", 1: "spleen"}``; empty if it has none.

    Raises:
        InputError: see `parse_data_list`; or ``labels`` does not map whole numbers to names.
    """
    path = data_list_path(dataset_dir, data_list)
    return label_names(parse_data_list(path), path)


def data_list_ignore_label(dataset_dir: StrPath, data_list: StrPath | None = None) -> int | None:
    """Return the value of unknown voxels that the data list declares (``ignore_label``); None if there is none.

    Raises:
        InputError: see `parse_data_list`; or it is not a whole number.
    """
    path = data_list_path(dataset_dir, data_list)
    if not path.is_file():
        return None  # a folder without a list; what lacks one is reported where its scans are read
    declared = parse_data_list(path).get("ignore_label")
    if declared is not None and not WHOLE.holds(declared):
        raise InputError(f"{path}: 'ignore_label' is {declared!r}: it must be the label value of unknown voxels.")
    return declared


def _check_files(
    scans: list[dict], section: str, path: Path, *, keys: Sequence[str], may_be_missing: bool = False
) -> None:
    by_scan = []
    for scan in scans:
        by_scan.append([])
        for key in keys:
            value = scan.get(key, [])
            if key == "label" and key in scan and not isinstance(value, str):
                raise InputError(f"{path}: the label of {scan['image']} must be the path of one file, got {value!r}")
            by_scan[-1] += ensure_tuple(value)
    files = [file for those in by_scan for file in those]
    missing = [file for file in files if not os.path.isfile(file)]
    some_are_whole = any(map(set(missing).isdisjoint, by_scan))
    if missing and not (may_be_missing and some_are_whole):
        raise InputError(
            f"{path}: {len(missing)} of {len(files)} files of section '{section}' do not exist: {_first(missing, 3)}. "
            f"Paths in a data list are relative to its folder, {path.parent}."
        )


def _sections_of(content: dict) -> str:
    sections = [f"'{section}' ({len(content[section])})" for section in SECTIONS if content.get(section)]
    return f"Its sections: {', '.join(sections)}."


def _unlabelled_source(source: Path, data_list: StrPath | None, key: str) -> tuple[list[dict], list[dict]]:
    """Return the training and validation entries of one source of `unlabelled_scans`; all have ``key``."""
    path = data_list_path(source, data_list if source.is_dir() else None)
    if key == "store" and (is_nifti(path.name) or not path.is_file()):
        raise InputError(
            f"{source} has no patch store: {path.name if is_nifti(path.name) else path} is not a data list of stored "
            "scans. Make one with configs/prepare.yaml and pass its folder, or read the scans directly with "
            "--data nifti."
        )
    if is_nifti(source.name) and not source.is_dir():
        return [{"image": image} for image in _one_nifti(source)], []
    if source.is_dir() and data_list is None and not path.is_file():
        return [{"image": image} for image in _images_below(source)], []
    if not source.exists():
        raise InputError(f"{source} not found. {_content(source.parent)}")
    content = parse_data_list(path)
    training = [scan for name in ("training", *UNLABELLED_SECTIONS) for scan in content.get(name, [])]
    validation = content.get("validation", [])
    if not training and not validation:
        raise InputError(f"{path} has no 'training' section to pre-train on. {_sections_of(content)}")
    without = [scan for scan in training + validation if key not in scan]
    if without:
        raise InputError(
            f"{path}: {len(without)} scans have no 'store', such as {without[0]['image']}. Run configs/prepare.yaml "
            "with --write_store true, or read the scans directly with --data nifti."
        )
    _check_files(training, "training", path, keys=(key,))
    _check_files(validation, "validation", path, keys=(key,))
    return training, validation


def _images_below(folder: Path) -> list[str]:
    """Return the NIfTI files below a folder that are neither masks by their names nor results."""
    found = _nifti_below(folder)
    beside = masks_beside_images(found)
    images = [image for image in found if image not in beside]
    try:
        content = folder_data_list(folder) or {}
    except InputError:
        return images
    masks = {os.path.normpath(folder / entry["label"]) for entry in content.get("training", [])}
    return [image for image in images if os.path.normpath(image) not in masks]


def _identity(image: str | list[str]) -> tuple[str, ...]:
    """Return the real file(s) of an image, with links resolved."""
    return tuple(os.path.realpath(file) for file in ([image] if isinstance(image, str) else image))


def label_as_reference(scans: Sequence[dict]) -> list[dict]:
    """Return items with the label as ``reference``: no preprocessing changes this key, and scores compare with it.

    Raises:
        InputError: a case has carried labels.
    """
    refuse_carried(scans, where="The section to score")
    return [
        {"image": item["image"], "reference": item["label"]} | ({LABELLED: item[LABELLED]} if LABELLED in item else {})
        for item in scans
    ]
