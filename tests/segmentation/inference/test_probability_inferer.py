# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Probabilities are the mean over networks and mirrored scans, and are also computed if memory is short."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import sliding_window_inference
from torch import nn

from benchmarks.pretrain_cost import LiveBytes
from bundles.common.errors import InputError
from bundles.segmentation.inference import probability_inferer, sliding_window
from bundles.segmentation.inference.probability_inferer import ProbabilityInferer

ROI = (16, 16, 8)
CLASSES = 4
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.94 GiB."


def network(seed: int, width: int = 3, classes: int = CLASSES) -> nn.Module:
    """Sees left from right: no mirror image of a prediction is the prediction of the mirror image."""
    torch.manual_seed(seed)
    layers = [nn.Conv3d(1, width, 3, padding=1), nn.Tanh(), nn.Conv3d(width, classes, 3, padding=1)]
    return nn.Sequential(*layers).requires_grad_(False)


def scan(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(seed))


def inferer(**change) -> ProbabilityInferer:
    return ProbabilityInferer(**({"roi_size": ROI, "sw_batch_size": 4, "overlap": 0.5} | change))


def blended(images: torch.Tensor, member: nn.Module) -> torch.Tensor:
    return sliding_window_inference(images, ROI, 4, member, 0.5, mode="gaussian")


# The shapes have a remainder, windows that reach beyond the scan, and slices that are no multiple of a slab's.
@pytest.mark.parametrize("shape", [(16, 16, 8), (37, 21, 19), (9, 30, 5)])
def test_one_network_without_mirroring_is_the_softmax_of_the_blended_logits(shape):
    images = scan(*shape)
    result, expected = inferer()(images, network(1)), blended(images, network(1)).softmax(1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=3e-7, atol=0)  # two roundings: slabs are vectorised differently


@pytest.mark.parametrize("axes", [(), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(37, 21, 19), (9, 30, 5)])
def test_the_mean_goes_over_all_networks_and_mirror_images(axes, shape):
    members, images = [network(1), network(2, width=5), network(3)], scan(*shape).numpy()
    expected = []
    for member, flips in product(members, product(*([False, True] if axis in axes else [False] for axis in range(3)))):
        flipped = [axis + 2 for axis in range(3) if flips[axis]]
        logits = blended(torch.from_numpy(np.flip(images, flipped).copy()), member).numpy()
        powers = np.exp(logits.astype(np.float64))
        expected.append(np.flip(powers / powers.sum(1, keepdims=True), flipped))
    assert len(expected) == 3 * 2 ** len(axes)
    result = inferer(mirror_axes=list(axes), others=members[1:])(torch.from_numpy(images), members[0])
    np.testing.assert_allclose(result.numpy(), np.mean(expected, axis=0), atol=1e-6)


def test_others_are_put_into_evaluation_and_half_precision_is_not_kept():
    class Half(nn.Dropout):
        def forward(self, x):
            return super().forward(torch.cat([x, 1 - x], 1)).bfloat16()

    images = scan(20, 16, 8)
    result = inferer(others=[Half(0.5)])(images, Half(0.5).eval())
    assert result.dtype == torch.float32
    assert torch.equal(result, inferer()(images, Half(0.5).eval()))


def test_metadata_of_the_scan_are_those_of_the_result():
    meta = {"filename_or_obj": "ct.nii.gz", "original_affine": np.diag([1, 2, 3, 1])}
    image = MetaTensor(scan(20, 16, 8)[0], affine=torch.diag(torch.tensor([1.5, 1.5, 2, 1])), meta=meta)
    # MONAI Label gives image[None] and takes [0] of the result; an evaluator collates and decollates.
    result = inferer()(image[None], network(1))[0]
    assert isinstance(result, MetaTensor) and result.shape == (CLASSES, 20, 16, 8)
    assert torch.equal(result.affine, image.affine) and result.meta["filename_or_obj"] == "ct.nii.gz"
    batch = torch.utils.data.default_collate([image.as_tensor()])
    collated = MetaTensor(batch, affine=image.affine[None], meta={"filename_or_obj": ["ct.nii.gz"]})
    collated.is_batch = True
    decollated = decollate_batch({"pred": inferer()(collated, network(1))})[0]["pred"]
    assert torch.equal(decollated, result) and decollated.meta["filename_or_obj"] == "ct.nii.gz"
    assert not isinstance(inferer()(scan(20, 16, 8), network(1)), MetaTensor)


