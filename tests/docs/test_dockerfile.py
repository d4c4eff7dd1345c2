# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The Dockerfile copies what exists and what its command needs. No container is built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tools.site_pages import ROOT

LINES = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def given(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def copied() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for words in (rest.split() for rest in given("COPY"))]


def left_out(folder: str, names: list[str]) -> set[str]:
    """Names in a folder that .dockerignore leaves out of the image."""
    patterns = [line.removeprefix("**/") for line in IGNORED[2:] if line and line[0] not in "!#"]
    paths = {name: (Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return {name for name, path in paths.items() if any(fnmatch(path, p) or fnmatch(name, p) for p in patterns)}


@pytest.fixture
def image(tmp_path) -> Path:
    """The work folder of the image, as COPY fills it."""
    for sources, target in copied():
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, symlinks=True, ignore=left_out)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    return tmp_path


def test_no_code_is_left_out_of_the_image(image):
    tracked = subprocess.run(
        ["git", "ls-files", "bundles", "demo", "tools", "zoo"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("no clone of git")
    assert [path for path in tracked.stdout.splitlines() if not (image / path).exists()] == []
    assert not [*image.rglob("__pycache__")] and not (image / "demo" / "out").exists()


def test_what_is_copied_exists_and_is_not_ignored():
    sources = [source for each, _ in copied() for source in each]
    assert len(sources) > 5
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert IGNORED[1] == "*" and {line[1:] for line in IGNORED if line.startswith("!")} == set(sources)


def test_python_and_installation_are_those_of_the_project():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lowest = config["options"]["python_requires"].removeprefix(">=3.")
    (base,) = given("FROM")
    assert int(re.fullmatch(r"python:3\.(\d+)-slim", base)[1]) >= int(lowest)
    (install,) = given("RUN")
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt" in install and "--constraint constraints.txt" in makefile
    extras = re.findall(r"\.\[([\w,]+)\]", install)
    assert {extra for each in extras for extra in each.split(",")} <= set(config["options.extras_require"])
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in install and given("ARG") == ["TORCH_INDEX="]


def test_the_command_runs_with_what_is_copied(image):
    """The demo, as `make demo` runs it; all that it imports is in the image."""
    (command,) = given("CMD")
    words = json.loads(command)
    assert f"$(VENV)/bin/{' '.join(words)}" in (ROOT / "Makefile").read_text()
    run = subprocess.run([sys.executable, *words[1:], "--help"], cwd=image, capture_output=True, text=True)
    assert run.returncode == 0 and "--pretrain_steps" in run.stdout, run.stderr


def test_links_of_the_bundles_lead_to_what_is_copied(image):
    found = [path for path in (image / "bundles").rglob("*") if path.is_symlink()]
    assert len(found) > 10
    assert [path for path in found if not path.resolve().is_relative_to(image) or not path.exists()] == []


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs the extra docs: make docs installs it")
    said = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")
