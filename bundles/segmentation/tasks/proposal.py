# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Propose a row of ``tasks.yaml`` for the user's own data set, from measurements of its scans.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021) where they apply, else ours. Each value is written with
the measurements and the rule that it comes from, so that the user can judge and edit it.
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

from ...common.data.ignore_label import IGNORE_LABEL, ignored_value
from ...common.data.list_forms.list_file import image_files, label_names, parse_data_list
from ...common.errors import InputError
from ...common.files import absolute_path, write_text
from ...common.networks.roi_size import STRIDE
from ...common.run.distributed import rank
from ...common.words import counted, shown
from ..models.label_names import check_labels
from .data_fingerprint import DataFingerprint, data_fingerprint
from .found_names import found_names

logger = logging.getLogger(__name__)

FILE = "task.yaml"
ANISOTROPY = 3  # nnU-Net: minimum ratio of the coarse axis to the next coarsest, in spacing and in number of voxels
WINDOW = (0.5, 99.5)  # nnU-Net: percentiles of the intensities of labelled voxels
WINDOW_STEP = 5  # HU, ours
SEEN = 0.25  # nnU-Net: share of the median volume that a patch of its low-resolution network covers
COARSER = 1.1  # factor between the spacings tried to reach that share, ours
EVEN = 0.75  # ours: minimum share that an ROI covers, relative to the best ROI; among these the most even one is chosen
RARE = 0.1  # ours: a class with a smaller share of the labelled voxels is at the centre of under 5% of pos_neg crops
TOLERANCE_STEP = 0.5  # mm, ours


@dataclass(frozen=True)
class Budget:
    """The largest number of voxels of a crop under a preset, and the preset's batch size (``presets.yaml``)."""

    voxels: int
    batch_size: int


OFFICIAL = Budget(voxels=96**3, batch_size=1)
CPU = Budget(voxels=64 * 64 * 32, batch_size=2)


@dataclass(frozen=True)
class Proposal:
    """The entries of a row with their reasons.

    Attributes:
        entries: name to value (of plain types) and reason. Entries of a preset are named like ``cpu/spacing``.
    """

    entries: dict[str, tuple[Any, str]]

    @property
    def row(self) -> dict[str, Any]:
        """The row in the form of ``tasks.yaml``: entries of a preset are nested under its name."""
        row: dict[str, Any] = {}
        for key, (value, _) in self.entries.items():
            preset, _, entry = key.rpartition("/")
            (row.setdefault(preset, {}) if preset else row)[entry] = value
        return row


def proposed_row(
    dataset_json: str | os.PathLike, *, output_dir: str | os.PathLike | None, ignore_label: int | None = IGNORE_LABEL
) -> tuple[str, dict]:
    """Propose a row for one's own data set, print it, and write it to ``OUTPUT_DIR/task.yaml``.

    Every process of a distributed run must call it: each measures the scans and gets the same row.

    Args:
        dataset_json: the data list, or a folder with one or without (see `common.data.list_forms`). Its labelled
            training scans are measured. A folder without a data list gets the names ``label_1``, ... for the values of
            its labels, and counts as CT if its voxels look like HU; both are logged as a warning.
        output_dir: None writes nothing.
        ignore_label: value of unknown voxels, unless the list declares it; None: there are none.

    Returns:
        Name of the task and the row.

    Raises:
        InputError: the list does not exist, declares no usable labels or modality, or has no labelled scan; a scan is
            unusable or does not match the list; or ``task.yaml`` already contains another row.
    """
    path = absolute_path(dataset_json)
    if not path.exists():
        raise InputError(
            f"--task {dataset_json}: file not found. It must be the folder of a data set, or its dataset.json."
        )
    path = path / "dataset.json" if path.is_dir() else path
    content = parse_data_list(path)
    training = content.get("training", [])
    items = [item for item in training if isinstance(item.get("label"), str)]
    if not items:
        raise InputError(
            f"{path}: none of its {len(training)} training scans has a 'label', so no row can be proposed."
        )
    _check_exist(items, path)
    ignore_label = ignored_value(ignore_label=ignore_label, labels=(), of_list=content.get("ignore_label"))
    if not path.is_file():  # made from the names of the files
        content |= found_names(items, folder=path.parent, ignore_label=ignore_label)
    labels, channels = _declared_labels(path, content), _declared_channels(path, content.get("modality"))
    if len(items) < len(training) and rank() == 0:
        logger.info(
            "%d of %d training scans have no label and are not measured", len(training) - len(items), len(training)
        )
    try:
        fingerprint = data_fingerprint(
            items,
            channels=len(channels),
            labels=map(int, labels),
            ignore_label=ignored_value(ignore_label=ignore_label, labels=labels),
            intensities=_all_ct(channels),
        )
        proposal = propose_row(fingerprint, channels=channels, labels=labels)
    except InputError as error:
        raise InputError(
            f"{_source(path)} (channels: {', '.join(channels)}; labels: {shown(labels)}): {error}"
        ) from error
    name = _name(content.get("name"), path)
    if rank() == 0:
        _print(proposal, name=name, scans=len(items))
        if absent := _absent(fingerprint, labels):
            logger.warning(
                "%s: no training label contains %s: the network cannot learn it", _source(path), ", ".join(absent)
            )
    if output_dir is not None:
        written = Path(output_dir) / FILE
        write_proposal(proposal, name=name, path=written, dataset_json=path)
        if rank() == 0:
            other = "" if path.name == "dataset.json" else f" --data_list {path.name}"
            logger.info(
                "wrote the proposed row to %s: edit it, then use it with --task %s --dataset_dir %s%s",
                *(written, written, path.parent, other),
            )
    return name, proposal.row


