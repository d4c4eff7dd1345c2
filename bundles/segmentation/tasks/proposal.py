# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A row of ``tasks.yaml`` for a data set of one's own, proposed from what its scans measure.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021) where they fit, else ours; each value is written with its
figures and its rule, to be edited by whoever knows better.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from monai.bundle import ConfigParser
from rich.console import Console
from rich.table import Table

from ...common.data.data_list import data_list_labels, parse_data_list
from ...common.errors import InputError
from ...common.files import write_text
from ...common.networks.roi_size import STRIDE
from ...common.run.distributed import rank
from ..models.label_names import check_labels
from .data_fingerprint import DataFingerprint, data_fingerprint

logger = logging.getLogger(__name__)

FILE = "task.yaml"
ANISOTROPY = 3  # nnU-Net: the coarse axis is so many times as coarse as the next, and has so many times fewer voxels
WINDOW = (0.5, 99.5)  # nnU-Net: percentiles of the intensities of labelled voxels
WINDOW_STEP = 5  # HU, ours
SEEN = 0.25  # of the median volume: nnU-Net makes its low-resolution network so coarse that a patch holds as much
COARSER = 1.1  # factor of a step towards it, ours
EVEN = 0.75  # ours: so much of the best share may be given up to cover all axes evenly
RARE = 0.1  # ours: a class of less of the labelled voxels is at the centre of less than 5% of the crops of pos_neg
TOLERANCE_STEP = 0.5  # mm, ours


@dataclass(frozen=True)
class Budget:
    """How much one crop may hold under a preset, and how many volumes the preset takes at once (``presets.yaml``)."""

    voxels: int
    batch_size: int


OFFICIAL = Budget(voxels=96**3, batch_size=1)
CPU = Budget(voxels=64 * 64 * 32, batch_size=2)


@dataclass(frozen=True)
class Proposal:
    """The entries of a row with their reasons.

    Attributes:
        entries: name (those of a preset as ``cpu/spacing``) to value, of plain types, and where it comes from.
    """

    entries: dict[str, tuple[Any, str]]

    @property
    def row(self) -> dict[str, Any]:
        """The row as ``tasks.yaml`` has it: entries of a preset under its name."""
        row: dict[str, Any] = {}
        for key, (value, _) in self.entries.items():
            preset, _, entry = key.rpartition("/")
            (row.setdefault(preset, {}) if preset else row)[entry] = value
        return row


def proposed_row(dataset_json: str | os.PathLike, *, output_dir: str | os.PathLike | None) -> tuple[str, dict]:
    """Propose a row for a data set in MSD's form, print it, and write it to ``OUTPUT_DIR/task.yaml``.

    Every process of a distributed run must call it: each measures the scans and comes to the same row.

    Args:
        dataset_json: the data list; its labelled training scans are measured.
        output_dir: None writes nothing.

    Returns:
        Name of the task and the row.

    Raises:
        InputError: the list is not there, declares no usable labels or modality, or has no labelled scan; a scan is
            unfit, or is not as the list declares; or ``task.yaml`` holds another row already.
    """
    path = Path(dataset_json).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"--task {dataset_json}: there is no such file. It must be the dataset.json of a data set.")
    content = parse_data_list(path)
    labels, channels = _declared_labels(path), _declared_channels(path, content.get("modality"))
    training = content.get("training", [])
    items = [item for item in training if isinstance(item.get("label"), str)]
    if not items:
        raise InputError(
            f"{path}: none of its {len(training)} training scans has a 'label', so no row can be proposed."
        )
    if len(items) < len(training) and rank() == 0:
        logger.info(
            "%d of %d training scans have no label and are not measured", len(training) - len(items), len(training)
        )
    try:
        fingerprint = data_fingerprint(
            items, channels=len(channels), labels=map(int, labels), intensities=_all_ct(channels)
        )
        proposal = propose_row(fingerprint, channels=channels, labels=labels)
    except InputError as error:
        raise InputError(f"{path} (channels: {', '.join(channels)}; labels: {labels}): {error}") from error
    name = _name(content.get("name"), path)
    if rank() == 0:
        _print(proposal, name=name, scans=len(items))
        if absent := _absent(fingerprint, labels):
            logger.warning("%s: no training label holds %s: the network will never find it", path, ", ".join(absent))
    if output_dir is not None:
        written = Path(output_dir) / FILE
        write_proposal(proposal, name=name, path=written, dataset_json=path)
        if rank() == 0:
            logger.info("the proposed row stands in %s: edit it, and use it by --task %s", written, written)
    return name, proposal.row


