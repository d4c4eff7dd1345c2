# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A bundle from ``monai.bundle download`` works as downloaded. The servers run on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from zoo.pack import Package, pack
from zoo.verify import main

from .loopback import serve_folder, serve_hub
from .own_process import python

NAME, REPO = "swin_unetr_btcv_seg", "someone/swin_unetr_btcv_seg"
# The functions behind the command line, in one process for all three: importing MONAI takes most of the time.
USE = """
import json, sys
from monai.bundle import download, load, run

options, folder, scan = json.loads(sys.argv[1]), *sys.argv[2:]
download(name="swin_unetr_btcv_seg", bundle_dir=folder, progress=False, **options)
bundle = f"{folder}/swin_unetr_btcv_seg"
run(config_file=f"{bundle}/configs/inference.json", bundle_root=bundle, dataset_dir=scan, output_dir=f"{folder}/masks")
network = load("swin_unetr_btcv_seg", bundle_dir=folder, workflow_type="inference", key_in_ckpt="model",
               args_file={"bundle_root": bundle}, device="cpu")
print("parameters:", sum(parameter.numel() for parameter in network.parameters()))
assert not any(name.split(".")[0] in ("bundles", "zoo") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory, btcv_models) -> Package:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.pack.run_checks", lambda folder, names: iter(()))
        return pack(NAME, models=btcv_models, out=tmp_path_factory.mktemp("out"))


def assert_it_worked(output: str, folder: Path, scan: Path) -> None:
    mask = nib.load(folder / "masks/scan_seg.nii.gz")
    assert mask.shape == nib.load(scan).shape and len(np.unique(mask.dataobj)) > 1
    assert "parameters: 3" in output  # millions


def test_a_zip_from_a_web_server_segments_a_scan_and_loads(package, scan, tmp_path):
    with serve_folder(package.archive.parent) as address:
        options = {"url": f"{address}/{package.archive.name}"}
        assert_it_worked(python("-c", USE, json.dumps(options), tmp_path, scan, cwd=tmp_path).stdout, tmp_path, scan)


@pytest.mark.parametrize("version", ["0.1.0", None])
def test_a_hugging_face_repository_segments_a_scan_and_loads(package, scan, tmp_path, version):
    options = {"source": "huggingface_hub", "repo": REPO, "version": version}
    with serve_hub(package.hugging_face, repo=REPO, tag=package.version) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        if version is None:  # must find the newest tag
            words = ["--name", NAME, "--source", "huggingface_hub", "--repo", REPO, "--bundle_dir", tmp_path]
            python("-m", "monai.bundle", "download", *words, cwd=tmp_path, **hub)
        else:
            assert_it_worked(
                python("-c", USE, json.dumps(options), tmp_path, scan, cwd=tmp_path, **hub).stdout, tmp_path, scan
            )
    files = {path.relative_to(package.hugging_face) for path in package.hugging_face.rglob("*") if path.is_file()}
    assert all((tmp_path / NAME / path).read_bytes() == (package.hugging_face / path).read_bytes() for path in files)


@pytest.fixture
def downloaded(package, tmp_path) -> Path:
    """A zip under the name that MONAI saves it as, without the version."""
    return Path(shutil.copy(package.archive, tmp_path / f"{NAME}.zip"))


@pytest.fixture
def unbuilt_checks(monkeypatch) -> None:
    monkeypatch.setattr("zoo.verify.run_checks", lambda folder: iter(()))


def test_the_list_of_releases_tells_a_download_that_it_released(package, downloaded, unbuilt_checks, capsys):
    assert main([str(downloaded), "--model_info", str(package.archive.with_name("model_info.json"))]) == 0
    assert "ok           bytes as released\n" in capsys.readouterr().out


def test_a_download_with_another_hash_is_refused_with_both(package, downloaded, unbuilt_checks, capsys):
    with open(downloaded, "ab") as file:
        file.write(b"\0")  # trailing data: the zip still opens
    assert main([str(downloaded), "--model_info", str(package.archive.with_name("model_info.json"))]) == 1
    output = capsys.readouterr().out
    assert "FAILED       bytes as released: " in output and package.checksum in output and "download it again" in output


def test_a_package_that_the_list_does_not_name_is_refused(downloaded, unbuilt_checks, tmp_path, capsys):
    (tmp_path / "list.json").write_text('{"another_v0.1.0": {"checksum": "0", "source": ""}}')
    assert main([str(downloaded), "--model_info", str(tmp_path / "list.json")]) == 1
    assert "does not contain swin_unetr_btcv_seg_v0.1.0, only another_v0.1.0" in capsys.readouterr().out
