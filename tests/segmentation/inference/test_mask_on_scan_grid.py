# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Label maps on the grid of the scan's file equal those of MONAI's `Invertd`, with less memory."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, SaveImaged, Spacingd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from benchmarks.pretrain_cost import LiveBytes
from bundles.common.errors import InputError
from bundles.segmentation.inference import mask_on_scan_grid
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd, resample_labels
from bundles.segmentation.inference.probability_inferer import ProbabilityInferer

BUNDLE = Path(__file__).parents[3] / "bundles/swin_unetr_btcv_seg"
SPACING = (1.5, 1.5, 2.0)
CLASSES = 5


def affine_of(matrix, origin=(-31.7, 22.4, 105.3)) -> np.ndarray:
    return np.block(
        [[np.asarray(matrix, dtype=float), np.reshape(origin, (3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]
    )


TURN = Rotation.from_euler("xyz", (10, -15, 8), degrees=True).as_matrix()
SHEAR = np.array([[0.8, 0, 0], [0, 0.8, 0.4], [0, 0, 2.5]])  # gantry tilt: slices are not stacked at right angles
# Affine of the file and its shape. 3 mm after 2 mm and 0.75 mm after 1.5 mm put many voxels half-way between two.
GEOMETRIES = {
    "RAS": (affine_of(np.diag([0.8, 0.8, 3])), (60, 52, 22)),
    "LPS": (affine_of(np.diag([-0.8, -0.8, 3])), (60, 52, 22)),
    "oblique": (affine_of(TURN @ np.diag([-0.9, -0.8, 2.5])), (60, 52, 22)),
    "sagittal slices": (affine_of([[0, 0, 3.1], [-0.8, 0, 0], [0, -0.9, 0]]), (56, 48, 20)),
    "thick slices": (affine_of(np.diag([0.6, 0.7, 5])), (70, 64, 13)),
    "isotropic": (affine_of(np.eye(3)), (50, 46, 40)),
    "multiples": (affine_of(np.diag([-0.75, 0.75, 1])), (60, 52, 30)),
    "sheared": (affine_of(SHEAR), (60, 52, 22)),
}


@pytest.fixture(scope="module")
def preprocessing() -> Compose:
    """The bundle's own preprocessing. Its HU window does not affect the geometry."""
    config = ConfigParser()
    config.read_config(BUNDLE / "configs/train.yaml")  # that of inference.yaml skips labels
    config["bundle_root"], config["spacing"] = str(BUNDLE), list(SPACING)
    forget_scripts()
    with pytest.MonkeyPatch.context() as patch:  # each bundle has its own package ``scripts``
        patch.syspath_prepend(BUNDLE)
        transforms = config.get_parsed_content("preprocessing")
    forget_scripts()
    return transforms


def forget_scripts() -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "scripts"]:
        del sys.modules[module]


def body(shape, seed: int = 0) -> np.ndarray:
    """A box of tissue with air on every side, so that the scan is cropped."""
    array = np.full(shape, -1000.0, dtype=np.float32)
    inner = tuple(slice(n // 6, n - n // 5) for n in shape)
    array[inner] = np.random.default_rng(seed).uniform(0, 200, size=array[inner].shape)
    return array


def preprocessed(folder, affine, shape, preprocessing, image=None) -> dict:
    nib.save(nib.Nifti1Image(body(shape) if image is None else image, affine), folder / "ct1.nii.gz")
    return preprocessing({"image": str(folder / "ct1.nii.gz")})


def smooth_probabilities(shape, classes: int = CLASSES, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    fields = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5), axes=None)
    return torch.from_numpy(20 * fields).softmax(0).float()


def model_coordinates(item: dict, shape) -> np.ndarray:
    """Position of each native voxel on the preprocessed grid, (X, Y, Z, 3), one after the other in float64."""
    voxels = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], axis=-1)
    world = voxels @ nib.load(item["image"].meta["filename_or_obj"]).affine.T
    return (world @ np.linalg.inv(item["image"].affine.numpy()).T)[..., :3]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_linear_is_the_winner_of_all_class_volumes_inverted(tmp_path, preprocessing, geometry):
    affine, shape = GEOMETRIES[geometry]
    item = preprocessed(tmp_path, affine, shape, preprocessing)
    item["pred"] = MetaTensor(smooth_probabilities(item["image"].shape[1:]))
    inverted = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False)(item)["pred"]
    labels = MaskOnScanGridd("pred", slab_bytes=2**20)(item)["pred"]
    assert labels.shape == inverted[:1].shape == (1, *shape)
    # Exactly one voxel outside of the crop, MONAI gets a probability of 1e-16 instead of 0, by rounding.
    rounding = (inverted.amax(0) < 1e-4).numpy()
    assert not labels[0].numpy()[rounding].any()
    different = (labels[0] != inverted.argmax(0)).numpy() & ~rounding
    assert different.mean() < 1e-4
    assert 0.1 < (labels > 0).float().mean() < 0.5 and len(labels.unique()) == CLASSES


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nearest_is_the_inverted_winner(tmp_path, preprocessing, geometry):
    affine, shape = GEOMETRIES[geometry]
    item = preprocessed(tmp_path, affine, shape, preprocessing)
    item["pred"] = MetaTensor(smooth_probabilities(item["image"].shape[1:]))
    winner = AsDiscreted("pred", argmax=True)(item)
    inverted = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=True)(winner)["pred"][0]
    labels = MaskOnScanGridd("pred", mode="nearest", slab_bytes=2**20)(item)["pred"][0]
    coordinates = model_coordinates(item, shape)
    # Half-way between two voxels both are nearest; rounding decides in MONAI.
    ties = (np.abs(coordinates - np.floor(coordinates) - 0.5) < 1e-5).any(-1)
    different = labels.numpy() != inverted.numpy()
    assert different[~ties].mean() < 1e-4
    assert 0.1 < (labels > 0).float().mean() < 0.5
    # A tie gives one of the two (or four, or eight) voxels around it.
    winner = np.pad(winner["pred"][0].numpy(), 1)
    neighbours = [
        winner[tuple(np.clip(np.round(coordinates[ties] + shift) + 1, 0, np.array(winner.shape) - 1).astype(int).T)]
        for shift in (np.array(np.meshgrid(*[[-0.01, 0.01]] * 3)).reshape(3, -1).T)
    ]
    assert np.all(np.any(np.stack(neighbours) == labels.numpy()[ties], axis=0))