def propose_row(fingerprint: DataFingerprint, *, channels: Sequence[str], labels: Mapping[str, str]) -> Proposal:
    """Propose a row. nnU-Net: Isensee et al., Nature Methods 2021, or its code; what is not its own is ours.

    - modality: CT where every channel is called CT; else MR, z-scored. nnU-Net, but here all channels are of one kind.
    - spacing: see `target_spacing`. nnU-Net.
    - hu_window of CT: percentiles `WINDOW` of labelled voxels (nnU-Net), outwards to 5 HU (ours). None for MR.
    - foreground: the lower end of the window (ours); for MR 0, as nnU-Net crops to what is not 0.
    - roi_size: see `roi_of`. nnU-Net's idea, our budgets.
    - nsd_tolerance: the coarsest spacing, up to 0.5 mm. Ours, a stand-in for what annotators agree to.
    - crop_sampling (official): ``classes`` where the rarest class holds less than a tenth of the labelled voxels. Ours.
    - batch_size, only where an ROI holds the whole median scan: a step sees about as many voxels as the preset's batch
      with ROIs that fill the budget, but never more scans than there are. Ours.
    - spacing and roi_size of cpu: see `coarser_spacing`. nnU-Net's low-resolution network, our budget.

    Args:
        fingerprint: of the labelled scans.
        channels: their names.
        labels: value to name, the background first.

    Raises:
        InputError: if no voxel of any scan is labelled.
    """
    volumes = fingerprint.class_volumes.sum(axis=0)
    if not volumes[1:].any():
        raise InputError(
            f"the labels of all {len(fingerprint.scans)} scans are background alone, such as that of "
            f"{fingerprint.scans[0].file}: there is nothing to learn."
        )
    ct = _all_ct(channels)
    absent = _absent(fingerprint, labels)
    window, reason_of_window = _hu_window(fingerprint.intensities) if ct else (None, "none: z-score (nnU-Net)")
    foreground = window[0] if ct else 0.0
    sizes = fingerprint.sizes_above(foreground)
    extents = sizes * fingerprint.spacings
    spacing, reason_of_spacing = target_spacing(fingerprint.spacings, sizes)
    coarser = coarser_spacing(spacing, extents, voxels=CPU.voxels)
    tolerance = math.ceil(round(max(spacing) / TOLERANCE_STEP, 6)) * TOLERANCE_STEP
    official = _crops(spacing, extents, OFFICIAL)
    cpu = _crops(coarser, extents, CPU)
    entries = {
        "modality": ("CT" if ct else "MR", _reason_of_modality(channels)),
        "channels": (list(channels), "the data list"),
        "labels": (dict(labels), "the data list" + (f"; NO SCAN HOLDS {', '.join(absent)}" if absent else "")),
        "spacing": (spacing, f"mm; {reason_of_spacing}"),
        "roi_size": official.pop("roi_size"),
        "hu_window": (window, reason_of_window),
        "foreground": (foreground, "the lower end of the window (ours)" if ct else "what is not 0 (nnU-Net)"),
        "nsd_tolerance": (tolerance, "mm; the coarsest spacing (ours): put in what your annotators agree to"),
        "official/crop_sampling": _crop_sampling(volumes, list(labels.values())),
        **{f"official/{key}": entry for key, entry in official.items()},
        "cpu/spacing": (
            coarser,
            "as above"
            if coarser == spacing
            else f"coarser, so that the ROI holds {SEEN:.0%} of the median scan (as nnU-Net's low resolution)",
        ),
        **{f"cpu/{key}": entry for key, entry in cpu.items()},
    }
    return Proposal(entries)


def target_spacing(spacings: np.ndarray, sizes: np.ndarray) -> tuple[list[float], str]:
    """The median along each axis; along the coarse axis of anisotropic scans the 10th percentile.

    It gets no finer than the other axes.

    Anisotropic: the coarse axis is more than three times as coarse as the next and has less than a third of its voxels.
    nnU-Net's rule (paper and code), rounded to three digits (ours).

    Args:
        spacings: mm, (scans, 3).
        sizes: voxels at these spacings, (scans, 3).

    Returns:
        The spacing in mm, and its reason.
    """
    target, size = np.median(spacings, axis=0), np.median(sizes, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    span = f"between {_times(low)} and {_times(high)} mm" if (low < high).any() else f"all {_times(low)} mm"
    reason = f"median of {len(spacings)} scans, {span} (nnU-Net)"
    if target[coarse] > ANISOTROPY * max(target[others]) and ANISOTROPY * size[coarse] < min(size[others]):
        reason += (
            f"; axis {coarse + 1} is far coarser, so there the 10th percentile, not the median of {target[coarse]:.3g}"
        )
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), *target[others])
    return [float(f"{value:.3g}") for value in target], reason


