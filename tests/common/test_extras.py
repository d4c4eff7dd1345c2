# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packages that only some work needs are named when they are missing, and nothing else needs them."""

from __future__ import annotations

import ast
import configparser
import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bundles.common.errors import InputError, RefusedScan
from bundles.common.extras import import_extra
from bundles.common.scans import dicom_series
from bundles.segmentation.results.dicom_segmentation import SaveDicomSegmentations

from .scans.dicom_files import write_series

ROOT = Path(__file__).parents[2]
FOLDERS = ("bundles", "zoo", "demo", "evidence", "tools", "benchmarks")


def requirements(section: str, option: str) -> dict[str, Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for line in config[section][option].splitlines() if line.strip()]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(
        InputError,
        match=r"^Registration needs the package no_such_package, which is not installed\. Run `make install "
        r"EXTRAS=register` in the project's folder, or `pip install no_such_package`\.$",
    ):
        import_extra("no_such_package", extra="register", use="Registration")


def test_an_installed_package_that_lacks_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        import_extra("broken_package", extra="dicom", use="DICOM")
    assert import_extra("json", extra="dicom", use="DICOM") is json


def test_without_highdicom_a_series_is_refused_before_it_is_segmented(tmp_path, monkeypatch):
    (tmp_path / "metadata.json").write_text('{"name": "model", "version": "1"}')
    monkeypatch.setitem(sys.modules, "highdicom", None)
    arguments = {"labels": {1: "liver"}, "output_dir": tmp_path, "metadata": str(tmp_path / "metadata.json")}
    SaveDicomSegmentations(series={}, **arguments)  # NIfTI needs no highdicom
    with pytest.raises(InputError, match=r"A DICOM segmentation needs the package highdicom.*EXTRAS=dicom"):
        SaveDicomSegmentations(series={"scan.nii.gz": ["1.dcm"]}, **arguments)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["gdcm - requires gdcm>=3.0.10"], r"needs a decoder that is not installed\. Run `make install EXTRAS=dicom`"),
        (["pylibjpeg - requires pylibjpeg>=2.0"], "is not supported: decompress it"),
    ],
)
def test_without_a_decoder_a_compressed_series_is_refused(tmp_path, monkeypatch, missing, message):
    class Decoder:
        is_available = False
        missing_dependencies = missing

    stored = np.zeros((4, 4, 3), dtype=np.int16)
    files = write_series(tmp_path / "series", stored, syntax="1.2.840.10008.1.2.5")  # run-length encoded
    monkeypatch.setattr(dicom_series, "get_decoder", lambda syntax: Decoder())
    header = dicom_series.read_header(str(files[0]))
    with pytest.raises(RefusedScan, match=message):
        dicom_series._decode(str(files[0]), header)


def test_what_modules_import_at_once_is_installed_without_extras():
    """Of third parties: packages of install_requires, and those that they bring."""
    installed = requirements("options", "install_requires")
    brought = {"packaging", "pillow", "pydantic-core"}  # by torch, matplotlib and pydantic
    owners = packages_distributions()
    extra = {
        name
        for option in ("dicom", "export", "mlflow", "openvino", "register")
        for name in requirements("options.extras_require", option)
    }
    assert not extra & installed.keys()
    # read only where Triton was found (`bias_gradient.why_no_kernel`), which torch brings with CUDA
    with_triton = ROOT / "bundles/common/networks/fast/bias_gradient_kernel.py"
    checked = 0
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - set(FOLDERS):
                if (path, top) == (with_triton, "triton"):
                    continue
                names = {canonicalize_name(name) for name in owners.get(top, [])}
                assert names & {*installed, *brought}, f"{path} imports {top} ({', '.join(names) or 'unknown'})"
                checked += 1
    assert checked > 300
