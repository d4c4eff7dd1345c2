# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Give one scan labels: register labelled scans to it, carry and fuse their labels, and decide which organs to keep."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import generate_spatial_bounding_box
from scipy import ndimage

from ...common.errors import InputError
from ...common.files import atomic_path, write_text
from ...common.scans.contact_sheet import thumbnail
from ...common.scans.nifti_writing import write_nifti
from ...common.scans.reading import Volume
from ...common.value_rules import ABOVE_ZERO, SHARE, ZERO_OR_ABOVE
from ..results.overlay import organ_colours
from .agreement import Decision, Limits, agreement, decide, dice_of_organs, expected_volumes, keep_only, refuse_mean
from .carrying import carry_both
from .fusion import IGNORE, Fused, fuse, local_likeness
from .itk_images import as_label, as_volume
from .outputs import Outputs
from .position.fit import Alignment
from .records import RECORDS, file_identity, read_record, unexpected
from .registered_pairs import registered
from .registration import RegistrationOptions
from .scans_of_run import Scan

PICTURE_MARGIN = 30.0  # mm around the organs
FORMAT = 3  # record format; a new number recomputes all scans


@dataclass(frozen=True)
class Recipe:
    """How labels are carried.

    Attributes:
        registration: see `RegistrationOptions`.
        labels: organ name of each label value, without the background.
        threshold: confidence below which a voxel is unknown; where one labelled scan judges alone,
            ``limits.min_confidence`` if that is less.
        gain: votes are weighted by local likeness to this power.
        likeness_window: mm; edge of the cube in which two scans are compared.
        unknown_margin: mm; where an organ is not kept, voxels this close to any of its carried copies are unknown.
        limits: what an organ must meet to be kept.
        min_organs: share of the organs of the labelled scans that a scan must keep, or it is left out; 0: always kept.
        picture_window: HU shown as black and white.
    """

    registration: RegistrationOptions
    labels: Mapping[int, str]
    threshold: float = 0.6
    gain: float = 2.0
    likeness_window: float = 15.0
    unknown_margin: float = 8.0
    limits: Limits = field(default_factory=Limits)
    min_organs: float = 0.3
    picture_window: Sequence[float] = (-160.0, 240.0)

    def __post_init__(self) -> None:
        for name in ("threshold", "min_organs"):
            SHARE.check(name, getattr(self, name))
        for name in ("gain", "likeness_window"):
            ABOVE_ZERO.check(name, getattr(self, name))
        ZERO_OR_ABOVE.check("unknown_margin", self.unknown_margin)
        refuse_mean(self.labels)