def median_size(extents: np.ndarray, spacing: Sequence[float]) -> list[int]:
    """Median size over the scans in voxels of a spacing.

    Args:
        extents: mm, (scans, 3).
        spacing: mm.
    """
    return [max(1, round(float(value))) for value in np.median(extents, axis=0) / np.array(spacing)]


def roi_of(size: Sequence[int], *, voxels: int) -> list[int]:
    """The ROI for a median size: it holds much of it (`share_seen`), and covers its axes evenly, as nnU-Net's does.

    Of all that hold nearly as much as the best one does (`EVEN`), it is the one whose least covered axis is covered
    best. Each side is a multiple of 32, no longer than the size, padded to 32, needs. The first two are alike, because
    training turns crops by 90 degrees in their plane. 32x32x32, which the network cannot take (`check_roi_size`),
    becomes 32x32x64.

    Args:
        size: voxels.
        voxels: greatest number of voxels of the ROI.
    """
    plane, height = (STRIDE * math.ceil(side / STRIDE) for side in (max(size[:2]), size[2]))
    if plane == height == STRIDE:
        return [STRIDE, STRIDE, 2 * STRIDE]
    sides = itertools.product(range(STRIDE, plane + 1, STRIDE), range(STRIDE, height + 1, STRIDE))
    rois = [[p, p, h] for p, h in sides if p * p * h <= voxels and max(p, h) > STRIDE]
    most = max(share_seen(roi, size) for roi in rois)
    return max(
        (roi for roi in rois if share_seen(roi, size) >= EVEN * most),
        key=lambda roi: (min(side / whole for side, whole in zip(roi, size, strict=True)), share_seen(roi, size)),
    )


def share_seen(roi: Sequence[int], size: Sequence[int]) -> float:
    """Share of a volume that an ROI holds."""
    return math.prod(min(1.0, side / whole) for side, whole in zip(roi, size, strict=True))


def coarser_spacing(spacing: Sequence[float], extents: np.ndarray, *, voxels: int) -> list[float]:
    """A spacing, no finer along any axis, at which the ROI of a budget holds `SEEN` of the median volume.

    The finest axes are made coarser first, until all are alike, by steps of a tenth: nnU-Net's low-resolution network,
    simplified.

    Args:
        spacing: mm.
        extents: sizes of the scans in mm, (scans, 3).
        voxels: see `roi_of`.
    """
    for step in itertools.count():
        finest = float(f"{min(spacing) * COARSER**step:.2g}")
        coarser = [max(finest, side) if step else side for side in spacing]
        size = median_size(extents, coarser)
        if share_seen(roi_of(size, voxels=voxels), size) >= SEEN:
            return coarser


def _hu_window(intensities: np.ndarray) -> tuple[list[float], str]:
    ends = np.percentile(intensities, WINDOW)
    low = math.floor(ends[0] / WINDOW_STEP) * WINDOW_STEP
    high = max(math.ceil(ends[1] / WINDOW_STEP) * WINDOW_STEP, low + WINDOW_STEP)
    measured = f"{WINDOW[0]} and {WINDOW[1]} percentiles of labelled voxels, {ends[0]:.4g} and {ends[1]:.4g} HU"
    return [float(low), float(high)], f"{measured} (nnU-Net), outwards to {WINDOW_STEP} (ours)"


