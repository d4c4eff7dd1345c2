# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""README for the bundle of a single task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bundles.common.words import listed


def structure_names(names: Sequence[str]) -> str:
    """Join names of structures for a sentence: ``liver, vessel and left atrium``."""
    return listed([name.replace("_", " ") for name in names])


def task_readme(*, bundle: str, task: str, row: Mapping[str, Any], own: bool) -> str:
    """Return the README as Markdown.

    Args:
        bundle: name of the bundle.
        task: name of the task.
        row: row of the task as used in training: ``modality``, ``channels``, ``labels``, ``spacing`` (mm),
            ``hu_window``, ``roi_size``.
        own: whether it is a user's own task rather than one of the Medical Segmentation Decathlon.
    """
    structures = structure_names([str(name) for value, name in row["labels"].items() if int(value) != 0])
    window = row["hu_window"]
    intensity = (
        f"HU {window[0]:g} to {window[1]:g} clipped and scaled to [0, 1]"
        if window
        else "z-score over the non-zero voxels of each channel"
    )
    channels = (
        "one channel"
        if len(row["channels"]) == 1
        else f"{len(row['channels'])} channels along the fourth axis of the file"
    )
    labels = "\n".join(f"| {value} | {str(name).replace('_', ' ')} |" for value, name in row["labels"].items())
    source = (
        "It was trained on the author's own data set."
        if own
        else f"It was trained on {task} of the Medical Segmentation Decathlon "
        "([medicaldecathlon.com](http://medicaldecathlon.com)), CC BY-SA 4.0."
    )
    return f"""# {bundle}

Swin UNETR for {structures} on {row["modality"]} (Tang et al., CVPR 2022, \
[arXiv 2111.14791](https://arxiv.org/abs/2111.14791)). {source}
For research only, not for clinical use.

## Input and output

Input: {row["modality"]}, {channels}: {", ".join(map(str, row["channels"]))}. Preprocessing: RAS orientation, \
{" x ".join(f"{mm:g}" for mm in row["spacing"])} mm, {intensity}; \
windows of {" x ".join(map(str, row["roi_size"]))} voxels. Output: a mask in the geometry of the scan, with the values:

| value | structure |
|---|---|
{labels}

## Commands

Run these inside this folder. The options are the top-level entries of the configs, each explained by a comment.

```
python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir scan.nii.gz
python -m monai.bundle run --config_file configs/evaluate.yaml --dataset_dir /data/{task}
python -m monai.bundle run --config_file configs/train.yaml --dataset_dir /data/{task} --pretrained_model models/model.pt
```

Training from the command line writes to `output/models` and never overwrites the weights of this bundle.
`configs/inference.json` and `configs/train.json` are copies of the YAML files for clients that only read JSON.
If you change one, change the other in the same way.

## Licence

Apache-2.0, see [LICENSE](../LICENSE).
"""
