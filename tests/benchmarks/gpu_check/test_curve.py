# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Order, doubling and comparison of the curve's runs, on scores that are given; crops, scores and packs by value."""

from __future__ import annotations

import json
import queue

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.gpu_check import curve_data, curve_runs
from benchmarks.gpu_check.curve import Curve, Job, Plan, carry_out
from benchmarks.gpu_check.curve_data import Pack, own_scans, pack_patient, read_pack, synthetic, write_contents
from benchmarks.gpu_check.curve_runs import Crops, Recipe, confusion, dice_of
from benchmarks.gpu_check.parts import MARK
from bundles.common.errors import InputError

PLAN = Plan(n=(2, 8), seeds=(0, 1), first=100, most=800)
RECIPE = Recipe("pack", "cpu", {}, batch=2, pretraining_steps=5)


def told(capsys) -> dict[str, dict]:
    lines = [json.loads(line[1:]) for line in capsys.readouterr().out.split("\n") if line.startswith(MARK)]
    assert len({line["check"] for line in lines}) == len(lines)
    return {line["check"]: line for line in lines}


class Machine:
    """Carries out runs in the order of their start; their Dice is that of a rule."""

    def __init__(self, dice, *, stops_after=None, fails=()):
        self.dice, self.stops_after, self.fails = dice, stops_after, fails
        self.order, self.results = [], queue.Queue()

    def start(self, name, function, *arguments, **options):
        self.order.append(name)
        if self.stops_after is not None and len(self.order) > self.stops_after:
            return
        if name in self.fails:
            self.results.put((name, RuntimeError("CUDA out of memory")))
        elif function is curve_runs.pretrain:
            self.results.put((name, {"steps": 5, "loss": 3.0, "seconds": 1.0, "peak": 0}))
        else:
            assert (options["encoder"] is not None) == name.pretrained
            table = [[self.dice(name) + 0.01 * patient] * 2 for patient in range(3)]
            found = {"loss": 1.0, "seconds": 1.0, "peak": 2**30, "names": [], "tuning": table, "validation": table}
            self.results.put((name, found))

    def run(self, tmp_path, *, at_once=3):
        curve = Curve(PLAN)
        ends = 1e12 if self.stops_after is None else 0.0
        carry_out(curve, RECIPE, work=tmp_path, ends=ends, at_once=at_once, start=self.start, results=self.results)
        return curve


def rising(job):
    """n = 2 gains until 200 steps, n = 8 until the last; pre-training gains 0.02, a little more with seed 1."""
    best = 0.5 if job.n == 2 else 0.9
    steps = min(job.steps, 200) if job.n == 2 else job.steps
    return best - 10 / steps + job.pretrained * (0.02 + 0.001 * job.seed)


def test_steps_double_until_scratch_gains_nothing_and_both_arms_are_compared_there(tmp_path, capsys):
    machine = Machine(rising)
    machine.run(tmp_path)
    found = told(capsys)
    assert found["steps, n = 2"]["chosen"] == 200 and found["steps, n = 2"]["converged"]
    assert found["steps, n = 8"]["chosen"] == 800 and not found["steps, n = 8"]["converged"]
    curve = found["curve, n = 2"]["curve"]
    assert (curve["steps"], curve["seeds"], curve["patients"]) == (200, [0, 1], 3)
    assert curve["scratch"] == pytest.approx(0.46) and curve["difference"] == pytest.approx(0.0205)
    assert curve["by_seed"] == pytest.approx([0.02, 0.021]) and curve["interval"][0] == pytest.approx(0.02)
    assert curve["seeds_interval"][1] == pytest.approx(0.0205 + 12.706 * 0.0005, abs=1e-5)
    assert "not yet converged" in found["curve, n = 8"]["text"] and "cut" not in found
    runs = {(n, steps) for n, steps in ((2, 100), (2, 200), (2, 400), (8, 100), (8, 200), (8, 400), (8, 800))}
    jobs = [name for name in machine.order if isinstance(name, Job)]
    assert {(job.n, job.steps) for job in jobs} == runs and len(jobs) == len(set(jobs)) == 4 * len(runs)


def test_the_order_is_useful_when_cut(tmp_path, capsys):
    machine = Machine(rising)
    machine.run(tmp_path)
    first = machine.order[:8]
    assert first[:2] == [0, 1] and first[2] == Job(100, 0, 2, False)  # the card is busy while the encoders are made
    jobs = [name for name in machine.order if isinstance(name, Job)]
    assert set(jobs[:8]) == {Job(100, seed, n, arm) for seed in (0, 1) for n in (2, 8) for arm in (False, True)}
    capsys.readouterr()
    Machine(rising, stops_after=7).run(tmp_path)
    found = told(capsys)
    assert found["cut"]["text"].startswith("the time was over")
    assert found["curve, n = 2"]["curve"]["seeds"] == [0] and found["curve, n = 2"]["curve"]["seeds_interval"] is None


def test_a_run_that_fails_is_told_and_costs_what_needs_it(tmp_path, capsys):
    Machine(rising, fails=[1, Job(200, 0, 8, False)]).run(tmp_path)
    found = told(capsys)
    assert found["pre-training, seed 1"]["ok"] is False
    assert found["scratch, n = 8, 200 steps, seed 0"]["text"].endswith("RuntimeError: CUDA out of memory")
    assert found["cut"]["text"].startswith("runs failed")
    assert found["curve, n = 2"]["curve"]["seeds"] == [0]
    assert found["curve, n = 8"]["curve"]["steps"] == 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    contents, sources = synthetic({"unlabelled": 1, "training": 2, "tuning": 1, "validation": 1}, spacing=(8, 8, 10))
    for source in sources:
        pack_patient(folder, contents, source)
    write_contents(folder, contents)
    return folder


