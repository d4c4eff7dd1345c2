# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packed small scans for the curve: synthetic patients drawn on the spot, or a user's own labelled CT.

A pack is a folder with ``contents.json``, a patch store of the images in HU, and the labels beside them, all on one
coarse grid. It is small enough to travel, and to lie on a GPU as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Orientationd, Spacingd

from bundles.common.data.data_list import segmentation_scans
from bundles.common.data.foreground import above_or_all
from bundles.common.errors import InputError
from bundles.common.scans.decode_once import LoadScand
from bundles.pretraining.crops.patch_store import StoredScan, write_scan
from bundles.segmentation.tasks.tasks import choose_task
from tools.synthetic_patient import draw_patient, render

CONTENTS = "contents.json"
TASKS = Path(__file__).resolve().parents[2] / "bundles" / "swin_unetr_btcv_seg" / "configs" / "tasks.yaml"
AIR = -500.0  # HU: the scans are cropped to the box of what is above
KEPT = ("labels", "hu_window", "spacing", "roi_size")  # entries of the task's row
# First seed of each section's patients: no patient is in two sections.
FIRST_SEED = {"unlabelled": 100_000, "training": 102_000, "tuning": 104_000, "validation": 106_000}
PATIENTS = {"unlabelled": 48, "training": 32, "tuning": 8, "validation": 16}
COARSE = (4.0, 4.0, 5.0)  # mm


@dataclass(frozen=True)
class Source:
    """A patient before packing.

    Attributes:
        name: name in the pack.
        seed: seed of a synthetic patient; None: from files.
        image, label: files; without a label, no label is packed.
        labelled: whether the label is packed.
    """

    name: str
    seed: int | None = None
    image: str = ""
    label: str = ""
    labelled: bool = True


def synthetic(patients: Mapping[str, int], *, spacing: Sequence[float] = COARSE, roi: Sequence[int] | None = None):
    """Return the contents of a pack of synthetic patients, and their sources.

    Args:
        patients: section to number of patients.
        spacing: spacing of the pack in mm.
        roi: size of a crop; None: the size in the task's preset ``cpu``.
    """
    row = choose_task(task=None, file=str(TASKS), preset="cpu")
    row |= {"spacing": list(spacing), "roi_size": list(roi or row["roi_size"])}
    sections = {name: [f"{name}_{i}" for i in range(number)] for name, number in patients.items()}
    sources = [
        Source(case, seed=FIRST_SEED[name] + i, labelled=name != "unlabelled")
        for name, cases in sections.items()
        for i, case in enumerate(cases)
    ]
    return {"synthetic": True, "row": {key: row[key] for key in KEPT}, "sections": sections}, sources


