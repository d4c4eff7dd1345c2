# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The workflows of swin_unetr_pretrain, through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from packaging.version import Version

from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.training.log import read_log
from bundles.common.weights.loading import load_model

from .command_line import BUNDLES, SMALL, run_bundle, succeed

OLD_MONAI = Version(monai.__version__) < Version("1.6")

SMALL = {**SMALL, "roi_size": "[64,64,32]"}


def test_training_ends_with_an_encoder_that_says_what_it_is(pretrained):
    encoder = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    assert set(encoder) == {"state_dict", "encoder", "trained"}
    assert encoder["encoder"] == {
        **{"in_channels": 1, "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        **{"window_size": 4, "patch_size": 2, "merging": "monai", "use_v2": False},
    }
    assert all(name.startswith("swinViT.") for name in encoder["state_dict"])
    assert encoder["trained"]["steps"] == 2
    model = torch.load(pretrained / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(model["model"][name], tensor) for name, tensor in encoder["state_dict"].items())


def test_training_writes_curves_and_panels(pretrained):
    assert [row["step"] for row in read_log(pretrained / "training_log.csv")] == [1, 2]
    for picture in ("loss_curves", "panel_inpainting", "panel_contrast", "panel_rotation"):
        assert (pretrained / f"{picture}.png").stat().st_size > 5000


def test_evaluation_repeats_the_validation_of_the_training(tmp_path, pretrained, unlabelled):
    model = pretrained / "models" / "model.pt"
    options = {name: SMALL[name] for name in ("preset", "roi_size")}
    run = run_bundle(
        "swin_unetr_pretrain",
        "evaluate.yaml",
        cwd=tmp_path,
        dataset_dir=unlabelled,
        pretrained_model=model,
        output_dir=tmp_path / "out",
        **options,
    )
    succeed(run)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    validation = json.loads((pretrained / "validation.json").read_text())
    assert evaluation.pop("verdicts").keys() == validation.pop("verdicts").keys()
    assert evaluation == pytest.approx(validation, rel=1e-5)


def test_inference_reconstructs_and_embeds_in_the_scans_geometry(tmp_path, pretrained, unlabelled):
    """A scan that is cut short costs the other nothing; scans of equal names are named by their folders, too."""
    scans = tmp_path / "scans"
    for name in ("p1", "p2"):
        (scans / name).mkdir(parents=True)
    whole = nib.load(unlabelled / "site 0" / "scan.nii.gz")
    air = np.pad(np.asarray(whole.dataobj), ((8, 8), (0, 0), (0, 0)), constant_values=-1000)
    scan = scans / "p1" / "scan.nii.gz"
    nib.save(nib.Nifti1Image(air, whole.affine), scan)
    (scans / "p2" / "scan.nii.gz").write_bytes(Path(scan).read_bytes()[:9000])
    options = {name: SMALL[name] for name in ("preset", "roi_size")}
    run = run_bundle(
        "swin_unetr_pretrain",
        "inference.yaml",
        dataset_dir=scans,
        pretrained_model=pretrained / "models" / "model.pt",
        output_dir=tmp_path,
        mask_fill="['zero']",
        **options,
    )
    assert run.returncode == 3 and "1 of 2 scans are done" in run.stdout + run.stderr
    assert "p2/scan.nii.gz,reconstruction" in (tmp_path / "failed.csv").read_text()
    original, masked = nib.load(scan), nib.load(tmp_path / "p1" / "scan_masked.nii.gz")
    reconstruction = nib.load(tmp_path / "p1" / "scan_reconstruction.nii.gz")
    for image in (masked, reconstruction):
        assert image.shape == original.shape
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
    tissue = original.get_fdata() > -200
    body = np.argwhere(original.get_fdata() > -500)  # scans are cropped to its box
    box = tuple(slice(low, high + 1) for low, high in zip(body.min(axis=0), body.max(axis=0), strict=True))
    for image in (masked, reconstruction):
        outside = np.ones(image.shape, bool)
        outside[tuple(slice(max(each.start - 2, 0), each.stop + 2) for each in box)] = False  # resampled at the border
        assert outside.any() and (image.get_fdata()[outside] == -1000).all()
    hidden = (masked.get_fdata() < -600)[tissue].mean()
    assert 0.15 < hidden < 0.45  # 0.3 of every window is set to the lower end of the HU window
    embedding = np.load(tmp_path / "p1" / "scan_embedding.npz")
    assert embedding["embedding"].shape == (192,)
    np.testing.assert_allclose(embedding["embedding"], embedding["windows"].mean(axis=0), rtol=1e-5)
    assert (tmp_path / "p1" / "scan_reconstruction.png").exists()


@pytest.mark.skipif(OLD_MONAI, reason="this MONAI cannot accumulate gradients, which the option says")
def test_accumulated_batches_make_one_step(tmp_path, unlabelled):
    options = {**SMALL, "dataset_dir": unlabelled, "batch_size": 1, "global_batch_size": 3, "output_dir": tmp_path}
    output = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options))
    assert "step 2/2" in output
    last = torch.load(tmp_path / "models" / "last.pt", weights_only=True)
    assert last["step"] == 2 and last["settings"]["accumulation_steps"] == 3
    assert {float(state["step"]) for state in last["optimizer"]["state"].values()} == {2.0}