def test_the_whole_scan_without_air_is_covered_to_its_outer_voxels(tmp_path, preprocessing):
    """7 slices of 3 mm are 10 of 2 mm: the centre of the last lies on the face of the tenth."""
    shape = (20, 18, 7)
    item = preprocessed(tmp_path, affine_of(np.diag([0.75, 1.5, 3])), shape, preprocessing, np.zeros(shape, np.float32))
    assert item["image"].shape[1:] == (10, 18, 10)
    item["pred"] = torch.zeros(2, 10, 18, 10)
    item["pred"][1] = 1
    for mode in ("linear", "nearest"):
        assert MaskOnScanGridd("pred", mode=mode)(item)["pred"].all()


def test_slabs_do_not_show_and_bound_the_memory(tmp_path, preprocessing):
    affine, shape = GEOMETRIES["oblique"]
    item = preprocessed(tmp_path, affine, shape, preprocessing)
    probabilities = smooth_probabilities(item["image"].shape[1:], classes=40)
    for mode in ("linear", "nearest"):
        results, peaks = [], []
        for slab_bytes in (1, 2**18, 2**40):
            with LiveBytes([probabilities, item["image"]]) as live:
                labels = MaskOnScanGridd("pred", mode=mode, slab_bytes=slab_bytes)({**item, "pred": probabilities})
            results.append(labels["pred"])
            peaks.append(live.peak)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        winner = 16 * item["image"].numel() if mode == "nearest" else 0  # computed with argmax in float64
        assert peaks[1] < results[0].numel() + winner + 2**18 + 2**14 < peaks[2]


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("box", [((3, 9), (0, 4), (7, 8)), ((0, 12), (0, 10), (0, 9)), ((11, 12), (9, 10), (8, 9))])
def test_sampling_the_box_of_the_labels_alone_misses_none(monkeypatch, mode, box):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(4, 12, 10, 9, generator=generator)
    organs = torch.zeros(12, 10, 9, dtype=torch.bool)
    organs[tuple(slice(*ends) for ends in box)] = True
    probabilities[0] = torch.where(organs, 0.2, 1.0)
    to_model = np.array([[0.4, 0.05, 0, -1], [-0.05, 0.4, 0, 0.3], [0, 0, 0.7, -1.2], [0, 0, 0, 1]])
    grid = {"to_model": to_model, "shape": (36, 30, 17), "mode": mode}
    labels = resample_labels(probabilities, **grid)
    assert labels.any()
    monkeypatch.setattr(mask_on_scan_grid, "_box_of_labels", lambda _: [(0, 12), (0, 10), (0, 9)])
    assert torch.equal(labels, resample_labels(probabilities, **grid))


