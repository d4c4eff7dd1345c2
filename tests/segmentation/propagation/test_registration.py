# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Known warps are found within millimetres, labels reach another patient, and a pair that fails says why."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from bundles.common.scans.reading import Volume
from bundles.segmentation.propagation import registration
from bundles.segmentation.propagation.carrying import carry_label
from bundles.segmentation.propagation.fusion import IGNORE
from bundles.segmentation.propagation.registration import RegistrationOptions, register
from tools.synthetic_patient import draw_patient

from .bodies import mean_dice, middle, scan_of

OPTIONS = RegistrationOptions(spacing=(8.0, 8.0, 8.0), deformation_iterations=4)


def warp():
    """A map from fixed to moving points in RAS: sizes, a rotation and a shift, all different along each axis."""
    matrix = np.eye(4)
    turn = Rotation.from_euler("xyz", (4, -6, 9), degrees=True).as_matrix()
    matrix[:3, :3] = turn @ np.diag((1.08, 0.94, 0.97))
    centre = middle(draw_patient(2))
    matrix[:3, 3] = centre + (35, -20, 60) - matrix[:3, :3] @ centre
    return matrix


def warped_pair():
    """One body twice, with other noise on another, oblique and flipped grid; the second in warped coordinates."""
    fixed, label = scan_of(2)
    moving, moving_label = scan_of(2, spacing=(7.0, 7.0, 9.0), oblique=np.array([9.0, 5.0, -7.0]), noise_seed=1)
    turns = nib.orientations.axcodes2ornt(("S", "A", "R"))
    flipped = [
        Volume(
            nib.apply_orientation(each.voxels, turns),
            warp() @ each.affine @ nib.orientations.inv_ornt_aff(turns, each.voxels.shape),
        )
        for each in (moving, moving_label)
    ]
    return *flipped, fixed, label


def errors(transform, truth, label):
    """Distances in mm between where a transform and the truth put the voxels of the organs."""
    points = nib.affines.apply_affine(label.affine, np.argwhere((label.voxels > 0) & (label.voxels != IGNORE))[::7])
    lps = np.array([transform.TransformPoint(point) for point in (points * (-1, -1, 1)).tolist()])
    return np.linalg.norm(lps * (-1, -1, 1) - nib.affines.apply_affine(truth, points), axis=1)


def start_shift(moving: int, fixed: int):
    return middle(draw_patient(moving)) - middle(draw_patient(fixed))


def digest(found, label):
    numbers = [found.before, found.affine, found.after, found.overlap, found.least_jacobian]
    parameters = [*found.transform.GetParameters(), *found.transform.GetFixedParameters(), *numbers]
    return hashlib.sha256(np.array(parameters).tobytes() + label.tobytes()).hexdigest()


def one_digest(_=None):
    """Register and carry; in a child process with another number of threads, too."""
    scan, label = scan_of(3, spacing=(12.0, 12.0, 12.0))
    fixed, _ = scan_of(4, spacing=(12.0, 12.0, 12.0))
    options = replace(OPTIONS, spacing=(12.0,) * 3, deformation_iterations=2, sampling=0.5)
    found = register(scan, fixed, shift=start_shift(3, 4), options=options)
    assert found.reason == ""
    return digest(found, carry_label(label, found.transform, like=fixed))


def test_a_known_scale_rotation_and_shift_is_found():
    moving, moving_label, fixed, label = warped_pair()
    centre = middle(draw_patient(2))
    shift = nib.affines.apply_affine(warp(), centre) - centre + (9, -8, 11)
    found = register(moving, fixed, shift=shift, options=OPTIONS)
    assert found.reason == "" and set(found.starts) == {0.0, 15.0, -15.0, 30.0, -30.0} and found.start in (0.0, -15.0)
    start = sitk.TranslationTransform(3, (shift * (-1, -1, 1)).tolist())
    assert errors(start, warp(), label).mean() > 15
    affine = found.transform.GetNthTransform(0)
    assert errors(affine, warp(), label).mean() < 1.5
    far = errors(found.transform, warp(), label)
    assert far.mean() < 2 and np.percentile(far, 95) < 4  # a quarter and a half of a voxel of the working grid
    assert found.before < found.starts[found.start] + 1e-9 < found.affine < found.after + 0.02
    determinant = np.linalg.det(warp()[:3, :3])
    assert 0.5 * determinant < found.least_jacobian < determinant and found.overlap > 0.9
    carried = carry_label(moving_label, found.transform, like=fixed)
    seen = carried != IGNORE
    assert mean_dice(carried[seen], label.voxels[seen]) > 0.75


