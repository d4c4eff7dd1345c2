# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A stored scan gives back what went in, a box costs no more than the blocks it touches, and bad files are named."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import blosc2
import numpy as np
import pytest

from bundles.common.errors import InputError, RefusedScan
from bundles.pretraining.crops.patch_store import StoredScan, write_scan

AFFINE = np.array([[0.7, 0.1, 0.0, -120.5], [-0.1, 0.7, 0.0, 33.3], [0.0, 0.0, 2.5, 1 / 3], [0.0, 0.0, 0.0, 1.0]])
PROCESS = Path("/proc/self")


def scan_of(voxels, folder, **options):
    """Write the voxels and return the scan."""
    box = [[0, size] for size in voxels.shape]
    write_scan(folder / "scan.b2nd", **{"voxels": voxels, "affine": AFFINE, "body_box": box, **options})
    return StoredScan(folder / "scan.b2nd")


def noise(shape=(70, 41, 35), seed=0):
    return np.random.default_rng(seed).integers(-1024, 1500, size=shape).astype(np.int16)


@pytest.mark.parametrize("shape", [(70, 41, 35), (1, 1, 1), (5, 130, 64), (128, 65, 16), (3, 2, 200)])
def test_every_box_is_the_box_of_the_volume(tmp_path, shape):
    voxels = noise(shape)
    scan = scan_of(voxels, tmp_path)
    assert scan.shape == shape and scan.dtype == np.int16
    random = np.random.default_rng(1)
    corners = [np.sort(random.integers(0, np.array(shape) + 1, size=(2, 3)), axis=0) for _ in range(20)]
    for low, high in [*corners, (np.zeros(3, int), np.array(shape))]:
        box = tuple(map(slice, low, high))
        read = scan.read(box)
        assert read.dtype == np.int16 and np.array_equal(read, voxels[box])
        read[...] = 0  # memory of its own, that torch may write to
    assert np.array_equal(scan.read((slice(None),) * 3), voxels)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([-32768, 0, 32767]), np.int16),
        (np.array([-1024.0, 3071.0, -0.0]), np.int16),
        (np.array([-1024.0, 0.1, 3071.0]), np.float32),
        (np.array([0, 32768]), np.float32),
        (np.array([0, 40000], dtype=np.uint16), np.float32),
        (np.array([-32769.0, 65536.0]), np.float32),
        (np.array([True, False]), np.int16),
    ],
)
def test_values_are_int16_where_nothing_is_lost_and_else_float32(tmp_path, values, dtype):
    scan = scan_of(values.reshape(-1, 1, 1), tmp_path)
    assert scan.dtype == dtype
    assert np.array_equal(scan.read((slice(None),) * 3).ravel(), values.astype(np.float32))


def test_voxels_may_lie_in_memory_in_any_order(tmp_path):
    voxels = noise()
    for order in (voxels[::-1], voxels.transpose(2, 0, 1), np.asfortranarray(voxels)):
        assert np.array_equal(scan_of(order, tmp_path).read((slice(None),) * 3), order)


