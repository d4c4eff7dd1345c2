# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The pictures show the right planes in the right orientation, in mm."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from monai.data import MetaTensor

from bundles.common.errors import InputError
from bundles.segmentation.results.overlay import SaveOverlays, load_ras, organ_colours, overlay_figure, save_figure

SHAPE = (9, 11, 13)
SPACING = (0.5, 1.0, 2.0)
LABELS = {1: "liver", 4: "spleen"}


def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, size=SHAPE).astype(np.int16)


def voxels(*places, value: int = 1) -> np.ndarray:
    array = np.zeros(SHAPE, dtype=np.uint8)
    for place in places:
        array[place] = value
    return array


def panels_of(figure) -> list:
    """The three planes of each row, from the top."""
    return [panel for panel in figure.axes if panel.get_images()]


def pictures_of(panel) -> tuple[np.ndarray, np.ndarray]:
    image, organs = (np.asarray(drawn.get_array()) for drawn in panel.get_images())
    return image, organs


def slow_planes(volume: np.ndarray, centre) -> list[np.ndarray]:
    """Voxel by voxel: left is the patient's right or front, top is front or above, where RAS grows to."""
    x, y, z = centre
    nx, ny, nz = volume.shape
    axial = [[volume[nx - 1 - c, ny - 1 - r, z] for c in range(nx)] for r in range(ny)]
    coronal = [[volume[nx - 1 - c, y, nz - 1 - r] for c in range(nx)] for r in range(nz)]
    sagittal = [[volume[x, ny - 1 - c, nz - 1 - r] for c in range(ny)] for r in range(nz)]
    return [np.array(plane) for plane in (axial, coronal, sagittal)]


def test_planes_go_through_the_centre_of_mass_of_the_truth():
    image = scan()
    truth = voxels((2, 3, 4), (4, 5, 10), (3, 4, 4), (3, 4, 6))  # mean (3, 4, 6)
    prediction = voxels((8, 8, 8))
    panels = panels_of(overlay_figure(image, prediction, truth=truth, spacing=SPACING, labels=LABELS))
    assert len(panels) == 6
    for panel, expected in zip(panels, slow_planes(image, (3, 4, 6)) * 2, strict=True):
        np.testing.assert_array_equal(pictures_of(panel)[0], expected)
    assert [panel.get_title() for panel in panels[:3]] == ["axial, Z = 6", "coronal, Y = 4", "sagittal, X = 3"]
    assert [panels[0].get_ylabel(), panels[3].get_ylabel()] == ["prediction", "truth"]


@pytest.mark.parametrize(
    ("prediction", "truth", "centre"),
    [
        (voxels((8, 1, 2), value=4), None, (8, 1, 2)),
        (voxels((8, 1, 2)), voxels(), (8, 1, 2)),
        (voxels(), voxels(), (4, 5, 6)),
        (voxels((8, 1, 2), value=3), None, (4, 5, 6)),  # 3 is not among the labels
    ],
)
def test_without_a_truth_the_prediction_and_then_the_middle_is_shown(prediction, truth, centre):
    image = scan()
    panels = panels_of(overlay_figure(image, prediction, truth=truth, spacing=SPACING, labels=LABELS))
    for panel, expected in zip(panels[:3], slow_planes(image, centre), strict=True):
        np.testing.assert_array_equal(pictures_of(panel)[0], expected)


def test_lengths_are_in_mm_and_equal_along_both_sides():
    panels = panels_of(overlay_figure(scan(), voxels((4, 5, 6)), spacing=SPACING, labels=LABELS))
    for panel, (width, height) in zip(panels, [(4.5, 11.0), (4.5, 26.0), (11.0, 26.0)], strict=True):
        assert [drawn.get_extent() for drawn in panel.get_images()] == [[0, width, 0, height]] * 2
        assert panel.get_aspect() == 1.0
        assert (*panel.get_xlim(), *panel.get_ylim()) == (0, width, 0, height)
        assert {drawn.origin for drawn in panel.get_images()} == {"upper"}


def test_the_sides_of_the_patient_are_marked():
    """A voxel at the right, front and top of the patient is at the top left of all planes, beside these letters."""
    image = np.full(SHAPE, -1000, dtype=np.int16)
    image[-1, -1, -1] = 999
    figure = overlay_figure(image, voxels((8, 10, 12)), spacing=SPACING, labels=LABELS)
    for panel, letters in zip(panels_of(figure), ["RA", "RS", "AS"], strict=True):
        assert pictures_of(panel)[0][0, 0] == 999
        assert "".join(text.get_text() for text in panel.texts) == letters


