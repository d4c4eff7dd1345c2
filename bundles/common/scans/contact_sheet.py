# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Contact sheets: pages of small slices, to look through a data set, or its labels, in minutes."""

from __future__ import annotations

import os
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.ndimage import zoom

from ..data.ignore_label import IGNORE_LABEL
from ..files import save_figure

PER_PAGE = 40
COLUMNS = 4
CAPTION = 36  # pixels above each scan


def write_sheets(
    folder: str | os.PathLike, scans: Sequence[tuple[str, str, np.ndarray]], *, stem: str, colour: str = "dimgray"
) -> list[Path]:
    """Write pages ``STEM_001.png``, ... of `PER_PAGE` scans each; further pages of an earlier run are removed.

    Args:
        folder: output folder.
        scans: name, remark (below the name) and thumbnail of each, grey or RGB, in order.
        stem: start of the file names.
        colour: colour of the remarks.

    Returns:
        The files.
    """
    pages = [scans[start : start + PER_PAGE] for start in range(0, len(scans), PER_PAGE)]
    paths = [Path(folder, f"{stem}_{number:03d}.png") for number in range(1, len(pages) + 1)]
    for path, page in zip(paths, pages, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the font lacks e.g. Chinese characters and draws boxes
            save_figure(_page(page, title=f"{path.stem}, {len(scans)} scans", colour=colour), path)
    for path in set(Path(folder).glob(f"{stem}_*.png")) - set(paths):
        if re.fullmatch(r"_\d{3,}", path.stem.removeprefix(stem)):
            path.unlink()
    return paths


def _page(scans: Sequence[tuple[str, str, np.ndarray]], *, title: str, colour: str) -> Figure:
    rows = -(-len(scans) // COLUMNS)
    width, height, gap = 3 * SIDE, SIDE + CAPTION, 8
    canvas = np.full((rows * height + 24, COLUMNS * (width + gap), 3), 255, np.uint8)
    corners = [
        (24 + place // COLUMNS * height + CAPTION, place % COLUMNS * (width + gap)) for place in range(len(scans))
    ]
    for (top, left), (_, _, picture) in zip(corners, scans, strict=True):
        canvas[top : top + SIDE, left : left + width] = picture if picture.ndim == 3 else picture[:, :, None]
    figure = Figure(figsize=(canvas.shape[1] / 100, canvas.shape[0] / 100), dpi=100)
    FigureCanvasAgg(figure)
    # One picture per page: an axes object for each of its 120 slices would take half a minute.
    figure.figimage(canvas, origin="upper")

    def write(text: str, row: int, column: int, **style) -> None:
        figure.text(column / canvas.shape[1], 1 - row / canvas.shape[0], text, va="top", parse_math=False, **style)

    write(title, 4, 4, fontsize=8, weight="bold")
    for (top, left), (name, remark, _) in zip(corners, scans, strict=True):
        write(_shortened(name, 54), top - CAPTION + 2, left + 2, fontsize=6.5)
        write("\n".join(textwrap.wrap(remark, 74)[:2]), top - CAPTION + 13, left + 2, fontsize=5.2, color=colour)
    return figure


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"


SIDE = 96  # pixels of one small slice
OPACITY = 0.45  # opacity of labels


def thumbnail(
    voxels: np.ndarray,
    *,
    spacing: Sequence[float],
    box: Sequence[Sequence[int]],
    window: tuple[float, float] | None,
    label: np.ndarray | None = None,
    colours: Mapping[int, tuple[float, float, float]] | None = None,
) -> np.ndarray:
    """Draw an axial, coronal and sagittal slice of a scan, small and in true proportions.

    They are the middle slices of a box or, with a label map that is not empty, those with most labelled voxels.

    Radiological convention, as in `overlay`: the patient's right (in the sagittal slice: anterior) is on the left,
    superior at the top.

    Args:
        voxels: (X, Y, Z) in RAS.
        spacing: mm per axis.
        box: box of the body, half-open ``[[low, high], ...]``; an empty box means the whole scan.
        window: values shown as black and white; None: the 0.5th and 99.5th percentile of the three slices.
        label: label map (X, Y, Z) in RAS, drawn over the slices.
        colours: RGB of each label value; other values are not drawn. Unknown voxels do not affect the choice of slices.

    Returns:
        Grey values (SIDE, 3 * SIDE), uint8; with a label map RGB values (SIDE, 3 * SIDE, 3).
    """
    if all(high > low for low, high in box):
        inside = tuple(slice(low, high) for low, high in box)
        voxels, label = voxels[inside], None if label is None else label[inside]
    centre = _fullest(label, colours or {}) if label is not None else tuple(size // 2 for size in voxels.shape)
    slices = _slices(voxels, centre)
    labels = [None] * 3 if label is None else _slices(label, centre)
    low, high = window or np.percentile(np.concatenate([plane.ravel() for plane in slices]), (0.5, 99.5))
    picture = np.zeros((SIDE, 3 * SIDE) if label is None else (SIDE, 3 * SIDE, 3), np.uint8)
    for place, (plane, drawn, (across, up)) in enumerate(zip(slices, labels, ((0, 1), (0, 2), (1, 2)), strict=True)):
        size = np.array([plane.shape[0] * spacing[up], plane.shape[1] * spacing[across]])
        rows, columns = np.maximum(1, np.floor(size / size.max() * SIDE)).astype(int)
        grey = np.clip((plane.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
        top, left = (SIDE - rows) // 2, place * SIDE + (SIDE - columns) // 2
        small = _resized(grey, rows, columns)
        if drawn is not None:
            small = _coloured(small, drawn, colours or {})
        picture[top : top + rows, left : left + columns] = small
    return picture


def _slices(voxels: np.ndarray, centre: Sequence[int]) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal plane through a voxel, as rows of a picture from the top."""
    x, y, z = centre
    return [plane.T[::-1, ::-1] for plane in (voxels[:, :, z], voxels[:, y], voxels[x])]


def _fullest(label: np.ndarray, values: Mapping[int, object]) -> tuple[int, ...]:
    """Return the index along each axis whose plane has most labelled voxels; the middle if there are none."""
    drawn = np.isin(label, [value for value in values if value != IGNORE_LABEL])
    if not drawn.any():
        return tuple(size // 2 for size in label.shape)
    return tuple(int(drawn.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))


def _coloured(grey: np.ndarray, label: np.ndarray, colours: Mapping[int, tuple[float, float, float]]) -> np.ndarray:
    """Return a grey picture in RGB, with the values of a plane of labels in colour."""
    rows, columns = (
        ((np.arange(size) + 0.5) / size * plane).astype(int)
        for size, plane in zip(grey.shape, label.shape, strict=True)
    )
    label = label[np.ix_(rows, columns)]
    picture = np.repeat(grey[:, :, None], 3, axis=2).astype(np.float32)
    for value, colour in colours.items():
        here = label == value
        picture[here] = (1 - OPACITY) * picture[here] + OPACITY * 255 * np.array(colour, np.float32)
    return np.rint(picture).astype(np.uint8)


def _resized(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    for axis, size in ((0, rows), (1, columns)):  # average whole pixels first, so that thin structures are not skipped
        factor = plane.shape[axis] // size
        if factor > 1:
            cut = np.take(plane, np.arange(plane.shape[axis] // factor * factor), axis=axis)
            shape = list(cut.shape)
            shape[axis : axis + 1] = [shape[axis] // factor, factor]
            plane = cut.reshape(shape).mean(axis=axis + 1)
    factors = (rows / plane.shape[0], columns / plane.shape[1])
    return np.clip(zoom(plane, factors, order=1, mode="nearest", grid_mode=True), 0, 255).astype(np.uint8)
