# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Register a pair of scans once: a new limit, a corrected label or another labelled scan needs no new registration."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...common.files import atomic_path, file_hash, write_text
from ...common.scans.reading import Volume
from .itk_images import simple_itk
from .position.fit import Alignment
from .records import RECORDS, file_identity, read_record
from .registration import Registration, RegistrationOptions, register
from .scans_of_run import Scan

FORMAT = 1  # record format; a new number registers all pairs again


def registered(
    atlas: Scan,
    target: Scan,
    *,
    moving: Volume,
    fixed: Volume,
    lies: Alignment,
    options: RegistrationOptions,
    folder: str | os.PathLike,
) -> Registration:
    """Return `register` of a labelled scan and a scan to label, from the records of an earlier run if it is there.

    The transform is always the one that was read from its file, so that both ways give the same bytes. A pair that
    cannot be registered is tried again.

    Args:
        atlas, target: the scans.
        moving, fixed: their voxels.
        lies: how the target lies over the atlas (`Alignment`).
        options: options of the registration.
        folder: output folder of the run.

    Raises:
        InputError: see `register`.
        OSError: the records cannot be written.
    """
    place = Path(folder) / RECORDS / "pairs" / target.name
    record, file = place / f"{atlas.name}.json", place / f"{atlas.name}.tfm"
    identity = json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "scans": [
                    [os.path.basename(each.image), *file_identity(each.image, folder)] for each in (atlas, target)
                ],
                "lies": asdict(lies),
                "options": asdict(options),
            }
        )
    )
    if (known := _read(record, file, identity)) is not None:
        return known
    record.unlink(missing_ok=True)  # it would vouch for another transform if this run is stopped here
    found = register(moving, fixed, scale=lies.scale, shift=lies.shift, options=options)
    if found.transform is None:
        return found
    with atomic_path(file) as temporary:
        try:
            simple_itk().WriteTransform(found.transform, str(temporary))
        except RuntimeError as error:  # from ITK, if the disk is full
            raise OSError(f"{file.name}: {str(error).strip().splitlines()[-1].strip()}") from error
    figures = asdict(replace(found, transform=None))
    figures["starts"] = list(found.starts.items())  # names in JSON are texts
    write_text(record, json.dumps({"identity": identity, "found": figures, "sha256": file_hash(file)}) + "\n")
    return replace(found, transform=simple_itk().ReadTransform(str(file)))


def _read(record: Path, file: Path, identity: dict[str, Any]) -> Registration | None:
    content = read_record(record, ("identity", "found"))
    if content is None or content["identity"] != identity:
        return None
    try:
        if content["sha256"] != file_hash(file):  # ITK reads a cut file without an error
            return None
        figures = content["found"]
        found = Registration(**{**figures, "starts": {shift: value for shift, value in figures["starts"]}})
        return replace(found, transform=simple_itk().ReadTransform(str(file)))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):  # incomplete, or the transform is gone
        return None
