# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Identify the case of an evaluator's item: its image file, and a name that no other case has."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ignite.engine import Engine
from monai.data.folder_layout import FolderLayoutBase
from monai.utils import ImageMetaKey, ensure_tuple

from ..errors import InputError
from .nifti_files import without_suffix

LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes and temporary prefixes are added


def case_name(image_file: str | PurePath) -> str:
    """Return the file name of an image without its folder and without ``.nii`` or ``.nii.gz``, in upper or lower case.

    The end of a name above `LONGEST_NAME` is replaced by its checksum, so that names of results fit the file system.
    """
    name = without_suffix(PurePath(image_file).name)
    stored = name.encode(errors="surrogateescape")
    if len(stored) <= LONGEST_NAME:
        return name
    return f"{stored[: LONGEST_NAME - 9].decode(errors='ignore')}-{hashlib.sha256(stored).hexdigest()[:8]}"


def case_names(image_files: Iterable[str]) -> dict[str, str]:
    """Return a unique name for each image: its `case_name`, prefixed by as many folders as equal names require.

    For example, ``s01/ct.nii.gz`` and ``s02/ct.nii.gz`` become ``s01/ct`` and ``s02/ct``. The names depend only on the
    list, so all processes with the same list get the same names. They are safe as file names: they never lead out of a
    folder.
    """
    by_name: dict[str, dict[str, Path]] = {}
    for file in image_files:
        by_name.setdefault(case_name(file), {})[file] = Path(os.path.abspath(file))
    names = {}
    for name, paths in by_name.items():
        count = len(set(paths.values()))
        tails = {file: (*path.parts[1:-1], name) for file, path in paths.items()}
        by_tail = Counter((tails[file], path.name) for file, path in paths.items())
        twice = {tail for tail, number in Counter(tail for tail, _ in by_tail).items() if number > 1}
        tails |= {file: path.parts[1:] for file, path in paths.items() if tails[file] in twice}  # ct.nii, ct.nii.gz
        depth = 1
        while len({tail[-depth:] for tail in tails.values()}) < count:
            depth += 1
        names |= {file: "/".join(tail[-depth:]) for file, tail in tails.items()}
    return names


def names_of(cases: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return `case_names` of the images of items ``{"image": file or files}``."""
    return case_names(image_file(case["image"]) for case in cases)


class CaseFiles(FolderLayoutBase):
    """MONAI's folder layout for `SaveImaged`: ``FOLDER/NAME_POSTFIX.nii.gz``, with names that no two cases share.

    MONAI's own layout uses only the image's file name.

    Args:
        output_dir: the folder.
        postfix: postfix of each file name.
        names: see `use`.
    """

    def __init__(self, output_dir: str | os.PathLike, postfix: str, names: Mapping[str, str] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.names = dict(names or {})

    def use(self, names: Mapping[str, str]) -> None:
        """Set the names of the images, see `case_names`; others have their `case_name`."""
        self.names = dict(names)

    def filename(self, subject: str | os.PathLike = "", idx: Any = None, **options: Any) -> str:
        """Return the file of an image, and create its folder."""
        name = self.names.get(str(subject), case_name(str(subject)))
        path = self.output_dir / f"{name}_{self.postfix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)


def items_of(engine: Engine) -> list[dict[str, Any]]:
    """Return one dictionary per case of this iteration, with the keys of batch and output; output takes precedence.

    MONAI keeps image, label and prediction in ``engine.state.output`` and all other keys, such as a second label, in
    ``engine.state.batch``. After decollating, both are lists of dictionaries.

    Raises:
        InputError: they are not lists, because the evaluator has ``decollate: false``.
    """
    batch, output = engine.state.batch, engine.state.output
    if not isinstance(batch, list) or not isinstance(output, list):
        raise InputError(
            f"The evaluator's batch is a {type(batch).__name__} and its output a {type(output).__name__}; both must be "
            "lists of one dictionary for each case: set its 'decollate' to true."
        )
    # Without a target from prepare_batch, the label in the output is None: use the one of the batch.
    outputs = [{key: value for key, value in item.items() if value is not None} for item in output]
    return [{**from_batch, **item} for from_batch, item in zip(batch, outputs, strict=True)]


def image_file_of(item: Mapping[str, Any], *keys: str | None) -> str:
    """Return the file that the first usable one of ``keys`` in a decollated item was read from (``filename_or_obj``).

    Raises:
        InputError: none of them is a MetaTensor that records its file.
    """
    for key in keys:
        meta = getattr(item.get(key), "meta", {})
        if meta.get(ImageMetaKey.FILENAME_OR_OBJ):
            return str(meta[ImageMetaKey.FILENAME_OR_OBJ])
    raise InputError(
        f"None of the keys {[key for key in keys if key]} of the item records its file (filename_or_obj): load them "
        f"with LoadImaged, and keep their metadata. The item's keys: {sorted(item)}."
    )


def image_file(image: str | Sequence[str]) -> str:
    """Return the file that identifies an item's image: the first of several, as in the metadata of LoadImaged."""
    return str(Path(ensure_tuple(image)[0]).expanduser())