def test_background_alone_gives_background():
    probabilities = torch.tensor([0.5, 0.5]).reshape(2, 1, 1, 1).expand(2, 6, 5, 4)  # a tie goes to background
    assert not resample_labels(probabilities, to_model=np.eye(4), shape=(6, 5, 4)).any()


def test_one_voxel_thick_probabilities_have_a_place():
    probabilities = torch.zeros(3, 1, 1, 1)
    probabilities[2] = 1
    to_model = np.diag([1, 1, 1, 1.0])
    to_model[:3, 3] = (-2, -1, -1)
    expected = torch.zeros(5, 3, 4, dtype=torch.uint8)
    expected[2, 1, 1] = 2
    for mode in ("linear", "nearest"):
        assert torch.equal(resample_labels(probabilities, to_model=to_model, shape=(5, 3, 4), mode=mode), expected)
    for elsewhere in [(50, -1, -1), (-2, 50, -1), (-2, -50, -1), (-2, -1, 50)]:
        to_model[:3, 3] = elsewhere
        assert not resample_labels(probabilities, to_model=to_model, shape=(5, 3, 4)).any()


def test_half_way_between_two_voxels_the_inner_one_wins():
    """Voxels of 1 mm between voxels of 2 mm, each with its own class: every second one is half-way."""
    voxels = 301
    probabilities = torch.eye(voxels)[:, :, None, None]
    to_model = np.diag([0.5, 1, 1, 1])
    labels = resample_labels(probabilities, to_model=to_model, shape=(2 * voxels, 1, 1), mode="nearest").numpy()
    expected = [number / 2 for number in range(2 * voxels)]
    expected = [np.ceil(place) if place < voxels // 2 else np.floor(place) for place in expected]
    np.testing.assert_array_equal(labels[:, 0, 0], expected)


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.uint16)])
def test_a_byte_holds_256_classes(classes, dtype):
    probabilities = torch.zeros(classes, 2, 2, 2)
    probabilities[-1] = 1
    labels = resample_labels(probabilities, to_model=np.eye(4), shape=(2, 2, 2))
    assert labels.dtype == dtype and np.all(labels.numpy() == classes - 1)


def save(folder, item) -> nib.Nifti1Image:
    SaveImaged(
        "pred", output_dir=folder, output_postfix="seg", separate_folder=False, output_dtype=np.uint8, resample=False
    )(item)
    return nib.load(folder / "ct1_seg.nii.gz")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_saved_mask_lies_on_the_grid_of_the_scan(tmp_path, preprocessing, geometry):
    affine, shape = GEOMETRIES[geometry]
    item = preprocessed(tmp_path, affine, shape, preprocessing)
    item["pred"] = smooth_probabilities(item["image"].shape[1:])
    before = item["image"].affine.clone()
    item = MaskOnScanGridd("pred", mode="nearest")(item)
    mask, scan = save(tmp_path, item), nib.load(tmp_path / "ct1.nii.gz")
    assert mask.shape == scan.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, scan.affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), item["pred"][0].numpy())
    assert torch.equal(item["image"].affine, before)  # reset for the next test


def test_channels_in_the_file_do_not_matter(tmp_path, preprocessing):
    """MSD's brain scans are (X, Y, Z, 4)."""
    affine, shape = GEOMETRIES["LPS"]
    one = preprocessed(tmp_path, affine, shape, preprocessing)
    four = preprocessed(tmp_path, affine, shape, preprocessing, np.stack([body(shape)] * 4, axis=-1))
    assert four["image"].shape == (4, *one["image"].shape[1:])
    pred = smooth_probabilities(one["image"].shape[1:])
    results = [MaskOnScanGridd("pred")({**item, "pred": pred})["pred"] for item in (one, four)]
    assert torch.equal(*results) and save(tmp_path, {"pred": results[1]}).shape == shape


