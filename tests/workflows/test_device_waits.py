# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Between two log entries, no training step synchronises with the device.

A synchronisation is anything that brings a value from the device to the host: ``.item()``, ``bool``, ``float``,
``.tolist()``, ``.cpu()``, indexing with a mask, and blocking copies to the device. All of them can be detected on a
CPU, where device and host are the same. Only data from the loader (such as the indices of the draws) are really on the
host and may be read.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack

import pytest
import torch
from ignite.engine import Events
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bundle_training import OF_A_STEP, engine_steps, training_config

HANDLERS = (*OF_A_STEP, "TrainingLog", "CropCounts", "StopSignal")
ROI = [64, 64, 32]
aten = torch.ops.aten
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2}
METHODS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}


def place() -> str:
    """Location of the innermost frame in the project or MONAI."""
    frames = [f for f in traceback.extract_stack() if "test_device_waits" not in f.filename]
    relevant = [f for f in frames if "/bundles/" in f.filename or "/monai/" in f.filename]
    return f"{(relevant or frames)[-1].filename}:{(relevant or frames)[-1].lineno}"


class Waits(TorchDispatchMode):
    """Records synchronisation inside operations, including those called from C++."""

    def __init__(self, host, found):
        super().__init__()
        self.host, self.found = host, found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put_) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        on_host = args and isinstance(args[0], torch.Tensor) and args[0].untyped_storage().data_ptr() in self.host
        if (packet in READING or by_mask) and not on_host:
            self.found.append(f"{packet} in {place()}")
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Records synchronisation by Python methods that do not appear as an operation."""

    def __init__(self, host, found):
        super().__init__()
        self.host, self.found, self.made = host, found, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in METHODS and args[0].untyped_storage().data_ptr() not in self.host:
            self.found.append(f"{name} in {place()}")
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            self.found.append(f"{name} from the host in {place()}")
        result = func(*args, **(kwargs or {}))
        has_inputs = any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs)))
        if isinstance(result, torch.Tensor) and not has_inputs and (kwargs or {}).get("device") is None:
            self.made.append(result)  # created without a device, so on the host, such as axes in MONAI's Dice loss
            self.host.add(result.untyped_storage().data_ptr())
        return result


def batches(steps, *, partly_known):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 1, *ROI, generator=generator)
    counts = {name: torch.zeros(2, dtype=torch.int64) for name in ("padded", "redrawn", "airy")}
    label = (image * 2).floor()
    if partly_known:
        label[:, :, :20] = 255
        counts |= {"unknown": torch.tensor([True, True]), "weight": torch.tensor([0.5, 1.0])}
    return [
        {"image": image, "label": label.clone(), "draw": torch.tensor([step, step]), **counts} for step in range(steps)
    ]


def waits_of_a_step(bundle, folder, *, fused=True, handlers=HANDLERS, partly_known=False, **options):
    """Synchronisations in the third of four steps, including handlers and fetching the next batch."""
    options |= {"preset": "cpu", "feature_size": 12, "depths": [1, 1, 1, 1], "roi_size": ROI, "output_dir": str(folder)}
    options |= {"max_steps": 4, "val_interval": 4, "log_every": 1000}
    config = training_config(bundle, handlers=handlers, **options)
    config["optimizer"]["fused"] = fused
    for handler in config["train"]["handlers"]:
        handler.pop("evaluator", None)
    trainer = config.get_parsed_content("train::trainer")
    assert trainer.non_blocking
    data = batches(4, partly_known=partly_known)
    host = {tensor.untyped_storage().data_ptr() for batch in data for tensor in batch.values()}
    found: list[str] = []
    modes = ExitStack()

    def count(engine):
        modes.close()
        if engine.state.iteration == 2:  # everything that is created once exists after two steps
            modes.enter_context(Waits(host, found))
            modes.enter_context(Calls(host, found))

    trainer.add_event_handler(Events.GET_BATCH_STARTED, count)
    engine_steps(trainer, data)()
    assert trainer.state.iteration == 4
    return found


SEGMENTATION = {"augmentation": dict.fromkeys(("flip", "rot90", "affine", "noise", "contrast"), 1.0)}
OPTIONS = {
    "swin_unetr_pretrain": {"mask_fill": ["noise", "sample", "zero"]},
    "swin_unetr_btcv_seg": {**SEGMENTATION, "class_balance": 0.0, "background_weight": 1.0},
    "swin_unetr_msd": {"task": "Task09_Spleen", **SEGMENTATION, "class_balance": 0.0, "background_weight": 1.0},
}


@pytest.mark.parametrize("bundle", OPTIONS)
def test_a_step_waits_for_nothing(bundle, tmp_path):
    assert waits_of_a_step(bundle, tmp_path, **OPTIONS[bundle]) == []


@pytest.mark.parametrize("batch_dice", [False, True])
def test_unknown_voxels_and_weights_make_no_step_wait(tmp_path, batch_dice):
    options = {**OPTIONS["swin_unetr_btcv_seg"], "partly_known": True, "batch_dice": batch_dice}
    assert waits_of_a_step("swin_unetr_btcv_seg", tmp_path, **options) == []


def test_a_wait_would_be_seen(tmp_path):
    found = waits_of_a_step("swin_unetr_pretrain", tmp_path, fused=False)
    assert any(each.startswith("__bool__") and "gradient_guard.py" in each for each in found)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0.5],
        lambda x: torch.nonzero(x),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_each_kind_of_wait_is_known(read):
    found: list[str] = []
    x = torch.rand(5)
    with Waits(set(), found), Calls(set(), found):
        read(x)
    assert found
    kept: list[str] = []
    with Waits(set(), kept), Calls(set(), kept):
        torch.where(x > 0.5, x, 0.0).add_(1).sum()
    assert not kept
