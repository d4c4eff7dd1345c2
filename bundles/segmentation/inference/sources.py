# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Record which scan each mask was made from, so that no mask is taken for another scan's, or replaced by it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...common.cases.case_handler import CaseHandler
from ...common.errors import InputError
from ...common.files import file_hash, file_stamp, write_text
from ...common.scans.dicom_series import Series
from ..results.organ_volumes import TABLE, read_cases

FILE = "sources.json"


@dataclass(frozen=True)
class Source:
    """What a mask was made from.

    Attributes:
        case: name of the mask, before ``_seg.nii.gz``.
        source: file of the scan, or folder of its DICOM series.
        series_uid: UID of a DICOM series, else "".
        identity: size and time of each file, or number, bytes and latest time of the files of a series; None: not
            recorded.
        content: hash of the content of all files, recorded with the mask; "": not recorded.
        files: all files; not recorded.
    """

    case: str
    source: str
    series_uid: str = ""
    identity: list[Any] | None = None
    content: str = ""
    files: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def record(self) -> dict[str, Any]:
        """Return what is written to ``sources.json``."""
        return {key: value for key, value in asdict(self).items() if key != "files"}

    def is_unchanged(self, now: Source) -> bool:
        """Return whether the scan is unchanged; what is not recorded counts as unchanged.

        A DICOM series may have been sent again: if only its times differ, its content decides.
        """
        if self.identity is None:
            return True
        if now.identity is None or self.series_uid != now.series_uid:
            return False
        if not now.series_uid:
            return self.identity == now.identity
        if self.identity[:2] != now.identity[:2]:
            return False
        return self.identity[2:] in ([], now.identity[2:]) or self.has_content_of(now)

    def has_content_of(self, now: Source) -> bool:
        """Return whether the content is recorded and that of another scan, whose files are read."""
        return bool(self.content) and self.content == content_of(now.files)

    def may_become(self, now: Source) -> bool:
        """Return whether ``now`` is the same scan, perhaps with other content: its mask may replace the earlier one.

        A DICOM series is known by its UID, since folders such as an inbox hold one patient after the other. A file is
        known by its path, or if it was moved, by its size and time.
        """
        if self.series_uid or now.series_uid:
            return self.series_uid == now.series_uid
        return self.source == now.source or (self.identity is not None and self.identity == now.identity)


def source_of(scan: str, files: Sequence[str], *, series: Series | None = None) -> Source:
    """Return what distinguishes a scan that is about to be segmented from others; its mask has no name yet.

    Args:
        scan: its file, or the folder of its series.
        files: all files that belong to it.
        series: its DICOM series, if it is one.
    """
    try:
        stamps = [file_stamp(file) for file in files]
    except OSError:  # what reads it will say so
        stamps = None
    if series is None or stamps is None:
        return Source("", scan, series.series_uid if series else "", stamps, files=tuple(files))
    identity = [len(stamps), sum(size for size, _ in stamps), max(time for _, time in stamps)]
    return Source("", scan, series.series_uid, identity, files=tuple(files))


def content_of(files: Iterable[str]) -> str:
    """Return a hash of the content of files, whatever their order and their names; "" if one cannot be read."""
    try:
        hashes = sorted(file_hash(file) for file in files)
    except OSError:
        return ""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def read_sources(output_dir: str | os.PathLike) -> dict[str, Source]:
    """Return what the masks in a folder were made from, by the image file that was segmented.

    A folder of an earlier version has no such record: its masks are known only by their table.
    """
    try:
        known = {image: Source(case, image) for image, case in read_cases(Path(output_dir) / TABLE).items()}
    except InputError:  # a table of another program, which a resumed run refuses
        known = {}
    try:
        content = json.loads((Path(output_dir) / FILE).read_text(encoding="utf-8"))
        return known | {image: Source(**entry) for image, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # there is none, or it is damaged
        return known


def mask_of(output_dir: str | os.PathLike, case: str) -> Path:
    """Return the file of a mask."""
    return Path(output_dir) / f"{case}_seg.nii.gz"


class RecordSources(CaseHandler):
    """Handler of an evaluator: records in ``sources.json`` what each mask was made from.

    List it before `OrganVolumes`, by whose table a resumed run knows what is done.

    Args:
        output_dir: folder of the masks.
        sources: source of each image of the run, as it was before it was read.
        options: ``names``, ``image_key``, ``pred_key`` and ``failures`` of `CaseHandler`.
    """

    product = "record of its source"

    def __init__(self, output_dir: str | Path, sources: Mapping[str, Source], **options: Any) -> None:
        super().__init__(output_dir, **options)
        self.sources = sources

    @cached_property
    def known(self) -> dict[str, Source]:
        """What is recorded: at the first case by earlier runs."""
        return read_sources(self.output_dir)

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Record the source of one case."""
        if file not in self.sources:
            return
        case = self.name_of(file)
        self.known = {image: source for image, source in self.known.items() if source.case != case}
        source = self.sources[file]
        self.known[file] = replace(source, case=case, content=content_of(source.files), files=())
        entries = {image: each.record() for image, each in sorted(self.known.items())}
        write_text(self.output_dir / FILE, json.dumps(entries, indent=1) + "\n")
