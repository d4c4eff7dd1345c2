# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find where the scans of a run are in the body. A continued run locates none twice."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.files import write_text
from ...common.run.progress import with_progress
from .atlas_choice import Selection
from .itk_images import as_volume
from .one_scan import FORMAT
from .position.fit import PositionFit
from .position.network import PositionNetwork, ScanPosition
from .records import RECORDS, file_identity, read_record, unexpected
from .scans_of_run import Scan

logger = logging.getLogger(__name__)


def locate(
    scans: Sequence[Scan], network_file: str, selection: Selection, out: Path, device: str
) -> tuple[dict[Scan, ScanPosition], dict[str, str]]:
    """Find where each scan is in the body. What is found is recorded, and read again by the next run.

    Args:
        scans: the run's scans.
        network_file: a position network.
        selection: which slopes are plausible.
        out: output folder.
        device: the network's device.

    Returns:
        The position of each scan that fits, and the reason for each of the others, by name.
    """
    network: PositionNetwork | None = None
    located: dict[Scan, ScanPosition] = {}
    reasons: dict[str, str] = {}

    network_identity = file_identity(network_file, out)

    def positions() -> Iterator[tuple[Scan, ScanPosition | str]]:
        nonlocal network
        for scan in scans:
            path = out / RECORDS / "positions" / f"{scan.name}.json"
            try:
                files = {"scan": file_identity(scan.image, out), "network": network_identity}
            except InputError as error:
                yield scan, str(error)
                continue
            identity = {"format": FORMAT, **files}
            if (known := _recorded_position(path, identity)) is not None:
                yield scan, known
                continue
            network = network or PositionNetwork(network_file, device=device)
            try:
                position = network.locate(as_volume(scan.image))
            except InputError as error:
                yield scan, str(error)
                continue
            except Exception as error:  # from a library, in one scan: the others continue
                logger.warning("%s", traceback.format_exc())
                yield scan, unexpected(error)
                continue
            write_text(path, json.dumps({"identity": identity, **asdict(position)}, indent=1) + "\n")
            yield scan, position

    for scan, position in with_progress(positions(), len(scans), doing="positions"):
        if isinstance(position, str):
            reasons[scan.name] = position
        elif problem := position.fit.problem(scales=tuple(selection.scales)):
            reasons[scan.name] = problem
        else:
            located[scan] = position
    return located, reasons


def _recorded_position(path: Path, identity: dict[str, Any]) -> ScanPosition | None:
    content = read_record(path, ("identity", "fit"))
    if content is None or content["identity"] != json.loads(json.dumps(identity)):
        return None
    try:
        fit = PositionFit(**{name: tuple(values) for name, values in content["fit"].items()})
        return ScanPosition(fit, tuple(tuple(map(tuple, profile)) for profile in content["profiles"]))
    except (KeyError, TypeError):  # incomplete: it is found again
        return None