def test_the_rest_of_the_scan_comes_back_to_the_bit(tmp_path):
    details = {"source": "CT äöü/1.nii.gz", "shape": [512, 512, 41], "air": 0.1 + 0.2, "collection": {"licence": None}}
    scan = scan_of(noise(), tmp_path, body_box=np.array([[3, 60], [0, 41], [7, 7]]), details=details)
    assert np.array_equal(scan.affine, AFFINE) and scan.affine.dtype == np.float64
    assert scan.spacing == pytest.approx((0.5**0.5, 0.5**0.5, 2.5))
    assert scan.body_box == [[3, 60], [0, 41], [7, 7]]
    assert scan.details == details
    assert scan_of(noise(), tmp_path).details == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_numbers_are_refused_and_leave_no_file(tmp_path, value):
    voxels = noise().astype(np.float32)
    voxels[4, 5, 6] = value
    with pytest.raises(RefusedScan, match="not numbers"):
        scan_of(voxels, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"voxels": noise((4, 4, 4))[0]},
        {"voxels": noise((4, 0, 4))},
        {"affine": np.eye(3)},
        {"body_box": [[0, 9], [0, 41]]},
        {"body_box": [[0, 71], [0, 41], [0, 35]]},
        {"body_box": [[9, 8], [0, 41], [0, 35]]},
    ],
)
def test_what_does_not_fit_together_is_not_written(tmp_path, change):
    whole = {"voxels": noise(), "affine": AFFINE, "body_box": [[0, 9], [0, 9], [0, 9]]}
    with pytest.raises(ValueError, match="box"):
        write_scan(tmp_path / "scan.b2nd", **{**whole, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file_or_none(tmp_path):
    """The process dies when all is written but the name."""
    old = scan_of(noise(), tmp_path).read((slice(None),) * 3)
    program = f"""
import os, numpy as np
from bundles.pretraining.crops.patch_store import write_scan
os.replace = lambda *_: os._exit(9)
for name in ("new", "scan"):
    if os.fork() == 0:
        path = f"{tmp_path}/{{name}}.b2nd"
        write_scan(path, voxels=np.zeros((9, 9, 9)), affine=np.eye(4), body_box=[[0, 9]] * 3)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
    visible = [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert visible == ["scan.b2nd"] and len(list(tmp_path.iterdir())) == 3
    assert np.array_equal(StoredScan(tmp_path / "scan.b2nd").read((slice(None),) * 3), old)


def test_a_box_needs_no_more_memory_than_itself(tmp_path):
    scan = scan_of(noise((128, 128, 128)), tmp_path)
    assert scan.shape == (128, 128, 128)
    tracemalloc.start()
    try:
        scan.read((slice(40, 60),) * 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 < 2 * 128**3 / 40


def test_a_box_reads_the_blocks_it_touches_and_no_others(tmp_path):
    """The file is destroyed in its middle, where the middle of the first axis is."""
    voxels = np.repeat(noise((256, 64, 8)), 8, axis=2)  # compressible: raw blocks would decode to anything
    scan = scan_of(voxels, tmp_path)
    path = tmp_path / "scan.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 10 : len(content) * 7 // 10] = b"\xff" * (
        len(content) * 7 // 10 - len(content) * 3 // 10
    )
    path.write_bytes(content)
    for low in (0, 16, 192, 224):
        box = (slice(low, low + 32), slice(0, 64), slice(0, 64))
        assert np.array_equal(scan.read(box), voxels[box])
    with pytest.raises(InputError, match="scan.b2nd is damaged.*run prepare again"):
        scan.read((slice(112, 144), slice(0, 64), slice(0, 64)))


@pytest.mark.skipif(not PROCESS.is_dir(), reason="counts in /proc")
def test_no_file_stays_open(tmp_path):
    before = len(list((PROCESS / "fd").iterdir()))
    scans = []
    for i in range(40):
        scans.append(scan_of(noise(), tmp_path / f"{i}"))
        assert scans[-1].shape == (70, 41, 35) and scans[-1].read((slice(0, 33),) * 3).shape == (33, 33, 33)
    assert len(list((PROCESS / "fd").iterdir())) == before


@pytest.mark.skipif(not PROCESS.is_dir(), reason="counts in /proc")
def test_reading_starts_no_threads(tmp_path):
    """They would live as long as the open file does."""
    scan = scan_of(noise((96, 96, 96)), tmp_path)
    before = len(list((PROCESS / "task").iterdir()))
    array, _ = scan._open()
    assert array[:90, :90, :90].shape == (90, 90, 90)
    assert len(list((PROCESS / "task").iterdir())) == before


def test_a_scan_pickles_as_its_path(tmp_path):
    scan = scan_of(noise(), tmp_path, details={"note": 5000 * "x"})
    assert len(scan.details["note"]) == 5000
    copy = pickle.loads(pickle.dumps(scan))
    assert len(pickle.dumps(scan)) < 500 and copy.path == str(tmp_path / "scan.b2nd")
    assert copy.details == scan.details and np.array_equal(copy.affine, scan.affine)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    scan = StoredScan(tmp_path / "later.b2nd")
    with pytest.raises(InputError, match=r"later.b2nd.*No such file.*run prepare again"):
        scan.shape  # noqa: B018
    os.rename(scan_of(noise(), tmp_path).path, tmp_path / "later.b2nd")
    assert scan.shape == (70, 41, 35)


@pytest.mark.parametrize("left", [0, 1, 40, 1000, 0.5, 0.99, -1])
def test_a_truncated_file_is_named(tmp_path, left):
    scan = scan_of(noise(), tmp_path)
    content = Path(scan.path).read_bytes()
    Path(scan.path).write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    for access in (lambda: scan.shape, lambda: scan.read((slice(0, 1),) * 3)):
        with pytest.raises(InputError, match=r"scan.b2nd \(\d+ bytes\) is truncated.*run prepare again"):
            access()


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "page").write_text("<html>")
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(10_000))
    blosc2.asarray(noise(), urlpath=str(tmp_path / "array"), mode="w")
    blosc2.SChunk(data=b"bytes", urlpath=str(tmp_path / "chunk"), mode="w")
    lazy = blosc2.lazyexpr("a + 1", operands={"a": blosc2.open(str(tmp_path / "array"))})
    lazy.save(urlpath=str(tmp_path / "lazy.b2nd"))
    for name in ("page", "noise", "array", "chunk", "lazy.b2nd"):
        for access in (lambda scan: scan.affine, lambda scan: scan.read((slice(0, 1),) * 3)):
            with pytest.raises(InputError, match=f"{name} .*not a stored scan: delete it and run prepare again"):
                access(StoredScan(tmp_path / name))
    with pytest.raises(InputError, match="directory.*run prepare again"):
        StoredScan(tmp_path).shape  # noqa: B018


def test_a_file_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bundles.pretraining.crops.patch_store.FORMAT", 7)
    scan = scan_of(noise(), tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="scan.b2nd is a stored scan of format 7.*reads format 1: run prepare again"):
        scan.read((slice(0, 1),) * 3)


@pytest.mark.parametrize(
    "box", [[[0, 99], [0, 1], [0, 1]], [[-1, 1], [0, 1], [0, 1]], [[2, 1], [0, 1], [0, 1]], [[0, 1]]]
)
def test_a_body_box_outside_of_the_voxels_is_refused(tmp_path, box):
    scan = scan_of(noise(), tmp_path)
    array = blosc2.open(scan.path, mode="a")
    array.schunk.vlmeta["scan"] = json.dumps({**json.loads(array.schunk.vlmeta["scan"]), "body_box": box})
    del array
    with pytest.raises(
        InputError, match=r"scan.b2nd is damaged: its body box \[\[.* is not inside its \(.* run prepare again"
    ):
        StoredScan(scan.path).body_box  # noqa: B018
