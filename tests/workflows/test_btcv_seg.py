# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The workflows of swin_unetr_btcv_seg, through the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil

import mlflow
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.networks.nets import SwinUNETR

from ..common.scans.dicom_files import write_series
from .command_line import SMALL, run_bundle, succeed

WINDOW = {"preset": "cpu", "roi_size": "[64,64,32]"}


def test_fine_tuning_builds_the_network_of_the_encoder(segmenter, pretrained):
    model = torch.load(segmenter / "models" / "model.pt", weights_only=True)
    encoder = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    assert model["encoder"] == encoder["encoder"]
    assert model["encoder"]["depths"] == [1, 1, 1, 1]  # the preset alone would build [2, 2, 2, 2]
    assert model["labels"]["6"] == "liver"
    # A plain MONAI network can load the weights unchanged.
    network = SwinUNETR(1, 14, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, feature_size=12)
    network.load_state_dict(model["model"], strict=True)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, segmenter, btcv):
    """Output folder and printed output of an evaluation of the validation case."""
    output = tmp_path_factory.mktemp("evaluated")
    options = {"dataset_dir": btcv, "pretrained_model": segmenter / "models" / "model.pt", "output_dir": output}
    return output, succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **options, **WINDOW))


def test_evaluation_scores_every_organ_in_the_scans_geometry(evaluated):
    output, _ = evaluated
    with open(output / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert {row["case"] for row in rows} == {"img0002"}
    summary = json.loads((output / "summary.json").read_text())
    assert summary["mean_dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)
    assert (output / "img0002_overlay.png").exists() and (output / "scores.png").exists()


def test_an_ensemble_is_another_model_and_a_second_run_scores_nothing_again(tmp_path, evaluated, segmenter, btcv):
    content = torch.load(segmenter / "models" / "model.pt", weights_only=True)
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold1").mkdir()
    torch.save(content, tmp_path / "fold0" / "model.pt")
    generator = torch.Generator().manual_seed(0)
    weights = content["model"]["out.conv.conv.weight"]
    weights += torch.randn(weights.shape, generator=generator)
    torch.save(content, tmp_path / "fold1" / "model.pt")
    options = {"dataset_dir": btcv, "pretrained_model": f"{tmp_path}/fold*/model.pt", "output_dir": tmp_path / "out"}
    output = succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **options, mirror_axes="[1]", **WINDOW))
    assert "ensemble of 2 models" in output and "already scored" not in output
    assert "was trained without flips" in output
    scores = (tmp_path / "out" / "scores.csv").read_bytes()
    assert scores != (evaluated[0] / "scores.csv").read_bytes()
    (tmp_path / "out" / "scores.csv").unlink()
    options |= {"tracking": "mlflow", "tracking_uri": f"sqlite:///{tmp_path}/mlruns.db"}
    again = run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **options, mirror_axes="[1]", **WINDOW)
    assert "1 of 1 case is already scored" in succeed(again)
    client = mlflow.MlflowClient(options["tracking_uri"])
    (run,) = client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert run.info.status == "FINISHED" and run.data.metrics["mean_dice"] == pytest.approx(summary["mean_dice"])
    assert (tmp_path / "out" / "scores.csv").read_bytes() == scores


def test_a_dicom_series_is_segmented_measured_and_written_as_dicom(tmp_path, segmenter, patients):
    image, _, affine = patients[2]
    sizes = nib.affines.voxel_sizes(affine)
    study = tmp_path / "study 1"
    slices = write_series(study / "CT", np.asarray(image, np.int16), spacing=sizes, intercept=0.0)
    write_series(study / "scout", np.zeros((40, 40, 1), np.int16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    options = {
        "dataset_dir": study,
        "pretrained_model": segmenter / "models" / "model.pt",
        "output_dir": tmp_path / "out",
    }
    output = succeed(run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, mirror_axes="[0]", **WINDOW))
    assert "scout" in output and "is left out: it is a localizer" in output
    (mask_file,) = (tmp_path / "out").glob("*_seg.nii.gz")
    name = mask_file.name.removesuffix("_seg.nii.gz")
    mask, made = nib.load(mask_file), nib.load(tmp_path / "out" / "dicom" / f"{name}.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj), image)  # axial slices: only the signs of the axes differ
    np.testing.assert_allclose(mask.affine, made.affine, atol=1e-4)
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.asarray(mask.dataobj)
    counts = [np.count_nonzero(labels == value) for value in range(1, 14)]
    assert [int(row["voxels"]) for row in rows] == counts
    assert [float(row["ml"]) for row in rows] == pytest.approx(
        np.array(counts) * np.prod(sizes) / 1000, rel=1e-3, abs=1e-3
    )
    assert any(counts)
    segmentation = pydicom.dcmread(tmp_path / "out" / f"{name}_seg.dcm")
    assert segmentation.Modality == "SEG"
    assert segmentation.StudyInstanceUID == pydicom.dcmread(slices[0]).StudyInstanceUID
    assert len(segmentation.SegmentSequence) == np.count_nonzero(counts)
    options["resume"] = True
    again = succeed(run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, mirror_axes="[0]", **WINDOW))
    assert "1 scan is already segmented" in again
    other = run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, **WINDOW)
    assert other.returncode == 1 and "mirror_axes was 0, now nothing" in other.stderr.splitlines()[-1]


