# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Decode a NIfTI file once in a run, although a check, the network and a picture need its voxels.

Decoding (gunzip) takes seconds for a CT. The stored voxels are kept in memory, up to `KEPT_BYTES`, until the last user
forgets them or others need the room.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import ImageReader, NibabelReader
from monai.transforms import LoadImaged
from monai.utils import ensure_tuple
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from ..data.label_values import TOLERANCE
from ..errors import InputError, RefusedScan
from ..files import file_stamp
from .headers.nifti_grid import is_aligned
from .nifti import check_dimensions, check_finite, open_scan, stored_voxels

KEPT_BYTES = 2**29  # 4 CT scans of 512 x 512 x 250 voxels of int16

_kept: OrderedDict[str, tuple[list[int], np.ndarray]] = OrderedDict()  # by file; the last one was used last
_lock = threading.Lock()


def voxels_once(
    scan: SpatialImage, file: str | os.PathLike, *, make_room: bool = False
) -> tuple[np.ndarray, float, float]:
    """Read the voxels like `nifti.stored_voxels`, and keep them for the next call with the same, unchanged file.

    Files that are mapped into memory (``.nii``) are not kept, since they need no decoding.

    Args:
        scan: the opened image.
        file: its file.
        make_room: forget the scans that were used longest ago if there is too little room for this one; False: do not
            keep this one then. A scan above `KEPT_BYTES` is never kept.

    Returns:
        The voxels as stored (read-only), their slope and their intercept.

    Raises:
        RefusedScan: the voxels are not plain numbers.
    """
    file = os.path.abspath(file)
    raw = _find(file)
    if raw is not None:
        return raw, float(scan.dataobj.slope), float(scan.dataobj.inter)
    stamp = file_stamp(file)  # before reading: a file that changes meanwhile is read again
    raw, slope, inter = stored_voxels(scan)
    if isinstance(raw, np.memmap) or not hasattr(scan.dataobj, "get_unscaled"):
        return raw, slope, inter
    raw.flags.writeable = False
    with _lock:
        if make_room:
            while _kept and _kept_bytes() + raw.nbytes > KEPT_BYTES:
                _kept.popitem(last=False)
        if _kept_bytes() + raw.nbytes <= KEPT_BYTES:
            _kept[file] = (stamp, raw)
    return raw, slope, inter


def with_kept_voxels(scan: SpatialImage, file: str | os.PathLike) -> SpatialImage:
    """Return the image with its voxels in memory if `voxels_once` has kept them, else ``scan`` itself.

    The new image has the affine, the header and the scaled voxels that nibabel reads from the file; its array is its
    own.
    """
    raw = _find(os.path.abspath(file))
    if raw is None:
        return scan
    scaled = apply_read_scaling(raw, np.asanyarray(scan.dataobj.slope), np.asanyarray(scan.dataobj.inter))
    return type(scan)(scaled.copy(order="K") if scaled is raw else scaled, scan.affine, scan.header)


def forget_voxels(file: str | os.PathLike) -> None:
    """Free the memory of a file's voxels, if they were kept."""
    with _lock:
        _kept.pop(os.path.abspath(file), None)


def _find(file: str) -> np.ndarray | None:
    with _lock:
        if file not in _kept:
            return None
        stamp, raw = _kept[file]
        if stamp != file_stamp(file):
            del _kept[file]
            return None
        _kept.move_to_end(file)
        return raw


def _kept_bytes() -> int:
    return sum(raw.nbytes for _, raw in _kept.values())


class DecodeOnceReader(NibabelReader):
    """MONAI's reader of NIfTI files, which opens them with `open_scan`: shape, affine and unit are those of the checks.

    MONAI's own reader replaces an sform by the qform where its scale differs from pixdim, and ignores the unit.

    Args:
        used_again: keep the voxels after reading, for a picture; whoever reads them last calls `forget_voxels`.
    """

    def __init__(self, *, used_again: bool = False) -> None:
        super().__init__()
        self.used_again = used_again

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> SpatialImage | list[SpatialImage]:
        """Open a file, or several for the channels of one image.

        Raises:
            InputError: a file was refused (see `open_scan`), or is not a volume; the message names it.
        """
        images: list[SpatialImage] = []
        self.filenames = ensure_tuple(data)
        for file in self.filenames:
            try:
                image = open_scan(file)
                check_dimensions(image.shape)
                if self.used_again:
                    voxels_once(image, file, make_room=True)
            except Exception as error:
                raise _named(file, error) from error
            image = with_kept_voxels(image, file)
            images.append(_on_grid_of(images[0], image) if images else image)
            if not self.used_again:
                forget_voxels(file)
        return images if len(images) > 1 else images[0]

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return True: no other reader is tried, so that a file in another format is refused with the reason."""
        return True

    def _get_array_data(self, img: SpatialImage, filename: PathLike) -> np.ndarray:
        try:
            voxels = super()._get_array_data(img, filename)
            if voxels.dtype.kind == "f":
                check_finite(voxels, 1.0, 0.0)
        except Exception as error:
            raise _named(filename, error) from error
        return voxels


def _on_grid_of(first: SpatialImage, channel: SpatialImage) -> SpatialImage:
    """Return a channel with the affine of the first one if both have the same grid (see `is_aligned`), else as it is.

    MONAI refuses channels whose affines differ by rounding.
    """
    if channel.shape != first.shape or not is_aligned(channel.affine, first.affine, channel.shape[:3]):
        return channel
    return type(channel)(channel.dataobj, first.affine, channel.header)


def _named(file: PathLike, error: Exception) -> Exception:
    """Return what to raise for a file: the many kinds of errors of nibabel, gzip and zlib do not name it."""
    if isinstance(error, MemoryError) or (isinstance(error, InputError) and not isinstance(error, RefusedScan)):
        return error
    if isinstance(error, RefusedScan):
        return InputError(f"{file}: {error}")
    return InputError(f"{file}: cannot be read, perhaps damaged or cut short ({type(error).__name__}: {error})")


class LoadScand(LoadImaged):
    """`LoadImaged` that opens NIfTI files with `DecodeOnceReader`, and refuses all others.

    Args:
        arguments, options: those of `LoadImaged`, except for ``reader``.
        labels: keys of label maps, whose values are rounded to the whole numbers that they stand for (`whole_labels`).
        used_again: see `DecodeOnceReader`.
    """

    def __init__(self, *arguments: Any, labels: KeysCollection = (), used_again: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.labels = ensure_tuple(labels)
        self.register(DecodeOnceReader(used_again=used_again))

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        """Load the files of an item.

        Raises:
            InputError: a file was refused (see `open_scan`), or a label has values that are not whole numbers.
        """
        item = super().__call__(data, reader)
        for key in self.labels:
            if key in item:
                item[key] = _whole(item[key], str(data[key]))
        return item


def _whole(label: torch.Tensor, file: str) -> torch.Tensor:
    nearest = label.round()
    off = (label - nearest).abs().max()
    if not off <= TOLERANCE:  # NaN, too
        worst = label.flatten()[(label - nearest).abs().nan_to_num(nan=torch.inf).argmax()]
        raise InputError(
            f"{file}: holds the label value {worst:g}, but label values are whole numbers. Was it resampled with "
            "interpolation? Resample the label with nearest neighbour, or remove its entry from the data list."
        )
    return nearest if off else label