def test_organs_are_filled_in_the_colour_of_the_legend():
    prediction = voxels((4, 5, 6), (3, 5, 6), value=1) + voxels((5, 5, 6), (6, 5, 6), value=4)
    prediction += voxels((0, 5, 6), value=7)
    figure = overlay_figure(scan(), prediction, spacing=SPACING, labels=LABELS)
    colours = {text.get_text(): patch.get_facecolor() for text, patch in _legend_of(figure)}
    assert list(colours) == ["liver", "spleen"]
    organs = pictures_of(panels_of(figure)[0])[1]
    for value, expected in [(1, colours["liver"][:3]), (4, colours["spleen"][:3])]:
        filled = slow_planes(prediction, (4, 5, 6))[0] == value
        assert filled.sum() == 2
        np.testing.assert_allclose(organs[filled][:, :3], [expected] * 2)
        assert (organs[filled][:, 3] > 0).all() and (organs[filled][:, 3] < 1).all()
    assert np.count_nonzero(organs[..., 3]) == 4


def _legend_of(figure):
    (legend,) = figure.legends
    return list(zip(legend.get_texts(), legend.get_patches(), strict=True))


def test_outlines_close_around_an_organ_at_the_border_of_the_scan():
    prediction = np.zeros(SHAPE, dtype=np.uint8)
    prediction[:3, :, :4] = 4
    panel = panels_of(overlay_figure(scan(), prediction, spacing=SPACING, labels=LABELS))[0]
    (outline,) = panel.collections
    np.testing.assert_allclose(outline.get_edgecolor()[0][:3], organ_colours(LABELS)[4])
    (path,) = outline.get_paths()
    corners = path.vertices
    # The axial plane is 4.5 mm x 11 mm; the organ is its right third, 1.5 mm, over the whole height.
    assert corners[:, 0].min() == pytest.approx(3.0) and corners[:, 0].max() == pytest.approx(4.5)
    assert corners[:, 1].min() == pytest.approx(0.0) and corners[:, 1].max() == pytest.approx(11.0)


@pytest.mark.parametrize("count", [1, 2, 13, 20])
def test_colours_are_distinct_and_stay_with_the_label(count):
    colours = organ_colours(range(1, count + 1))
    assert list(colours) == list(range(1, count + 1))
    rgb = np.array([to_rgb(colour) for colour in colours.values()])
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 10 * np.eye(count)
    assert distances.min() > 0.15


@pytest.mark.parametrize(("window", "limits"), [((-100.0, 240.0), (-100.0, 240.0)), (None, (10.0, 990.0))])
def test_window_sets_black_and_white(window, limits):
    ramp = np.linspace(0, 1000, num=1001).reshape(7, 11, 13)
    figure = overlay_figure(ramp, np.zeros(ramp.shape, int), spacing=SPACING, labels=LABELS, window=window)
    assert panels_of(figure)[0].get_images()[0].get_clim() == pytest.approx(limits)


def test_shapes_that_differ_are_named():
    with pytest.raises(InputError, match=r"truth has the shape \(9, 11, 12\), the scan \(9, 11, 13\)"):
        overlay_figure(scan(), voxels(), truth=voxels()[..., 1:], spacing=SPACING, labels=LABELS)


# Files and the handler