def test_four_odd_patients_of_ten_cost_none_of_the_others(tmp_path, segmenter):
    """Six masks, a summary that names the four, status 3; --resume true tries only the four."""
    voxels = np.random.default_rng(0).integers(-100, 200, (24, 24, 12)).astype(np.int16)
    study = tmp_path / "study"
    for number in range(7):
        write_series(study / f"p{number}", voxels, spacing=(4, 4, 5), intercept=0.0)
    cut = sorted((study / "p1").iterdir())[-1]
    cut.write_bytes(cut.read_bytes()[:300])
    gap = write_series(study / "p2", voxels, spacing=(4, 4, 5), intercept=0.0)[5]
    gap.unlink()
    for number in range(7, 10):
        (study / f"p{number}").mkdir()
        values = np.where(voxels == voxels.max(), np.nan, voxels) if number == 8 else voxels
        nib.save(nib.Nifti1Image(values, np.diag([4, 4, 5, 1])), study / f"p{number}" / f"ct{number}.nii.gz")
    short = study / "p9" / "ct9.nii.gz"
    short.write_bytes(short.read_bytes()[:2000])
    options = {"pretrained_model": segmenter / "models" / "model.pt", "output_dir": tmp_path / "out", **WINDOW}
    run = run_bundle("swin_unetr_btcv_seg", "inference.yaml", dataset_dir=study, **options)
    assert run.returncode == 3 and "Traceback" not in run.stderr + run.stdout
    masks = {path.name for path in (tmp_path / "out").glob("*_seg.nii.gz")}
    assert masks == {f"study__p{number}_seg.nii.gz" for number in (0, 3, 4, 5, 6)} | {"ct7_seg.nii.gz"}
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        images = {row["image"] for row in csv.DictReader(file)}
    sources = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert len(images) == 6 and set(sources) == images and all(source["identity"] for source in sources.values())
    assert sum(bool(source["series_uid"]) for source in sources.values()) == 5
    with open(tmp_path / "out" / "failed.csv", newline="") as file:
        failed = {row["scan"]: row["reason"] for row in csv.DictReader(file)}
    odd = {str(cut): "truncated", str(study / "p1"): "perhaps slices of it", str(study / "p2"): "lacks 1 of its slices"}
    odd |= {str(study / "p8" / "ct8.nii.gz"): "NaN", str(short): "cut short"}
    assert set(failed) == set(odd) and all(words in failed[scan] for scan, words in odd.items())
    summary = (run.stdout + run.stderr)[(run.stdout + run.stderr).rindex("scans are done") :]
    assert all(scan in summary for scan in odd)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_seg.nii.gz")}

    write_series(study / "p2", voxels, spacing=(4, 4, 5), intercept=0.0)
    again = run_bundle("swin_unetr_btcv_seg", "inference.yaml", dataset_dir=study, **options, resume=True)
    assert again.returncode == 3 and "6 scans are already segmented" in again.stdout + again.stderr
    assert (tmp_path / "out" / "study__p2_seg.nii.gz").exists()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with open(tmp_path / "out" / "failed.csv", newline="") as file:
        assert {row["scan"] for row in csv.DictReader(file)} == set(odd) - {str(study / "p2")}


