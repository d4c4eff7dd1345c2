# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The leaderboard archive contains every mask under its image's name, or is not written and every fault is listed."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.decathlon.submission import submit

from ..workflows.command_line import BUNDLES, run_bundle, succeed

ROOT = str(BUNDLES / "swin_unetr_msd")
AFFINE = np.array([[-2.0, 0, 0, 40], [0, 2, 0, -30], [0, 0, 3, 100], [0, 0, 0, 1]])
SHAPE = (12, 10, 8)


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def task_folder(folder: Path, *, cases: list[str], labels: dict, modality: dict, channels: int = 1) -> Path:
    """Write the data of a task with test images only."""
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    for case in cases:
        save(np.random.default_rng(0).normal(40, 50, shape).astype(np.int16), folder / "imagesTs" / f"{case}.nii.gz")
    tests = [f"./imagesTs/{case}.nii.gz" for case in cases]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": labels, "modality": modality, "training": [], "test": tests})
    )
    return folder


def mask(values: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, values, SHAPE).astype(dtype)


@pytest.fixture
def asked(tmp_path) -> dict:
    """Two tasks with valid masks; one of them has two channels per file."""
    spleen, prostate = tmp_path / "data" / "Task09_Spleen", tmp_path / "data" / "Task05_Prostate"
    labels = {"0": "background", "1": "PZ", "2": "TZ"}
    task_folder(
        spleen,
        cases=["spleen_1", "spleen_7", "spleen_11"],
        labels={"0": "background", "1": "spleen"},
        modality={"0": "CT"},
    )
    task_folder(prostate, cases=["prostate_03"], labels=labels, modality={"0": "T2", "1": "ADC"}, channels=2)
    for case in ("spleen_1", "spleen_7", "spleen_11"):
        save(mask(2), tmp_path / "spleen" / f"{case}_seg.nii.gz")
    save(mask(3), tmp_path / "prostate" / "prostate_03_seg.nii.gz")
    tasks = {"Task09_Spleen": str(tmp_path / "spleen"), "Task05_Prostate": str(tmp_path / "prostate")}
    return {
        "tasks": tasks,
        "data_dirs": str(tmp_path / "data"),
        "archive": str(tmp_path / "out.zip"),
        "bundle_root": ROOT,
    }


def test_the_archive_holds_each_mask_under_the_name_of_its_image(tmp_path, asked, caplog):
    names = submit(**asked)
    expected = ["Task05_Prostate/prostate_03.nii.gz"]
    expected += [f"Task09_Spleen/{case}.nii.gz" for case in ("spleen_1", "spleen_11", "spleen_7")]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == names == expected
        assert archive.read(names[1]) == (tmp_path / "spleen" / "spleen_1_seg.nii.gz").read_bytes()
    assert "lacks 8 tasks of the leaderboard: Task01_BrainTumour, " in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_equal_masks_give_equal_bytes_at_another_time(tmp_path, asked):
    submit(**asked)
    first = (tmp_path / "out.zip").read_bytes()
    os.utime(tmp_path / "spleen" / "spleen_1_seg.nii.gz", (1e9, 1e9))
    tasks = dict(reversed(asked["tasks"].items()))
    submit(**asked | {"tasks": tasks, "archive": str(tmp_path / "again.zip")})
    assert (tmp_path / "again.zip").read_bytes() == first


def scaled() -> nib.Nifti1Image:
    image = nib.Nifti1Image(mask(2), AFFINE)
    image.header.set_slope_inter(0.5, 0)
    return image


