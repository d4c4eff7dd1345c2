# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Labels reach unlabelled scans, each scan with its reason or its label, and the same bytes however the run goes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundles.common.data.data_list import segmentation_scans
from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from bundles.common.scans.reading import Volume
from bundles.segmentation.propagation import locations, one_scan, registered_pairs
from bundles.segmentation.propagation import propagate as module
from bundles.segmentation.propagation.agreement import Limits
from bundles.segmentation.propagation.atlas_choice import Selection
from bundles.segmentation.propagation.fusion import IGNORE
from bundles.segmentation.propagation.one_scan import Recipe
from bundles.segmentation.propagation.position.fit import fit_positions, profiles_of
from bundles.segmentation.propagation.position.network import ScanPosition
from bundles.segmentation.propagation.propagate import propagate
from bundles.segmentation.propagation.registration import Registration, RegistrationOptions
from bundles.segmentation.propagation.results import summary_lines
from bundles.segmentation.propagation.scans_of_run import scans_of_run
from tools.synthetic_patient import ORGANS, draw_patient

from .bodies import mean_dice, middle, scan_of

RECIPE = Recipe(
    RegistrationOptions(
        spacing=(12.0, 12.0, 12.0), affine_iterations=30, deformation_iterations=3, control_spacing=90.0
    ),
    dict(ORGANS),
    limits=Limits(min_confidence=0.3),
)
NAMES = {"labels": {"0": "background"} | {str(value): name for value, name in ORGANS.items()}, "modality": {"0": "CT"}}
LABELLED, UNLABELLED, HELD_OUT = (0, 1, 4), (2, 3), (5,)


