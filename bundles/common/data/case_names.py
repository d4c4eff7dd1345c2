# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which case an item of an evaluator is: its image file, and a name that no other case has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ignite.engine import Engine
from monai.utils import ImageMetaKey, ensure_tuple

from ..errors import InputError


def case_name(image_file: str | PurePath) -> str:
    """Return the file name of an image without its folder and without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"\.nii(\.gz)?$", "", PurePath(image_file).name)


def case_names(image_files: Iterable[str]) -> dict[str, str]:
    """Return a name of its own for each image: its `case_name`, with as many of its folders as tell equal names apart.

    So ``s01/ct.nii.gz`` and ``s02/ct.nii.gz`` become ``s01/ct`` and ``s02/ct``. The names depend on the list alone, so
    they are equal in all processes that have it, and they never lead out of a folder: files may be called by them.
    """
    alike: dict[str, dict[str, Path]] = {}
    for file in image_files:
        alike.setdefault(case_name(file), {})[file] = Path(os.path.abspath(file))
    names = {}
    for name, paths in alike.items():
        count = len(set(paths.values()))
        tails = {file: (*path.parts[1:-1], name) for file, path in paths.items()}
        if len(set(tails.values())) < count:  # ct.nii beside ct.nii.gz
            tails = {file: path.parts[1:] for file, path in paths.items()}
        depth = 1
        while len({tail[-depth:] for tail in tails.values()}) < count:
            depth += 1
        names |= {file: "/".join(tail[-depth:]) for file, tail in tails.items()}
    return names


def items_of(engine: Engine) -> list[dict[str, Any]]:
    """Return all that an evaluator has of each case of this iteration: one dictionary for each, output over batch.

    MONAI keeps image, label and prediction in ``engine.state.output`` and all other keys, such as a second label, in
    ``engine.state.batch``; both are lists of dictionaries after its decollating.

    Raises:
        InputError: if they are not, since the evaluator was made with ``decollate: false``.
    """
    batch, output = engine.state.batch, engine.state.output
    if not isinstance(batch, list) or not isinstance(output, list):
        raise InputError(
            f"The evaluator's batch is a {type(batch).__name__} and its output a {type(output).__name__}; both must be "
            "lists of one dictionary for each case: leave its 'decollate' true."
        )
    # An evaluator whose prepare_batch gives no target puts None for the label: the batch's is meant then.
    outputs = [{key: value for key, value in item.items() if value is not None} for item in output]
    return [{**from_batch, **item} for from_batch, item in zip(batch, outputs, strict=True)]


def image_file_of(item: Mapping[str, Any], *keys: str | None) -> str:
    """Return the file that the first of ``keys`` in a decollated item was read from (``filename_or_obj``).

    Raises:
        InputError: if none of them is a MetaTensor that knows its file.
    """
    for key in keys:
        meta = getattr(item.get(key), "meta", {})
        if meta.get(ImageMetaKey.FILENAME_OR_OBJ):
            return str(meta[ImageMetaKey.FILENAME_OR_OBJ])
    raise InputError(
        f"None of the keys {[key for key in keys if key]} of the item names its file (filename_or_obj): load them with "
        f"LoadImaged, and keep their metadata. The item's keys: {sorted(item)}."
    )


def image_file(image: str | Sequence[str]) -> str:
    """Return the file by which an item's image is known: the first of several, as LoadImaged has it in the metadata."""
    return str(Path(ensure_tuple(image)[0]).expanduser())