class BrightIsLiver(torch.nn.Module):
    def forward(self, image):
        return 50 * torch.cat([0.5 - image, image - 0.5], dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluator_and_monai_label_save_the_same_mask(tmp_path, preprocessing, channels_last):
    """A cube, bright on dark; both callers, the first with collated, the second with plain metadata."""
    affine, shape = GEOMETRIES["oblique"]
    image = np.full(shape, -100, dtype=np.float32)  # inside of the window
    image[20:40, 12:40, 6:16] = 240
    truth = image > 0
    stored = image[..., None] if channels_last else image
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "ct1.nii.gz")
    inferer = ProbabilityInferer(roi_size=(32, 32, 32), sw_batch_size=2, overlap=0.25, mirror_axes=[0])
    saver = SaveImaged("pred", output_dir=tmp_path / "a", output_postfix="seg", separate_folder=False, resample=False)
    dataset = Dataset([{"image": str(tmp_path / "ct1.nii.gz")}], preprocessing)
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1),
        network=BrightIsLiver(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"].to(device), None),
        inferer=inferer,
        postprocessing=Compose([MaskOnScanGridd("pred"), saver]),
    ).run()
    mask = nib.load(tmp_path / "a/ct1_seg.nii.gz")
    found = np.asarray(mask.dataobj) > 0
    assert found.shape == shape and 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "ct1.nii.gz").affine)

    item = preprocessing({"image": str(tmp_path / "ct1.nii.gz")})
    item["pred"] = inferer(item["image"][None], BrightIsLiver())[0]
    labels = Compose([MaskOnScanGridd("pred")])(item)["pred"]
    np.testing.assert_array_equal(labels[0].numpy() > 0, found)
    assert labels.meta["spatial_shape"].tolist() == list(
        shape
    )  # MONAI Label checks it to see that no resizing is needed


# A label through preprocessing and back


def organs(affine, shape, millilitres) -> np.ndarray:
    """Ellipsoids of these volumes at random places, 5 mm and more from the border, no two in one voxel."""
    rng, spacing = np.random.default_rng(0), np.linalg.norm(affine[:3, :3], axis=0)
    position = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * spacing
    label_map = np.zeros(shape, dtype=np.uint8)
    for value, volume in enumerate(millilitres, start=1):
        inside = np.ones(shape, dtype=bool)
        while label_map[inside].any() or inside.all():
            axes = rng.uniform(0.8, 1.25, 3)
            radii = axes * (1000 * volume / (4 / 3 * np.pi * axes.prod())) ** (1 / 3)
            centre = rng.uniform(radii + 5, spacing * shape - radii - 5)
            inside = (((position - centre) / radii) ** 2).sum(-1) < 1
        label_map[inside] = value
    return label_map


def dice(one: np.ndarray, other: np.ndarray, value: int) -> float:
    return 2 * np.sum((one == value) & (other == value)) / (np.sum(one == value) + np.sum(other == value))


ROUND_TRIPS = {
    "RAS": (affine_of(np.diag([0.8, 0.8, 3])), (150, 130, 44)),
    "LPS": (affine_of(np.diag([-0.8, -0.8, 3])), (150, 130, 44)),
    "oblique": (affine_of(TURN @ np.diag([-0.8, -0.8, 3])), (150, 130, 44)),
    "isotropic": (affine_of(np.eye(3)), (120, 104, 110)),
    "oblique isotropic": (affine_of(TURN), (120, 104, 110)),
}
MILLILITRES = [2, 4, 10, 30, 100]


@pytest.mark.parametrize("geometry", ROUND_TRIPS)
def test_a_label_comes_back_to_itself(tmp_path, preprocessing, geometry):
    """As far as a grid of 1.5 x 1.5 x 2 mm can carry it: what is lost on the way there, no way back restores.

    Sampled at the nearest voxel on the way there and back, as training labels are on the way there, organs of 2 ml keep
    a Dice of 0.9 on a grid of 1 mm, exactly as with `Invertd`. As shares of each voxel, which is what a perfect network
    would predict, they keep more.
    """
    affine, shape = ROUND_TRIPS[geometry]
    truth = organs(affine, shape, MILLILITRES)
    nib.save(nib.Nifti1Image(np.full(shape, 50, np.int16), affine), tmp_path / "ct1.nii.gz")
    nib.save(nib.Nifti1Image(truth, affine), tmp_path / "label.nii.gz")
    shares = np.stack([truth == value for value in range(len(MILLILITRES) + 1)], axis=-1).astype(np.float32)
    nib.save(nib.Nifti1Image(shares, affine), tmp_path / "shares.nii.gz")
    item = preprocessing({"image": str(tmp_path / "ct1.nii.gz"), "label": str(tmp_path / "label.nii.gz")})
    indicator = torch.nn.functional.one_hot(item["label"][0].as_tensor().long()).movedim(-1, 0)
    back = MaskOnScanGridd("pred", mode="nearest")({**item, "pred": indicator.float()})["pred"][0].numpy()
    inverted = Invertd("pred", transform=preprocessing, orig_keys="image")({**item, "pred": item["label"]})["pred"][0]

    geometric = Compose([t for t in preprocessing.transforms[:4]])  # loading to spacing; this scan has no air to crop
    assert isinstance(geometric.transforms[0], LoadImaged) and isinstance(geometric.transforms[3], Spacingd)
    of_shares = geometric({"image": str(tmp_path / "shares.nii.gz")})["image"]
    assert of_shares.shape[1:] == item["image"].shape[1:]
    soft = MaskOnScanGridd("pred")({**item, "pred": of_shares})["pred"][0].numpy()

    for value, volume in enumerate(MILLILITRES, start=1):
        assert dice(soft, truth, value) > (0.97 if volume >= 4 else 0.95)
        assert dice(back, truth, value) > (0.97 if volume >= 100 else 0.94 if volume >= 10 else 0.89)
        assert dice(back, truth, value) == pytest.approx(dice(inverted.numpy(), truth, value), abs=0.01)
        moved = np.mean(np.argwhere(soft == value), axis=0) - np.mean(np.argwhere(truth == value), axis=0)
        assert np.abs(moved).max() < 0.35  # voxels of the scan: half a voxel of either grid would be more


