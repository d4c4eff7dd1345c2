# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The label value of unknown voxels: nobody labelled what they show. They are neither a class nor background."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import InputError
from ..words import shown

#: The usual value (Cityscapes, PASCAL VOC): the largest of a uint8 label.
IGNORE_LABEL = 255


def allowed_values(labels: Iterable[int], ignore_label: int | None) -> str:
    """Return the values that a label may hold, for a message: "the declared 0, 1, and 255 for unknown voxels"."""
    unknown = "" if ignore_label is None else f", and {ignore_label} for unknown voxels"
    return f"the declared {shown(list(labels))}{unknown}"


def ignored_value(*, ignore_label: int | None, labels: Iterable[int | str], of_list: int | None = None) -> int | None:
    """Return the value of unknown voxels, or None if there is none.

    A declared value is a class: where ``labels`` declares 255, the default has no effect. A value that the data list
    declares as unknown takes precedence over the default.

    Args:
        ignore_label: the option; None for no unknown voxels.
        labels: declared values, as numbers or text.
        of_list: the value that the data list declares (``ignore`` of nnU-Net), if any.

    Raises:
        InputError: ``ignore_label`` is a declared value other than the default 255, or not that of the data list.
    """
    if of_list is not None and ignore_label not in (of_list, IGNORE_LABEL):
        raise InputError(
            f"--ignore_label is {ignore_label}, but the data list declares {of_list} as the value of unknown voxels. "
            "Leave the option out."
        )
    ignore_label = ignore_label if of_list is None else of_list
    if ignore_label is None or ignore_label not in {int(value) for value in labels}:
        return ignore_label
    if ignore_label == IGNORE_LABEL:
        return None
    raise InputError(
        f"--ignore_label {ignore_label} is also a declared label: a value is either a class or unknown. "
        "Choose a value that --labels does not declare, or --ignore_label '$None'."
    )
