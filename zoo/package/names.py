# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Names that clients of the zoo read right."""

from __future__ import annotations

import re

from bundles.common.errors import InputError

#: MONAI Label takes a bundle for another kind of model if its folder's name holds one of these.
KINDS = ("detection", "classification", "deepedit", "deepgrow")


def check_name(name: str) -> None:
    """Refuse a name of a bundle that a client would misread.

    Raises:
        InputError: if it holds ``_v``, where MONAI cuts the version off ``NAME_vVERSION``, or one of `KINDS`, or what is no part of
            a file name everywhere.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"the name {name!r} must be made of letters, digits, underscores and hyphens.")
    if "_v" in name:
        raise InputError(
            f"the name {name!r} holds '_v', where clients cut off the version (NAME_v1.0.0): choose another, with a word before the v."
        )
    if kinds := [kind for kind in KINDS if kind in name]:
        raise InputError(
            f"the name {name!r} holds {kinds[0]!r}, by which MONAI Label takes it for another kind of model: choose another."
        )
