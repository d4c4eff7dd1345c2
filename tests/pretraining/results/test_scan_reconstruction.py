# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A scan is masked window by window as in training, and what is returned fits the scan and the windows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.augmented_views import AugmentedViews
from bundles.pretraining.results.scan_reconstruction import MaskedWindows, SaveEmbeddings, SaveReconstructionPictures

ROI = [8, 8, 4]


class Network(torch.nn.Module):
    """Reconstructs twice its input; embeds a window by its mean and its largest voxel."""

    def forward(self, x):
        return 2 * x

    def embedding(self, x):
        return torch.stack([x.mean(dim=(1, 2, 3, 4)), x.amax(dim=(1, 2, 3, 4))], dim=1)


def windows(seed=0, sw_batch_size=1, ratio=0.3, fill="zero"):
    views = AugmentedViews(
        seed=seed,
        plane="axial",
        mask_fill=[fill],
        mask_ratio=[ratio, ratio],
        mask_block=[0.2, 0.5],
        mask_rule="covered",
    )
    return MaskedWindows(roi_size=ROI, sw_batch_size=sw_batch_size, views=views)


def scan(*shape):
    return 1 + torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(4))


def test_masks_of_another_crop_are_refused():
    with pytest.raises(InputError, match="'sample' takes voxels of another crop"):
        windows(fill="sample")


@pytest.mark.parametrize("shape", [(16, 16, 8), (19, 9, 4), (5, 8, 3)])
@pytest.mark.parametrize("sw_batch_size", [1, 3])
def test_masked_voxels_are_hidden_and_the_others_are_those_of_the_scan(shape, sw_batch_size):
    image = scan(*shape)
    outputs = windows(sw_batch_size=sw_batch_size)(image, Network())
    assert outputs["reconstruction"].shape == outputs["masked"].shape == image.shape
    hidden = outputs["masked"] == 0
    assert 0.1 < hidden.float().mean() < 0.6
    if all(
        side % roi == 0 for side, roi in zip(shape, ROI, strict=True)
    ):  # else the last windows overlap and are averaged
        assert torch.equal(outputs["masked"][~hidden], image[~hidden])
        assert 0.3 - 1e-6 <= hidden.float().mean() < 0.5
    torch.testing.assert_close(outputs["reconstruction"], 2 * outputs["masked"])


def test_without_masking_the_scan_passes_through():
    image = scan(16, 8, 8)
    torch.testing.assert_close(windows(ratio=0)(image, Network())["masked"], image)


def test_every_window_is_masked_on_its_own_and_the_seed_fixes_it():
    image = scan(16, 16, 4)
    masked = windows()(image, Network())["masked"]
    parts = [masked[0, 0, x : x + 8, y : y + 8] == 0 for x in (0, 8) for y in (0, 8)]
    assert all(not torch.equal(parts[i], parts[j]) for i in range(4) for j in range(i))
    assert torch.equal(masked, windows()(image, Network())["masked"])
    assert not torch.equal(masked, windows(seed=1)(image, Network())["masked"])


@pytest.mark.parametrize("sw_batch_size", [1, 3, 16])
def test_embeddings_are_those_of_the_unmasked_windows(sw_batch_size):
    image = scan(16, 16, 8)
    embedding = windows(sw_batch_size=sw_batch_size)(image, Network())["embedding"]
    assert embedding.shape == (1, 8, 2)
    parts = [image[0, 0, x : x + 8, y : y + 8, z : z + 4] for x in (0, 8) for y in (0, 8) for z in (0, 4)]
    expected = torch.tensor([[part.mean(), part.max()] for part in parts])
    order = embedding[0, :, 0].argsort()
    torch.testing.assert_close(embedding[0][order], expected[expected[:, 0].argsort()])


def case(name, **entries):
    image = MetaTensor(torch.zeros(1, 4, 6, 8), affine=torch.diag(torch.tensor([1.0, 2.0, 4.0, 1.0])))
    image.meta["filename_or_obj"] = f"/data/{name}.nii.gz"
    return {"image": image, **entries}


def engine_with(*items):
    return SimpleNamespace(state=SimpleNamespace(batch=[{} for _ in items], output=list(items)))


def test_embeddings_are_saved_per_scan_with_their_mean(tmp_path):
    embedding = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    SaveEmbeddings(tmp_path / "new").iteration_completed(
        engine_with(case("a", embedding=embedding), case("b", embedding=2 * embedding))
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a_embedding.npz", "b_embedding.npz"]
    with np.load(tmp_path / "new" / "b_embedding.npz") as saved:
        assert saved["windows"].tolist() == [[2.0, 4.0], [6.0, 12.0]]
        assert saved["embedding"].tolist() == [4.0, 8.0]


def test_a_picture_per_scan_shows_masked_scan_and_reconstruction_in_true_proportions(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "bundles.pretraining.results.scan_reconstruction.Figure.savefig",
        lambda self, path, dpi: (figures.append(self), path.write_text("picture")),
    )
    item = case("a")
    volumes = {
        name: MetaTensor(torch.rand(1, 4, 6, 8), affine=item["image"].affine)
        for name in ("scan", "masked", "reconstruction")
    }
    SaveReconstructionPictures(tmp_path, hu_window=[-100.0, 300.0]).iteration_completed(engine_with(item | volumes))
    assert [path.name for path in tmp_path.iterdir()] == ["a_reconstruction.png"]
    (figure,) = figures
    assert len(figure.axes) == 9
    for row, name in enumerate(("scan", "masked", "reconstruction")):
        volume = volumes[name].numpy()[0]
        for column, picture in enumerate((volume[2].T, volume[:, 3].T, volume[:, :, 4].T)):
            axes = figure.axes[3 * row + column]
            assert np.array_equal(axes.images[0].get_array(), picture)
            assert axes.images[0].get_clim() == (-100.0, 300.0)
            # height over width of a pixel: spacing 1, 2, 4 mm
            assert axes.get_aspect() == pytest.approx((4 / 2, 4 / 1, 2 / 1)[column])
            assert axes.get_title() == f"{name}, middle of {'xyz'[column]}"
