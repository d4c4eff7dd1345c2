# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that clients of the zoo interpret a bundle's name correctly."""

from __future__ import annotations

import re

from bundles.common.errors import InputError

#: MONAI Label treats a bundle as another kind of model if the name of its folder contains one of these.
KINDS = ("detection", "classification", "deepedit", "deepgrow")


def check_name(name: str) -> None:
    """Check that clients interpret a bundle's name correctly.

    Raises:
        InputError: if the name contains ``_v``, at which MONAI splits ``NAME_vVERSION``, or one of `KINDS`, or a
            character that is not portable in file names.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(
            f"the name {name!r} must consist of letters, digits, underscores and hyphens, and must begin with a letter "
            "or digit."
        )
    if "_v" in name:
        raise InputError(
            f"the name {name!r} contains '_v', at which clients cut off the version (NAME_v1.0.0). Choose a name in "
            "which no word after an underscore begins with v."
        )
    if kinds := [kind for kind in KINDS if kind in name]:
        raise InputError(
            f"the name {name!r} contains {kinds[0]!r}, so MONAI Label would treat it as another kind of model. Choose "
            "another name."
        )
