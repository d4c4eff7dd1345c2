# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The plan of the house (docs/explanation/architecture.md): who may import whom, and what a bundle carries."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ROOT / "bundles"
LARGEST_FOLDER = 14  # Python files, __init__ aside

#: What all rooms of ``common`` above the networks may use.
TEXT = {
    *("bundles.common.errors", "bundles.common.extras", "bundles.common.files"),
    *("bundles.common.value_rules", "bundles.common.words"),
}
#: Package to the packages that it may import, itself aside; the longest matching name counts.
MAY_IMPORT = {
    "bundles.common.errors": {"bundles.common.files"},
    "bundles.common.files": set(),
    "bundles.common.extras": {"bundles.common.errors"},
    "bundles.common.parent_process": set(),
    "bundles.common.value_rules": {"bundles.common.errors"},
    "bundles.common.words": set(),
    "bundles.common.networks": {"bundles.common.errors", "bundles.common.value_rules"},
    "bundles.common.run": {*TEXT, "bundles.common.networks", "bundles.common.parent_process"},
    "bundles.common.data": {*TEXT, "bundles.common.run"},
    "bundles.common.weights": {*TEXT, "bundles.common.networks", "bundles.common.run"},
    "bundles.common.scans": {*TEXT, "bundles.common.run", "bundles.common.data"},
    "bundles.common.cases": {*TEXT, "bundles.common.run", "bundles.common.data", "bundles.common.scans"},
    "bundles.common.training": {*TEXT, "bundles.common.run", "bundles.common.data", "bundles.common.weights"},
    "bundles.common.networks.swin_unetr": {
        *("bundles.common.errors", "bundles.common.networks", "bundles.common.value_rules"),
    },
    "bundles.segmentation": {"bundles.common"},
    "bundles.decathlon": {"bundles.common", "bundles.segmentation"},
    "bundles.pretraining": {"bundles.common"},
    "zoo": {"bundles.common", "bundles.segmentation"},
    "tools": {"bundles.common"},
    "demo": {"bundles.common", "bundles.segmentation", "tools"},
    "evidence": {"bundles.common", "bundles.segmentation", "bundles.pretraining", "tools"},
    "workflow": {"bundles.common", "bundles.segmentation", "evidence", "tools"},
    "benchmarks": {"bundles.common", "bundles.segmentation", "bundles.pretraining", "tools", "evidence.results"},
}
#: The rooms whose code a bundle links to.
ROOMS = {
    "swin_unetr_pretrain": ("common", "pretraining"),
    "swin_unetr_btcv_seg": ("common", "segmentation"),
    "swin_unetr_msd": ("common", "segmentation", "decathlon"),
}


def python_files(*folders: str) -> list[Path]:
    """Files of the repository, none of them through a link."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not any(above.is_symlink() for above in (path, *path.parents))]


@cache
def imported_by(path: Path) -> frozenset[str]:
    """Dotted names that a file imports from the repository."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(name for name in names if (ROOT / name.split(".")[0]).is_dir())


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_go_down_the_house_only():
    wrong = []
    for path in python_files("bundles", "zoo", "tools", "demo", "evidence", "workflow", "benchmarks"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = max((name for name in MAY_IMPORT if within(module, name)), key=len, default=None)
        if room is None:
            assert path.name == "__init__.py", f"{module} is in no room of MAY_IMPORT"
            continue
        allowed = {room, *MAY_IMPORT[room]}
        wrong += [f"{module}: {name}" for name in imported_by(path) if not any(within(name, each) for each in allowed)]
    assert wrong == []


def test_nothing_is_imported_through_a_bundles_link():
    """Else one class has two names, and an error of one is not caught as the other."""
    through = re.compile(r"bundles[./]swin_unetr_\w+[./]scripts[./]\w+")
    files = python_files("bundles", "zoo", "tools", "demo", "evidence", "workflow", "benchmarks", "tests")
    names = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported_by(path) if through.match(name)}
    names |= {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in files
        if path != Path(__file__).resolve()
        for found in re.finditer(r"bundles\.swin_unetr_\w+\.scripts\.\w+", path.read_text(encoding="utf-8"))
    }
    assert names == set()