COARSE = {
    "RAS": (affine_of(np.diag([2.0, 2.0, 2.5])), (60, 52, 50)),
    "LPS": (affine_of(np.diag([-2.0, -2.0, 2.5])), (60, 52, 50)),
    "oblique": (affine_of(TURN @ np.diag([-3.0, -3.0, 3.0])), (40, 36, 40)),
    "anisotropic": (affine_of(np.diag([1.6, 1.6, 6.0])), (75, 65, 22)),
    "sagittal slices": (affine_of([[0, 0, 6.0], [-1.7, 0, 0], [0, -2.0, 0]]), (70, 60, 22)),
}


@pytest.mark.parametrize("geometry", COARSE)
def test_a_label_no_finer_than_the_grid_comes_back_by_the_nearest_path_whole(tmp_path, preprocessing, geometry):
    affine, shape = COARSE[geometry]
    millilitres = [1.5, 4, 10, 30, 100]
    truth = organs(affine, shape, millilitres)
    nib.save(nib.Nifti1Image(np.full(shape, 50, np.int16), affine), tmp_path / "ct1.nii.gz")
    nib.save(nib.Nifti1Image(truth, affine), tmp_path / "label.nii.gz")
    item = preprocessing({"image": str(tmp_path / "ct1.nii.gz"), "label": str(tmp_path / "label.nii.gz")})
    indicator = torch.nn.functional.one_hot(item["label"][0].as_tensor().long()).movedim(-1, 0).float()
    back = MaskOnScanGridd("pred", mode="nearest")({**item, "pred": indicator})["pred"][0].numpy()
    assert all(dice(back, truth, value) > 0.97 for value in range(1, len(millilitres) + 1))


# Invalid input


def test_unusable_items_are_named(tmp_path, preprocessing):
    item = preprocessed(tmp_path, *GEOMETRIES["RAS"], preprocessing)
    with pytest.raises(InputError, match="'cubic' is not one of linear, nearest"):
        MaskOnScanGridd("pred", mode="cubic")
    with pytest.raises(InputError, match=r"'pred' of .*ct1.nii.gz has the shape \(2, 5, 5, 5\), the image \(1, "):
        MaskOnScanGridd("pred")({**item, "pred": torch.zeros(2, 5, 5, 5)})
    nowhere = MetaTensor(torch.zeros(1, 4, 4, 4), meta={"filename_or_obj": "in/x.nii.gz"})
    with pytest.raises(InputError, match="in/x.nii.gz lack the grid of its file .*LoadImaged"):
        MaskOnScanGridd("pred")({"image": nowhere, "pred": torch.zeros(2, 4, 4, 4)})
    with pytest.raises(KeyError, match="pred"):
        MaskOnScanGridd("pred")(item)
    assert "pred" not in MaskOnScanGridd("pred", allow_missing_keys=True)(item)


def test_collated_metadata_are_understood(tmp_path, preprocessing):
    """A data loader turns affine and shape into tensors."""
    affine, shape = GEOMETRIES["sagittal slices"]
    item = preprocessed(tmp_path, affine, shape, preprocessing)
    batch = next(iter(DataLoader(Dataset([{"image": str(tmp_path / "ct1.nii.gz")}], preprocessing), batch_size=1)))
    collated = decollate_batch(batch)[0]
    assert isinstance(collated["image"].meta["original_affine"], torch.Tensor)
    pred = smooth_probabilities(item["image"].shape[1:])
    results = [MaskOnScanGridd("pred")({**each, "pred": pred})["pred"] for each in (item, collated)]
    assert torch.equal(*results) and torch.equal(results[0].affine, results[1].affine)
