# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The kit holds all that the GPU machine lacks, and runs from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu_check import kit
from benchmarks.gpu_check.check import fits
from benchmarks.gpu_check.parts import PARTS
from bundles.common.errors import InputError


def write_wheel(
    folder: Path, name: str, version: str, *, needs: tuple[str, ...] = (), tags: str = "py3-none-any"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tags}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{name}/__init__.py", f"VERSION = '{version}'\n")
    return path


@pytest.fixture
def registry(monkeypatch):
    """A registry of wheels that are written when they are asked for; returns the requests."""
    needs = {"one": ("two>=1", "torch>=2", 'colorama; sys_platform == "win32"'), "two": ("httpx[http2]",), "h2": ()}
    asked = []

    def download(requirement, folder):
        asked.append(str(requirement))
        return write_wheel(folder, requirement.name, "1.0", needs=needs[requirement.name])

    monkeypatch.setattr(kit, "download", download)
    return asked


def test_wheels_bring_what_they_need_but_for_what_the_image_has(tmp_path, registry):
    write_wheel(tmp_path, "two", "0.9")  # too old
    write_wheel(tmp_path, "unrelated", "1.0")
    wheels = kit.collect_wheels([Requirement("one==1.0")], tmp_path)
    assert registry == ["one==1.0", "two>=1", "h2"]
    assert {path.name.split("-")[0] for path in wheels} == {"one", "two", "h2"}
    assert sorted(tmp_path.iterdir()) == sorted(wheels)  # nothing else travels
    kit.collect_wheels([Requirement("one==1.0")], tmp_path)
    assert len(registry) == 3  # what is there is not fetched again


def test_a_wheel_that_cannot_be_found_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        InputError, match=r"pip finds no wheel of nosuchpackage==1\.0 for Python 3\.12 on Linux x86-64: ERR"
    ):
        kit.download(Requirement("nosuchpackage==1.0"), tmp_path)


def test_the_kit_carries_the_versions_of_the_project():
    pinned = {requirement.name: str(requirement.specifier) for requirement in kit.pinned()}
    assert pinned.keys() == set(kit.WANTED) and all(version.startswith("==") for version in pinned.values())


def test_kit_and_image_have_what_each_part_imports():
    packages = {"ignite": "pytorch-ignite", "yaml": "pyyaml"}
    needed = {packages.get(module, module) for part in PARTS.values() for module in part.needs}
    assert needed - set(kit.WANTED) - kit.IN_THE_IMAGE == set()


def test_own_scans_travel_and_an_earlier_users_do_not(tmp_path, registry, monkeypatch, capsys):
    monkeypatch.setattr(kit, "pinned", lambda: [])
    monkeypatch.setattr(kit, "write_dataset", lambda *_, **__: None)
    monkeypatch.setattr(kit, "own_scans", lambda data, spacing: ({"spacing": list(spacing)}, ["one", "two"]))
    monkeypatch.setattr(kit, "pack_patient", lambda folder, contents, source: (folder / source).write_bytes(b"x" * 500))
    out = tmp_path / "kit"
    assert kit.main(["--out", str(out), "--data", "SCANS", "--spacing", "3", "3", "5"]) == 0
    assert json.loads((out / "curve" / "contents.json").read_text()) == {"spacing": [3, 3, 5]}
    assert {path.name for path in (out / "curve").iterdir()} == {"one", "two", "contents.json"}
    assert "the scans of SCANS" in capsys.readouterr().out
    assert kit.main(["--out", str(out)]) == 0
    assert not (out / "curve").exists()
    monkeypatch.setattr(kit, "LARGEST", 900)
    assert kit.main(["--out", str(out), "--data", "SCANS"]) == 1
    assert "The scans of SCANS take 0 of them: list fewer, or pass a coarser --spacing." in capsys.readouterr().err
    assert kit.main(["--out", str(out), "--spacing", "0", "3", "5"]) == 1
    assert "--spacing [0.0, 3.0, 5.0] must be three sizes in mm above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wheel", "fitting"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp311-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp313-abi3-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux2014_x86_64.whl", False),
    ],
)
def test_wheels_for_another_python_are_left_out(wheel, fitting):
    assert fits(wheel, minor=12) is fitting


def test_the_code_is_complete_without_links_and_results(tmp_path):
    kit.write_code(tmp_path / "code.zip")
    with zipfile.ZipFile(tmp_path / "code.zip") as archive:
        names = set(archive.namelist())
    assert {
        *("bundles/segmentation/models/ensemble.py", "bundles/swin_unetr_btcv_seg/configs/train.yaml"),
        *("bundles/swin_unetr_btcv_seg/scripts/segmentation/models/ensemble.py", "tools/synthetic_ct.py"),
    } <= names
    assert not [name for name in names if "/__pycache__/" in name]
    assert not [name for name in names if name.startswith("bundles/swin_unetr_btcv_seg/models/")]


def test_the_kit_runs_from_an_empty_folder(tmp_path):
    folder = tmp_path / "kit"
    write_wheel(folder / "wheels", "kitwheel", "3.2")
    write_wheel(folder / "wheels", "otherpython", "1.0", tags="cp39-cp39-manylinux2014_x86_64")
    kit.write_code(folder / "code.zip")
    (folder / "scans").mkdir()
    (folder / "curve").mkdir()  # a user's scans: passed on
    (folder / "check.py").write_bytes((kit.ROOT / "benchmarks" / "gpu_check" / "check.py").read_bytes())
    command = [sys.executable, "kit/check.py", "--out", "results", "--only", "machine", "--dry_run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out otherpython-1.0" in done.stdout and "0 fault(s)" in done.stdout
    results = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    assert results["parts"]["machine"]["status"] == "done"