@dataclass(frozen=True)
class Job:
    """One scan to label.

    Attributes:
        target: the scan.
        atlases: the labelled scans to carry from, best first, and how the target lies over each (`Alignment`).
        recipe: how labels are carried.
        folder: output folder of the run.
        leave_out: the target is a labelled scan: measure the carried label against its own, and write no label.
        masks_only: write no label for training.
        held: label values that any labelled scan of the run has. Where none of the copies has one of them, background
            is unknown: it may be that organ.
    """

    target: Scan
    atlases: tuple[tuple[Scan, Alignment], ...]
    recipe: Recipe
    folder: str
    leave_out: bool = False
    masks_only: bool = False
    held: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return everything on which the result depends, as it comes back from JSON."""
        scans = [self.target, *(scan for scan, _ in self.atlases)]
        files = [file for scan in scans for file in (scan.image, scan.label) if file]
        recipe = asdict(self.recipe)
        if self.leave_out:  # measured before the limits are known
            for name in ("threshold", "limits", "min_organs", "unknown_margin", "picture_window"):
                del recipe[name]
        content = {
            "format": FORMAT,
            "files": [[os.path.basename(file), *file_identity(file, self.folder)] for file in files],
            "alignments": [asdict(alignment) for _, alignment in self.atlases],
            "recipe": recipe,
            "masks_only": self.masks_only,
            "held": [] if self.leave_out else list(self.held),
        }
        return json.loads(json.dumps(content))

    @property
    def record(self) -> Path:
        """The file that says what came of the job; written last."""
        kind = "left_out" if self.leave_out else "labels"
        return Path(self.folder) / RECORDS / kind / f"{self.target.name}.json"


def finished(job: Job) -> dict[str, Any] | None:
    """Return the result of an earlier run of the same job whose files are still there, or None.

    Files that a run with other scans or options has set aside are taken back.
    """
    content = read_record(job.record, ("identity", "result"))
    try:
        if content is None or content["identity"] != job.identity():
            return None
    except InputError:  # a file is gone: the job says so
        return None
    result, sizes = content["result"], content.get("sizes")
    if not {"organs", "pairs", "reason", "labelled"} <= set(result):
        return None
    if not result["organs"]:
        return result
    outputs = Outputs(job.folder, job.target.name)
    outputs.take_back(masks_only=job.masks_only)
    return result if outputs.are_whole(sizes if isinstance(sizes, dict) else {}, masks_only=job.masks_only) else None


def label_scan(job: Job) -> dict[str, Any]:
    """Do one job, write its files and its record, and return its result.

    A result has ``scan``, ``reason`` (why the scan got no label, else ""), ``labelled``, ``pairs`` (what came of each
    registration), ``organs`` (rows of the table) and, for a labelled scan that was left out, ``measured`` (organ to
    agreement and Dice with its own label).
    """
    started = time.monotonic()
    result = refused(job.target.name, "")
    try:
        identity = job.identity()  # before the work: a file that changes meanwhile makes the record stale
        _label(job, result)
        result["seconds"] = round(time.monotonic() - started, 1)
        # What failed has no record: the next run tries it again.
        if result["organs"] or "measured" in result:
            sizes = Outputs(job.folder, job.target.name).sizes(masks_only=job.masks_only) if result["organs"] else {}
            content = {"identity": identity, "result": result, "sizes": sizes}
            write_text(job.record, json.dumps(content, indent=1) + "\n")
    except InputError as error:
        result["reason"] = str(error)
    except OSError as error:
        raise InputError(
            f"Cannot write in {job.folder}: {error.strerror or error}. Finished scans are kept: free some space and run the "
            "same command again."
        ) from error
    except Exception as error:  # from a library, in one scan: the others continue
        return refused(job.target.name, unexpected(error)) | {"traceback": traceback.format_exc()}
    return result


@dataclass(frozen=True)
class _Copy:
    """A labelled scan on the voxels of the scan to label.

    Attributes:
        label: uint8 (X, Y, Z).
        likeness: float32 (X, Y, Z), see `local_likeness`.
        holds: label values of the labelled scan.
        volumes: millilitres of each organ in the labelled scan.
        scale: scale of the labelled scan along each axis, for the scan to label.
    """

    label: np.ndarray
    likeness: np.ndarray
    holds: set[int]
    volumes: dict[str, float]
    scale: Sequence[float]


def _label(job: Job, result: dict[str, Any]) -> None:
    """Do a job: carry, fuse, then measure (a labelled scan that was left out) or decide and write."""
    recipe, labels = job.recipe, dict(job.recipe.labels)
    target = as_volume(job.target.image)
    copies = []
    for atlas, lies in job.atlases:
        pair, copy = _carried(atlas, lies, target, job)
        result["pairs"].append(pair)
        copies += [] if copy is None else [copy]
    if not copies:
        reasons = "; ".join(f"{pair['atlas']}: {pair['reason']}" for pair in result["pairs"])
        result["reason"] = f"no labelled scan could be registered to it ({reasons})"
        return
    holds = [copy.holds for copy in copies]
    fused = fuse([copy.label for copy in copies], [copy.likeness for copy in copies], holds=holds, gain=recipe.gain)
    agreed = agreement([copy.label for copy in copies], labels=labels, holds=holds)
    if job.leave_out:
        truth = as_label(job.target.label).voxels
        dice = dice_of_organs(fused.label, truth, labels=labels)
        result["measured"] = {
            organ: {"agreement": _rounded(agreed[organ]), "dice": _rounded(dice[organ])}
            for value, organ in labels.items()
            if (truth == value).any() and value in set.union(*holds)  # what no copy has says nothing about carrying
        }
        return
    decisions = decide(
        job.target.name,
        agreements=agreed,
        confidences={
            organ: float(fused.confidence[fused.label == value].mean())
            for value, organ in labels.items()
            if (fused.label == value).any()
        },
        volumes=_millilitres(fused.label, target, labels),
        expected=expected_volumes([copy.volumes for copy in copies], [copy.scale for copy in copies]),
        limits=recipe.limits,
    )
    result["organs"] = [
        {name: _rounded(value) for name, value in asdict(each).items() if name != "scan"} for each in decisions
    ]
    kept = sum(decision.kept for decision in decisions)
    carried = {organ for copy in copies for organ, size in copy.volumes.items() if size > 0}
    if recipe.min_organs and (kept == 0 or kept < recipe.min_organs * len(carried)):
        result["reason"] = f"{kept} of {len(carried)} organs can be kept, fewer than {recipe.min_organs:.0%}"
    else:
        result["labelled"] = True
    _write(job, target, _for_training(job, target, copies, fused, decisions), fused)


def _carried(atlas: Scan, lies: Alignment, target: Volume, job: Job) -> tuple[dict[str, Any], _Copy | None]:
    """Register a labelled scan and carry its label; return what came of it, and the copy (None if it failed)."""
    pair: dict[str, Any] = {"atlas": atlas.name}
    recipe, options = job.recipe, job.recipe.registration
    # An error here is a disk error: the target gets no label without this scan.
    scan, label = as_volume(atlas.image), as_label(atlas.label)
    try:
        found = registered(atlas, job.target, moving=scan, fixed=target, lies=lies, options=options, folder=job.folder)
    except InputError as error:
        return pair | {"reason": str(error)}, None
    names = ("reason", "start", "before", "affine", "after", "overlap", "least_jacobian")
    pair |= {name: _rounded(getattr(found, name)) for name in names}
    if found.transform is None:
        return pair, None
    moved, copy = carry_both(scan, label, found.transform, like=target)
    likeness = local_likeness(
        np.asarray(target.voxels, np.float32),
        moved,
        spacing=target.spacing,
        window=recipe.likeness_window,
        hu_window=recipe.registration.hu_window,
    )
    labels = dict(recipe.labels)
    holds = {int(value) for value in np.unique(label.voxels)} & set(labels)
    return pair, _Copy(copy, likeness, holds, _millilitres(label.voxels, label, labels), lies.scale)


def _for_training(
    job: Job, target: Volume, copies: Sequence[_Copy], fused: Fused, decisions: Sequence[Decision]
) -> np.ndarray:
    """Return the label map for training: `IGNORE` where votes are unsure, and in and around what is not kept."""
    recipe, labels = job.recipe, dict(job.recipe.labels)
    label = fused.sure(threshold=recipe.threshold, alone=min(recipe.threshold, recipe.limits.min_confidence))
    label = keep_only(label, decisions, labels=labels)
    names = {organ: value for value, organ in labels.items()}
    doubtful = [names[decision.organ] for decision in decisions if not decision.kept]
    near = _near([copy.label for copy in copies], doubtful, target.spacing, recipe.unknown_margin)
    if set(job.held) - set.union(*(copy.holds for copy in copies)):
        near[...] = True
    label[near & (label == 0)] = IGNORE
    return label


def _write(job: Job, target: Volume, label: np.ndarray, fused: Fused) -> None:
    job.record.unlink(missing_ok=True)  # an earlier run's: it would vouch for these files if this one is stopped here
    outputs = Outputs(job.folder, job.target.name)
    outputs.forget_set_aside()
    mask = np.where(fused.label == IGNORE, 0, fused.label).astype(np.uint8)
    percent = np.rint(100 * fused.confidence).astype(np.uint8)
    written = {outputs.mask: mask, outputs.confidence: percent} | ({} if job.masks_only else {outputs.label: label})
    for path, voxels in written.items():
        write_nifti(path, voxels=voxels, affine=target.affine)
    _write_picture(outputs.picture, target, label, job.recipe)


def _near(copies: Sequence[np.ndarray], values: Sequence[int], spacing: Sequence[float], margin: float) -> np.ndarray:
    """Return where a copy has one of the values, and what is within ``margin`` mm of that."""
    votes = np.zeros(copies[0].shape, bool)
    for copy in copies:
        votes |= np.isin(copy, values)
    if not votes.any() or margin == 0:
        return votes
    return ndimage.distance_transform_edt(~votes, sampling=spacing) <= margin


def _millilitres(voxels: np.ndarray, grid: Volume, labels: Mapping[int, str]) -> dict[str, float]:
    voxel = abs(float(np.linalg.det(np.asarray(grid.affine)[:3, :3]))) / 1000
    return {organ: float((voxels == value).sum()) * voxel for value, organ in labels.items()}


def _write_picture(path: Path, scan: Volume, label: np.ndarray, recipe: Recipe) -> None:
    ras, label = scan.to_ras(), Volume(label, scan.affine).to_ras().voxels
    colours = {**organ_colours(recipe.labels), IGNORE: (1.0, 1.0, 1.0)}
    box = _box_around(np.isin(label, list(recipe.labels)), ras.spacing)
    picture = thumbnail(
        ras.voxels, spacing=ras.spacing, box=box, window=tuple(recipe.picture_window), label=label, colours=colours
    )
    with atomic_path(path) as temporary:
        np.save(temporary, picture)


def _box_around(organs: np.ndarray, spacing: Sequence[float]) -> list[list[int]]:
    """Return the half-open box of a mask and `PICTURE_MARGIN` around it, or [] for an empty mask."""
    if not organs.any():
        return []
    margin = [math.ceil(PICTURE_MARGIN / size) for size in spacing]
    ends = generate_spatial_bounding_box(organs[None], margin=margin, allow_smaller=True)
    return [list(each) for each in zip(*ends, strict=True)]


def _rounded(value: Any) -> Any:
    """Return a number as it is written: six digits, None for NaN (which JSON lacks)."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def refused(scan: str, reason: str) -> dict[str, Any]:
    """Return the result of a scan that gets no label."""
    return {"scan": scan, "reason": reason, "labelled": False, "pairs": [], "organs": []}


def with_limits(recipe: Recipe, *, min_agreement: float) -> Recipe:
    """Return a recipe with another least agreement."""
    return replace(recipe, limits=replace(recipe.limits, min_agreement=min_agreement))