@pytest.mark.parametrize("axes", [[], [0], [0, 1, 2]])
@pytest.mark.parametrize("members", [1, 3])
def test_at_most_two_class_volumes_exist_at_a_time(axes, members):
    shape, classes = (120, 24, 24), 16
    images, networks = scan(*shape), [network(seed, classes=classes) for seed in range(members)]
    infer = inferer(sw_batch_size=1, overlap=0.25, mirror_axes=axes, others=networks[1:])
    with LiveBytes([images, *(tensor for member in networks for tensor in member.parameters())]) as live:
        result = infer(images, networks[0])
    volume = result.numel() * 4
    # Beside them: the sum of window weights and a mirrored scan (1/16 each), windows, and slabs of 8 slices.
    assert volume < live.peak < (1.4 if members * 2 ** len(axes) == 1 else 2.4) * volume
    assert live.now == volume


# Windows of air


class Releasing(nn.Module):
    """Writes down when it computes windows and when it is told to release its memory."""

    def __init__(self, name: str, diary: list[str]):
        super().__init__()
        self.name, self.diary = name, diary

    def forward(self, windows):
        self.diary.append(self.name)
        return windows.repeat(1, CLASSES, 1, 1, 1)

    def release_memory(self):
        self.diary.append(f"{self.name} released")


def test_each_network_releases_its_memory_before_the_next_one_computes():
    diary: list[str] = []
    members = [Releasing(name, diary) for name in "ab"]
    inferer(others=members[1:], mirror_axes=[0])(scan(16, 16, 8), members[0])
    assert diary == ["a", "a", "a released", "b", "b", "b released"]  # a scan and its mirror image


class Thresholds(nn.Module):
    """Predicts background in air, like every trained network, and organs from the brightness around a voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.AvgPool3d(3, stride=1, padding=1, count_include_pad=False)
        self.windows = 0

    def forward(self, x):
        self.windows += len(x)
        mean = self.mean(x)
        return torch.cat([0.3 - mean, 0.1 * (mean - 0.3), 2 * mean - 1, *[mean - 5] * (CLASSES - 3)], 1)


def body() -> torch.Tensor:
    """A column with a texture; the corners around it are air."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in (96, 80, 40)), indexing="ij")
    inside = x.abs() + y.abs() + 0.2 * z.abs() < 1
    coarse = torch.rand(1, 1, 12, 10, 6, generator=torch.Generator().manual_seed(0))
    return inside * nn.functional.interpolate(coarse, size=inside.shape, mode="trilinear").clamp(min=0.01)


@pytest.mark.parametrize("axes", [[], [0, 1]])
def test_masks_without_windows_of_air_are_those_of_all_windows(axes):
    images, few, all_of_them = body(), Thresholds(), Thresholds()
    skipped = inferer(mirror_axes=axes)(images, few).argmax(1)
    plain = inferer(skip_air=False, mirror_axes=axes)(images, all_of_them).argmax(1)
    assert 0.8 * all_of_them.windows < few.windows < 0.98 * all_of_them.windows
    assert plain.unique().tolist() == [0, 1, 2] and (plain == 0).float().mean() < 0.9
    assert (skipped == plain).float().mean() >= 0.9999
    monai = blended(images, Thresholds()).argmax(1)
    assert axes or (skipped == monai).float().mean() >= 0.9999


def test_what_only_windows_of_air_cover_is_background_even_if_the_network_says_otherwise():
    class Organs(nn.Module):
        def forward(self, x):
            return torch.cat([x - 1, x + 1], 1)

    images = torch.zeros(1, 1, 48, 16, 8)
    images[0, 0, :10] = 1
    result = inferer()(images, Organs()).argmax(1)
    assert result[0, :, 0, 0].tolist() == [1] * 24 + [0] * 24  # the windows 0 to 15 and 8 to 23 are not empty
    assert inferer(skip_air=False)(images, Organs()).argmax(1).all()


# Too little memory


