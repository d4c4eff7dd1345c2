# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The challenge's CSV files become NIfTI files in their places, or a message names the file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from evidence.openkbp import main


def flat(x: int, y: int, z: int) -> int:
    """The challenge's index of a voxel of the NIfTI file."""
    return ((127 - y) * 128 + (127 - x)) * 128 + (127 - z)


def write_patient(folder: Path, *, ct: dict[int, float], structures: dict[str, list[int]]) -> None:
    folder.mkdir(parents=True)
    (folder / "ct.csv").write_text(",data\n" + "".join(f"{index},{value:.1f}\n" for index, value in ct.items()))
    for name, indices in structures.items():
        (folder / f"{name}.csv").write_text(",data\n" + "".join(f"{index},\n" for index in indices))
    (folder / "voxel_dimensions.csv").write_text("3.9\n3.8\n2.5\n")


@pytest.fixture
def source(tmp_path):
    ct = {flat(10, 20, 30): 1024.0, flat(127, 0, 5): 2000.0}
    organs = {"Brainstem": [flat(1, 2, 3), flat(4, 5, 6)], "Mandible": [flat(4, 5, 6)]}
    for number in (1, 2, 8):  # 8 is not in the figures
        write_patient(tmp_path / f"provided-data/train-pats/pt_{number}", ct=ct, structures=organs)
    write_patient(tmp_path / "provided-data/valid-pats/pt_201", ct=ct, structures={"PTV70": [1]})
    return tmp_path / "provided-data"


def test_voxels_lie_in_their_places(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(source), str(out)]) == 0
    assert "2 training and 1 validation patients" in capsys.readouterr().out
    content = json.loads((out / "dataset.json").read_text())
    assert [entry["patient"] for entry in content["training"]] == ["pt_1", "pt_2"]
    assert content["labels"]["7"] == "mandible"
    image = nib.load(out / content["training"][0]["image"])
    voxels = np.asarray(image.dataobj)
    np.testing.assert_allclose(image.affine, np.diag([3.9, 3.8, 2.5, 1]), rtol=1e-6)
    assert (voxels[10, 20, 30], voxels[127, 0, 5]) == (0, 976)
    assert (voxels == -1024).sum() == 128**3 - 2
    label = np.asarray(nib.load(out / content["training"][0]["label"]).dataobj)
    assert (label[1, 2, 3], label[4, 5, 6], (label > 0).sum()) == (1, 7, 2)  # the later structure counts
    assert not np.asarray(nib.load(out / content["validation"][0]["label"]).dataobj).any()


def test_all_patients_on_request_and_nothing_is_converted_twice(source, tmp_path):
    out = tmp_path / "out"
    main([str(source), str(out)])
    first = out / "imagesTr/train_pt_1.nii.gz"
    os.utime(first, (1, 1))
    main([str(source), str(out), "--all"])
    assert first.stat().st_mtime == 1
    assert len(json.loads((out / "dataset.json").read_text())["training"]) == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ct.csv", ",data\n2097152,3.0\n", r"ct\.csv has an index that is no voxel of 128 x 128 x 128"),
        ("ct.csv", ",data\n1,x\n", r"ct\.csv cannot be read: .*'x'"),
        ("ct.csv", ",data\n1,3.0\n2,1", r"ct\.csv cannot be read: its last line has no end: it is cut short"),
        ("ct.csv", ",data\n", r"ct\.csv cannot be read: it has no rows"),
        ("Mandible.csv", ",data\n12", r"Mandible\.csv cannot be read: its last line has no end"),
        ("voxel_dimensions.csv", "3.9\n", r"voxel_dimensions\.csv must hold three sizes in mm above 0"),
        ("voxel_dimensions.csv", None, r"voxel_dimensions\.csv cannot be read"),
    ],
)
def test_files_in_another_form_are_named(source, tmp_path, capsys, name, text, words):
    file = source / "train-pats/pt_2" / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "out")])
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out/dataset.json").exists()


def test_another_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "out")])
    assert "pass the folder provided-data of the challenge" in capsys.readouterr().err
