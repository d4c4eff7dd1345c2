# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pictures of a label map over its scan: three planes, with the prediction in the first row and the truth below."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.data import MetaTensor

from ...common.cases.case_handler import CaseHandler
from ...common.errors import InputError, RefusedScan
from ...common.files import save_figure
from ...common.run.distributed import rank
from ...common.scans.decode_once import forget_voxels, with_kept_voxels
from ...common.scans.nifti import open_scan
from ...common.words import sentence
from ..models.label_names import organ_names

logger = logging.getLogger(__name__)

# For each plane: the axis perpendicular to it, and the anatomical directions at the left and at the top of the picture.
PLANES = {"axial": (2, "R", "A"), "coronal": (1, "R", "S"), "sagittal": (0, "A", "S")}
ABDOMEN_WINDOW = (-175.0, 250.0)  # HU, the window of the BTCV and most MSD recipes
FILL_OPACITY = 0.35

Colour = tuple[float, float, float]


def overlay_figure(
    image: np.ndarray,
    prediction: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    spacing: Sequence[float],
    labels: Mapping[int, str],
    window: tuple[float, float] | None = ABDOMEN_WINDOW,
    title: str | None = None,
) -> Figure:
    """Draw the axial, coronal and sagittal plane of a scan with its organs filled and outlined.

    The planes go through the centre of mass of the labelled voxels of the truth, if there are any; else of the
    prediction; else through the centre of the scan.

    Radiological convention: the patient's right is at the left of the axial and coronal plane, as seen from the feet
    and from the front; anterior is at the top of the axial and at the left of the sagittal plane; superior is at the
    top of the coronal and sagittal plane. Both axes of a plane have the same scale in mm.

    Args:
        image: the scan in RAS orientation, shape (X, Y, Z), in HU.
        prediction: label map of the same shape and orientation.
        truth: the true label map, for a second row of planes below the prediction's.
        spacing: voxel size along X, Y, Z in mm.
        labels: organ name of each label value; other values are not drawn.
        window: the HU shown as black and white; None for the 1st and 99th percentile, for MR, which has no unit.
        title: text above the planes.

    Returns:
        The figure, made without pyplot: it needs no display, and is freed with its last reference.

    Raises:
        InputError: the shapes differ.
    """
    rows = {"prediction": prediction} | ({} if truth is None else {"truth": truth})
    for role, label_map in rows.items():
        if image.ndim != 3 or label_map.shape != image.shape:
            raise InputError(
                f"The {role} has the shape {label_map.shape}, the scan {image.shape}: both must have the same shape "
                "(X, Y, Z). Check that both are in the geometry of the scan's file."
            )
    centre = _centre(reversed(rows.values()), labels)
    low, high = np.percentile(image, (1, 99)) if window is None else window
    colours = organ_colours(labels)

    figure = Figure(figsize=(11, 3.8 * len(rows) + 0.6), layout="compressed")
    FigureCanvasAgg(figure)
    widths = [_plane_size(axis, image.shape, spacing)[0] for axis, _, _ in PLANES.values()]
    panels = figure.subplots(len(rows), 3, squeeze=False, width_ratios=widths)
    for panel_row, (role, label_map) in zip(panels, rows.items(), strict=True):
        panel_row[0].set_ylabel(role)
        for panel, (plane, (axis, left, top)) in zip(panel_row, PLANES.items(), strict=True):
            width, height = _plane_size(axis, image.shape, spacing)
            place = {"extent": (0, width, 0, height), "aspect": "equal", "interpolation": "nearest"}
            panel.imshow(_plane(image, axis, centre[axis]), cmap="gray", vmin=low, vmax=high, **place)
            organs = _plane(label_map, axis, centre[axis])
            panel.imshow(_filled(organs, colours), **place)
            _outline(panel, organs, colours, size=(width, height))
            panel.set(xticks=[], yticks=[], xlim=(0, width), ylim=(0, height))
            panel.set_title(f"{plane}, {'XYZ'[axis]} = {centre[axis]}", fontsize=9)
            mark = {"transform": panel.transAxes, "color": "white", "fontsize": 9}
            panel.text(0.02, 0.5, left, ha="left", va="center", **mark)
            panel.text(0.5, 0.98, top, ha="center", va="top", **mark)
    patches = [Patch(color=colours[value], label=organ) for value, organ in labels.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(7, max(1, len(patches))), fontsize=8)
    if title:
        figure.suptitle(title)
    return figure


def organ_colours(labels: Iterable[int]) -> dict[int, Colour]:
    """Return an RGB colour for each label value: evenly spaced hues, with alternating brightness."""
    values = list(labels)
    return {
        value: tuple(hsv_to_rgb((i / len(values), 0.9, 1.0 if i % 2 == 0 else 0.65)).tolist())
        for i, value in enumerate(values)
    }