class Greedy(nn.Module):
    """Runs out of memory when it gets more than ``most`` windows at once, and in its first ``refusals`` calls."""

    def __init__(self, most: int = 100, refusals: int = 0) -> None:
        super().__init__()
        self.inner, self.most, self.refusals, self.batches = network(1), most, refusals, []

    def forward(self, x):
        self.batches.append(len(x))
        self.refusals -= 1
        if len(x) > self.most or self.refusals >= 0:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return self.inner(x)


def test_windows_are_halved_until_they_fit_and_the_next_scan_starts_there(caplog):
    greedy, images, infer = Greedy(most=2), scan(37, 21, 19), inferer(sw_batch_size=9)
    result = infer(images, greedy)
    torch.testing.assert_close(result, blended(images, network(1)).softmax(1))
    assert greedy.batches[:3] == [9, 4, 2] and set(greedy.batches[3:]) <= {2, 1}
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    for message, words in zip(messages, [("9 windows of [16, 16, 8]", "4"), ("4 windows", "2")], strict=True):
        assert words[0] in message and f"--sw_batch_size {words[1]} avoids" in message
        assert "[37, 21, 19]" in message and "Tried to allocate 2.00 GiB" in message

    caplog.clear()
    greedy.batches.clear()
    infer(images, greedy)
    assert max(greedy.batches) == 2 and not caplog.records


def test_the_last_resorts_are_the_computers_memory_and_its_processor(caplog):
    infer, images = inferer(sw_batch_size=2), scan(20, 16, 8)
    result = infer(images, Greedy(refusals=3))
    torch.testing.assert_close(result, blended(images, network(1)).softmax(1))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "--sw_batch_size 1 avoids the failed attempt" in messages[0]
    assert "computer's memory" in messages[1] and "--sw_batch_size 1" in messages[1]
    assert "On the CPU" in messages[2] and "--device cpu" in messages[2]


