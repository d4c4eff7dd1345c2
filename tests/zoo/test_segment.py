# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One command segments a scan with a released model, and runs only what was released."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from zoo.pack import pack
from zoo.package.archive import file_hash
from zoo.segment import RELEASED, find_release, main, unpack

from .conftest import save_btcv
from .own_process import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def released(tmp_path_factory, btcv_models, spleen_models) -> Path:
    out = tmp_path_factory.mktemp("released")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.pack.run_checks", lambda folder, names: iter(()))
        pack("swin_unetr_btcv_seg", models=btcv_models, out=out, half=True)
        pack("swin_unetr_msd", task="Task09_Spleen", models=spleen_models, out=out)
    return out


def test_a_scan_is_segmented_by_the_model_that_is_named(released, scan, btcv_models, tmp_path):
    shutil.copyfile(btcv_models / "model.pt", tmp_path / "own.pt")
    code = f"from zoo.segment import main; from pathlib import Path; import sys; sys.exit(main(released=Path({str(released)!r}), unpacked=Path({str(tmp_path / 'unpacked')!r})))"
    words = ["btcv", os.path.relpath(scan, tmp_path), "--output_dir", "masks", "--overlap", "0.0"]
    words += ["--pretrained_model", "own.pt"]  # further options, too, are read where the user stands
    output = python("-c", code, *words, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
    assert output.startswith("swin_unetr_btcv_seg 0.1.0: Swin UNETR for the 13 abdominal organs")
    assert "Research only, not for clinical use" in output.splitlines()[0]
    mask, image = nib.load(tmp_path / "masks/scan_seg.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape and len(np.unique(mask.dataobj)) > 1
    np.testing.assert_allclose(mask.affine, image.affine)


def test_half_precision_halves_the_file_and_rounds_the_weights(released, btcv_models):
    bundle = unpack(find_release("btcv", released), released / "unpacked")
    whole, half = (torch.load(folder / "model.pt") for folder in (btcv_models, bundle / "models"))
    assert (bundle / "models/model.pt").stat().st_size < 0.52 * (btcv_models / "model.pt").stat().st_size
    assert {key: value for key, value in half.items() if key != "model"} == {
        key: value for key, value in whole.items() if key != "model"
    }
    assert whole["model"].keys() == half["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(half["model"][name], tensor.half() if tensor.is_floating_point() else tensor), name
    assert any(not tensor.is_floating_point() for tensor in half["model"].values())


@pytest.mark.parametrize("half", [False, True])
def test_a_package_does_not_tell_the_folders_of_its_machine(tmp_path, unbuilt, half):
    start = {"file": "/home/someone/runs/encoder.pt", "modules": []}
    models = save_btcv(tmp_path / "models", data="/home/someone/scans/btcv", start=start)
    package = pack("swin_unetr_btcv_seg", models=models, out=tmp_path / "out", half=half)
    packed = torch.load(unpack(package.archive, tmp_path) / "models/model.pt")
    assert packed["trained"]["data"] == "btcv" and packed["trained"]["start"] == {"file": "encoder.pt", "modules": []}
    whole = torch.load(models / "model.pt")
    assert {**packed["trained"], "data": 0, "start": 0} == {**whole["trained"], "data": 0, "start": 0}
    assert b"/home/someone" not in package.archive.read_bytes()


def test_weights_beyond_half_precision_are_refused(tmp_path, btcv_models, unbuilt):
    content = torch.load(btcv_models / "model.pt")
    content["model"]["out.conv.conv.bias"][1] = 7e4
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt has weights up to 7e\+04, too large for half precision"):
        pack("swin_unetr_btcv_seg", models=tmp_path, out=tmp_path / "out", half=True)
    assert not list((tmp_path / "out").glob("*.zip"))


def test_the_readme_tells_about_the_weights(tmp_path, btcv_models, unbuilt):
    about = tmp_path / "about.md"
    about.write_text("## Data\n\nTwelve synthetic patients.\n")
    package = pack("swin_unetr_btcv_seg", models=btcv_models, out=tmp_path / "out", half=True, about=about)
    bundle = unpack(package.archive, tmp_path)
    readme = (bundle / "docs/README.md").read_text()
    assert "\n\n## Data\n\nTwelve synthetic patients.\n\n## Weights of this package\n" in readme
    assert f"| sha256 | `{file_hash(bundle / 'models/model.pt', 'sha256')}` |" in readme
    with pytest.raises(InputError, match=r"--about .*missing\.md does not exist"):
        pack("swin_unetr_btcv_seg", models=btcv_models, out=tmp_path / "out", about=tmp_path / "missing.md")


@pytest.mark.parametrize(
    ("name", "found"), [("swin_unetr_msd_spleen", "spleen"), ("spleen", "spleen"), ("btcv", "btcv_seg")]
)
def test_a_part_of_the_name_is_enough(released, name, found):
    assert find_release(name, released).name.endswith(f"{found}_v0.1.0.zip")


@pytest.mark.parametrize(("name", "how"), [("liver", "none"), ("swin", "a part of the names")])
def test_other_names_are_told_what_is_released(released, name, how):
    with pytest.raises(
        InputError,
        match=f"{name} is {how} of the released models. Released are: swin_unetr_btcv_seg, swin_unetr_msd_spleen",
    ):
        find_release(name, released)


def test_the_newest_version_is_taken(released, tmp_path):
    folder = Path(shutil.copytree(released, tmp_path / "released"))
    package = "swin_unetr_msd_spleen_v0.1.0"
    index = json.loads((folder / "model_info.json").read_text())
    for version in ("0.9.0", "0.10.0", "0.10.rc1"):
        shutil.copy(folder / f"{package}.zip", folder / f"{package.replace('0.1.0', version)}.zip")
        index[package.replace("0.1.0", version)] = index[package]
    (folder / "model_info.json").write_text(json.dumps(index))
    assert find_release("spleen", folder).name == "swin_unetr_msd_spleen_v0.10.0.zip"


def test_a_package_that_is_cut_short_missing_or_changed_is_not_run(released, tmp_path, capsys, scan):
    folder = Path(shutil.copytree(released, tmp_path / "released"))
    path = folder / "swin_unetr_msd_spleen_v0.1.0.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["spleen", str(scan)], released=folder, unpacked=tmp_path / "unpacked") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Stopped: {path} has {path.stat().st_size} bytes with sha1 ") and "cut short" in said
    path.unlink()
    assert main(["spleen", str(scan)], released=folder, unpacked=tmp_path / "unpacked") == 1
    assert f"{path} is missing. Get it again" in capsys.readouterr().err
    assert main(["btcv", "no/scan"], released=folder, unpacked=tmp_path / "unpacked") == 1
    assert "no/scan does not exist" in capsys.readouterr().err
    assert not (tmp_path / "unpacked").exists()


def test_unpacking_is_done_once(released, tmp_path):
    path = find_release("spleen", released)
    bundle = unpack(path, tmp_path)
    (bundle / "mark").touch()
    assert unpack(path, tmp_path) == bundle and (bundle / "mark").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [bundle.parent.name]


def test_what_is_released_here_is_whole_small_and_listed():
    index = json.loads((RELEASED / "model_info.json").read_text())
    assert {path.stem for path in RELEASED.glob("*.zip")} == set(index)
    for package in index:
        path = find_release(package.rpartition("_v")[0])
        assert path.stat().st_size < 16 * 2**20


def test_the_released_model_labels_a_volume_of_the_kind_that_it_knows(tmp_path):
    """One bright curved body in the dark is not a hippocampus; that the mask has its geometry and values is what counts."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in (36, 50, 35)), indexing="ij"))
    body = np.linalg.norm(grid - np.array([18, 25, 17]).reshape(3, 1, 1, 1), axis=0) < 9
    volume = 200 * body + np.random.default_rng(0).normal(100, 20, body.shape)
    nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([1.0, -1.0, 1.0, 1.0])), tmp_path / "box.nii.gz")
    assert (
        main(["hippocampus", str(tmp_path / "box.nii.gz"), "--output_dir", str(tmp_path / "masks")], unpacked=tmp_path)
        == 0
    )
    mask = nib.load(tmp_path / "masks/box_seg.nii.gz")
    assert mask.shape == body.shape and np.array_equal(mask.affine, np.diag([1.0, -1.0, 1.0, 1.0]))
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2}
    assert (tmp_path / "masks/volumes.csv").read_text().splitlines()[0] == "case,label,voxels,ml,image"
