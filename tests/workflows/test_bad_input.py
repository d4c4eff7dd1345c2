# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Invalid input stops a run before it trains, with one message that names file or option, value and solution."""

from __future__ import annotations

import fcntl
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from ..forked_python import run
from .command_line import BUNDLES, SMALL, run_bundle


def refused(tmp_path, dataset_dir, **options) -> str:
    """Assert that a training is refused; return its message."""
    output = tmp_path / "output"
    options = {"dataset_dir": dataset_dir, "output_dir": output, **SMALL, **options}
    ended = run_bundle("swin_unetr_btcv_seg", "train.yaml", **options)
    assert ended.returncode == 1, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert "step 1" not in ended.stdout
    assert not (output / "models").exists()
    assert "Traceback" not in ended.stderr
    return ended.stderr[ended.stderr.rindex("Stopped:") :]


@pytest.fixture
def broken(tmp_path, btcv):
    """A copy of the data set to corrupt."""
    return shutil.copytree(btcv, tmp_path / "btcv")


def rewrite(path, change):
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj), image.affine)
    nib.save(nib.Nifti1Image(array, affine), path)


def test_missing_folder(tmp_path):
    assert "nowhere" in refused(tmp_path, tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "dataset.json" in refused(tmp_path, tmp_path / "empty")


def test_list_that_names_absent_files(tmp_path, broken):
    (broken / "imagesTr" / "img0001.nii.gz").unlink()
    assert "img0001.nii.gz" in refused(tmp_path, broken)


def test_corrupt_nifti(tmp_path, broken):
    path = broken / "imagesTr" / "img0000.nii.gz"
    path.write_bytes(path.read_bytes()[:20000])
    assert "img0000.nii.gz" in refused(tmp_path, broken)


@pytest.mark.parametrize("shape", [(40, 40), (40, 40, 40, 3)])
def test_image_that_is_not_3d(tmp_path, broken, shape):
    rewrite(broken / "imagesTr" / "img0000.nii.gz", lambda a, m: (np.zeros(shape, np.int16), m))
    message = refused(tmp_path, broken)
    assert "img0000.nii.gz" in message and str(shape[-1]) in message


def test_label_that_does_not_match_its_image(tmp_path, broken):
    rewrite(broken / "labelsTr" / "label0001.nii.gz", lambda a, m: (a[:-3], m))
    assert "label0001.nii.gz" in refused(tmp_path, broken)


def test_corrupt_nifti_in_pre_training(tmp_path, unlabelled):
    folder = shutil.copytree(unlabelled, tmp_path / "scans")
    path = folder / "site 1" / "scan.nii.gz"
    path.write_bytes(path.read_bytes()[:20000])
    ended = run_bundle("swin_unetr_pretrain", "train.yaml", dataset_dir=folder, output_dir=tmp_path / "output", **SMALL)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "site 1/scan.nii.gz" in ended.stderr[ended.stderr.rindex("Stopped:") :]


def test_case_without_any_organ_trains_on_the_others(tmp_path, broken):
    rewrite(broken / "labelsTr" / "label0001.nii.gz", lambda a, m: (np.zeros_like(a), m))
    ended = run_bundle("swin_unetr_btcv_seg", "train.yaml", dataset_dir=broken, output_dir=tmp_path / "output", **SMALL)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_list_that_calls_another_value_liver(tmp_path, broken):
    content = json.loads((broken / "dataset.json").read_text())
    content["labels"]["1"], content["labels"]["6"] = content["labels"]["6"], content["labels"]["1"]
    (broken / "dataset.json").write_text(json.dumps(content))
    assert "--labels" in refused(tmp_path, broken)


def test_option_with_an_unknown_choice(tmp_path, btcv):
    assert "pos_neg, classes" in refused(tmp_path, btcv, crop_sampling="class")


@pytest.mark.parametrize("bundle", ["swin_unetr_btcv_seg", "swin_unetr_pretrain"])
@pytest.mark.parametrize("config", ["evaluate.yaml", "inference.yaml"])
def test_missing_model(tmp_path, btcv, bundle, config):
    missing = tmp_path / "no_such_model.pt"
    scans = btcv if config == "evaluate.yaml" else btcv / "imagesTr"
    ended = run_bundle(bundle, config, dataset_dir=scans, pretrained_model=missing, output_dir=tmp_path)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "no_such_model.pt" in ended.stderr[ended.stderr.rindex("Stopped:") :]


def test_null_as_a_model_is_refused(tmp_path, btcv):
    ended = run_bundle(
        "swin_unetr_btcv_seg", "evaluate.yaml", dataset_dir=btcv, pretrained_model="null", output_dir=tmp_path
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "--pretrained_model None must be a path" in ended.stderr[ended.stderr.rindex("Stopped:") :]


def test_undeclared_label(tmp_path, broken):
    rewrite(broken / "labelsTr" / "label0002.nii.gz", lambda a, m: (np.where(a == 6, 77, a).astype(np.uint8), m))
    message = refused(tmp_path, broken)
    assert "label0002.nii.gz" in message and "77" in message


def test_roi_that_32_does_not_divide(tmp_path, btcv):
    message = refused(tmp_path, btcv, roi_size="[64,60,32]")
    assert "60" in message and "32" in message


def test_roi_too_small_to_train(tmp_path, btcv):
    assert "[32, 32, 32]" in refused(tmp_path, btcv, roi_size="[32,32,32]")


def test_misspelt_option(tmp_path, btcv):
    message = refused(tmp_path, btcv, pretrained_encodr="x.pt")
    assert "--pretrained_encodr" in message and "--pretrained_encoder" in message


def test_nested_entry_that_an_option_governs(tmp_path, btcv):
    message = refused(tmp_path, btcv, **{"optimizer#lr": "1e-6"})
    assert "--optimizer#lr would replace what --learning_rate sets" in message


def test_misspelt_entry_of_a_further_config(tmp_path, btcv):
    """From Python it is the same: both reach the run as entries of its config."""
    (tmp_path / "mine.yaml").write_text("max_stepz: 3\n")
    folder = BUNDLES / "swin_unetr_btcv_seg"
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from monai.bundle import run\n"
        f"run(config_file=['configs/train.yaml', {str(tmp_path / 'mine.yaml')!r}], dataset_dir={str(btcv)!r},"
        f" output_dir={str(tmp_path / 'output')!r}, preset='cpu')\n"
    )
    ended = run(["-c", script], cwd=folder, env=os.environ, timeout=300)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "'max_stepz'" in ended.stderr and "Did you mean max_steps" in ended.stderr
    assert not (tmp_path / "output" / "models").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "gpu"}, {"amp": True, "amp_type": "fp16"}])