class Travelling(nn.Module):
    """Records the devices that it is moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(torch.device(device).type)


def test_each_step_keeps_more_off_the_gpu(monkeypatch):
    """The device ``meta``, which computes nothing, represents the GPU."""
    calls = []

    def windows(images, member, *, roi_size, sw_batch_size, overlap, skip_air, network_device, volume_device):
        calls.append((sw_batch_size, network_device.type, volume_device.type))
        if len(calls) < 4:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return torch.zeros((1, CLASSES, *images.shape[2:]), device=volume_device)

    monkeypatch.setattr(probability_inferer, "blend_windows", windows)
    monkeypatch.setattr(probability_inferer, "_check_finite", lambda inputs: None)  # there are no values
    first, second = Travelling(), Travelling()
    infer = inferer(sw_batch_size=2, others=[second])
    result = infer(torch.empty((1, 1, 20, 16, 8), device="meta"), first)
    assert calls[:4] == [(2, "meta", "meta"), (1, "meta", "meta"), (1, "meta", "cpu"), (1, "cpu", "cpu")]
    assert result.device.type == "cpu" and torch.all(result == 1 / CLASSES)
    assert first.places == ["meta", "meta", "meta", "cpu", "meta"]  # and moved back for the next scan
    assert second.places == ["cpu", "meta"]


def test_a_scan_that_fits_nowhere_is_said_so():
    infer = inferer(sw_batch_size=2)
    for _ in range(2):  # the second scan goes straight to the last resort
        with pytest.raises(InputError, match=r"neither into the GPU's memory .*\[20, 16, 8\].*2.00 GiB.*--roi_size"):
            infer(scan(20, 16, 8), Greedy(most=0))


class GreedyOnCpu(Greedy):
    def forward(self, x):
        self.batches.append(len(x))
        if len(x) > self.most:
            torch.empty(2**58)  # more than any computer has
        return self.inner(x)


def test_the_computers_memory_is_told_from_that_of_a_gpu(caplog):
    greedy, images = GreedyOnCpu(most=2), scan(37, 21, 19)
    torch.testing.assert_close(inferer(sw_batch_size=4)(images, greedy), blended(images, network(1)).softmax(1))
    assert greedy.batches[:2] == [4, 2]
    assert "The computer's memory is too small" in caplog.text and "--sw_batch_size 2 avoids" in caplog.text
    greedy = GreedyOnCpu(most=0)
    with pytest.raises(InputError, match=r"The scan does not fit into the computer's memory \(1 window"):
        inferer(sw_batch_size=2)(images, greedy)
    assert greedy.batches == [2, 1]  # the other plans only move things from a GPU


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["one window", "one voxel"])
def test_values_of_the_network_that_are_not_numbers_are_refused(value, where):
    """They would be background, without a word: the largest probability is looked for by comparing."""
    inner, seen = network(1), []

    class Overflowing(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            out = inner(x)
            if len(seen) == 2:
                out[0, 1, *([...] if where == "one window" else [8, 8, 4])] = value
            return out

    images = MetaTensor(scan(37, 21, 19), meta={"filename_or_obj": "/data/p1/ct.nii.gz"})
    with pytest.raises(InputError, match=r"/data/p1/ct.nii.gz: .*not a number \(NaN\) in \d+ voxels.*--amp false"):
        inferer(mirror_axes=[0], others=[network(2)])(images, Overflowing())


def test_memory_that_the_weights_of_the_window_lack_is_recognised(monkeypatch, caplog):
    compute, refusals = sliding_window.compute_importance_map, [1]

    def no_memory(*args, **kwargs):
        if refusals:
            refusals.pop()
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return compute(*args, **kwargs)

    monkeypatch.setattr(sliding_window, "compute_importance_map", no_memory)
    sliding_window.importance_map.cache_clear()
    inferer()(scan(20, 16, 8), network(1))
    assert "Tried to allocate 2.00 GiB" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_library_without_memory_on_the_gpu_is_a_gpu_that_is_too_small(caplog, text):
    class Library(Greedy):
        def forward(self, x):
            if len(x) > 1:
                raise RuntimeError(text)
            return super().forward(x)

    images = scan(20, 16, 8)
    result = inferer(sw_batch_size=2)(images, Library())
    torch.testing.assert_close(result, blended(images, network(1)).softmax(1))
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("The GPU's memory is too small") and text.splitlines()[0] in message


def test_mixed_precision_is_that_of_the_config_whoever_calls(monkeypatch):
    """MONAI Label calls the inferer outside an evaluator, which would set it."""
    entered = []

    @contextmanager
    def autocast(*device, **options):
        entered.append((*device, options))
        yield
        entered.append("left")

    monkeypatch.setattr(torch, "autocast", autocast)
    inferer(amp=True, amp_kwargs={"dtype": torch.bfloat16})(scan(20, 16, 8), network(1))
    assert entered == [("cuda", {"dtype": torch.bfloat16}), "left"]
    inferer(amp_kwargs={"dtype": torch.bfloat16})(scan(20, 16, 8), network(1))
    assert len(entered) == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory(caplog):
    with pytest.raises(RuntimeError, match="expected input"):
        inferer()(torch.zeros(1, 2, 20, 16, 8), network(1))
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sw_batch_size": 0}, "--sw_batch_size 0"),
        ({"sw_batch_size": 1.5}, "--sw_batch_size 1.5"),
        ({"overlap": 1.0}, "--overlap 1.0"),
        ({"overlap": -0.1}, "--overlap -0.1"),
        ({"overlap": [0.5, 0.5, 1.5]}, r"--overlap \[0.5, 0.5, 1.5\]"),
        ({"mirror_axes": [0, 3]}, r"--mirror_axes \[0, 3\]"),
        ({"mirror_axes": [1, 1]}, r"--mirror_axes \[1, 1\]"),
        ({"mirror_axes": [-1]}, r"--mirror_axes \[-1\]"),
        ({"mirror_axes": 0}, "--mirror_axes 0"),
        ({"mirror_axes": "xy"}, "--mirror_axes 'xy'"),
    ],
)
def test_unusable_arguments_are_named(change, words):
    with pytest.raises(InputError, match=words):
        inferer(**change)


def test_a_scan_with_nan_is_refused_by_name():
    image = MetaTensor(torch.zeros(1, 1, 32, 32, 32), meta={"filename_or_obj": ["ct.nii.gz"]})
    image[0, 0, 3, 4, 5] = float("nan")
    with pytest.raises(InputError, match=r"ct\.nii\.gz.* not numbers"):
        inferer()(image, torch.nn.Identity())