def test_a_case_that_cannot_be_scored_is_left_out_and_named(tmp_path, segmenter, btcv):
    data = shutil.copytree(btcv, tmp_path / "data")
    broken = data / "imagesTr" / "img0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:20000])
    away = data / "labelsTr" / "label0000.nii.gz"
    away.rename(data / "kept")
    options = {"pretrained_model": segmenter / "models" / "model.pt", "output_dir": tmp_path / "out", **WINDOW}
    run = run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", dataset_dir=data, section="all", **options)
    assert run.returncode == 3 and "Traceback" not in run.stderr + run.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cases"] == ["img0002"]
    assert summary["not_scored"] == [str(data / "imagesTr" / "img0000.nii.gz"), str(broken)]
    assert "1 of 3 scans are done" in run.stdout + run.stderr
    (data / "kept").rename(away)
    broken.write_bytes((btcv / "imagesTr" / "img0001.nii.gz").read_bytes())
    again = succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", dataset_dir=data, section="all", **options))
    assert "1 of 3 cases are already scored" in again
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["cases"]) == 3 and "not_scored" not in summary
    assert not (tmp_path / "out" / "failed.csv").exists()


def test_what_the_model_says_is_what_runs(tmp_path, segmenter, btcv):
    """Without options, spacing, window, ROI and overlap are the model's; another value is used, with a warning."""
    options = {
        "dataset_dir": btcv / "imagesTr" / "img0000.nii.gz",
        "pretrained_model": segmenter / "models" / "model.pt",
    }
    masks = {}
    for name, given in {"none": {}, "all": WINDOW, "other": {"spacing": "[5.0,5.0,5.0]", "overlap": 0.5}}.items():
        output = succeed(
            run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, **given, output_dir=tmp_path / name)
        )
        (mask,) = (tmp_path / name).glob("*_seg.nii.gz")
        masks[name] = np.asarray(nib.load(mask).dataobj)
        warned = re.findall(r"was trained with (\w+) (.+?); this run uses (.+)", output)
        expected = [("spacing", "4.0, 4.0, 5.0", "5.0, 5.0, 5.0"), ("overlap", "0.25", "0.5")]
        assert [tuple(part.strip() for part in found) for found in warned] == (expected if name == "other" else [])
    np.testing.assert_array_equal(masks["none"], masks["all"])
    assert masks["none"].any() and (masks["other"] != masks["none"]).any()


def test_scans_that_are_hardly_ct_are_warned_of_and_segmented_nevertheless(tmp_path, segmenter):
    """MR, a scan smaller than the window, and a scan of air. An empty mask is reported."""
    rng = np.random.default_rng(0)
    scans = {
        "mr": (rng.integers(0, 900, (60, 60, 30)), (2.0, 2.0, 3.0)),
        "small": (rng.integers(-1000, 1000, (20, 20, 10)), (2.0, 2.0, 5.0)),
        "air": (rng.integers(-1024, -950, (40, 40, 40)), (3.0, 3.0, 3.0)),
    }
    (tmp_path / "scans").mkdir()
    for name, (voxels, spacing) in scans.items():
        nib.save(
            nib.Nifti1Image(voxels.astype(np.int16), np.diag([*spacing, 1])), tmp_path / "scans" / f"{name}.nii.gz"
        )
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "inference.yaml",
        dataset_dir=tmp_path / "scans",
        pretrained_model=segmenter / "models" / "model.pt",
        output_dir=tmp_path / "out",
        mask_interpolation="nearest",
        **WINDOW,
    )
    output = succeed(run)
    assert "do not look like CT in HU" in output
    assert all(f"{name}.nii.gz: " in output for name in ("mr", "air")) and "small.nii.gz: " not in output
    for name, (voxels, _) in scans.items():
        mask = nib.load(tmp_path / "out" / f"{name}_seg.nii.gz")
        assert mask.shape == voxels.shape
        empty = not np.asarray(mask.dataobj).any()
        assert (f"{name}.nii.gz: the mask is all background" in output) == empty