LPI = np.array([[-0.5, 0, 0, 7], [0, -1, 0, 8], [0, 0, -2, 9], [0, 0, 0, 1.0]])
# Stored as (Z, X, Y), all flipped.
ZXY = np.array([[0, -0.5, 0, 7], [0, 0, -1, 8], [-2, 0, 0, 9], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("affine", "stored"),
    [
        (np.diag([*SPACING, 1]), scan()),
        (LPI, scan()[::-1, ::-1, ::-1]),
        (ZXY, scan().transpose(2, 0, 1)[::-1, ::-1, ::-1]),
    ],
)
def test_load_ras_turns_voxels_and_spacing(tmp_path, affine, stored):
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "a.nii.gz")
    array, spacing = load_ras(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(array, scan())
    assert spacing == pytest.approx(SPACING)


def test_load_ras_takes_the_first_of_several_sequences(tmp_path):
    nib.save(nib.Nifti1Image(np.stack([scan(), scan() + 1], axis=-1), np.diag([*SPACING, 1])), tmp_path / "mr.nii")
    np.testing.assert_array_equal(load_ras(tmp_path / "mr.nii")[0], scan())


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.nii.gz").write_text("not an image")
    nib.save(nib.Nifti1Image(np.zeros((4, 4), np.uint8), np.eye(4)), tmp_path / "flat.nii")
    for name, words in [("none.nii.gz", "does not exist"), ("text.nii.gz", "NIfTI"), ("flat.nii", r"\(4, 4\)")]:
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            load_ras(tmp_path / name)


def item_of(folder, *, name: str = "ct1.nii.gz", prediction=None, affine=LPI) -> dict:
    """A scan stored in LPI, the image in memory scaled, the prediction as stored."""
    nib.save(nib.Nifti1Image(np.ascontiguousarray(scan()[::-1, ::-1, ::-1]), LPI), folder / name)
    prediction = voxels((2, 3, 4), value=4)[::-1, ::-1, ::-1] if prediction is None else prediction
    return {
        "image": MetaTensor(torch.zeros(1, 4, 4, 4), meta={"filename_or_obj": str(folder / name)}),
        "pred": MetaTensor(torch.from_numpy(prediction.copy())[None], affine=affine),
        "reference": MetaTensor(torch.from_numpy(voxels((2, 3, 4)).copy())[None], affine=np.diag([*SPACING, 1])),
    }


def run(handler, items) -> None:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    engine.run([items])


def test_handler_draws_each_case_from_its_own_file(tmp_path, monkeypatch):
    drawn = []

    def keep(figure, path, dpi=100):
        drawn.append(figure)
        save_figure(figure, path, dpi)

    monkeypatch.setattr("bundles.segmentation.results.overlay.save_figure", keep)
    labels = {"0": "background", "1": "liver", "4": "spleen"}
    items = [item_of(tmp_path, name="ct1.nii.gz"), item_of(tmp_path, name="ct2.nii")]
    run(SaveOverlays(labels, tmp_path / "out", label_key="reference"), items)

    assert sorted(os.listdir(tmp_path / "out")) == ["ct1_overlay.png", "ct2_overlay.png"]
    assert imread(tmp_path / "out" / "ct1_overlay.png").ndim == 3
    panels = panels_of(drawn[0])
    assert len(panels) == 6
    for panel, expected in zip(panels, slow_planes(scan(), (2, 3, 4)) * 2, strict=True):
        image, organs = pictures_of(panel)
        np.testing.assert_array_equal(image, expected)  # the HU of the file, not the image in memory
        assert np.count_nonzero(organs[..., 3]) == 1
    # Prediction and truth are stored in different orientations, but drawn at the same position.
    place = [np.argwhere(pictures_of(panel)[1][..., 3]).tolist() for panel in panels]
    assert place[:3] == place[3:] == [[[11 - 1 - 3, 9 - 1 - 2]], [[13 - 1 - 4, 9 - 1 - 2]], [[13 - 1 - 4, 11 - 1 - 3]]]


def test_equal_names_in_two_folders_get_pictures_of_their_own(tmp_path):
    items = []
    for name in ("s1", "s2"):
        (tmp_path / name).mkdir()
        items.append(item_of(tmp_path / name, name="ct.nii.gz"))
    items.append(item_of(tmp_path, name="mr.nii.gz"))
    files = [{"image": item["image"].meta["filename_or_obj"]} for item in items]
    # Each process of a distributed run has its share of the scans, and the whole list.
    for share in (items[:1], items[1:]):
        run(SaveOverlays(LABELS, tmp_path / "out", items=files), share)
    pictures = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert pictures == ["mr_overlay.png", "s1/ct_overlay.png", "s2/ct_overlay.png"]


def test_handler_without_label_draws_the_prediction_alone_even_if_empty(tmp_path):
    run(SaveOverlays(LABELS, tmp_path / "out"), [item_of(tmp_path, prediction=voxels())])
    assert os.listdir(tmp_path / "out") == ["ct1_overlay.png"]


def test_handler_names_the_case_whose_shape_differs(tmp_path):
    with pytest.raises(InputError, match=r"ct1 .*ct1.nii.gz.*prediction has the shape \(9, 11, 12\)"):
        run(SaveOverlays(LABELS, tmp_path), [item_of(tmp_path, prediction=voxels()[..., 1:])])


def test_handler_names_a_missing_key_and_an_image_without_a_file(tmp_path):
    item = item_of(tmp_path)
    with pytest.raises(InputError, match="ct1.nii.gz has no label map 'label', only"):
        run(SaveOverlays(LABELS, tmp_path, label_key="label"), [item])
    with pytest.raises(InputError, match=r"\['image', 'pred'\].*filename_or_obj"):
        run(SaveOverlays(LABELS, tmp_path), [item | {"image": torch.zeros(1, 4, 4, 4)}])
