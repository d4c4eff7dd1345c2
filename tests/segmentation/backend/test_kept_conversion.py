# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A kept conversion is used for the same weights, windows and versions alone, and only if it is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from bundles.segmentation.backend.kept_conversion import KeptConversion, made_from, network_hash
from bundles.segmentation.backend.openvino_network import OpenVinoNetwork, convert

from .conftest import ROI, build, needs_openvino, smooth_scan

NAMES = [f"model.openvino_64x32x32.{suffix}" for suffix in ("bin", "json", "xml")]


@pytest.fixture(scope="module")
def source(network) -> dict:
    return made_from(network, channels=1, roi_size=ROI)


@pytest.fixture(scope="module")
def converted(network):
    return convert(network, channels=1, roi_size=ROI)


@pytest.fixture
def kept(tmp_path, source, converted) -> KeptConversion:
    kept = KeptConversion(tmp_path / "model.pt", source)
    kept.write(converted, {"a processor": 2e-5})
    return kept


def test_the_hash_is_that_of_weights_and_modules():
    first = network_hash(build())
    assert first == network_hash(build())
    assert len({first, network_hash(build(seed=1)), network_hash(build(merging="legacy"))}) == 3
    changed = build()
    changed.out.conv.conv.bias[0] += 1e-6
    assert network_hash(changed) != first


@needs_openvino
def test_what_was_written_is_read_with_the_same_numbers(kept, network, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    model, checked = kept.read()
    assert checked == {"a processor": 2e-5}
    window = smooth_scan(*ROI)
    torch.testing.assert_close(OpenVinoNetwork(model)(window), network(window), rtol=0, atol=1e-3)


@needs_openvino
def test_further_processors_are_added(kept):
    kept.note({"a processor": 2e-5, "another": 3e-5})
    assert kept.read()[1] == {"a processor": 2e-5, "another": 3e-5}


@needs_openvino
@pytest.mark.parametrize(
    ("name", "value"), [("weights", "0" * 64), ("openvino", "2020.1.0"), ("window", [96, 96, 96]), ("conversion", 0)]
)
def test_a_conversion_from_something_else_is_not_used(kept, source, name, value, caplog):
    record = json.loads(kept.record.read_text())
    record["made_from"][name] = value
    kept.record.write_text(json.dumps(record))
    with caplog.at_level(logging.INFO):
        assert kept.read() is None
    assert f"was made from other {name}: it is made anew" in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@needs_openvino
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [cut, turn_a_bit, Path.unlink])
def test_a_damaged_file_is_named_and_not_used(kept, tmp_path, name, damage, caplog):
    damage(tmp_path / name)
    assert kept.read() is None
    if name.endswith("json") and damage is Path.unlink:
        assert not caplog.records
    else:
        assert "it is made anew" in caplog.text and str(kept.record.parent) in caplog.text


@needs_openvino
@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"made_from": 1, "checked": {}, "files": {}}', "\x00"])
def test_a_foreign_record_is_not_used(kept, content):
    kept.record.write_text(content)
    assert kept.read() is None


@needs_openvino
def test_a_write_that_fails_leaves_nothing_that_counts(kept, converted, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bundles.segmentation.backend.kept_conversion._hash", fail)
    with pytest.raises(OSError, match="No space left"):
        kept.write(converted, {})
    assert not kept.record.exists()
    assert not [path for path in kept.record.parent.iterdir() if path.name.startswith(".")]
