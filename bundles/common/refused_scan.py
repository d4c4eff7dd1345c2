# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A scan that is left out while the others go on."""

from __future__ import annotations

from .input_error import InputError


class RefusedScan(InputError):
    """Says why one scan is left out; whoever catches it adds the name of the file or series."""