def own_scans(data: Path, *, spacing: Sequence[float] = COARSE):
    """Return the contents of a pack of labelled CT in MSD form, and its sources.

    The validation is the list's own section, else a fifth of the patients. A fifth of the training, eight at most, is
    set apart to decide how long to train. Pre-training sees the images of the rest, without their labels.

    Raises:
        InputError: the data are not CT, or too few.
    """
    row = choose_task(task=str(data), file=str(TASKS), preset="cpu")
    if row["hu_window"] is None:
        raise InputError(
            f"{data} is not CT: the curve of the GPU check packs CT in HU only. Leave DATA out, or pass CT."
        )
    scans = {part: segmentation_scans(data, section=part, fold=None) for part in ("training", "validation")}
    order = np.random.RandomState(0).permutation(len(scans["training"]))
    apart = min(PATIENTS["tuning"], len(order) // 5)
    if apart < 1 or len(scans["validation"]) < 2:
        raise InputError(
            f"{data} has {len(order)} training and {len(scans['validation'])} validation scans: the curve needs 5 and 2."
        )
    parts = {"tuning": order[:apart], "training": order[apart:]}
    listed = {part: [scans["training"][i] for i in chosen] for part, chosen in parts.items()}
    listed["validation"] = scans["validation"]
    sections = {part: [f"{part}_{i}" for i in range(len(cases))] for part, cases in listed.items()}
    sources = [
        Source(name, image=case["image"], label=case["label"])
        for part, cases in listed.items()
        for name, case in zip(sections[part], cases, strict=True)
    ]
    sections["unlabelled"] = sections["training"]
    row |= {"spacing": list(spacing), "roi_size": [64, 64, 32]}
    return {"synthetic": False, "row": {key: row[key] for key in KEPT}, "sections": sections}, sources


def pack_patient(folder: Path, contents: Mapping[str, Any], source: Source) -> None:
    """Write one patient into a pack.

    Raises:
        InputError: its label has a value that the task does not have.
    """
    if source.seed is None:
        keys = ["image", "label"] if source.labelled else ["image"]
        case = LoadScand(keys=keys, labels="label", image_only=True, ensure_channel_first=True)(
            {"image": source.image, "label": source.label}
        )
    else:
        voxels, label, affine = render(draw_patient(source.seed))
        case = {
            key: MetaTensor(torch.from_numpy(each)[None].float(), affine=torch.from_numpy(affine))
            for key, each in (("image", voxels), ("label", label))
        }
    spacing = contents["row"]["spacing"]
    case = Compose(
        [
            Orientationd(["image", "label"], axcodes="RAS", labels=None, allow_missing_keys=True),
            Spacingd(["image", "label"], pixdim=spacing, mode=("bilinear", "nearest"), allow_missing_keys=True),
            CropForegroundd(
                ["image", "label"],
                source_key="image",
                select_fn=lambda image: above_or_all(image, other=AIR),
                allow_smaller=True,
                allow_missing_keys=True,
            ),
        ]
    )(case)
    image = case["image"][0]
    write_scan(
        folder / f"{source.name}.b2nd",
        voxels=image.as_tensor().round().to(torch.int16).numpy(),
        affine=case["image"].affine.numpy(),
        body_box=[[0, size] for size in image.shape],
        details={"foreground_hu": AIR, "spacing": list(spacing)},
    )
    if source.labelled:
        label = case["label"][0].as_tensor().round().long()
        known = {int(value) for value in contents["row"]["labels"]}
        if strange := set(label.unique().tolist()) - known:
            raise InputError(f"{source.label} has the values {sorted(strange)}, which the data set does not declare.")
        np.savez_compressed(folder / f"{source.name}.npz", label=label.to(torch.uint8).numpy())


def write_contents(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write ``contents.json``, the last file of a pack."""
    (folder / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Pack:
    """A pack with all its voxels on a device.

    Attributes:
        folder: where its files are.
        row: labels, HU window, spacing and size of a crop.
        sections: section to names of patients.
        images: name to HU, (1, X, Y, Z) int16 on the device.
        labels: name to label values, (1, X, Y, Z) uint8 on the device.
        voxels: name of a training patient to {label value: flat indices of its voxels}, on the host.
    """

    folder: Path
    row: Mapping[str, Any]
    sections: Mapping[str, Sequence[str]]
    images: Mapping[str, torch.Tensor]
    labels: Mapping[str, torch.Tensor]
    voxels: Mapping[str, Mapping[int, np.ndarray]]

    @property
    def classes(self) -> int:
        """Return the number of classes with the background."""
        return len(self.row["labels"])


def read_pack(folder: Path, device: str) -> Pack:
    """Read a pack onto a device; patients without a label only as files, for the pre-training."""
    contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    images, labels, voxels = {}, {}, {}
    for section in ("training", "tuning", "validation"):
        for name in contents["sections"][section]:
            image = StoredScan(folder / f"{name}.b2nd").read((slice(None),) * 3)
            label = np.load(folder / f"{name}.npz")["label"]
            images[name] = torch.from_numpy(image)[None].to(device)
            labels[name] = torch.from_numpy(label)[None].to(device)
            if section == "training":
                flat = label.ravel()
                voxels[name] = {int(value): np.flatnonzero(flat == value) for value in np.unique(flat)}
    return Pack(folder, contents["row"], contents["sections"], images, labels, voxels)
