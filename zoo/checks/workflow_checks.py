# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checks that build what a bundle's configs describe.

    PYTHONPATH=BUNDLE python -P zoo/checks/workflow_checks.py BUNDLE [CHECK ...]

This is a separate program, so that it can only import the ``scripts`` package of the checked bundle. It imports nothing
else of this project. Each result is a line on standard output: ``::check`` followed by JSON.
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
    """Return the path of a workflow's config; JSON before YAML, as clients choose."""
    path = folder / "configs" / f"{name}.json"
    return str(path if path.is_file() else path.with_suffix(".yaml"))


def _parser(folder: Path, name: str) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_file(_config(folder, name)))
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    parser.update({"bundle_root": str(folder)})
    return parser


def make_data(folder: Path, metadata: dict[str, Any]) -> Path:
    """Write a data set that matches the bundle's metadata: five cases of random noise and random labels.

    Args:
        folder: folder to write to.
        metadata: content of ``metadata.json``.

    Returns:
        The folder.
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
    """Check that ``models/model.pt`` has exactly the tensors of ``network_def``."""
    from scripts.common.weights.loading import load_model

    network = _parser(folder, "inference").get_parsed_content("network_def")
    load_model(network, str(folder / "models" / "model.pt"))


def shapes(folder: Path, work: Path) -> None:
    """Check with ``verify_net_in_out`` that input and output of the network have the shapes in the metadata."""
    from monai.bundle import verify_net_in_out

    verify_net_in_out(
        net_id="network_def",
        meta_file=str(folder / "configs" / "metadata.json"),
        config_file=_config(folder, "inference"),
        device="cpu",
        bundle_root=str(folder),
    )


def as_trained(folder: Path, work: Path) -> None:
    """Check that inference preprocesses scans as the training did."""
    import torch

    parser = _parser(folder, "inference")
    content = torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True)
    trained = content.get("trained") or {}
    differences = []
    for name in ("spacing", "hu_window", "roi_size"):
        if name in trained and name in parser:
            value = parser.get_parsed_content(name)
            value = list(value) if isinstance(value, tuple) else value
            if value != trained[name]:
                differences.append(f"{name} is {value}, but was {trained[name]} in training")
    if differences:
        raise ValueError("; ".join(differences))


def properties(name: str, kind: str, *, overlay: str | None = None) -> Callable[[Path, Path], None]:
    """Make a check that ``check_properties()`` of a workflow reports nothing missing.

    Args:
        name: name of the config.
        kind: type of the workflow.
        overlay: config for several processes to load on top; it is built in a process group of one.
    """

    def check(folder: Path, work: Path) -> None:
        from monai.bundle import ConfigWorkflow

        data = make_data(work / name, json.loads((folder / "configs" / "metadata.json").read_text()))
        options: dict[str, Any] = {"bundle_root": str(folder), "output_dir": str(work / "output")}
        options["dataset_dir"] = str(data / "imagesTr" if name == "inference" else data)
        files = [_config(folder, name)]
        if overlay is not None:
            files.append(_config(folder, overlay))
            _init_process_group()
        workflow = ConfigWorkflow(files, workflow_type=kind, **options)
        if "fold" in workflow.parser:  # weights trained on all cases would leave no cases for validation
            workflow.parser.update({"fold": 0})
        workflow.initialize()
        if missing := workflow.check_properties():
            raise ValueError(f"missing, or under another id: {', '.join(missing)}")

    return check


def _init_process_group() -> None:
    """Make this process a process group of one, as torchrun does with several; needs no port."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "weights fit network_def": weights_fit,
    "network_def as in the metadata": shapes,
    "inference as in training": as_trained,
    "properties of train": properties("train", "train"),
    "properties of evaluate": properties("evaluate", "evaluation"),
    "properties of inference": properties("inference", "inference"),
    "properties of train for torchrun": properties("train", "train", overlay="multi_gpu_train"),
}


def reason(error: BaseException) -> str:
    """Return the cause of an error that MONAI's parser may have wrapped: the first InputError, else the root cause."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    input_error = next((link for link in chain if type(link).__name__ == "InputError"), None)
    return str(input_error) if input_error else f"{type(chain[-1]).__name__}: {chain[-1]}"


def main() -> None:
    """Run the checks named on the command line, or all."""
    folder, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CHECKS)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # so that no file is only found because the bundle's folder is the working directory
        for name in names:
            failure = None
            try:
                CHECKS[name](folder, Path(work))
            except Exception as error:  # a faulty bundle can raise anything
                failure = reason(error)
            print(f"\n{MARK}{json.dumps({'check': name, 'failure': failure})}", flush=True)
        os.chdir(folder)


if __name__ == "__main__":
    main()
