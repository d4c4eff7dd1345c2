# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Draw where in the body a network believes every voxel of whole scans to be, next to where it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from ...common.files import save_figure
from ...common.networks.positions import UNIT, position_map, positions
from ...common.run.distributed import rank, unwrap
from ..crops.crop_dataset import whole_scan
from ..proxy_tasks.position import residuals

logger = logging.getLogger(__name__)

RANGE = 250.0  # mm to either side of the middle, over which a colour goes from none to full


def position_errors(
    predicted: torch.Tensor, affine: torch.Tensor, body: torch.Tensor
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Return the mean absolute error by axis in mm, the true positions, and the predicted ones shifted onto them.

    Args:
        predicted: (3, X, Y, Z) in mm.
        affine: (4, 4), voxel indices to mm in RAS.
        body: bool (1, X, Y, Z), the voxels that count.
    """
    true = positions(affine[None].to(predicted.device), predicted.shape[1:])[0]
    number = body.sum().clamp(min=1)
    shift = ((predicted - true) * body).sum(dim=(1, 2, 3)) / number
    error = residuals(predicted[None] / UNIT, true[None], body[None], 1)[0].abs().double().sum(dim=(1, 2, 3)) / number
    return error.tolist(), true, predicted - shift[:, None, None, None]


def _colours(position: torch.Tensor, middle: torch.Tensor, body: torch.Tensor) -> np.ndarray:
    """Return positions as RGB (X, Y, Z, 3): red to the right, green to the front, blue to the head; black outside."""
    rgb = (0.5 + (position - middle[:, None, None, None]) / (2 * RANGE)).clamp(0, 1)
    return (rgb * body).movedim(0, -1).float().cpu().numpy()


def position_figure(scans: Sequence[dict[str, Any]]) -> Figure:
    """Draw a row per scan: the scan, its true and its predicted positions, in the coronal and the sagittal plane.

    Args:
        scans: each has ``image`` (1, X, Y, Z), ``true`` and ``predicted`` (3, X, Y, Z) in mm, ``body`` (1, X, Y, Z),
            ``spacing`` (mm) and ``error`` (mm by axis).
    """
    figure = Figure(figsize=(13, 2.8 * len(scans)), layout="constrained")
    for row, scan in enumerate(scans):
        inside = scan["body"].expand_as(scan["true"])
        middle = (scan["true"] * inside).sum(dim=(1, 2, 3)) / scan["body"].sum().clamp(min=1)
        pictures = {
            "scan": scan["image"][0].float().cpu().numpy(),
            "true position": _colours(scan["true"], middle, scan["body"]),
            "predicted": _colours(scan["predicted"], middle, scan["body"]),
        }
        for column, (plane, axis) in enumerate((plane, axis) for plane in pictures for axis in (1, 0)):
            axes = figure.add_subplot(len(scans), 6, 6 * row + column + 1)
            picture = np.take(pictures[plane], pictures[plane].shape[axis] // 2, axis=axis)
            across = scan["spacing"][0 if axis == 1 else 1]
            axes.imshow(
                picture.swapaxes(0, 1), cmap="gray", origin="lower", aspect=scan["spacing"][2] / across, vmin=0, vmax=1
            )
            axes.set(xticks=[], yticks=[], frame_on=False)
            title = f"{plane}, {'coronal' if axis == 1 else 'sagittal'}"
            if plane == "predicted" and axis == 1:
                title += "\nerror x {:.0f}, y {:.0f}, z {:.0f} mm".format(*scan["error"])
            axes.set_title(title, fontsize=9)
    return figure


class PositionPanel:
    """Handler for `SupervisedEvaluator`: map whole validation scans, and write ``panel_position.png``.

    Colours show the position: red to the right, green to the front, blue to the head. The metrics ``scan_position_mm``
    and ``scan_position_mm_x``, ``_y``, ``_z`` are the mean absolute errors over the body of these scans, after each
    scan's mean error is subtracted.

    Args:
        dataset: `crop_dataset` of the validation.
        network: the network, which may be wrapped for several processes.
        tasks: proxy tasks in use; without position nothing is done.
        folder: output folder; each validation overwrites the previous picture.
        roi_size: window in voxels.
        body_above: intensity above which a voxel belongs to the body.
        scans: largest number of scans to map.
    """

    def __init__(
        self,
        *,
        dataset: Any,
        network: torch.nn.Module,
        tasks: Sequence[str],
        folder: str,
        roi_size: Sequence[int],
        body_above: float,
        scans: int = 2,
    ) -> None:
        self.dataset, self.network, self.tasks = dataset, network, tuple(tasks)
        self.folder, self.roi_size, self.body_above, self.scans = Path(folder), tuple(roi_size), body_above, scans

    def attach(self, engine: Engine) -> None:
        """Register the handler, if position is a task."""
        if "position" in self.tasks and self.scans:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if rank() > 0:
            return
        mapped = []
        for index in range(min(self.scans, len(self.dataset))):
            image, affine = whole_scan(self.dataset, index)
            network = unwrap(self.network)
            device = next(network.parameters()).device
            # Off the device before anything is computed from it: a whole CT takes gigabytes in addition to the
            # training.
            predicted = position_map(network.predict_positions, image, roi_size=self.roi_size, device=device).cpu()
            body = image.amax(dim=0, keepdim=True) > self.body_above
            error, true, shifted = position_errors(predicted, affine, body)
            spacing = affine[:3, :3].norm(dim=0).tolist()
            mapped.append(
                {"image": image, "true": true, "predicted": shifted, "body": body, "spacing": spacing, "error": error}
            )
        by_axis = np.mean([scan["error"] for scan in mapped], axis=0)
        engine.state.metrics["scan_position_mm"] = float(by_axis.mean())
        engine.state.metrics |= {
            f"scan_position_mm_{axis}": float(error) for axis, error in zip("xyz", by_axis, strict=True)
        }
        logger.info(
            "positions on %d whole scans are off by %.1f mm on average: x %.1f, y %.1f, z %.1f",
            *(len(mapped), by_axis.mean(), *by_axis),
        )
        save_figure(position_figure(mapped), self.folder / "panel_position.png")