def test_few_label_recipe_in_the_folders_of_the_download(tmp_path, btcv, pretrained):
    """No data list: BTCV's original folders, split into three folds. Augmentation and learning rates of the preset."""
    raw = tmp_path / "RawData" / "Training"
    (raw / "img").mkdir(parents=True)
    (raw / "label").mkdir()
    for number in range(3):
        os.link(btcv / "imagesTr" / f"img{number:04d}.nii.gz", raw / "img" / f"img{number:04d}.nii.gz")
        os.link(btcv / "labelsTr" / f"label{number:04d}.nii.gz", raw / "label" / f"label{number:04d}.nii.gz")
    options = {"spacing": "[4.0,4.0,5.0]", "num_workers": 0, "crops_per_volume": 1, "folds": 3, "fold": 2}
    # A high rate: the score of hardly trained networks moves up and down, and the first step down ends the run.
    options |= {"max_steps": 20, "val_interval": 1, "early_stopping": 1, "learning_rate": 0.02, "warmup_steps": 1}
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        preset="few_label",
        dataset_dir=tmp_path,
        output_dir=tmp_path / "out",
        pretrained_encoder=pretrained / "models" / "encoder.pt",
        roi_size="[32,32,64]",
        **options,
    )
    assert "early stopping: no better mean_dice in the last 1 validation" in succeed(run)
    trained = torch.load(tmp_path / "out" / "models" / "model.pt", weights_only=True)["trained"]
    assert (trained["encoder_lr_decay"], trained["drop_path"], trained["scans"]["number"]) == (0.75, 0.1, 2)
    assert trained["augmentation"]["affine"] == 0.5 and trained["augmentation"]["flip"] == [0.0] * 3
    last = torch.load(tmp_path / "out" / "models" / "last.pt", weights_only=True)
    rates = [group["initial_lr"] for group in last["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.02 * 0.75**stages for stages in (5, 4, 3, 2, 1, 0)])


def test_a_mask_has_the_geometry_of_its_scan_and_declared_labels(tmp_path, segmenter, btcv):
    (tmp_path / "scans").mkdir()
    scan = nib.load(btcv / "imagesTr" / "img0002.nii.gz")
    oblique = scan.affine @ np.array([[0.98, -0.2, 0, 0], [0.2, 0.98, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], oblique), tmp_path / "scans" / "oblique.nii.gz")
    nib.save(scan, tmp_path / "scans" / "plain.nii.gz")
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "inference.yaml",
        cwd=tmp_path,
        dataset_dir=tmp_path / "scans",
        pretrained_model=segmenter / "models" / "model.pt",
        output_dir=tmp_path / "out",
        **WINDOW,
    )
    succeed(run)
    for name in ("oblique", "plain"):
        original, mask = (
            nib.load(tmp_path / "scans" / f"{name}.nii.gz"),
            nib.load(tmp_path / "out" / f"{name}_seg.nii.gz"),
        )
        assert mask.shape == original.shape
        np.testing.assert_allclose(mask.affine, original.affine, atol=1e-3)
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= set(range(14))
        assert (tmp_path / "out" / f"{name}_overlay.png").exists()


def test_an_encoder_of_another_size_is_refused_with_both_values(tmp_path, pretrained, btcv):
    encoder = pretrained / "models" / "encoder.pt"
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=btcv,
        output_dir=tmp_path,
        pretrained_encoder=encoder,
        preset="cpu",
        feature_size=24,
    )
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("Stopped:")
    assert str(encoder) in message and "feature_size is 12 in the file, 24 requested" in message


def test_two_processes_train_and_evaluate_together(tmp_path, btcv):
    train = run_bundle(
        "swin_unetr_btcv_seg",
        ["train.yaml", "multi_gpu_train.yaml"],
        processes=2,
        dataset_dir=btcv,
        output_dir=tmp_path,
        **{**SMALL, "batch_size": 1},
    )
    assert succeed(train).count("cosine between the weights at the start and now") == 1  # of two steps, on rank 0
    moved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["trained"]["moved"]
    assert 0 < moved["distance"]["swinViT.layers1"] < 1 and 0 < moved["distance"]["out"] < 1
    evaluate = run_bundle(
        "swin_unetr_btcv_seg",
        ["evaluate.yaml", "multi_gpu_evaluate.yaml"],
        processes=2,
        dataset_dir=btcv,
        section="training",
        pretrained_model=tmp_path / "models" / "model.pt",
        output_dir=tmp_path / "evaluation",
        preset="cpu",
    )
    succeed(evaluate)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert len(summary["cases"]) == 2


def test_training_on_every_case_needs_no_validation_and_may_keep_the_mean_of_its_weights(tmp_path, btcv):
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=btcv,
        output_dir=tmp_path,
        fold="all",
        max_gradient_norm=None,
        average_steps=2,
        end_learning_rate=0.003,
        warmup_steps=0,
        **SMALL,
    )
    output = succeed(run)
    assert "cases, no validation (" in output and "validation  mean_dice" not in output
    model, last = (torch.load(tmp_path / "models" / name, weights_only=True) for name in ("model.pt", "last.pt"))
    assert model["trained"]["steps"] == 2
    name = "out.conv.conv.weight"
    assert torch.equal(model["model"][name], last["average"][f"module.{name}"])
    assert not torch.equal(model["model"][name], last["network"][name])
    assert {group["lr"] for group in last["optimizer"]["param_groups"]} == {0.003}
