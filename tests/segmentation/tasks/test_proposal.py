# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Proposed rows follow the rules written beside their values. Expected values are calculated by hand."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.networks.roi_size import check_roi_size
from bundles.common.run.options import check_option
from bundles.segmentation.tasks import proposal as module
from bundles.segmentation.tasks.data_fingerprint import DataFingerprint, ScanFacts
from bundles.segmentation.tasks.proposal import (
    coarser_spacing,
    propose_row,
    proposed_row,
    roi_of,
    share_seen,
    target_spacing,
    write_proposal,
)
from bundles.segmentation.tasks.tasks import choose_task

from ...realdata.test_real_scans import DATA
from ...workflows.command_line import BUNDLES

LABELS = {"0": "background", "1": "organ"}


def scan(size, spacing, *, voxels=(900_000, 100_000), intensities=(), name="a") -> ScanFacts:
    """A scan without air: bright everywhere."""
    profiles = tuple(np.full(side, 1000.0) for side in size)
    return ScanFacts(name, tuple(map(float, spacing)), profiles, np.array(voxels), np.array(intensities, float))


def data(*scans: ScanFacts) -> DataFingerprint:
    return DataFingerprint(scans, tuple(range(len(scans[0].class_voxels))))


# ---- whole rows ----------------------------------------------------------------------------------------------------


def test_ct_with_thick_slices_as_of_the_spleen():
    """x and y at the median of 0.7, 0.8, 0.9; z, 5 > 3 * 0.8 with 90 < 512 / 3, at the 10th percentile of 2.5, 5, 5.

    96^3 = 884736 has room for 160 x 160 x 32, but not for 192 x 192 x 32 nor for 128 x 128 x 64. cpu: the median scan,
    409.6 x 409.6 x 450 mm, has 84 x 84 x 92 voxels at 0.8 * 1.1^19 = 4.9 mm, of which 64 x 64 x 32 is 20%, and
    76 x 76 x 83 at 5.4 mm: 27%.
    """
    hu = np.arange(-41.0, 160.0)  # 0.5 and 99.5 percentiles: -40 and 158
    scans = [scan((512, 512, 90), (xy, xy, z), intensities=hu) for xy, z in ((0.7, 2.5), (0.8, 5), (0.9, 5))]
    row = propose_row(data(*scans), channels=["CT"], labels=LABELS).row
    assert row["spacing"] == [0.8, 0.8, 3.0]
    assert row["hu_window"] == [-40.0, 160.0] and row["foreground"] == -40.0 and row["modality"] == "CT"
    assert row["roi_size"] == [160, 160, 32]
    assert row["nsd_tolerance"] == 3.0
    assert row["official"] == {"crop_sampling": "pos_neg"}
    assert row["cpu"] == {"spacing": [5.4, 5.4, 5.4], "roi_size": [64, 64, 32]}


def test_small_mr_as_of_the_hippocampus():
    """35 x 50 x 35 fits into 64^3, of which three fill 96^3; cpu has room for half of that: 32 of 35 slices."""
    scans = [scan((side, 50, 35), (1, 1, 1), voxels=(50_000, 1500, 1400)) for side in (33, 35, 37, 35, 35)]
    labels = {"0": "background", "1": "anterior", "2": "posterior"}
    row = propose_row(data(*scans), channels=["MRI"], labels=labels).row
    assert row == {
        "modality": "MR",
        "channels": ["MRI"],
        "labels": labels,
        "spacing": [1.0, 1.0, 1.0],
        "roi_size": [64, 64, 64],
        "hu_window": None,
        "foreground": 0.0,
        "nsd_tolerance": 1.0,
        "official": {"crop_sampling": "pos_neg", "batch_size": 3},
        "cpu": {"spacing": [1.0, 1.0, 1.0], "roi_size": [64, 64, 32]},
    }


def test_mr_of_few_slices_as_of_the_prostate():
    """z keeps 3.6 mm, because all scans are the same.

    cpu: 192 x 192 x 72 mm are 137 x 137 x 20 voxels at 0.6 * 1.1^9 = 1.4 mm, of which 64 x 64 x 32 is 22%, and
    120 x 120 x 20 at 1.6 mm: 28%.
    """
    scans = [scan((320, 320, 20), (0.6, 0.6, 3.6), voxels=(2_000_000, 9_100, 900)) for _ in range(3)]
    labels = {"0": "background", "1": "peripheral", "2": "transition"}
    row = propose_row(data(*scans), channels=["T2", "ADC"], labels=labels).row
    assert row["spacing"] == [0.6, 0.6, 3.6] and row["roi_size"] == [160, 160, 32]
    assert row["nsd_tolerance"] == 4.0  # 3.6, rounded up to a multiple of 0.5
    assert row["channels"] == ["T2", "ADC"] and row["hu_window"] is None
    assert row["official"] == {"crop_sampling": "classes"}  # 900 of 10000 is 9%
    assert row["cpu"] == {"spacing": [1.6, 1.6, 3.6], "roi_size": [64, 64, 32]}


