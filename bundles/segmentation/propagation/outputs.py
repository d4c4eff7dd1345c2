# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The files of one scan in the output folder: where they are, whether they are whole, and how they are set aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ...common.files import move_file
from .itk_images import as_volume
from .records import RECORDS

SET_ASIDE = "set_aside"  # in the folder of the records: files of scans that are left out now


@dataclass(frozen=True)
class Outputs:
    """Files of one scan.

    Attributes:
        folder: output folder of the run.
        name: the scan's name.
    """

    folder: str
    name: str

    @property
    def label(self) -> Path:
        """For training: 255 where the class is unknown."""
        return Path(self.folder) / "labels" / f"{self.name}.nii.gz"

    @property
    def mask(self) -> Path:
        """Every voxel has a class."""
        return Path(self.folder) / "masks" / f"{self.name}_seg.nii.gz"

    @property
    def confidence(self) -> Path:
        """Percent, 0 to 100."""
        return Path(self.folder) / "confidence" / f"{self.name}.nii.gz"

    @property
    def picture(self) -> Path:
        """Thumbnail for the contact sheet."""
        return Path(self.folder) / RECORDS / "pictures" / f"{self.name}.npy"

    def all(self, *, masks_only: bool = False) -> tuple[Path, ...]:
        """Return all of them, or all except the label for training."""
        return (self.mask, self.confidence, self.picture) + (() if masks_only else (self.label,))

    def sizes(self, *, masks_only: bool = False) -> dict[str, int]:
        """Return the bytes of each file by its path in the folder."""
        return {self._inside(path): path.stat().st_size for path in self.all(masks_only=masks_only)}

    def are_whole(self, sizes: Mapping[str, int], *, masks_only: bool = False) -> bool:
        """Return whether all files are there and can be read.

        Files of the recorded size are taken as they are. Others are read: a label that somebody has corrected is whole,
        one that a full disk has cut is not.

        Args:
            sizes: what `sizes` returned when they were written; a file without an entry is read.
            masks_only: see `all`.
        """
        for path in self.all(masks_only=masks_only):
            try:
                size = path.stat().st_size
            except OSError:
                return False
            if size != sizes.get(self._inside(path)) and not _is_readable(path):
                return False
        return True

    def set_aside(self, *, masks_only: bool = False) -> None:
        """Move the files out of sight, where `take_back` finds them: the scan is left out now, and may return."""
        for path in self.all(masks_only=masks_only):
            move_file(path, self._aside(path))

    def take_back(self, *, masks_only: bool = False) -> None:
        """Move the files back that `set_aside` has moved, where there are no newer ones."""
        for path in self.all(masks_only=masks_only):
            if not path.exists():
                move_file(self._aside(path), path)

    def forget_set_aside(self) -> None:
        """Remove what `set_aside` has moved: newer files take its place."""
        for path in self.all():
            self._aside(path).unlink(missing_ok=True)

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _aside(self, path: Path) -> Path:
        return Path(self.folder) / RECORDS / SET_ASIDE / path.relative_to(self.folder)


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".npy":
            np.load(path)
        else:
            as_volume(path)
    except (InputError, OSError, ValueError, EOFError):
        return False
    return True