def _crops(spacing: Sequence[float], extents: np.ndarray, budget: Budget) -> dict[str, tuple[Any, str]]:
    """The ROI and, where it holds the whole median scan, a batch size that fills the step."""
    size = median_size(extents, spacing)
    roi = roi_of(size, voxels=budget.voxels)
    seen = f"holds {share_seen(roi, size):.0%} of the median scan, {_times(size)} voxels at this spacing"
    crops: dict[str, tuple[Any, str]] = {"roi_size": (roi, f"{seen} (nnU-Net's idea; at most {budget.voxels}, ours)")}
    batch_size = min(budget.batch_size * (budget.voxels // math.prod(roi)), len(extents))
    if all(side >= whole for side, whole in zip(roi, size, strict=True)) and batch_size > budget.batch_size:
        reason = f"whole scans: about as many voxels a step as {budget.batch_size} x {budget.voxels} (ours)"
        crops["batch_size"] = (batch_size, reason)
    return crops


def _crop_sampling(volumes: np.ndarray, names: Sequence[str]) -> tuple[str, str]:
    present = [value for value in range(1, len(volumes)) if volumes[value]]
    rarest = min(present, key=lambda value: volumes[value])
    share = volumes[rarest] / volumes[1:].sum()
    measured = f"the rarest class, {names[rarest]}, has {share:.1%} of what is labelled"
    if share < RARE:
        return "classes", f"{measured}, below {RARE:.0%}: draws every class equally often (ours)"
    return "pos_neg", f"{measured}, not below {RARE:.0%}: draws labelled voxels and background at even odds (ours)"


def _absent(fingerprint: DataFingerprint, labels: Mapping[str, str]) -> list[str]:
    volumes = fingerprint.class_volumes.sum(axis=0)
    return [name for (value, name), volume in zip(labels.items(), volumes, strict=True) if int(value) and not volume]


def _all_ct(channels: Sequence[str]) -> bool:
    return all(channel.strip().lower() == "ct" for channel in channels)


def _reason_of_modality(channels: Sequence[str]) -> str:
    if _all_ct(channels):
        return "the data list calls every channel CT: intensities are HU"
    if any(_all_ct([channel]) for channel in channels):
        return "the data list names other channels beside CT: no HU window, all are z-scored"
    return f"the data list says {', '.join(channels)}, not CT: z-scored, as MR is"


# ---- the data list -------------------------------------------------------------------------------------------------


def _declared_labels(path: Path) -> dict[str, str]:
    declared = data_list_labels(path)
    if not declared:
        raise InputError(f'{path} declares no labels. Add them: "labels": {{"0": "background", "1": "spleen"}}.')
    try:
        return check_labels({str(value): name for value, name in sorted(declared.items())})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _declared_channels(path: Path, modality: Any) -> list[str]:
    """Names of the channels in their order."""
    if isinstance(modality, Mapping) and modality and set(modality) == set(map(str, range(len(modality)))):
        return [str(modality[str(number)]) for number in range(len(modality))]
    found = "no 'modality'" if modality is None else f"'modality' {modality!r}"
    raise InputError(
        f'{path} declares {found}. Name each channel by its number from 0: "modality": {{"0": "CT"}} for CT in HU, '
        'or {"0": "T2", "1": "ADC"}.'
    )


def _name(declared: Any, path: Path) -> str:
    """The list's own name, else that of its folder, of letters, digits, ``_`` and ``-`` alone."""
    names = (re.sub(r"[^A-Za-z0-9_-]+", "_", str(name or "")).strip("_-") for name in (declared, path.parent.name))
    return next((name for name in names if name), "own_task")


# ---- what is shown and written -------------------------------------------------------------------------------------


def write_proposal(proposal: Proposal, *, name: str, path: str | os.PathLike, dataset_json: str | os.PathLike) -> None:
    """Write ``{NAME: row}`` as YAML with the reason beside each value, and how to use it at the head.

    A file that holds the same row is left as it is.

    Args:
        proposal: of `propose_row`.
        name: of the task.
        path: the file.
        dataset_json: what it was proposed for.

    Raises:
        InputError: if the file holds something else.
    """
    path = Path(path)
    if path.exists():
        try:
            held = ConfigParser.load_config_file(path)
        except (yaml.YAMLError, ValueError):
            held = None
        if held == {name: proposal.row}:
            return
        raise InputError(
            f"{path} holds another row than is proposed for {dataset_json}: it was edited, or the data have changed. "
            f"To use it, give --task {path}; for a new proposal, remove it or choose another --output_dir."
        )
    write_text(path, _yaml(proposal, name, path, Path(dataset_json)))


def _yaml(proposal: Proposal, name: str, path: Path, dataset_json: Path) -> str:
    options = f"--task {shlex.quote(str(path))} --dataset_dir {shlex.quote(str(dataset_json.parent))}"
    if dataset_json.name != "dataset.json":
        options += f" --data_list {shlex.quote(dataset_json.name)}"
    lines = [
        f"# {name}: a row as in configs/tasks.yaml, proposed from the scans of {dataset_json}.",
        "# Edit what you know better; then, in the bundle's folder:",
        "#",
        f"#   python -m monai.bundle run --config_file configs/train.yaml {options}",
        "#",
        "# The trained model.pt carries the row: evaluate.yaml and inference.yaml need no --task.",
        f"{_yaml_text(name)}:",
    ]
    heads = set()
    for key, (value, reason) in proposal.entries.items():
        preset, _, entry = key.rpartition("/")
        if preset not in {"", *heads}:
            heads.add(preset)
            lines.append(f"  {preset}:")
        lines.append(f"{'    ' if preset else '  '}{entry}: {_yaml_text(value)}  # {reason}")
    return "\n".join([*map(_one_line, lines), ""])


def _yaml_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML, and leaves no doubt what is text


def _one_line(text: str) -> str:
    return re.sub(r"[^\S ]+", " ", text)  # a line break in a name must not end the comment


def _print(proposal: Proposal, *, name: str, scans: int) -> None:
    table = Table("entry", "value", "why", title=f"{name}: a row proposed from {scans} scans", show_lines=True)
    for key, (value, reason) in proposal.entries.items():
        table.add_row(key, _yaml_text(value), reason)
    Console(markup=False).print(table)


def _times(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