# ---- single rules --------------------------------------------------------------------------------------------------


def test_the_coarse_axis_is_treated_apart_only_where_it_has_few_voxels_too():
    """nnU-Net: more than 3 times as coarse as the next AND less than a third of its voxels."""

    def target(z, size):
        spacings = np.array([[1.0, 0.8, value] for value in z])
        return target_spacing(spacings, np.tile(size, (len(z), 1)))[0]

    assert target((2, 4, 4, 6, 6), (99, 90, 29)) == [1.0, 0.8, 2.8]  # 10th percentile: 2 + 0.4 * (4 - 2)
    assert target((2, 4, 4, 6, 6), (99, 90, 30)) == [1.0, 0.8, 4.0]  # 3 * 30 is not less than 90
    assert target((2, 3, 3, 6, 6), (99, 90, 29)) == [1.0, 0.8, 3.0]  # 3 is not more than 3 * 1
    assert target((0.1, 4, 4, 4, 4), (99, 90, 29)) == [1.0, 0.8, 1.66]  # 0.1 + 0.4 * 3.9
    assert target((0.1, 0.1, 4, 4, 4), (99, 90, 29)) == [1.0, 0.8, 1.0]  # no finer than the others
    two = np.array([[0.7894, 0.7894, 2.0], [0.7816, 0.7816, 2.0]])
    assert target_spacing(two, np.full((2, 3), 99))[0] == [0.785, 0.785, 2.0]  # 0.7855, in three digits


def test_an_roi_is_even_unless_that_shows_much_less():
    """Comments give the rejected alternatives."""
    assert roi_of([400, 400, 400], voxels=96**3) == [96, 96, 96]
    assert roi_of([512, 512, 90], voxels=96**3) == [
        160,
        160,
        32,
    ]  # 31% of x, 36% of z; 96^3 covers 1% more of the volume, but 19% of x
    assert roi_of([320, 320, 20], voxels=96**3) == [160, 160, 32]
    assert roi_of([76, 76, 83], voxels=64 * 64 * 32) == [64, 64, 32]  # 27%; 32 x 32 x 96 is more even but covers 18%
    assert roi_of([30, 50, 30], voxels=96**3) == [64, 64, 32]  # x equals y
    assert roi_of([20, 31, 32], voxels=96**3) == [32, 32, 64]


@pytest.mark.parametrize("voxels", [96**3, 64 * 64 * 32])
def test_every_roi_is_one_that_the_network_takes_within_its_budget(voxels):
    for size in itertools.product((9, 32, 33, 70, 130, 512), repeat=3):
        roi = roi_of(size, voxels=voxels)
        check_roi_size(roi, square_plane=(0, 1))
        assert math.prod(roi) <= voxels
        needed = [32 * math.ceil(side / 32) for side in (max(size[:2]), size[2])]
        assert roi[0] <= needed[0] and (roi[2] <= needed[1] or roi == [32, 32, 64])
        if needed[0] ** 2 * needed[1] <= voxels:  # there is room for all of it
            assert share_seen(roi, size) == 1


def test_the_coarser_spacing_is_the_first_that_shows_a_quarter_and_keeps_coarse_axes():
    """300 mm are 79 voxels of 3.8 mm, of which 64 x 64 x 32 is (64/79)^2 * 32/79 = 27%, and 86 of 3.5 mm: 21%."""
    extents = np.array([[300.0, 300.0, 300.0]])
    assert coarser_spacing([1.0, 1.0, 2.5], extents, voxels=64 * 64 * 32) == [3.8, 3.8, 3.8]
    assert share_seen([64, 64, 32], [79, 79, 79]) > 0.25 > share_seen([64, 64, 32], [86, 86, 86])
    assert coarser_spacing([1.0, 1.0, 6.0], extents, voxels=64 * 64 * 32) == [3.1, 3.1, 6.0]
    assert share_seen([64, 64, 32], [97, 97, 50]) > 0.25 > share_seen([64, 64, 32], [103, 103, 50])
    assert coarser_spacing([1.0, 1.0, 1.0], extents / 5, voxels=64 * 64 * 32) == [1.0, 1.0, 1.0]  # 60^3: covers half


