# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The list of releases allows only one set of bytes per version."""

from __future__ import annotations

import json

import pytest

from bundles.common.errors import InputError
from zoo.package.release_index import add_to_index, read_index, released


def test_a_package_is_added_beside_others_in_the_zoos_form(tmp_path):
    path = tmp_path / "model_info.json"
    add_to_index(path, package="b_v0.1.0", checksum="22", url_prefix="https://example.org/releases/")
    add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix=None)
    assert (
        path.read_text()
        == json.dumps(
            {
                "a_v0.1.0": {"checksum": "11", "source": "a_v0.1.0.zip"},
                "b_v0.1.0": {"checksum": "22", "source": "https://example.org/releases/b_v0.1.0.zip"},
            },
            indent=4,
        )
        + "\n"
    )


def test_equal_bytes_are_fine_and_keep_the_address_unless_another_is_given(tmp_path):
    path = tmp_path / "model_info.json"
    assert not released(path, package="a_v0.1.0", checksum="11")
    add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix="https://example.org")
    assert released(path, package="a_v0.1.0", checksum="11")
    add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix=None)
    assert read_index(path)["a_v0.1.0"]["source"] == "https://example.org/a_v0.1.0.zip"
    add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix="https://other.org")
    assert read_index(path)["a_v0.1.0"]["source"] == "https://other.org/a_v0.1.0.zip"


def test_other_bytes_of_a_released_version_are_refused(tmp_path):
    path = tmp_path / "model_info.json"
    add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix=None)
    before = path.read_bytes()
    with pytest.raises(
        InputError,
        match=r"a_v0\.1\.0 was released with other bytes.*sha1 11, this package 12.*Raise version.*"
        r"a_v0\.1\.0 was never published, remove its entry from .*model_info\.json",
    ):
        add_to_index(path, package="a_v0.1.0", checksum="12", url_prefix=None)
    assert path.read_bytes() == before
    add_to_index(path, package="a_v0.1.1", checksum="12", url_prefix=None)


@pytest.mark.parametrize("text", ["{", "[]", '{"a_v1": "x"}'])
def test_a_broken_list_is_not_written_over(tmp_path, text):
    path = tmp_path / "model_info.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"model_info\.json.*Repair the file"):
        add_to_index(path, package="a_v0.1.0", checksum="11", url_prefix=None)
    assert path.read_text() == text