def test_a_pack_of_synthetic_patients_is_read_whole(folder):
    data = read_pack(folder, "cpu")
    assert data.classes == 14 and data.row["spacing"] == [8, 8, 10] and data.row["roi_size"] == [64, 64, 32]
    assert set(data.images) == {"training_0", "training_1", "tuning_0", "validation_0"}
    image, label = data.images["training_0"], data.labels["training_0"]
    assert image.dtype == torch.int16 and image.shape == label.shape and -1024 <= image.min() < -700 < 300 < image.max()
    assert (label[0].flatten()[data.voxels["training_0"][6]] == 6).all() and (label == 6).sum() == len(
        data.voxels["training_0"][6]
    )
    assert 20 < image[label == 6].float().mean() < 140  # the liver's HU


def test_crops_are_those_of_the_draw_and_centred_on_a_class(folder):
    data = read_pack(folder, "cpu")
    crops = Crops(data, ["training_0", "training_1"], seed=1, steps=4, batch=3)
    batches = list(crops)
    assert len(batches) == 4 and batches[1]["draw"].tolist() == [3, 4, 5]
    assert batches[0]["image"].shape == batches[0]["label"].shape == (3, 1, 64, 64, 32)
    assert 0 <= batches[0]["image"].min() < batches[0]["image"].max() <= 1
    again = Crops(data, ["training_0", "training_1"], seed=1, steps=4, batch=3)[2]
    assert all(torch.equal(again[key], batches[2][key]) for key in again)
    other = Crops(data, ["training_0", "training_1"], seed=2, steps=4, batch=3)[2]
    assert not torch.equal(again["image"], other["image"])


def test_small_crops_hold_the_voxel_that_was_drawn():
    label = torch.zeros(1, 40, 30, 20, dtype=torch.uint8)
    label[0, 38, 1, 10] = 5
    data = Pack(
        *("x", {"hu_window": [0, 1], "roi_size": [8, 8, 32]}, {}),
        images={"a": torch.zeros_like(label, dtype=torch.int16)},
        labels={"a": label},
        voxels={"a": {0: np.arange(9), 5: np.flatnonzero(label[0].numpy().ravel() == 5)}},
    )
    image, cut = Crops(data, ["a"], seed=0, steps=1, batch=1).crop(0)
    assert cut.shape == (1, 8, 8, 32) and (cut == 5).sum() == 1 and cut[0, 6, 1, 10] == 5
    assert (image[..., 20:] == -1024).all() and (image[..., :20] == 0).all()


def test_dice_is_by_organ_and_none_where_the_label_lacks_it():
    true = torch.tensor([0, 1, 1, 1, 2, 2, 0, 0])
    found = torch.tensor([0, 1, 1, 0, 2, 1, 3, 0])
    assert dice_of(confusion(found, true, 4).numpy()) == [pytest.approx(4 / 6), pytest.approx(2 / 3), None]


def msd(folder, *, cases=6, validation=2):
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    entries = []
    for i in range(cases + validation):
        hu = random.integers(-100, 200, (40, 40, 24)).astype(np.int16)
        label = np.zeros(hu.shape, np.uint8)
        label[10:20, 10:20, 5:15] = 1
        for part, voxels in (("imagesTr", hu), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.5, 1.0])), folder / part / f"case_{i}.nii.gz")
        entries.append({"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"})
    content = {"labels": {"0": "background", "1": "tumour"}, "modality": {"0": "CT"}}
    content |= {"training": entries[:cases], "validation": entries[cases:]}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_own_scans_are_packed_on_the_coarse_grid_and_nobody_is_in_two_sections(tmp_path):
    msd(tmp_path / "data")
    contents, sources = own_scans(tmp_path / "data")
    assert {part: len(names) for part, names in contents["sections"].items()} == {
        **{"tuning": 1, "training": 5, "validation": 2, "unlabelled": 5}
    }
    files = [source.image for source in sources]
    assert len(set(files)) == 8 and all("case_6" in f or "case_7" in f for f in files[-2:])
    assert not contents["synthetic"] and contents["row"]["labels"] == {"0": "background", "1": "tumour"}
    folder = tmp_path / "pack"
    folder.mkdir()
    for source in sources:
        pack_patient(folder, contents, source)
    write_contents(folder, contents)
    data = read_pack(folder, "cpu")
    assert data.images["training_0"].shape == (1, 20, 20, 12) and data.voxels["training_0"][1].size == 5 * 5 * 5
    strange = {**contents, "row": {**contents["row"], "labels": {"0": "background"}}}
    with pytest.raises(InputError, match=r"case_\d\.nii\.gz has the values \[1\], which the data set does not declare"):
        pack_patient(folder, strange, sources[0])


def test_scans_that_cannot_make_a_curve_are_refused(tmp_path, monkeypatch):
    msd(tmp_path / "few", cases=4)
    with pytest.raises(InputError, match="has 4 training and 2 validation scans: the curve needs 5 and 2"):
        own_scans(tmp_path / "few")
    monkeypatch.setattr(curve_data, "choose_task", lambda **_: {"hu_window": None})
    with pytest.raises(InputError, match="is not CT: the curve of the GPU check packs CT in HU only"):
        own_scans(tmp_path / "few")