def propose_row(fingerprint: DataFingerprint, *, channels: Sequence[str], labels: Mapping[str, str]) -> Proposal:
    """Propose a row by the following rules: nnU-Net's (Isensee et al., Nature Methods 2021, or its code) or ours.

    - modality: CT if every channel is called CT; else MR, z-scored. nnU-Net's, but here one choice for all channels.
    - spacing: see `target_spacing`. nnU-Net's.
    - hu_window, CT only: percentiles `WINDOW` of labelled voxels (nnU-Net's), rounded outwards to multiples of 5 HU
      (ours). None for MR.
    - foreground: the lower end of the window (ours); 0 for MR, as nnU-Net crops to the non-zero voxels.
    - roi_size: see `roi_of`. nnU-Net's idea with our budgets.
    - nsd_tolerance: the coarsest spacing, rounded up to a multiple of 0.5 mm. Ours, in place of the agreement between
      annotators.
    - crop_sampling (official): ``classes`` if the rarest class has less than a tenth of the labelled voxels. Ours.
    - batch_size, only if an ROI covers the whole median scan: a step then has about as many voxels as the preset's
      batch with ROIs that fill the budget, but at most as many scans as the data set has. Ours.
    - spacing and roi_size of cpu: see `coarser_spacing`. nnU-Net's low-resolution network with our budget.

    Args:
        fingerprint: fingerprint of the labelled scans.
        channels: names of the channels.
        labels: label names by value, the background first.

    Raises:
        InputError: no voxel of any scan is labelled.
    """
    volumes = fingerprint.class_volumes.sum(axis=0)
    if not volumes[1:].any():
        raise InputError(
            f"the labels of all {len(fingerprint.scans)} scans contain only background, such as that of "
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
        "labels": (dict(labels), "the data list" + (f"; NO SCAN CONTAINS {', '.join(absent)}" if absent else "")),
        "spacing": (spacing, f"mm; {reason_of_spacing}"),
        "roi_size": official.pop("roi_size"),
        "hu_window": (window, reason_of_window),
        "foreground": (foreground, "the lower end of the window (ours)" if ct else "non-zero voxels (nnU-Net)"),
        "nsd_tolerance": (
            tolerance,
            "mm; the coarsest spacing (ours): replace it by the agreement between your annotators",
        ),
        "official/crop_sampling": _crop_sampling(volumes, list(labels.values())),
        **{f"official/{key}": entry for key, entry in official.items()},
        "cpu/spacing": (
            coarser,
            "as above"
            if coarser == spacing
            else f"coarser, so that the ROI covers {SEEN:.0%} of the median scan (as nnU-Net's low resolution)",
        ),
        **{f"cpu/{key}": entry for key, entry in cpu.items()},
    }
    return Proposal(entries)