def test_mlflow_and_tensorboard_hold_curves_per_task_and_pictures(tmp_path, unlabelled):
    options = {**SMALL, "dataset_dir": unlabelled, "output_dir": tmp_path, "tracking": "mlflow"}
    if OLD_MONAI:  # its default is a folder, which MLflow refuses
        options |= {"tracking_uri": f"sqlite:///{tmp_path}/mlruns.db"}
    succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    curves = ("loss", "loss_inpainting", "loss_contrast", "loss_rotation", "learning_rate", "crops_per_second")
    rows = read_log(tmp_path / "training_log.csv")
    for name in curves:
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert sorted((point.step, point.value) for point in history) == [
            (row["step"], pytest.approx(row[name])) for row in rows
        ]
    validation = json.loads((tmp_path / "validation.json").read_text())
    for name in ("loss_rotation", "rotation_accuracy", "contrast_top1", "masked_psnr"):
        (point,) = client.get_metric_history(run.info.run_id, f"validation/{name}")
        assert (point.step, point.value) == (2, pytest.approx(validation[name]))
    kept = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "pictures/step_000002")}
    assert "pictures/step_000002/panel_inpainting.png" in kept
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_resuming_with_another_setting_is_refused_unless_it_is_named(tmp_path, pretrained, unlabelled):
    output = shutil.copytree(pretrained, tmp_path / "copy")
    options = {**SMALL, "dataset_dir": unlabelled, "output_dir": output, "resume": True, "max_steps": 4}
    run = run_bundle("swin_unetr_pretrain", "train.yaml", **options)
    assert run.returncode == 1
    message = run.stderr[run.stderr.rindex("Stopped:") :]
    assert "max_steps was 2, now 4" in message and "--resume_changes" in message and "Traceback" not in run.stderr
    output = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", resume_changes="['max_steps']", **options))
    assert "step 4/4" in output and "step 2/4" not in output


def test_voxels_that_are_not_numbers_are_named_in_a_worker_too(tmp_path, unlabelled):
    folder = shutil.copytree(unlabelled, tmp_path / "scans")
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        voxels = image.get_fdata(dtype=np.float32)
        voxels[::9, ::9, ::5] = np.nan
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    options = {**SMALL, "dataset_dir": folder, "check_data": "none", "num_workers": 1, "cache_num": 0}
    run = run_bundle("swin_unetr_pretrain", "train.yaml", output_dir=tmp_path / "output", **options)
    assert run.returncode == 1
    message = run.stderr[run.stderr.rindex("Stopped:") :]
    assert re.search(r"scan\.nii\.gz: has \d+ of \d+ voxels that are NaN", message) and "Traceback" not in message


def test_one_task_alone_trains(tmp_path, unlabelled):
    run = run_bundle(
        "swin_unetr_pretrain", "train.yaml", dataset_dir=unlabelled, output_dir=tmp_path, tasks="['rotation']", **SMALL
    )
    succeed(run)
    assert set(read_log(tmp_path / "training_log.csv")[0]) == {
        *("step", "loss", "loss_rotation", "gradient_norm", "learning_rate", "crops_per_second"),
    }