FAULTS = {
    "missing": (
        lambda folder: (folder / "spleen_7_seg.nii.gz").unlink(),
        "spleen_7 has no mask: spleen_7_seg.nii.gz is missing from the folder",
    ),
    "left over": (
        lambda folder: save(mask(2), folder / "spleen_2_seg.nii.gz"),
        "spleen_2_seg.nii.gz does not belong to any test image",
    ),
    "not a mask": (
        lambda folder: save(mask(2), folder / "spleen_1.nii.gz"),
        "spleen_1.nii.gz does not belong to any test image",
    ),
    "shape": (
        lambda folder: save(mask(2)[:-1], folder / "spleen_1_seg.nii.gz"),
        r"spleen_1_seg.nii.gz has shape (11, 10, 8), its image",
    ),
    "fourth axis": (
        lambda folder: save(mask(2)[..., None], folder / "spleen_1_seg.nii.gz"),
        r"spleen_1_seg.nii.gz has shape (12, 10, 8, 1), its image",
    ),
    "flipped": (
        lambda folder: save(mask(2), folder / "spleen_1_seg.nii.gz", np.diag([-1.0, 1, 1, 1]) @ AFFINE),
        "spleen_1_seg.nii.gz is displaced by up to 80 mm from its image",
    ),
    "label": (
        lambda folder: save(mask(4), folder / "spleen_1_seg.nii.gz"),
        "spleen_1_seg.nii.gz contains the values 2, 3, which are not among the labels [0, 1]",
    ),
    "negative": (
        lambda folder: save(-mask(2, np.int16), folder / "spleen_1_seg.nii.gz"),
        "spleen_1_seg.nii.gz contains the values -1, which are not among the labels",
    ),
    "float": (
        lambda folder: save(mask(2, np.float32), folder / "spleen_1_seg.nii.gz"),
        "spleen_1_seg.nii.gz is stored as float32: labels must be integers",
    ),
    "scaled": (
        lambda folder: nib.save(scaled(), folder / "spleen_1_seg.nii.gz"),
        "is stored as uint8 with slope 0.5 and intercept 0",
    ),
    "cut short": (
        lambda folder: (folder / "spleen_1_seg.nii.gz").write_bytes(
            (folder / "spleen_1_seg.nii.gz").read_bytes()[:-40]
        ),
        "spleen_1_seg.nii.gz cannot be read and may be damaged or truncated",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(tmp_path, asked, name):
    spoil, words = FAULTS[name]
    spoil(tmp_path / "spleen")
    with pytest.raises(InputError) as caught:
        submit(**asked)
    lines = str(caught.value).splitlines()
    assert f"{tmp_path / 'out.zip'} was not written: 1 fault in the masks:" in lines[0]
    assert lines[1].startswith("Task09_Spleen: ") and words in lines[1]
    assert not (tmp_path / "out.zip").exists()


def test_faults_of_all_tasks_are_named_at_once_and_an_older_archive_stays(tmp_path, asked):
    (tmp_path / "out.zip").write_text("older")
    (tmp_path / "spleen" / "spleen_7_seg.nii.gz").unlink()
    save(mask(4), tmp_path / "spleen" / "spleen_1_seg.nii.gz")
    save(mask(9), tmp_path / "prostate" / "prostate_03_seg.nii.gz")
    with pytest.raises(InputError, match="3 faults") as caught:
        submit(**asked)
    assert all(
        word in str(caught.value)
        for word in ("spleen_7 has no", "spleen_1_seg", "prostate_03_seg.nii.gz contains the values 3, 4, 5, 6, 7, ...")
    )
    assert (tmp_path / "out.zip").read_text() == "older"


@pytest.mark.parametrize(("faults", "more"), [(18, None), (30, "and 13 more")])
def test_many_faults_take_twenty_lines(tmp_path, asked, faults, more):
    for number in range(faults):
        save(mask(2), tmp_path / "spleen" / f"other_{number:02d}_seg.nii.gz")
    with pytest.raises(InputError, match=f"{faults} faults") as caught:
        submit(**asked)
    lines = str(caught.value).splitlines()
    assert len(lines) == 20
    assert (lines[-2] == more) if more else "other_17" in lines[-2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": {}}, "--tasks names no task"),
        ({"tasks": {"Task9_Splen": "."}}, "Did you mean Task09_Spleen"),
        ({"tasks": {"Task03_Liver": "."}}, "Task03_Liver"),
        ({"tasks": {"Task09_Spleen": "nowhere"}}, "folder of masks of Task09_Spleen, nowhere, does not exist"),
        (
            {"data_dirs": {"Task05_Prostate": "."}},
            "--data_dirs has no folder for Task09_Spleen, only for Task05_Prostate",
        ),
        ({"archive": "out.tar"}, "--archive out.tar must end in .zip"),
        ({"models": {"Task03_Liver": "model.pt"}}, "--models names Task03_Liver"),
        ({"options": {"overlapp": 0.5}}, "--inference names overlapp, which is not an option of .*inference.yaml"),
        ({"options": {"output_dir": "here"}}, "--inference names output_dir"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_predicted(asked, change, words):
    with pytest.raises(InputError, match=words):
        submit(**asked | change)


def test_a_model_that_is_missing_or_of_another_task_is_refused_before_anything_is_predicted(tmp_path, asked):
    torch.save({"model": {}, "task": "Task03_Liver"}, tmp_path / "liver.pt")
    for model, words in (
        ("absent.pt", "Task09_Spleen: --pretrained_model absent.pt does not exist"),
        ("runs/fold*/model.pt", "Task09_Spleen: --pretrained_model 'runs/fold\\*/model.pt' fits no file"),
        ([str(tmp_path / "liver.pt")], "Task09_Spleen: .*liver.pt was trained for Task03_Liver"),
    ):
        with pytest.raises(InputError, match=f"--models, {words}"):
            submit(**asked | {"models": {"Task09_Spleen": model}})


def test_data_of_another_task_are_refused(tmp_path, asked):
    swapped = {"Task05_Prostate": f"{tmp_path}/data/Task09_Spleen", "Task09_Spleen": f"{tmp_path}/data/Task05_Prostate"}
    with pytest.raises(InputError, match="Task09_Spleen/dataset.json declares labels"):
        submit(**asked | {"data_dirs": swapped})


def test_submit_yaml_predicts_the_test_images_and_packs_them(tmp_path, asked, record):
    """With random weights: only the path from the images to the archive is tested. A picture that fails costs no mask."""
    (tmp_path / "masks" / "spleen_11_overlay.png").mkdir(parents=True)
    torch.manual_seed(0)
    content = {"model": build_swin_unetr(record, out_channels=2).state_dict(), "encoder": record}
    content |= {"labels": {"0": "background", "1": "spleen"}, "task": "Task09_Spleen"}
    save_atomically(content, tmp_path / "model.pt")
    options = {
        "cwd": tmp_path,
        "tasks": {"Task09_Spleen": str(tmp_path / "masks")},
        "data_dirs": asked["data_dirs"],
        "models": {"Task09_Spleen": str(tmp_path / "model.pt")},
        "inference": {"preset": "cpu", "roi_size": [64, 64, 32]},
        "archive": tmp_path / "predicted.zip",
    }
    succeed(run_bundle("swin_unetr_msd", "submit.yaml", **options))
    assert "spleen_11.nii.gz,picture," in (tmp_path / "masks" / "failed.csv").read_text()
    with zipfile.ZipFile(tmp_path / "predicted.zip") as archive:
        assert archive.namelist() == [f"Task09_Spleen/spleen_{number}.nii.gz" for number in (1, 11, 7)]
        predicted = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read("Task09_Spleen/spleen_7.nii.gz")))
    assert predicted.shape == SHAPE and predicted.get_data_dtype() == np.uint8
    np.testing.assert_allclose(predicted.affine, AFFINE, atol=1e-4)