def test_a_batch_of_small_volumes_is_no_larger_than_there_are_scans():
    """40 x 40 x 20: 64 x 64 x 32 covers it; 884736 / 131072 = 6.75; 131072 / 131072 = 1 keeps the batch of cpu."""
    for count, batch in ((4, 4), (6, 6), (9, 6)):
        row = propose_row(data(*[scan((40, 40, 20), (1, 1, 1))] * count), channels=["MR"], labels=LABELS).row
        assert row["roi_size"] == [64, 64, 32] and row["official"]["batch_size"] == batch
        assert "batch_size" not in row["cpu"]
    row = propose_row(data(*[scan((20, 20, 20), (1, 1, 1))] * 9), channels=["MR"], labels=LABELS).row
    assert row["roi_size"] == row["cpu"]["roi_size"] == [32, 32, 64]
    assert (row["official"]["batch_size"], row["cpu"]["batch_size"]) == (9, 4)  # 13 for 9 scans; 2 * 131072 / 65536


def test_budgets_start_from_the_batches_of_the_presets():
    presets = ConfigParser.load_config_file(str(BUNDLES / "swin_unetr_msd" / "configs" / "presets.yaml"))
    assert presets["official"]["batch_size"] == module.OFFICIAL.batch_size
    assert presets["cpu"]["batch_size"] == module.CPU.batch_size


def test_the_window_is_rounded_outwards_and_never_empty():
    def window(values):
        return propose_row(data(scan((9, 9, 99), (1, 1, 1), intensities=values)), channels=["ct"], labels=LABELS).row

    assert window(np.repeat([-33.0, 51.0], 500))["hu_window"] == [-35.0, 55.0]
    assert window(np.repeat([-35.0, 55.0], 500))["hu_window"] == [-35.0, 55.0]
    assert window([40.0] * 9)["hu_window"] == [40.0, 45.0]
    for values in ([40.0] * 9, np.arange(-1000.0, 1000.0)):
        for name in ("hu_window", "spacing"):
            check_option(name, window(values)[name])


def test_the_box_is_that_above_the_lower_end_of_the_window():
    """200 planes of air (-1000) around 40 of tissue, whose window starts at -40."""
    profile = np.r_[np.full(100, -1000.0), np.full(40, 60.0), np.full(100, -1000.0)]
    facts = ScanFacts("a", (1.0,) * 3, (profile,) * 3, np.array([9, 9]), np.arange(-40.0, 60.0))
    proposal = propose_row(data(facts), channels=["CT"], labels=LABELS)
    assert proposal.row["foreground"] == -40.0 and proposal.row["roi_size"] == [64, 64, 64]
    assert "40 x 40 x 40 voxels" in proposal.entries["roi_size"][1]


@pytest.mark.parametrize(
    ("channels", "modality", "words"),
    [
        (["CT"], "CT", "calls every channel CT"),
        ([" ct ", "Ct"], "CT", "calls every channel CT"),
        (["CT", "PET"], "MR", "other channels beside CT: no HU window, all are z-scored"),
        (["CTA"], "MR", "names CTA, not CT: z-scored like MR"),
        (["FLAIR", "T1w"], "MR", "names FLAIR, T1w, not CT"),
    ],
)
def test_only_what_is_called_ct_has_a_window_and_that_is_said(channels, modality, words):
    facts = data(scan((99, 99, 99), (1, 1, 1), intensities=range(100)))
    proposal = propose_row(facts, channels=channels, labels=LABELS)
    assert proposal.row["modality"] == modality and (proposal.row["hu_window"] is not None) == (modality == "CT")
    assert words in proposal.entries["modality"][1]


def test_a_class_that_no_scan_holds_is_said_and_labels_without_any_are_refused():
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    proposal = propose_row(data(scan((99, 99, 99), (1, 1, 1), voxels=(9, 5, 0))), channels=["MR"], labels=labels)
    assert proposal.entries["labels"] == (labels, "the data list; NO SCAN CONTAINS cancer")
    assert proposal.row["official"]["crop_sampling"] == "pos_neg"  # only liver is labelled
    with pytest.raises(
        InputError, match="labels of all 1 scans contain only background, such as that of a: there is nothing"
    ):
        propose_row(data(scan((99, 99, 99), (1, 1, 1), voxels=(9, 0, 0))), channels=["MR"], labels=labels)


# ---- from the files ------------------------------------------------------------------------------------------------