@pytest.mark.parametrize("bundle", ROOMS)
def test_a_bundle_links_to_its_rooms_and_has_no_module_of_its_own(bundle):
    scripts = BUNDLES / bundle / "scripts"
    assert {path.name for path in scripts.iterdir()} - {"__pycache__"} == {"__init__.py", *ROOMS[bundle]}
    for room in ROOMS[bundle]:
        assert (scripts / room).is_symlink() and (scripts / room).resolve() == BUNDLES / room


@pytest.mark.parametrize("bundle", ROOMS)
def test_a_bundle_carries_only_what_it_can_run(bundle):
    """Every module is reached from a config, by its name or through imports."""
    configs = [path for path in (BUNDLES / bundle / "configs").iterdir() if path.suffix == ".yaml"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in configs)
    files = {
        ".".join(path.relative_to(BUNDLES).with_suffix("").parts): path
        for path in python_files(*(f"bundles/{room}" for room in ROOMS[bundle]))
        if path.name != "__init__.py"
    }
    todo = {name for name in files if re.search(rf"\bscripts\.{re.escape(name)}\b", text)}
    reached = set()
    while todo:
        name = todo.pop()
        reached.add(name)
        for imported in imported_by(files[name]):
            parts = imported.removeprefix("bundles.").split(".")
            todo |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & files.keys() - reached
    assert sorted(files.keys() - reached) == []


def test_every_target_of_a_config_exists():
    missing = []
    for path in BUNDLES.glob("*/configs/*.yaml"):
        for target in re.findall(r"\bscripts((?:\.\w+)+)", path.read_text(encoding="utf-8")):
            parts = target.strip(".").split(".")
            ends = [
                end for end in range(1, len(parts)) if (BUNDLES.joinpath(*parts[:end])).with_suffix(".py").is_file()
            ]
            names = set()
            for end in ends:
                tree = ast.parse(BUNDLES.joinpath(*parts[:end]).with_suffix(".py").read_text(encoding="utf-8"))
                names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            if not ends or parts[ends[-1]] not in names:
                missing.append(f"{path.parent.parent.name}/{path.name}: scripts{target}")
    assert missing == []


def test_folders_are_small_enough_to_read():
    counts: dict[Path, int] = {}
    for path in python_files("bundles", "zoo", "tools", "demo", "evidence"):
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > LARGEST_FOLDER} == {}


def test_tests_mirror_the_modules():
    """A test file of a room has the path of a module, or lies in the folder of the modules that it tests."""
    folders = {
        Path("tests", *path.parent.relative_to(ROOT).parts[(path.parts[len(ROOT.parts)] == "bundles") :])
        for path in python_files("bundles", "zoo", "tools", "demo", "evidence", "workflow", "benchmarks")
    }
    folders |= {Path("tests", name) for name in ("workflow", "workflows", "realdata", "label", "legacy", "docs")} | {
        Path("tests")
    }
    strange = {path.parent for path in python_files("tests") if path.name.startswith("test_")}
    assert {path.relative_to(ROOT) for path in strange} - folders == set()


def test_no_comment_names_a_file_that_a_user_does_not_have():
    private = re.compile(r"\b(traps|paper|contracts|sights|design|style)\.md\b|\bshared/(?!data\b|reference/schema)")
    files = [
        path
        for path in [
            *python_files("bundles", "zoo", "tools", "demo", "evidence", "workflow", "benchmarks"),
            *ROOT.rglob("docs/**/*.md"),
        ]
        if ".venv" not in str(path)
    ]
    files += [path for path in BUNDLES.rglob("*.yaml") if not path.is_symlink()]
    named = {f"{path.relative_to(ROOT)}: {found[0]}" for path in files for found in private.finditer(path.read_text())}
    assert named == set()