def test_the_given_scale_and_shift_map_fixed_to_moving_points():
    """With no step taken, what is left is the start itself, and only the right direction and signs fit."""
    scan, label = scan_of(2)
    given = np.diag([1.2, 0.9, 1.1, 1.0])
    given[:3, 3] = (30, -50, 70)
    moving = Volume(scan.voxels, given @ scan.affine)
    options = replace(OPTIONS, affine_iterations=1, deformation_iterations=1)
    found = register(moving, scan, scale=(1.2, 0.9, 1.1), shift=(30, -50, 70), options=options)
    assert found.reason == ""  # a start that is right is no failure, although nothing is gained
    assert found.start == 0 and found.before > 1.4 * max(found.starts[15.0], found.starts[-15.0])
    working = [registration._WorkingScan.of(each, options, "") for each in (moving, scan)]
    assert errors(registration._Pair(*working, options).affine(given), given, label).max() < 1e-6


def test_the_working_grid_holds_the_whole_scan_and_does_not_depend_on_the_stored_axes():
    """The body may reach to the edge of the scan. Voxels are averaged along the axes that are finer."""
    affine = np.diag([2.0, 4.0, 1.0, 1.0])
    affine[:3, 3] = (-50, 20, 300)
    scan = Volume(np.random.default_rng(0).normal(50, 30, (48, 24, 64)).astype(np.float32), affine)
    turns = nib.orientations.axcodes2ornt(("P", "S", "R"))
    turned = affine @ nib.orientations.inv_ornt_aff(turns, scan.voxels.shape)
    other = Volume(nib.apply_orientation(scan.voxels, turns), turned)
    options = replace(OPTIONS, spacing=(8.0, 8.0, 4.0))
    one, two = (registration._WorkingScan.of(each, options, "") for each in (scan, other))
    assert one.image.GetSize() == two.image.GetSize() and np.array_equal(one.seen, two.seen)
    voxels = [sitk.GetArrayFromImage(each.image) for each in (one, two)]
    assert np.abs(voxels[0] - voxels[1]).max() < 1e-2
    assert voxels[0][one.seen].std() < 15  # of 30 HU noise: up to 32 voxels are averaged
    corners = np.array(np.meshgrid((0, 47), (0, 23), (0, 63))).reshape(3, -1).T
    for point in nib.affines.apply_affine(affine, corners) * (-1, -1, 1):
        index = np.array(one.image.TransformPhysicalPointToContinuousIndex(point.tolist()))
        assert (index >= 0).all() and (index <= np.array(one.image.GetSize()) - 1).all()


def test_air_around_the_body_changes_nothing():
    """It has no control points: the deformation takes the time of the body, however wide the scan is."""
    moving, _ = scan_of(3, spacing=(8.0, 8.0, 8.0))
    fixed, _ = scan_of(4, spacing=(8.0, 8.0, 8.0))

    def in_air(*widths):
        affine = fixed.affine.copy()
        affine[:3, 3] -= affine[:3, :3] @ [before for before, _ in widths]
        return Volume(np.pad(fixed.voxels, widths, constant_values=-1000), affine)

    scans = in_air((3, 3), (3, 3), (0, 0)), in_air((8, 12), (10, 4), (0, 0))
    options = replace(OPTIONS, deformation_iterations=2)
    one, two = (register(moving, scan, shift=start_shift(3, 4), options=options) for scan in scans)
    assert one.reason == two.reason == ""
    points = middle(draw_patient(4)) * (-1, -1, 1) + [[-40, 30, -20], [25, -35, 30], [0, 0, 0]]

    def mapped(transform):
        return np.array([transform.TransformPoint(point) for point in points.tolist()])

    assert np.abs(mapped(one.transform) - mapped(two.transform)).max() < 1e-3
    affine = one.transform.GetNthTransform(0)
    assert np.abs(mapped(one.transform) - mapped(affine)).max() > 0.5  # the deformation does something there


def test_the_best_of_five_starts_wins():
    scan, _ = scan_of(2)
    quick = replace(OPTIONS, affine_iterations=1, deformation_iterations=1)
    for off in (15.0, -15.0, 30.0):
        moved = Volume(scan.voxels, scan.affine.copy())
        moved.affine[2, 3] += off
        found = register(moved, scan, options=quick)
        assert found.start == off and found.before == found.starts[0.0] < found.starts[off]
    assert list(register(scan, scan, options=replace(quick, start_shift=0.0)).starts) == [0.0]