def test_device_that_this_machine_lacks(tmp_path, btcv, options):
    message = refused(tmp_path, btcv, **options)
    assert f"--{next(iter(options))} " in message and ("GPU" in message or "is not a device" in message)


def test_output_that_another_run_writes_into(tmp_path, btcv):
    (tmp_path / "output").mkdir()
    with open(tmp_path / "output" / ".training.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "Another training writes into --output_dir" in refused(tmp_path, btcv)


def test_output_that_is_a_file_is_told_before_the_scans_are_read(tmp_path, broken):
    (broken / "imagesTr" / "img0000.nii.gz").write_bytes(b"damaged")
    (tmp_path / "file").write_text("")
    message = refused(tmp_path, broken, output_dir=tmp_path / "file" / "output")
    assert "Cannot write into --output_dir" in message and "Not a directory" in message


@pytest.mark.parametrize(("name", "value"), [("output_dir", ""), ("pretrained_encoder", "")])
def test_empty_path(tmp_path, btcv, name, value):
    assert f"--{name} is empty" in refused(tmp_path, btcv, **{name: value})


def test_unknown_preset(tmp_path, btcv):
    assert "official, few_label, whole_network, cpu" in refused(tmp_path, btcv, preset="gpu")


def test_missing_checkpoint(tmp_path, btcv):
    assert "no_such_encoder.pt" in refused(tmp_path, btcv, pretrained_encoder=tmp_path / "no_such_encoder.pt")


def test_broken_data_list(tmp_path, broken):
    (broken / "dataset.json").write_text(json.dumps({"training": []})[:-1])
    assert "dataset.json" in refused(tmp_path, broken)


def test_bundle_copied_without_what_it_links_to(tmp_path, btcv):
    shutil.copytree(BUNDLES / "swin_unetr_btcv_seg", tmp_path / "copied", symlinks=True)
    words = ["-m", "monai.bundle", "run", "--config_file", "configs/train.yaml", "--dataset_dir", btcv]
    ended = run(words, cwd=tmp_path / "copied", env=os.environ, timeout=300)
    assert ended.returncode != 0
    assert "Cannot find the config file: configs/train.yaml" in ended.stderr  # MONAI reads it before any code of ours
    shutil.rmtree(tmp_path / "copied/configs")
    shutil.copytree(BUNDLES / "swin_unetr_btcv_seg/configs", tmp_path / "copied/configs")
    ended = run(words, cwd=tmp_path / "copied", env=os.environ, timeout=300)
    assert ended.returncode != 0
    assert "scripts/segmentation: dead link" in ended.stderr and "cp -rL" in ended.stderr