def test_published_weights_go_through_convert_into_a_fine_tuning_and_its_model(tmp_path, pretrained, btcv):
    """A file in the layout of model_swinvit.pt, with the old patch merging, which the trained model keeps."""
    source, official, encoder = pretrained / "models" / "encoder.pt", tmp_path / "x.pt", tmp_path / "published.pt"
    succeed(run_bundle("swin_unetr_pretrain", "convert.yaml", source=source, target=official, layout="official"))
    content = torch.load(official, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, encoder)
    convert = {"source": encoder, "target": tmp_path / "e.pt", "merging": "legacy"}
    output = succeed(run_bundle("swin_unetr_pretrain", "convert.yaml", **convert))
    assert "mlp.fc1/fc2" in output and "legacy, according to --merging" in output
    options = {**SMALL, "depths": None, "roi_size": "[64,64,32]", "dataset_dir": btcv, "output_dir": tmp_path / "seg"}
    options |= {"merging": "legacy"}
    succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", pretrained_encoder=encoder, **options))
    model = torch.load(tmp_path / "seg" / "models" / "model.pt", weights_only=True)
    assert model["encoder"]["merging"] == "legacy"
    start = model["trained"]["start"]
    assert start["file"] == str(encoder) and start["missing"] == start["left_over"] == []
    # exported as in docs/how-to/weights.md, it gives the outputs of the network
    trained = tmp_path / "seg" / "models" / "model.pt"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "monai.bundle",
        "ckpt_export",
        "network_def",
        "--use_trace",
        "true",
    ]
    command += ["--ckpt_file", str(trained), "--pretrained_model", str(trained), "--key_in_ckpt", "model"]
    command += ["--filepath", str(tmp_path / "model.ts"), "--input_shape", "[1,1,64,64,32]", "--bundle_root", "."]
    command += ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.yaml"]
    folder = BUNDLES / "swin_unetr_btcv_seg"
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": "."}, check=True, timeout=300)
    network = build_swin_unetr(model["encoder"], out_channels=14).eval()
    load_model(network, str(trained))
    image = torch.rand(1, 1, 64, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), network(image), rtol=1e-4, atol=1e-4)
    # evaluation and inference, too, refuse an unknown file until the user sets its patch merging
    unknown = tmp_path / "unknown.pt"
    torch.save(model["model"], unknown)
    for config in ("evaluate.yaml", "inference.yaml"):
        scans = btcv if config == "evaluate.yaml" else btcv / "imagesTr"
        options = {"dataset_dir": scans, "pretrained_model": unknown, "preset": "cpu", "roi_size": "[64,64,32]"}
        run = run_bundle("swin_unetr_btcv_seg", config, output_dir=tmp_path / config, **options)
        assert run.returncode == 1
        assert "--merging legacy" in run.stderr[run.stderr.rindex("Stopped:") :]
    succeed(run_bundle("swin_unetr_btcv_seg", config, output_dir=tmp_path / "masks", merging="legacy", **options))


def test_a_store_gives_the_weights_that_the_scans_give(tmp_path, unlabelled):
    """Prepared once, read in both ways: draws, crops, validation and weights are bit-identical."""
    prepared = tmp_path / "prepared"
    options = {"source": unlabelled, "dataset_dir": prepared, "min_body": 100, "validation_share": 0.3}
    succeed(run_bundle("swin_unetr_pretrain", "prepare.yaml", **options))
    models = {}
    for data in ("nifti", "store", "device"):
        output = tmp_path / data
        options = {**SMALL, "roi_size": "[64,64,32]", "spacing": None, "dataset_dir": prepared, "output_dir": output}
        options |= {
            "data": "nifti" if data == "nifti" else "store",
            "tasks": "['rotation','position']",
        }  # position also reads the affine
        options |= {"store_on_device": 0.5, "num_workers": 1} if data == "device" else {}
        said = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options))
        assert ("of the store kept on cpu: " in said) == (data == "device")
        models[data] = torch.load(output / "models" / "model.pt", weights_only=True)
    for data in ("store", "device"):
        one, other = models["nifti"]["model"], models[data]["model"]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert models["nifti"]["trained"]["score"] == models[data]["trained"]["score"]
    refused = run_bundle("swin_unetr_pretrain", "train.yaml", **{**options, "foreground_hu": -400.0})
    assert refused.returncode == 1
    assert "was prepared with foreground_hu -500.0, but this run has -400.0" in refused.stderr.splitlines()[-1]