def true_positions(scan: Volume, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the scan, and those that a good network finds: the same, from the middle of the body, some mm off."""
    scan = scan.to_ras()
    body = np.argwhere(scan.voxels > -300)[::50]
    points = nib.affines.apply_affine(scan.affine, body)
    noise = np.random.default_rng(0).normal(0, 4, points.shape)
    return points, points - centre + noise


class KnownPositions:
    """A position network that knows where the synthetic patients are, by the name of the file."""

    calls = 0

    def __init__(self, path: str, *, device: str) -> None:
        pass

    def locate(self, scan: Volume) -> ScanPosition:
        type(self).calls += 1
        seed = int(np.abs(scan.affine[:3, 3]).sum() * 1000) % 1_000_003
        true, predicted = true_positions(scan, CENTRES[seed])
        return ScanPosition(fit_positions(true, predicted), profiles_of(true, predicted))


CENTRES: dict[int, np.ndarray] = {}


def write_patient(folder, seed: int) -> dict[str, str]:
    image, label = scan_of(seed)
    CENTRES[int(np.abs(image.affine[:3, 3]).sum() * 1000) % 1_000_003] = middle(draw_patient(seed))
    entry = {}
    for kind, volume in (("image", image), ("label", label)):
        file = folder / f"{kind}sTr" / f"p{seed}.nii.gz"
        write_nifti(file, voxels=volume.voxels, affine=volume.affine)
        entry[kind] = str(file)
    return entry


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    entries = {seed: write_patient(folder, seed) for seed in (*LABELLED, *UNLABELLED, *HELD_OUT)}
    (folder / "dataset.json").write_text(
        json.dumps(
            NAMES
            | {
                "training": [entries[seed] for seed in LABELLED],
                "validation": [entries[seed] for seed in HELD_OUT],
                "unlabelled": [{"image": entries[seed]["image"]} for seed in UNLABELLED],
            }
        )
    )
    (folder / "network.pt").write_bytes(b"not read")
    return folder


@pytest.fixture(autouse=True)
def known_positions(monkeypatch):
    monkeypatch.setattr(locations, "PositionNetwork", KnownPositions)


def run(data, out, *, selection=None, recipe=RECIPE, workers=0, **options):
    purpose = options.get("purpose", "training")
    scans = scans_of_run(dataset_dir=str(data), output_dir=str(out), **options)
    return propagate(
        scans=scans,
        position_network=str(data / "network.pt"),
        recipe=recipe,
        selection=selection or Selection(),
        output_dir=str(out),
        purpose=purpose,
        workers=workers,
        names=NAMES,
    )


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("carried")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locations, "PositionNetwork", KnownPositions)
        return out, run(data, out)


def copy_of(done, folder):
    """A finished run, of which a new run repeats only what differs."""
    return Path(shutil.copytree(done[0], folder / "copy"))


def table(out):
    with open(out / "propagation.csv") as file:
        return list(csv.DictReader(file))


def digests(out):
    """Digest of every file that a user sees, by its path."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and ".propagated" not in path.parts]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_carried_labels_are_right_and_unknown_where_they_are_not_sure(data, done):
    out, summary = done
    assert summary.labelled == ("p2", "p3") and summary.left_out == {}
    for seed in UNLABELLED:
        label = nib.load(out / "labels" / f"p{seed}.nii.gz")
        mask = np.asarray(nib.load(out / "masks" / f"p{seed}_seg.nii.gz").dataobj)
        confidence = np.asarray(nib.load(out / "confidence" / f"p{seed}.nii.gz").dataobj)
        truth = scan_of(seed)[1]
        assert np.allclose(label.affine, truth.affine) and label.get_data_dtype() == np.uint8
        label = np.asarray(label.dataobj)
        assert mean_dice(mask, truth.voxels) > 0.6
        known = label != 255
        assert 0.5 < known.mean() < 1 and set(np.unique(mask)) <= {0, *ORGANS}
        right = (mask == truth.voxels)[truth.voxels > 0]
        assert (label == truth.voxels)[
            (truth.voxels > 0) & known
        ].mean() > right.mean()  # the doubtful voxels were wrong
        assert (confidence[known & (label > 0)] >= 60).all() and confidence.max() <= 100


def test_agreement_is_measured_on_the_labelled_scans(done):
    out, summary = done
    rows = list(csv.DictReader(open(out / "left_one_out.csv")))
    assert {row["scan"] for row in rows} == {"p0", "p1", "p4"}
    assert summary.relation.pairs >= 6 and summary.relation.rank_correlation > 0
    assert summary.min_agreement == max(summary.relation.min_agreement, Selection().otherwise)
    dice = np.array([float(row["dice"]) for row in rows if row["agreement"]])
    agreed = np.array([float(row["agreement"]) for row in rows if row["agreement"]])
    assert dice[agreed >= summary.min_agreement - 1e-3].mean() >= 0.6
    assert (out / "agreement.png").stat().st_size > 1000 and (out / "contact_sheet_001.png").stat().st_size > 1000


def test_the_data_list_trains_as_it_is(data, done):
    out, _ = done
    training = segmentation_scans(out, section="training", fold=None)
    assert [bool(entry.get("carried")) for entry in training] == [False] * 3 + [True] * 2
    assert all(os.path.isfile(entry["image"]) and os.path.isfile(entry["label"]) for entry in training)
    assert all({*each["carried_from"]} <= {entry["image"] for entry in training[:3]} for each in training[3:])
    assert all(each["carried_from"] for each in training[3:])
    validation = segmentation_scans(out, section="validation", fold=None)
    assert [os.path.basename(entry["image"]) for entry in validation] == ["p5.nii.gz"]
    assert json.loads((out / "dataset.json").read_text())["labels"] == NAMES["labels"]


def test_the_table_says_for_each_organ_what_came_of_it(done):
    rows = table(done[0])
    assert [row["scan"] for row in rows] == ["p2"] * len(ORGANS) + ["p3"] * len(ORGANS)
    for row in rows:
        label, mask = (
            np.asarray(nib.load(done[0] / kind / f"{row['scan']}{end}.nii.gz").dataobj)
            for kind, end in (("labels", ""), ("masks", "_seg"))
        )
        value = {name: value for value, name in ORGANS.items()}[row["organ"]]
        voxels = float((mask == value).sum()) * 8**3 / 1000
        if row["kept"] == "true":
            assert float(row["volume_ml"]) == pytest.approx(voxels, rel=1e-3)
            assert "agree by Dice" in row["reason"]
        else:
            assert not (label == value).any()  # unknown, not background


def test_processes_a_stop_and_a_continued_run_give_the_same_bytes(data, done, tmp_path):
    out, _ = done
    whole = tmp_path / "whole"
    assert run(data, whole, workers=2).labelled == ("p2", "p3")
    stopped = tmp_path / "stopped"
    calls = 0

    def one_then_stop(job):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(job)

    real = module.label_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", one_then_stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(data, stopped)
    assert not (stopped / "dataset.json").exists()
    KnownPositions.calls, made = 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", lambda job: made.append(job.target.name) or real(job))
        run(data, stopped)
    assert KnownPositions.calls == 0  # all positions were known
    assert made == ["p1", "p4", "p2", "p3"]
    expected = digests(out)
    for other in (whole, stopped):
        found = digests(other)
        assert found.keys() == expected.keys()
        # The list alone names paths; they are the same, since the scans did not move.
        assert [name for name in found if found[name] != expected[name]] == []


def test_another_option_makes_only_what_depends_on_it(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    made = []
    real = module.label_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", lambda job: made.append((job.leave_out, job.target.name)) or real(job))
        run(data, out)
        assert made == []
        with pytest.raises(InputError, match="None of the 2 scans got a label, such as p2: 0 of 13 organs"):
            run(data, out, selection=Selection(min_agreement=0.99))
    assert made == [(False, "p2"), (False, "p3")]
    run_again = {row["organ"]: row for row in table(out) if row["scan"] == "p2"}
    assert run_again["*"]["kept"] == "false" and "organs can be kept" in run_again["*"]["reason"]
    assert (out / "left_out_001.png").exists() and not (out / "contact_sheet_001.png").exists()


def test_bad_scans_are_left_out_with_their_reasons_and_the_rest_goes_on(data, done, tmp_path):
    folder = tmp_path / "scans"
    good, _ = scan_of(2)
    write_nifti(folder / "good.nii.gz", voxels=good.voxels, affine=good.affine)
    write_nifti(folder / "air.nii.gz", voxels=np.full((20, 20, 20), -1000, np.int16), affine=good.affine)
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:5000])

    class Network(KnownPositions):
        def locate(self, scan):
            if scan.voxels.max() < 0:
                raise InputError("has 0 voxels of body, and 1000 are needed")
            return super().locate(scan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locations, "PositionNetwork", Network)
        out = copy_of(done, tmp_path)
        summary = run(data, out, unlabelled=str(folder))
    assert summary.labelled == ("good",)
    assert "0 voxels of body" in summary.left_out["air"]
    assert "cut" in summary.left_out and "damaged" in summary.left_out["cut"]
    assert {row["scan"] for row in table(out) if row["organ"] == "*"} == {"air", "cut"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": (-1.0, 1.0, 1.0)}, "mirrored or turned"),
        ({"scale": (1.0, 1.0, 0.1)}, "z axis has scale 0.10, not 0.2 to 1.6: another region"),
        ({"says": 5000.0}, "differ from those of every labelled scan"),
        ({"longer": 10.0}, "no labelled scan covers enough of it"),
    ],
)
def test_scans_that_do_not_fit_by_position_are_left_out(data, done, tmp_path, change, reason):
    class Network(KnownPositions):
        def locate(self, scan):
            position = super().locate(scan)
            if not np.allclose(scan.affine, scan_of(3)[0].affine, atol=1e-3):
                return position
            fit = replace(position.fit, scale=change.get("scale", position.fit.scale))
            x, y, (at, says) = position.profiles
            at, says = np.array(at), np.array(says) + change.get("says", 0.0)
            if "longer" in change:  # ten times as long as the labelled scans
                beyond = at[-1] + 5 * np.arange(1, 10 * len(at))
                at, says = np.append(at, beyond), np.append(says, says[-1] + beyond - at[-1])
            return ScanPosition(fit, (x, y, (tuple(at.tolist()), tuple(says.tolist()))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locations, "PositionNetwork", Network)
        out = copy_of(done, tmp_path)
        shutil.rmtree(out / ".propagated" / "positions")
        summary = run(data, out)
    assert summary.labelled == ("p2",) and reason in summary.left_out["p3"]
    assert not (out / "labels" / "p3.nii.gz").exists()


def test_two_labelled_scans_and_one(data, tmp_path):
    content, known = json.loads((data / "dataset.json").read_text()), {}
    for number in (2, 1):
        content["training"] = content["training"][:number]
        (tmp_path / "list.json").write_text(json.dumps(content))
        out = tmp_path / str(number)
        scans = scans_of_run(dataset_dir=str(tmp_path), data_list="list.json", output_dir=str(out))
        summary = propagate(
            scans=scans,
            position_network=str(data / "network.pt"),
            recipe=replace(RECIPE, min_organs=0.1),
            selection=Selection(otherwise=0.35),
            output_dir=str(out),
            workers=0,
            names=NAMES,
        )
        assert summary.min_agreement == 0.35 and summary.labelled == ("p2", "p3")
        assert (out / "left_one_out.csv").exists() == (number == 2)
        reasons = {row["reason"].split(",")[0].split(" 0.")[0] for row in table(out) if row["kept"] == "true"}
        assert reasons == ({"the copies agree by Dice"} if number == 2 else {"one copy only"})
        label, percent = (np.asarray(nib.load(out / part / "p3.nii.gz").dataobj) for part in ("labels", "confidence"))
        known[number] = percent[(label != IGNORE) & (label != 0)]
    # Votes of two copies are compared with threshold; where one judges alone, its likeness is with min_confidence.
    assert known[1].min() >= 29 and (known[1] < 45).any()
    assert known[2].min() >= 29 and (known[2] < 59).mean() < 0.2 * (known[1] < 59).mean()


def test_masks_without_training(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    (out / "dataset.json").unlink()
    summary = run(data, out, unlabelled=str(data / "imagesTr" / "p5.nii.gz"), purpose="masks")
    assert summary.labelled == ("p5",) and not (out / "dataset.json").exists()
    mask = np.asarray(nib.load(out / "masks" / "p5_seg.nii.gz").dataobj)
    assert mean_dice(mask, scan_of(5)[1].voxels) > 0.5


def test_labels_that_cannot_be_carried_are_named_and_the_others_are_used(data, done, tmp_path, caplog):
    content = json.loads((data / "dataset.json").read_text())
    label = nib.load(content["training"][0]["label"])
    for number, voxels in enumerate((np.full(label.shape, 77), np.zeros(label.shape), np.zeros((5, 5, 5)))):
        file = tmp_path / f"bad{number}.nii.gz"
        write_nifti(file, voxels=voxels.astype(np.uint8), affine=label.affine)
        content["training"].append({"image": content["training"][0]["image"], "label": str(file)})
    for number, entry in enumerate(content["training"][3:]):
        image = tmp_path / f"image{number}.nii.gz"
        image.write_bytes(open(entry["image"], "rb").read())
        entry["image"] = str(image)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    shutil.copy2(data / "network.pt", tmp_path / "network.pt")
    out = copy_of(done, tmp_path)
    summary = run(tmp_path, out)
    assert summary.labelled == ("p2", "p3")
    for text in ("has the values [77.0]", "has no voxel of any organ", "is on another grid, (5, 5, 5) voxels"):
        assert text in caplog.text
    listed = json.loads((out / "dataset.json").read_text())["training"]
    assert len(listed) == 5  # three real and two carried
    content["training"] = content["training"][3:]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="None of the 3 labelled scans can be used"):
        run(tmp_path, tmp_path / "none")


def test_a_second_run_into_the_same_folder_is_refused(data, tmp_path):
    from bundles.common.files import folder_lock

    with folder_lock(tmp_path / ".propagated" / "lock"), pytest.raises(InputError, match="Another run"):
        run(data, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atlases": 0}, "--atlases 0"),
        ({"wanted_dice": 2}, "--wanted_dice 2"),
        ({"max_residual": -1}, "--max_residual -1"),
        ({"min_common": None}, "--min_common None"),
        ({"scales": [1.2, 1.6]}, r"--scales \[1.2, 1.6\]"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Selection(**options)


def test_an_unexpected_error_costs_its_own_scan_and_is_tried_again(data, done, tmp_path, caplog):
    out = copy_of(done, tmp_path)
    (out / ".propagated" / "labels" / "p2.json").unlink()
    shutil.rmtree(out / ".propagated" / "pairs" / "p2")
    real, broken = registered_pairs.register, True

    def register(*args, **kwargs):
        if broken:
            raise ValueError("a library has a bad day")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered_pairs, "register", register)
        summary = run(data, out)
        assert summary.labelled == ("p3",) and "ValueError: a library has a bad day" in summary.left_out["p2"]
        assert "Traceback" in caplog.text and not (out / "labels" / "p2.nii.gz").exists()
        broken = False
        assert run(data, out).labelled == ("p2", "p3")


def test_a_full_disk_ends_the_run_with_one_message(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    (out / ".propagated" / "labels" / "p2.json").unlink()

    def write(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_scan, "write_nifti", write)
        with pytest.raises(InputError, match="No space left on device. Finished scans are kept"):
            run(data, out)


def test_a_transform_that_cannot_be_written_ends_the_run_with_one_message(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    (out / ".propagated" / "labels" / "p2.json").unlink()
    shutil.rmtree(out / ".propagated" / "pairs" / "p2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            registered_pairs, "register", lambda *args, **options: replace(Registration(), transform=object())
        )
        patch.setattr(registered_pairs, "simple_itk", lambda: NoRoom)
        with pytest.raises(InputError, match="p[014].tfm: itk: cannot write. Finished scans are kept"):
            run(data, out)


class NoRoom:
    @staticmethod
    def WriteTransform(transform, file):
        raise RuntimeError("Exception thrown\nitk: cannot write\n")


def test_an_organ_that_no_copy_has_makes_background_unknown(data, done, tmp_path):
    """Scan p0 alone has no spleen: its background may be the spleen of others."""
    content = json.loads((data / "dataset.json").read_text())
    spleen = {name: value for value, name in ORGANS.items()}["spleen"]
    _, label = scan_of(0)
    without = tmp_path / "without.nii.gz"
    write_nifti(without, voxels=np.where(label.voxels == spleen, 0, label.voxels).astype(np.uint8), affine=label.affine)
    content["training"] = [{**content["training"][0], "label": str(without)}, content["training"][1]]
    content["unlabelled"] = content["unlabelled"][:1]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    shutil.copy2(data / "network.pt", tmp_path / "network.pt")
    recipe = replace(RECIPE, min_organs=0.1)
    real = registered_pairs.register

    def register(moving, fixed, **options):  # the scan with a spleen cannot be registered
        found = real(moving, fixed, **options)
        failed = np.allclose(moving.affine, scan_of(1)[0].affine, atol=1e-3)
        return replace(found, transform=None, reason="no common field of view") if failed else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered_pairs, "register", register)
        run(tmp_path, tmp_path / "out", recipe=recipe, selection=Selection(otherwise=0.1))
    label = np.asarray(nib.load(tmp_path / "out" / "labels" / "p2.nii.gz").dataobj)
    assert not (label == 0).any() and (label == 255).any() and (0 < label[label != 255]).all()


def test_masks_leave_the_labels_and_the_list_of_a_training_alone(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    before = {name: digest for name, digest in digests(out).items() if name.startswith(("labels", "dataset.json"))}
    assert "dataset.json" in before
    run(data, out, purpose="masks")
    after = {name: digest for name, digest in digests(out).items() if name.startswith(("labels", "dataset.json"))}
    assert after == before


def test_a_run_that_stops_between_files_and_record_leaves_no_record_of_others(data, done, tmp_path):
    """Else the run before it, repeated, would take the files of the stopped one for its own."""
    out = copy_of(done, tmp_path)
    before = digests(out)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_scan, "_write_picture", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, out, recipe=replace(RECIPE, threshold=0.95))
    assert digests(out)["labels/p2.nii.gz"] != before["labels/p2.nii.gz"]
    run(data, out)
    assert digests(out) == before


def test_the_folder_of_ones_own_data_is_no_output(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "own"))
    before = digests(own)
    with pytest.raises(InputError, match=r"own holds a dataset\.json that no run of propagate\.yaml wrote"):
        run(data, own)
    assert digests(own) == before


def test_a_run_that_begins_anew_takes_its_old_list_away(data, done, tmp_path):
    out = copy_of(done, tmp_path)

    def stop(job):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, out, recipe=replace(RECIPE, threshold=0.7))
    assert not (out / "dataset.json").exists()


def test_a_scan_that_is_left_out_for_once_keeps_its_finished_label(data, done, tmp_path):
    """A mistyped option, or a scan on a disk that is away for a moment, costs no registration."""
    out = copy_of(done, tmp_path)
    before = digests(out)
    with pytest.raises(InputError, match="None of the 2 scans got a label"):
        run(data, out, selection=Selection(max_residual=1e-6))
    assert not list((out / "labels").glob("*")) and not list((out / "masks").glob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", None)  # nothing is done again
        run(data, out)
    assert digests(out) == before


def test_a_new_label_replaces_one_that_was_set_aside(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    with pytest.raises(InputError):
        run(data, out, selection=Selection(max_residual=1e-6))
    stricter = replace(RECIPE, threshold=0.9)
    run(data, out, recipe=stricter)
    label = (out / "labels" / "p2.nii.gz").read_bytes()
    assert label != (done[0] / "labels" / "p2.nii.gz").read_bytes()
    assert not [path for path in (out / ".propagated" / "set_aside").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "file", ["labels/p2.nii.gz", "masks/p2_seg.nii.gz", "confidence/p2.nii.gz", ".propagated/pictures/p2.npy"]
)
@pytest.mark.parametrize("left", [0, 0.7])
def test_a_file_that_was_cut_is_made_anew(data, done, tmp_path, file, left):
    out = copy_of(done, tmp_path)
    whole = (out / file).read_bytes()
    (out / file).write_bytes(whole[: int(left * len(whole))])
    made, real = [], module.label_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "label_scan", lambda job: made.append(job.target.name) or real(job))
        run(data, out)
    assert made == ["p2"] and (out / file).read_bytes() == whole


def test_a_label_that_somebody_has_corrected_stays(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    file = out / "labels" / "p2.nii.gz"
    label = nib.load(file)
    voxels = np.asarray(label.dataobj).copy()
    voxels[:5] = 0
    write_nifti(file, voxels=voxels, affine=label.affine)
    corrected = file.read_bytes()
    run(data, out)
    assert file.read_bytes() == corrected


@pytest.mark.parametrize("kind", ["positions", "labels"])
@pytest.mark.parametrize("content", ["{}", "[]", '{"identity": {}}', "{", "same"])
def test_incomplete_records_are_made_anew(data, done, tmp_path, kind, content):
    out = copy_of(done, tmp_path)
    record = out / ".propagated" / kind / "p2.json"
    if content == "same":  # of this run, but without what it found
        known = json.loads(record.read_text())
        content = json.dumps({"identity": known["identity"], "fit": {}})
    record.write_text(content)
    assert run(data, out).labelled == ("p2", "p3")
    assert json.loads(record.read_text())["identity"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": -1}, "--workers -1 must be"),
        ({"labels": {1: "mean"}}, "An organ is called 'mean'"),
        ({"output": "file"}, "is a file: choose a folder"),
        ({"output": "file", "below": "sub"}, "cannot be written: Not a directory"),
        ({"output": "foreign"}, "no run of propagate.yaml wrote"),
        ({"labels": {77: "liver"}}, "None of the 3 labelled scans can be used"),
    ],
)
def test_what_cannot_work_is_refused_before_a_network_is_trained(data, tmp_path, changes, message):
    out = tmp_path / "out"
    if changes.get("output") == "file":
        out.write_text("")
    if changes.get("output") == "foreign":
        out.mkdir()
        (out / "dataset.json").write_text("{}")
    out = out / changes.get("below", "")
    trained = []
    with pytest.raises(InputError, match=message):
        propagate(
            scans=scans_of_run(dataset_dir=str(data), output_dir=str(tmp_path / "other")),
            position_network=lambda: trained.append(1) or str(data / "network.pt"),
            recipe=replace(RECIPE, labels=changes.get("labels", RECIPE.labels)),
            selection=Selection(),
            output_dir=str(out),
            workers=changes.get("workers", 0),
        )
    assert not trained


def test_labels_that_are_nearly_whole_numbers_are_carried(data, done, tmp_path):
    """Some software stores 1.0000001; training takes it, too."""
    content = json.loads((data / "dataset.json").read_text())
    for entry in content["training"]:
        label = nib.load(entry["label"])
        voxels = np.asarray(label.dataobj).astype(np.float32)
        file = tmp_path / os.path.basename(entry["label"])
        nib.save(nib.Nifti1Image(voxels * np.float32(1.0000002), label.affine), file)
        entry["label"] = str(file)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    shutil.copy2(data / "network.pt", tmp_path / "network.pt")
    out = tmp_path / "out"
    assert run(tmp_path, out).labelled == ("p2", "p3")
    for seed in UNLABELLED:
        assert (out / "labels" / f"p{seed}.nii.gz").read_bytes() == (
            done[0] / "labels" / f"p{seed}.nii.gz"
        ).read_bytes()


def test_the_summary_counts_alike_reasons_and_shows_one_of_each():
    reasons = {
        "p1": "its positions differ from those of every labelled scan, by 25 mm on average, more than 20: another region?",
        "p2": "its positions differ from those of every labelled scan, by 31 mm on average, more than 20: another region?",
        "p3": "/data/a: b/p3.nii.gz cannot be read: No such file",
    }
    summary = module.Summary((), reasons, 0.3, None)
    lines = [line for line in summary_lines(Path("out"), summary, "masks", held_out=False) if "left out" in line]
    assert lines == [f"left out:    2, such as p1: {reasons['p1']}", f"left out:    1, such as p3: {reasons['p3']}"]


def no_registration(*args, **kwargs):
    raise AssertionError("this pair was registered before")


def without_registration(data, out, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered_pairs, "register", no_registration)
        return run(data, out, **changes)


def test_another_limit_needs_no_new_registration(data, done, tmp_path):
    """What a person changes after a look at the contact sheets costs seconds, and gives what a new run gives."""
    stricter = replace(RECIPE, threshold=0.8, limits=Limits(min_confidence=0.4))
    kept = copy_of(done, tmp_path)
    without_registration(data, kept, recipe=stricter)
    run(data, tmp_path / "anew", recipe=stricter)
    assert digests(kept) == digests(tmp_path / "anew") != digests(done[0])
    without_registration(data, kept)
    assert digests(kept) == digests(done[0])


def test_a_corrected_label_is_carried_without_a_new_registration(data, done, tmp_path):
    content = json.loads((data / "dataset.json").read_text())
    label = nib.load(content["training"][0]["label"])
    liver = {name: value for value, name in ORGANS.items()}["liver"]
    voxels = np.asarray(label.dataobj)
    corrected = tmp_path / "labelsTr" / "p0.nii.gz"
    write_nifti(corrected, voxels=np.where(voxels == liver, 0, voxels).astype(np.uint8), affine=label.affine)
    content["training"][0]["label"] = str(corrected)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    shutil.copy2(data / "network.pt", tmp_path / "network.pt")
    out = copy_of(done, tmp_path)
    without_registration(tmp_path, out)
    assert digests(out)["masks/p2_seg.nii.gz"] != digests(done[0])["masks/p2_seg.nii.gz"]


@pytest.mark.parametrize("fault", ["scan", "options", "transform", "record"])
def test_a_pair_is_registered_anew_if_anything_of_it_differs(data, done, tmp_path, fault):
    out = copy_of(done, tmp_path)
    pairs = out / ".propagated" / "pairs" / "p2"
    recipe = replace(RECIPE, threshold=0.7)  # every scan is fused again
    if fault == "scan":
        content = json.loads((pairs / "p1.json").read_text())
        content["identity"]["scans"][1][1] += 1  # another size
        (pairs / "p1.json").write_text(json.dumps(content))
    elif fault == "options":
        recipe = replace(recipe, registration=replace(RECIPE.registration, sampling=0.05))
    elif fault == "transform":
        (pairs / "p1.tfm").write_bytes((pairs / "p1.tfm").read_bytes()[:200])
    else:
        (pairs / "p1.json").write_text("{}")
    real, made = registered_pairs.register, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered_pairs, "register", lambda *args, **options: made.append(1) or real(*args, **options))
        run(data, out, recipe=recipe)
    assert len(made) == (12 if fault == "options" else 1)


def test_a_labelled_scan_that_is_away_for_a_moment_stops_the_run(data, done, tmp_path):
    """Without it every label would be carried anew, from fewer scans."""
    content = json.loads((data / "dataset.json").read_text())
    moved = tmp_path / "p1.nii.gz"
    shutil.copy2(content["training"][1]["label"], moved)
    content["training"][1]["label"] = str(moved)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    shutil.copy2(data / "network.pt", tmp_path / "network.pt")
    out = copy_of(done, tmp_path)
    without_registration(tmp_path, out)
    before = digests(out)
    moved.write_bytes(moved.read_bytes()[:1000])
    with pytest.raises(InputError, match="The labelled scan p1 cannot be used: .* 2 labels in .* were carried from it"):
        run(tmp_path, out)
    assert digests(out) == before
    assert run(tmp_path, tmp_path / "fresh").labelled == ("p2", "p3")  # nothing was carried from it: it is left out


def test_a_labelled_scan_that_cannot_be_read_in_a_job_leaves_no_label_without_it(data, done, tmp_path):
    out = copy_of(done, tmp_path)
    (out / ".propagated" / "labels" / "p2.json").unlink()
    real = one_scan.as_volume

    def failing(file):
        if str(file).endswith("imagesTr/p1.nii.gz"):
            raise InputError(f"{file} cannot be read: Input/output error")
        return real(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_scan, "as_volume", failing)
        summary = run(data, out)
    assert summary.labelled == ("p3",) and "p1.nii.gz cannot be read" in summary.left_out["p2"]
    assert run(data, out).labelled == ("p2", "p3") and digests(out) == digests(done[0])


def test_a_folder_that_is_refused_is_not_marked_as_an_output(data, tmp_path):
    out = tmp_path / "mine"
    module.check_output(out)
    assert list(out.iterdir()) == []