def make_data(folder: Path, *, cases: int = 3, **changes) -> Path:
    """CT of 20 x 20 x 8 voxels of 1 x 1 x 2 mm, in LPS; HU of the organ is 0, 1, ... in each."""
    (folder / "imagesTr").mkdir(parents=True)
    affine, training = np.diag([-1.0, -1.0, 2.0, 1.0]), []
    for number in range(cases):
        image, label = np.full((20, 20, 8), -1000, np.int16), np.zeros((20, 20, 8), np.uint8)
        label[5:15, 5:15, 2:6] = 1
        image[label == 1] = np.arange(400)
        files = {key: f"imagesTr/{number}_{key}.nii.gz" for key in ("image", "label")}
        for key, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, affine), folder / files[key])
        training.append(files)
    content = {"name": "My organs, v2", "modality": {"0": "CT"}, "labels": LABELS, "training": training} | changes
    path = folder / "dataset.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_data_set_gets_its_row_printed_and_written_with_reasons(tmp_path, capsys, caplog):
    """The 0.5 and 99.5 percentiles of 0 to 399 are 1.995 and 397.005; 10 x 10 x 4 voxels are above 0."""
    path = make_data(tmp_path / "data")
    caplog.set_level(logging.INFO)
    name, row = proposed_row(path, output_dir=tmp_path / "out")
    assert name == "My_organs_v2"
    assert row["spacing"] == [1.0, 1.0, 2.0] and row["hu_window"] == [0.0, 400.0] and row["roi_size"] == [32, 32, 64]
    printed = capsys.readouterr().out
    assert "My_organs_v2: a row proposed from 3 scans" in printed and "│ 0.0, 400.0 " in printed
    written = tmp_path / "out" / "task.yaml"
    assert f"wrote the proposed row to {written}: edit it, then use it with --task {written}" in caplog.text
    assert ConfigParser.load_config_file(str(written)) == {name: row}
    text = written.read_text()
    assert f"configs/train.yaml --task {written} --dataset_dir {tmp_path}/data\n" in text
    assert (
        "  hu_window: [0.0, 400.0]  # 0.5 and 99.5 percentiles of labelled voxels, 1.995 and 397 HU (nnU-Net), outwards"
        in text
    )
    assert "10 x 10 x 4 voxels at this spacing" in text
    body = text[text.index('"My_organs_v2":') :].splitlines()[1:]
    assert all("  # " in line for line in body if line.strip() not in ("official:", "cpu:")) and len(body) == 15
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["task.yaml"]


def test_the_data_set_and_the_file_that_was_written_are_the_same_task(tmp_path):
    path = make_data(tmp_path / "data")
    file, written = str(BUNDLES / "swin_unetr_msd" / "configs" / "tasks.yaml"), tmp_path / "task.yaml"
    for preset in ("official", "few_label", "whole_network", "cpu"):
        of_data = choose_task(task=str(path), file=file, preset=preset, output_dir=str(tmp_path))
        assert of_data == choose_task(task=str(written), file=file, preset=preset)
        assert of_data["name"] == "My_organs_v2" and of_data["hu_window"] == [0.0, 400.0]
        check_roi_size(of_data["roi_size"])


def test_a_row_that_was_edited_is_never_overwritten(tmp_path):
    path = make_data(tmp_path / "data")
    proposed_row(path, output_dir=tmp_path)
    written = tmp_path / "task.yaml"
    text = written.read_text() + "# kept, as the row is the same\n"
    written.write_text(text)
    proposed_row(path, output_dir=tmp_path)
    assert written.read_text() == text
    for edited in (text.replace("[0.0, 400.0]", "[-5.0, 400.0]"), "no: [row", ""):
        written.write_text(edited)
        with pytest.raises(InputError, match="task.yaml differs from the row proposed for .*dataset.json") as error:
            proposed_row(path, output_dir=tmp_path)
        assert f"pass --task {written}; for a new proposal, remove it or choose another --output_dir." in str(
            error.value
        )
        assert written.read_text() == edited
    assert proposed_row(path, output_dir=None)[0] == "My_organs_v2"  # nothing is written


def test_names_and_labels_of_any_text_come_back_from_the_file(tmp_path):
    """Special characters of YAML and MONAI configs, a line break, non-Latin scripts."""
    labels = {"0": "background", "1": 'Milz: "größer"\n# 5', "2": "$@脾", "3": "no"}
    facts = data(scan((99, 99, 99), (1, 1, 1), voxels=(9, 9, 9, 0)))
    proposal = propose_row(facts, channels=["null\n"], labels=labels)
    write_proposal(proposal, name="123", path=tmp_path / "task.yaml", dataset_json=tmp_path / "a b" / "list.json")
    assert ConfigParser.load_config_file(str(tmp_path / "task.yaml")) == {"123": proposal.row}
    text = (tmp_path / "task.yaml").read_text()
    assert yaml.safe_load(text) == {"123": proposal.row}
    assert f"--dataset_dir '{tmp_path}/a b' --data_list list.json" in text