def target_spacing(spacings: np.ndarray, sizes: np.ndarray) -> tuple[list[float], str]:
    """Return the median spacing along each axis, but the 10th percentile along the coarse axis of anisotropic scans.

    The coarse axis does not become finer than the other axes. Scans are anisotropic if the spacing of the coarse axis
    is more than three times that of the next coarsest, and it has less than a third of the voxels of any other axis.
    This is nnU-Net's rule (paper and code), rounded to three digits (ours).

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
        reason += f"; axis {coarse + 1} is far coarser: its 10th percentile, not its median of {target[coarse]:.3g}"
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), *target[others])
    return [float(f"{value:.3g}") for value in target], reason


def median_size(extents: np.ndarray, spacing: Sequence[float]) -> list[int]:
    """Return the median size of the scans in voxels of a given spacing.

    Args:
        extents: mm, (scans, 3).
        spacing: mm.
    """
    return [max(1, round(float(value))) for value in np.median(extents, axis=0) / np.array(spacing)]


def roi_of(size: Sequence[int], *, voxels: int) -> list[int]:
    """Return the ROI for a median size: it covers a large share of it, evenly along all axes, as nnU-Net's patch does.

    Candidates are the ROIs whose share (`share_seen`) is at least `EVEN` times the largest possible one. The result is
    the candidate whose least covered axis is covered best. Each side is a multiple of 32, at most the size rounded up
    to a multiple of 32. The first two sides are equal, because training rotates crops by 90 degrees in their plane.
    32x32x32, which the network does not accept (`check_roi_size`), becomes 32x32x64.

    Args:
        size: voxels.
        voxels: largest number of voxels of the ROI.
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
    """Return the share of a volume that an ROI covers."""
    return math.prod(min(1.0, side / whole) for side, whole in zip(roi, size, strict=True))


