# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The README of the bundle of one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def listed(names: Sequence[str]) -> str:
    """Names of structures in a sentence: ``liver, vessel and left atrium``."""
    *first, last = [name.replace("_", " ") for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def task_readme(*, bundle: str, task: str, row: Mapping[str, Any], own: bool) -> str:
    """README in Markdown.

    Args:
        bundle: name of the bundle.
        task: name of the task.
        row: its row, as the weights were trained: ``modality``, ``channels``, ``labels``, ``spacing`` (mm), ``hu_window``, ``roi_size``.
        own: whether it is a user's own task and not one of the Medical Segmentation Decathlon.
    """
    structures = listed([str(name) for value, name in row["labels"].items() if int(value) != 0])
    window = row["hu_window"]
    intensity = (
        f"HU {window[0]:g} to {window[1]:g} clipped and scaled to [0, 1]"
        if window
        else "z-score of the non-zero voxels of each channel"
    )
    channels = (
        "one channel"
        if len(row["channels"]) == 1
        else f"{len(row['channels'])} channels in the fourth axis of the file"
    )
    labels = "\n".join(f"| {value} | {str(name).replace('_', ' ')} |" for value, name in row["labels"].items())
    source = (
        "The data set is the maker's own."
        if own
        else f"The data set is {task} of the Medical Segmentation Decathlon ([medicaldecathlon.com](http://medicaldecathlon.com)), CC BY-SA 4.0."
    )
    return f"""# {bundle}

Swin UNETR for {structures} on {row["modality"]} (Tang et al., CVPR 2022, [arXiv 2111.14791](https://arxiv.org/abs/2111.14791)). {source}
Research only, not for clinical use.

## Input and output

{row["modality"]}, {channels}: {", ".join(map(str, row["channels"]))}. Preprocessing: RAS orientation, {" x ".join(f"{mm:g}" for mm in row["spacing"])} mm, {intensity}; \
windows of {" x ".join(map(str, row["roi_size"]))} voxels. The mask is written in the scan's own geometry:

| value | structure |
|---|---|
{labels}

## Commands

Run inside this folder. Options are the top-level entries of the configs, each with a comment.

```
python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir scan.nii.gz
python -m monai.bundle run --config_file configs/evaluate.yaml --dataset_dir /data/{task}
python -m monai.bundle run --config_file configs/train.yaml --dataset_dir /data/{task} --pretrained_model models/model.pt
```

From the command line, training writes to `output/models`, never over the weights of this bundle. `configs/inference.json` and `configs/train.json` say the same as the YAML
files, for clients that read JSON alone: change both, or neither.

## Licence

Apache-2.0, see [LICENSE](../LICENSE).
"""