@pytest.mark.parametrize(
    ("declared", "name"),
    [("Spleen", "Spleen"), ("A/B: c", "A_B_c"), ("", "my_data"), (None, "my_data"), ("脾", "my_data"), (7, "7")],
)
def test_the_name_is_the_lists_own_or_the_folders(tmp_path, declared, name):
    path = make_data(tmp_path / "my data", cases=1, name=declared)
    assert proposed_row(path, output_dir=None)[0] == name


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        proposed_row(path, output_dir=path.parent / "out")
    assert not (path.parent / "out").exists()
    return str(error.value)


def test_a_list_that_is_not_there_or_lacks_what_a_row_needs_is_refused(tmp_path):
    missing = tmp_path / "none" / "dataset.json"
    assert refusal(missing) == (
        f"--task {missing}: file not found. It must be the folder of a data set, or its dataset.json."
    )
    for number, (changes, words) in enumerate(
        [
            ({"labels": None}, 'declares no labels. Add them: "labels": {"0": "background", "1": "spleen"}.'),
            ({"labels": {"background": 0, "organ": 1}}, "'labels' must map label values to names"),
            (
                {"labels": {"0": "background", "2": "organ"}},
                "must have the values 0 (background), 1, 2, ... without a gap",
            ),
            (
                {"modality": None},
                'declares no \'modality\'. Name each channel by its number from 0: "modality": {"0": "CT"}',
            ),
            ({"modality": "CT"}, "declares 'modality' 'CT'. Name each channel by its number"),
            ({"modality": {"1": "CT"}}, "declares 'modality' {'1': 'CT'}. Name each channel by its number from 0"),
            ({"training": [{"image": "imagesTr/0_image.nii.gz"}]}, "none of its 1 training scans has a 'label'"),
            ({"training": [], "test": ["imagesTr/0_image.nii.gz"]}, "none of its 0 training scans has a 'label'"),
            (
                {"modality": {"0": "T2", "1": "ADC"}},
                "(channels: T2, ADC; labels: 0: background, 1: organ): 3 of 3 scans",
            ),
        ]
    ):
        path = make_data(tmp_path / str(number), **changes)
        message = refusal(path)
        assert message.startswith(str(path)) and words in message, changes


def test_scans_that_are_not_as_the_list_declares_are_refused_by_name(tmp_path):
    path = make_data(tmp_path / "data")
    label = path.parent / "imagesTr" / "1_label.nii.gz"
    voxels = np.asarray(nib.load(label).dataobj).astype(np.float32)
    voxels[0, 0, 0] = 1.5
    nib.save(nib.Nifti1Image(voxels, nib.load(label).affine), label)
    message = refusal(path)
    assert message.startswith(f"{path} (channels: CT; labels: 0: background, 1: organ): 1 of 3 scans are bad:")
    assert f"{label}: holds the label value 1.5; allowed are whole numbers, the declared 0, 1" in message


def test_scans_without_a_label_are_left_out_and_an_absent_class_is_warned_of(tmp_path, caplog):
    path = make_data(tmp_path / "data", labels={"0": "background", "1": "organ", "2": "cancer"})
    content = json.loads(path.read_text())
    content["training"].append({"image": "imagesTr/not_there.nii.gz"})
    path.write_text(json.dumps(content))
    caplog.set_level(logging.INFO)
    _, row = proposed_row(path, output_dir=None)
    assert row["labels"]["2"] == "cancer"
    assert "1 of 4 training scans have no label and are not measured" in caplog.text
    assert f"{path}: no training label contains cancer: the network cannot learn it" in caplog.text


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "Task04_Hippocampus").is_dir(), reason="no real scans here: set REALDATA")
def test_of_the_hippocampus_the_whole_volume_is_seen_at_one_millimetre(tmp_path):
    name, row = proposed_row(DATA / "Task04_Hippocampus" / "dataset.json", output_dir=tmp_path)
    assert name == "Hippocampus" and row["modality"] == "MR" and row["hu_window"] is None
    assert row["spacing"] == row["cpu"]["spacing"] == [1.0, 1.0, 1.0]
    assert row["roi_size"] == [64, 64, 64] and row["cpu"]["roi_size"] == [64, 64, 32]
    assert row["official"] == {"crop_sampling": "pos_neg", "batch_size": 3}
    assert "covers 100% of the median scan" in (tmp_path / "task.yaml").read_text()