def load_ras(path: str | os.PathLike) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI file in RAS orientation (axes swapped and flipped, never resampled).

    Args:
        path: the file. The first volume of a 4D file is used, such as an MR scan of several sequences.

    Returns:
        The voxels (X, Y, Z) in the units of the file, and the voxel size in mm.

    Raises:
        InputError: the file is missing, or is not a 3D or 4D image.
    """
    try:
        image = nib.as_closest_canonical(with_kept_voxels(open_scan(path), path))
    except RefusedScan as error:
        raise InputError(
            f"The image {path} {sentence(str(error))} Check the path in the data list, or convert the scan again."
        ) from error
    if image.ndim not in (3, 4):
        raise InputError(f"The image {path} has the shape {image.shape}: a scan of shape (X, Y, Z) is needed.")
    voxels = np.asarray(image.dataobj if image.ndim == 3 else image.dataobj[..., 0])
    return voxels, tuple(nib.affines.voxel_sizes(image.affine).tolist())


class SaveOverlays(CaseHandler):
    """Handler of an evaluator: writes ``<case>_overlay.png`` for each case, in the scan's own geometry and units.

    The scan is read again, because the image in the item is resampled and scaled; `decode_once` may have kept its
    voxels.

    Args:
        labels: organ name of each label value; text keys, as in a JSON file, are read as numbers, and a name for the
            background 0 is ignored.
        output_dir: the folder of the pictures.
        window: the HU shown as black and white; see `overlay_figure`.
        options: ``pred_key``, ``image_key``, ``label_key`` (None draws only the prediction), ``items`` and ``failures``
            of `CaseHandler`. Without ``items``, cases with the same file name overwrite each other's picture.

    Raises:
        InputError: during the run, if the scan cannot be read or a label map is missing or has another shape.
    """

    product = "picture"

    def __init__(
        self,
        labels: Mapping[int | str, str],
        output_dir: str | Path,
        *,
        window: Sequence[float] | None = ABDOMEN_WINDOW,
        **options: Any,
    ) -> None:
        super().__init__(output_dir, **options)
        self.labels = organ_names(labels)
        self.window = window
        self.drawn: list[Path] = []

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def finish(self, engine: Engine) -> None:
        """Log where the pictures are."""
        if rank() == 0 and self.drawn:
            one = self.drawn[0] if len(self.drawn) == 1 else self.output_dir / "*_overlay.png"
            logger.info("look at the %s: %s", "picture" if len(self.drawn) == 1 else "pictures", one)
        self.drawn = []

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Draw one case."""
        name = self.name_of(file)
        prediction = self.label_map(item, self.pred_key, file)
        truth = None if self.label_key is None else self.label_map(item, self.label_key, file)
        image, spacing = load_ras(file)
        try:
            figure = overlay_figure(
                image,
                _to_ras(prediction),
                truth=None if truth is None else _to_ras(truth),
                spacing=spacing,
                labels=self.labels,
                window=self.window,
                title=name,
            )
        except InputError as error:
            raise InputError(f"No picture of the case {name} ({file}): {error}") from error
        path = self.output_dir / f"{name}_overlay.png"
        save_figure(figure, path)
        self.drawn.append(path)
        forget_voxels(file)


def _to_ras(label_map: MetaTensor) -> np.ndarray:
    orientation = nib.io_orientation(label_map.affine.numpy(force=True))
    return nib.apply_orientation(label_map[0].numpy(force=True), orientation)


def _centre(label_maps: Iterable[np.ndarray], labels: Iterable[int]) -> tuple[int, int, int]:
    """Return the voxel at the centre of mass of the first map with labelled voxels; without any, at the centre."""
    for label_map in label_maps:
        labelled = np.isin(label_map, list(labels))
        if labelled.any():
            counts = [labelled.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
            return tuple(round(float(np.average(np.arange(len(count)), weights=count))) for count in counts)
    return tuple(size // 2 for size in label_map.shape)


def _plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Return the plane at ``index`` of ``axis`` as picture rows, from the top, in the radiological convention.

    The columns are the first of the other two axes, the rows the second. Both are reversed, because in RAS they run
    opposite to the columns and rows of a picture.
    """
    return np.take(volume, index, axis=axis).T[::-1, ::-1]


def _plane_size(axis: int, shape: Sequence[int], spacing: Sequence[float]) -> tuple[float, float]:
    """Return width and height in mm of the plane perpendicular to ``axis``."""
    width, height = (shape[a] * spacing[a] for a in range(3) if a != axis)
    return width, height


def _filled(plane: np.ndarray, colours: Mapping[int, Colour]) -> np.ndarray:
    """Return an RGBA picture (rows, columns, 4): organs translucent, the rest transparent."""
    picture = np.zeros((*plane.shape, 4))
    for value, colour in colours.items():
        picture[plane == value] = (*colour, FILL_OPACITY)
    return picture


def _outline(panel: Axes, plane: np.ndarray, colours: Mapping[int, Colour], *, size: tuple[float, float]) -> None:
    """Draw contour lines around the organs. Unlike coloured pixels they stay complete when the plane is downscaled."""
    rows, columns = plane.shape
    (width, height), (dx, dy) = size, (size[0] / columns, size[1] / rows)
    for value, colour in colours.items():
        organ = np.pad(plane == value, 1)  # closes the contour of an organ at the border of the scan
        if organ.any():
            outer = (-dx, width + dx, -dy, height + dy)
            panel.contour(organ, [0.5], colors=[colour], linewidths=1, origin="upper", extent=outer)