def coarser_spacing(spacing: Sequence[float], extents: np.ndarray, *, voxels: int) -> list[float]:
    """Return a spacing, no finer along any axis, at which the ROI of a budget covers `SEEN` of the median volume.

    The finest axes are made coarser in steps of 10% until they reach the next coarsest, then together. This is a
    simplified form of nnU-Net's low-resolution network.

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
    return [float(low), float(high)], f"{measured} (nnU-Net), outwards to multiples of {WINDOW_STEP} (ours)"


def _crops(spacing: Sequence[float], extents: np.ndarray, budget: Budget) -> dict[str, tuple[Any, str]]:
    """Return the ROI and, if it covers the whole median scan, a batch size that fills the budget of a step."""
    size = median_size(extents, spacing)
    roi = roi_of(size, voxels=budget.voxels)
    seen = f"covers {share_seen(roi, size):.0%} of the median scan, {_times(size)} voxels at this spacing"
    crops: dict[str, tuple[Any, str]] = {
        "roi_size": (roi, f"{seen} (nnU-Net's idea; at most {budget.voxels} voxels, ours)")
    }
    batch_size = min(budget.batch_size * (budget.voxels // math.prod(roi)), len(extents))
    if all(side >= whole for side, whole in zip(roi, size, strict=True)) and batch_size > budget.batch_size:
        reason = f"whole scans: about as many voxels per step as {budget.batch_size} x {budget.voxels} (ours)"
        crops["batch_size"] = (batch_size, reason)
    return crops


def _crop_sampling(volumes: np.ndarray, names: Sequence[str]) -> tuple[str, str]:
    present = [value for value in range(1, len(volumes)) if volumes[value]]
    rarest = min(present, key=lambda value: volumes[value])
    share = volumes[rarest] / volumes[1:].sum()
    measured = f"the rarest class, {names[rarest]}, has {share:.1%} of the labelled voxels"
    if share < RARE:
        return "classes", f"{measured}, below {RARE:.0%}: draws every class equally often (ours)"
    return "pos_neg", f"{measured}, not below {RARE:.0%}: draws labelled voxels and background equally often (ours)"


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
    return f"the data list names {', '.join(channels)}, not CT: z-scored like MR"


# ---- the data list -------------------------------------------------------------------------------------------------


def _source(dataset_json: Path) -> Path:
    """Return the data list, or the folder that has none."""
    return dataset_json if dataset_json.is_file() else dataset_json.parent


def _check_exist(items: Sequence[Mapping[str, Any]], path: Path) -> None:
    missing = [file for item in items for file in (*image_files(item), item["label"]) if not os.path.isfile(file)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} files of its training section do not exist, such as {missing[0]}. Paths in a data "
            f"list are relative to its folder, {path.parent}."
        )


def _declared_labels(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    declared = label_names(content, path)
    if not declared:
        raise InputError(f'{path} declares no labels. Add them: "labels": {{"0": "background", "1": "spleen"}}.')
    try:
        return check_labels({str(value): name for value, name in sorted(declared.items())})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _declared_channels(path: Path, modality: Any) -> list[str]:
    """Return the names of the channels in order."""
    if isinstance(modality, Mapping) and modality and set(modality) == set(map(str, range(len(modality)))):
        return [str(modality[str(number)]) for number in range(len(modality))]
    found = "no 'modality'" if modality is None else f"'modality' {modality!r}"
    raise InputError(
        f'{path} declares {found}. Name each channel by its number from 0: "modality": {{"0": "CT"}} for CT in HU, '
        'or {"0": "T2", "1": "ADC"}.'
    )


def _name(declared: Any, path: Path) -> str:
    """Return the list's own name, else its folder's, reduced to letters, digits, ``_`` and ``-``."""
    names = (re.sub(r"[^A-Za-z0-9_-]+", "_", str(name or "")).strip("_-") for name in (declared, path.parent.name))
    return next((name for name in names if name), "own_task")


# ---- output --------------------------------------------------------------------------------------------------------


def write_proposal(proposal: Proposal, *, name: str, path: str | os.PathLike, dataset_json: str | os.PathLike) -> None:
    """Write ``{NAME: row}`` as YAML, with instructions at the top and the reason next to each value.

    A file that contains the same row is not changed.

    Args:
        proposal: from `propose_row`.
        name: name of the task.
        path: the file.
        dataset_json: the data list that the row was proposed for.

    Raises:
        InputError: the file contains something else.
    """
    path = Path(path)
    if path.exists():
        try:
            recorded = ConfigParser.load_config_file(path)
        except (yaml.YAMLError, ValueError):
            recorded = None
        if recorded == {name: proposal.row}:
            return
        raise InputError(
            f"{path} differs from the row proposed for {_source(Path(dataset_json))}: it was edited, or the data have changed. "
            f"To use it, pass --task {path}; for a new proposal, remove it or choose another --output_dir."
        )
    write_text(path, _yaml(proposal, name, path, Path(dataset_json)))


def _yaml(proposal: Proposal, name: str, path: Path, dataset_json: Path) -> str:
    options = f"--task {shlex.quote(str(path))} --dataset_dir {shlex.quote(str(dataset_json.parent))}"
    if dataset_json.name != "dataset.json":
        options += f" --data_list {shlex.quote(dataset_json.name)}"
    lines = [
        f"# {name}: a row as in configs/tasks.yaml, proposed from the scans of {_source(dataset_json)}.",
        "# Check and edit the values; then run in the bundle's folder:",
        "#",
        f"#   python -m monai.bundle run --config_file configs/train.yaml {options}",
        "#",
        "# The row is saved in the trained model.pt: evaluate.yaml and inference.yaml need no --task.",
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
    return json.dumps(value, ensure_ascii=False)  # JSON is valid YAML, and quotes all strings


def _one_line(text: str) -> str:
    return re.sub(r"[^\S ]+", " ", text)  # a line break in a name must not end the comment


def _print(proposal: Proposal, *, name: str, scans: int) -> None:
    table = Table(
        "entry", "value", "why", title=f"{name}: a row proposed from {counted(scans, 'scan')}", show_lines=True
    )
    for key, (value, reason) in proposal.entries.items():
        table.add_row(key, shown(value), reason)
    Console(markup=False).print(table)


def _times(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
