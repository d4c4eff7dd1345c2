# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checks that build what a bundle's configs describe; a program of its own, so that the bundle's ``scripts`` are its only ones.

    PYTHONPATH=BUNDLE python -P zoo/workflow_checks.py BUNDLE [CHECK ...]

It imports nothing of this project but what the bundle carries. Each result is a line of standard output, ``::check`` and JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

MARK = "::check "
CASES = 5


def _config(folder: Path, name: str) -> str:
    """A workflow's config; where there are two, the one that clients take."""
    path = folder / "configs" / f"{name}.json"
    return str(path if path.is_file() else path.with_suffix(".yaml"))


def _parser(folder: Path, name: str) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_file(_config(folder, name)))
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    parser.update({"bundle_root": str(folder)})
    return parser


def make_data(folder: Path, metadata: dict[str, Any]) -> Path:
    """Write a data set as the bundle's metadata describe it: some noise, some labels, five cases.

    Args:
        folder: where it goes.
        metadata: ``metadata.json``.
    """
    formats = metadata["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    channels, labels = image["num_channels"], pred["channel_def"]
    random = np.random.default_rng(0)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    cases = []
    for number in range(CASES):
        shape = (32, 32, 32) if channels == 1 else (32, 32, 32, channels)
        arrays = {
            "image": random.normal(40, 20, shape).astype(np.float32),
            "label": random.integers(0, len(labels), (32, 32, 32)).astype(np.uint8),
        }
        case = {}
        for kind, array in arrays.items():
            path = folder / f"{kind}sTr" / f"case_{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
            case[kind] = f"./{kind}sTr/{path.name}"
        cases.append(case)
    modality = {str(number): str(name) for number, name in image.get("channel_def", {}).items()}
    content = {"name": folder.name, "labels": labels, "modality": modality, "training": cases}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def weights_fit(folder: Path, work: Path) -> None:
    """``models/model.pt`` has exactly the tensors of ``network_def``."""
    from scripts.common.weights.loading import load_model

    network = _parser(folder, "inference").get_parsed_content("network_def")
    load_model(network, str(folder / "models" / "model.pt"))


def shapes(folder: Path, work: Path) -> None:
    """``verify_net_in_out``: the network takes and gives what the metadata say."""
    from monai.bundle import verify_net_in_out

    verify_net_in_out(
        net_id="network_def",
        meta_file=str(folder / "configs" / "metadata.json"),
        config_file=_config(folder, "inference"),
        device="cpu",
        bundle_root=str(folder),
    )


def as_trained(folder: Path, work: Path) -> None:
    """Inference prepares scans as the training did."""
    import torch

    parser = _parser(folder, "inference")
    content = torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True)
    trained = content.get("trained") or {}
    said = []
    for name in ("spacing", "hu_window", "roi_size"):
        if name in trained and name in parser:
            value = parser.get_parsed_content(name)
            value = list(value) if isinstance(value, tuple) else value
            if value != trained[name]:
                said.append(f"{name} is {value}, {trained[name]} in the training")
    if said:
        raise ValueError("; ".join(said))


def properties(name: str, kind: str, *, overlay: str | None = None) -> Callable[[Path, Path], None]:
    """Make the check that ``check_properties()`` of one workflow finds nothing missing.

    Args:
        name: of the config.
        kind: of the workflow.
        overlay: config for several processes that goes over it, built as the only process of its group.
    """

    def check(folder: Path, work: Path) -> None:
        from monai.bundle import ConfigWorkflow

        data = make_data(work / name, json.loads((folder / "configs" / "metadata.json").read_text()))
        options: dict[str, Any] = {"bundle_root": str(folder), "output_dir": str(work / "output")}
        options["dataset_dir"] = str(data / "imagesTr" if name == "inference" else data)
        files = [_config(folder, name)]
        if overlay is not None:
            files.append(_config(folder, overlay))
            _be_a_group()
        workflow = ConfigWorkflow(files, workflow_type=kind, **options)
        if "fold" in workflow.parser:  # weights that were trained on all cases would have none to be scored on
            workflow.parser.update({"fold": 0})
        workflow.initialize()
        if missing := workflow.check_properties():
            raise ValueError(f"missing, or under another id: {', '.join(missing)}")

    return check


def _be_a_group() -> None:
    """Make this process a process group, as torchrun makes several; without a port."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "weights fit network_def": weights_fit,
    "network_def as the metadata say": shapes,
    "inference as the training": as_trained,
    "properties of train": properties("train", "train"),
    "properties of evaluate": properties("evaluate", "evaluation"),
    "properties of inference": properties("inference", "inference"),
    "properties of train for torchrun": properties("train", "train", overlay="multi_gpu_train"),
}


def reason(error: BaseException) -> str:
    """What was wrong, out of what MONAI's parser wraps around it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    told = next((link for link in chain if type(link).__name__ == "InputError"), None)
    return str(told) if told else f"{type(chain[-1]).__name__}: {chain[-1]}"


def main() -> None:
    """Run the checks that the command line names, or all."""
    folder, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CHECKS)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # nothing may be found because the bundle's folder is the working one
        for name in names:
            failure = None
            try:
                CHECKS[name](folder, Path(work))
            except Exception as error:  # whatever a bundle can do wrong
                failure = reason(error)
            print(f"\n{MARK}{json.dumps({'check': name, 'failure': failure})}", flush=True)
        os.chdir(folder)


if __name__ == "__main__":
    main()