def test_labels_reach_another_patient():
    scan, label = scan_of(3)
    fixed, truth = scan_of(4)
    shift = start_shift(3, 4)
    found = register(scan, fixed, shift=shift, options=OPTIONS)
    assert found.reason == ""
    scores = []
    start = sitk.TranslationTransform(3, (shift * (-1, -1, 1)).tolist())
    for transform in (start, found.transform.GetNthTransform(0), found.transform):
        carried = carry_label(label, transform, like=fixed)
        assert carried.shape == fixed.voxels.shape
        scores.append(mean_dice(carried[carried != IGNORE], truth.voxels[carried != IGNORE]))
    assert scores[0] < 0.5  # the two bodies laid over each other as positions would
    assert scores[1] > 0.58 and scores[2] > 0.61 and scores[2] > scores[1] + 0.01


@pytest.mark.slow
def test_the_same_bytes_from_one_process_and_from_four(monkeypatch):
    here = one_digest()
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "3")
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(one_digest, range(4))) == [here] * 4


def test_files_give_the_same_as_arrays(tmp_path):
    quick = replace(OPTIONS, spacing=(12.0,) * 3, affine_iterations=2, deformation_iterations=1)
    pair = [scan_of(seed, spacing=(12.0, 12.0, 12.0))[0] for seed in (3, 4)]
    files = [tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz"]
    for file, volume in zip(files, pair, strict=True):
        write_nifti(file, voxels=volume.voxels, affine=volume.affine)
    shift = start_shift(3, 4)
    arrays, read = (register(*each, shift=shift, options=quick) for each in (pair, files))
    assert read.after == pytest.approx(arrays.after, abs=1e-3)
    with pytest.raises(InputError, match=r"none\.nii does not exist"):
        register(tmp_path / "none.nii", files[1])


def test_failures_are_results_with_a_reason(monkeypatch):
    scan, _ = scan_of(3, spacing=(12.0, 12.0, 12.0))
    fixed, _ = scan_of(4, spacing=(12.0, 12.0, 12.0))
    options = replace(OPTIONS, spacing=(12.0,) * 3, deformation_iterations=2)
    shift = start_shift(3, 4)

    def reason(moving, fixed, **changes):
        changes = {"shift": shift, "options": options, **changes}
        found = register(moving, fixed, **changes)
        assert found.transform is None
        return found.reason

    assert "no common field of view" in reason(scan, fixed, shift=shift + (0, 0, 2000))
    air = Volume(np.full_like(scan.voxels, -1000), scan.affine)
    assert reason(air, fixed).startswith("no body: in the moving scan 0 voxels")
    assert reason(scan, air).startswith("no body: in the fixed scan 0 voxels")
    even = Volume(np.full_like(scan.voxels, 50), scan.affine)
    assert reason(even, fixed) == "nothing to compare: the moving scan is 50 HU everywhere in its body"
    noise = np.random.default_rng(0).normal(50, 30, scan.voxels.shape).astype(np.float32)
    assert reason(Volume(noise, scan.affine), fixed).startswith("the optimiser found nothing: mutual information is")
    assert "the affine map is degenerate" in reason(
        scan, fixed, scale=(0.2,) * 3, shift=middle(draw_patient(3)) - 0.2 * middle(draw_patient(4))
    )
    wild = replace(options, control_spacing=30.0, deformation_iterations=25, sampling=0.05)
    folded = register(scan, fixed, shift=shift, options=wild)
    assert folded.transform is None and folded.least_jacobian <= 0
    assert "folds in the body" in folded.reason and math.isfinite(folded.after)

    def stop(self, affine):
        raise RuntimeError("Exception thrown in ITK\nitk::ERROR: All samples map outside moving image buffer.")

    monkeypatch.setattr(registration._Pair, "fit_deformation", stop)
    assert reason(scan, fixed) == "the optimiser stopped: itk::ERROR: All samples map outside moving image buffer."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hu_window": (900, -300)}, "hu_window"),
        ({"hu_window": None}, "--hu_window None"),
        ({"spacing": None}, "--spacing None"),
        ({"spacing": (4, 4)}, "spacing"),
        ({"body_above": 900}, "--body_above 900"),
        ({"control_spacing": 0}, "--control_spacing 0"),
        ({"start_shift": -1}, "--start_shift -1"),
        ({"sampling": 1.5}, "--sampling 1.5"),
        ({"bins": 4}, "--bins 4"),
        ({"seed": -1}, "--seed -1"),
        (
            {"affine_iterations": 10**12},
            "--affine_iterations 1000000000000 must be a whole number, 1 or more, at most 100000",
        ),
    ],
)
def test_options_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        RegistrationOptions(**change)


@pytest.mark.parametrize("change", [{"scale": (1, 1)}, {"scale": (1, 0, 1)}, {"shift": (0, 0, math.nan)}])
def test_the_start_is_checked(change):
    scan = Volume(np.zeros((3, 3, 3), np.int16), np.eye(4))
    with pytest.raises(InputError, match=next(iter(change))):
        register(scan, scan, **change)
