# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Change the code in small ways and see whether the tests notice: python -m tools.mutants [--only losses] [--each 12]

Each mutant is one change of one module where an error would be silent, in a copy of the project. The tests that mirror
the module run on it, in a process forked from one that has imported MONAI. Those that pass have not noticed: the mutant
survives, and its change is printed. equivalent_mutants.py lists changes that make no difference, with the reason.

cosmic-ray and mutmut start Python again for each mutant, and 9 s of each start are imports.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import gc
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .child_process import available_cores
from .equivalent_mutants import EQUIVALENTS

ROOT = Path(__file__).parents[1]
PATIENCE = 4.0  # times the duration of the tests without a change, and a minute: then a mutant hangs, which is noticed
# What tests and modules import besides the standard library, so that a fork has it. Nothing of this project.
PRELOADED = [
    "monai.bundle",
    "torch._dynamo",
    "nibabel",
    "matplotlib.pyplot",
    "scipy.stats",
    "pytest",
    "xdist.plugin",
    "hypothesis",
]

_TABLE_TESTS = (
    "test_the_first_figure_leads_and_the_other_labels_are_apart",
    "test_labels_that_are_lower_are_named_with_both_intervals",
    "test_a_label_that_only_the_bootstrap_calls_lower_is_marked",
    "test_no_lower_label_is_said_as_well",
    "test_t_intervals_stand_beside_those_of_the_bootstrap",
    "test_each_seed_is_stated_and_few_seeds_are_doubted",
    "test_tables_have_nsd_and_the_paired_difference_of_hd95",
)
_SWIN_TESTS = (
    "test_the_encoder",
    "test_the_encoder_without_the_norm_of_its_outputs",
    "test_swin_unetr",
    "test_gradient_checkpointing",
    "test_the_deepest_output_alone",
    "test_every_module_of_monai_is_replaced_and_stays_what_it_was",
    "test_a_crop_with_one_voxel_at_the_bottom_is_refused_as_monai_refuses_it",
    "test_a_metatensor_comes_out_as_one_with_its_affine",
    "test_export_to_onnx",
    "test_torch_export_gives_the_same_values",
)
#: Modules where an error would be silent, and arguments of pytest: the tests that must notice it (default: those of the same path).
TARGETS: dict[str, tuple[str, ...]] = {
    "bundles/common/data/partial_labels.py": (),
    "bundles/common/data/seeded_crops.py": (),
    "bundles/common/networks/fast/attention.py": (
        "tests/common/networks/fast/test_attention.py",
        "--deselect=tests/common/networks/fast/test_attention.py::test_every_stage_equals_monai_in_values_and_gradients",
    ),
    "bundles/common/networks/fast/bias_gradient.py": (),
    "bundles/common/networks/fast/fused_attention.py": (
        "tests/common/networks/fast/test_fused_attention.py",
        "tests/common/networks/fast/test_attention.py",
        "--deselect=tests/common/networks/fast/test_attention.py::test_every_stage_equals_monai_in_values_and_gradients",
    ),
    "bundles/common/networks/fast/norm_act.py": (),
    "bundles/common/networks/fast/swin.py": tuple(
        f"tests/common/networks/fast/test_swin.py::{test}" for test in _SWIN_TESTS
    ),
    "bundles/common/networks/fast/unet_blocks.py": (
        "tests/common/networks/fast/test_unet_blocks.py",
        *(f"tests/common/networks/fast/test_swin.py::{test}" for test in _SWIN_TESTS),
    ),
    "bundles/common/networks/fast/windows.py": (),
    "bundles/common/networks/patch_merging.py": (),
    "bundles/common/networks/positions.py": (),
    "bundles/common/networks/roi_size.py": (),
    "bundles/common/networks/swin_unetr.py": (),
    "bundles/common/run/mixed_precision.py": (),
    "bundles/common/training/checkpoint.py": (),
    "bundles/common/training/gradient_guard.py": (),
    "bundles/common/training/lr_schedule.py": (),
    "bundles/common/training/parameter_groups.py": (),
    "bundles/common/training/weight_average.py": (),
    "bundles/common/weights/dialects.py": (),
    "bundles/common/weights/loading.py": (),
    "bundles/common/weights/merging_guard.py": (),
    "bundles/common/weights/merging_order.py": (),
    "bundles/common/weights/whole_network.py": (),
    "bundles/pretraining/network.py": (),
    "bundles/pretraining/proxy_tasks/augmented_views.py": (),
    "bundles/pretraining/proxy_tasks/contrast.py": (),
    "bundles/pretraining/proxy_tasks/draws.py": (),
    "bundles/pretraining/proxy_tasks/losses.py": (
        "tests/pretraining/proxy_tasks/test_losses.py",
        "tests/pretraining/proxy_tasks/test_position.py",
    ),
    "bundles/pretraining/proxy_tasks/masking.py": (),
    "bundles/pretraining/proxy_tasks/position.py": (),
    "bundles/pretraining/proxy_tasks/rotation.py": (),
    "bundles/pretraining/proxy_tasks/tasks.py": (),
    "bundles/segmentation/results/bootstrap.py": (),
    "bundles/segmentation/results/case_scores.py": (),
    "bundles/segmentation/results/metrics.py": ("tests/segmentation/results/test_case_scores.py",),
    "bundles/segmentation/results/score_summary.py": (),
    "bundles/segmentation/training/loss.py": (),
    "evidence/results/paired_bootstrap.py": (),
    "evidence/results/power.py": (),
    "evidence/results/records.py": (),
    "evidence/results/table.py": (
        "tests/evidence/results/test_table.py",
        *(f"tests/evidence/test_report.py::{test}" for test in _TABLE_TESTS),
    ),
    "evidence/study/subsets.py": (),
    "zoo/package/archive.py": (),
    "zoo/package/trained_settings.py": (),
    "zoo/package/packed_weights.py": (
        "tests/zoo/package/test_packed_weights.py",
        "tests/zoo/package/test_trained_settings.py",
        "tests/zoo/test_pack.py",
    ),
}
_SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Div,
        ast.Div: ast.Mult,
        ast.FloorDiv: ast.Mult,
        ast.Mod: ast.Mult,
    },
    **{ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}

#: Keywords that make no difference here: UTF-8 is the default, and the tests run on a CPU (benchmarks/gpu_check on a GPU).
_NEUTRAL = ("encoding", "device", "stacklevel")


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        module: its path in the project.
        line: what was changed, and what into: the first line that differs.
        source: the whole changed module.
    """

    module: str
    line: tuple[str, str]
    source: str


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Make every mutant of a module, one change each.

    Texts, types, imports and decorators are left alone, and so are `_NEUTRAL` keywords and the ``strict`` of `zip`.
    """
    tree = ast.parse(source)
    plain = ast.unparse(tree)
    left_alone = {id(part) for node in ast.walk(tree) for each in _neutral_parts(node) for part in ast.walk(each)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in left_alone:
            continue
        for kind in range(_kinds(node)):
            changed = copy.deepcopy(tree)
            _change(next(other for place, other in enumerate(ast.walk(changed)) if place == number), kind)
            text = ast.unparse(ast.fix_missing_locations(changed))
            if text != plain:
                before, after = plain.splitlines(), text.splitlines()
                (_, low, _, other, _), *_ = [
                    block
                    for block in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
                    if block[0] != "equal"
                ]
                line = (
                    before[low].strip() if low < len(before) else "",
                    after[other].strip() if other < len(after) else "",
                )
                yield Mutant(module, line, text)


def _neutral_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield decorators, and the values of keywords that make no difference."""
    yield from getattr(node, "decorator_list", ())
    if isinstance(node, ast.Call):
        yield from (each.value for each in node.keywords if each.arg in _neutral_keywords(node))


def _neutral_keywords(call: ast.Call) -> tuple[str, ...]:
    return (*_NEUTRAL, "strict") if isinstance(call.func, ast.Name) and call.func.id == "zip" else _NEUTRAL


def _named(call: ast.Call) -> list[int]:
    """Return the places of the keywords of a call that may be left out."""
    neutral = (None, *_neutral_keywords(call))
    return [place for place, keyword in enumerate(call.keywords) if keyword.arg not in neutral]


def _kinds(node: ast.AST) -> int:
    """Return in how many ways a node is changed."""
    if isinstance(node, ast.Compare):
        return len([op for op in node.ops if type(op) in _SWAPS])
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        return int(type(node.op) in _SWAPS)
    if isinstance(node, ast.Constant):
        return int(isinstance(node.value, (int, float)))
    if (
        isinstance(node, (ast.If, ast.IfExp))
        or isinstance(node, ast.UnaryOp)
        and isinstance(node.op, (ast.Not, ast.USub))
    ):
        return 1
    if isinstance(node, ast.Call):
        return len(_named(node))
    return int(isinstance(node, ast.Return) and node.value is not None)


def _change(node: ast.AST, kind: int) -> None:
    if isinstance(node, ast.Compare):
        places = [place for place, op in enumerate(node.ops) if type(op) in _SWAPS]
        node.ops[places[kind]] = _SWAPS[type(node.ops[places[kind]])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        node.op = _SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Call):
        del node.keywords[_named(node)[kind]]
    else:
        node.value = ast.Constant(None)


def matching_tests(module: str) -> tuple[str, ...]:
    """Return the test files of a module: those named in `TARGETS`, else that of the same path."""
    if named := TARGETS.get(module):
        return named
    path = Path(module)
    parts = path.parts[1:] if path.parts[0] == "bundles" else path.parts
    return (str(Path("tests", *parts[:-1], f"test_{path.name}")),)


def copy_project(root: Path, folder: Path) -> None:
    """Copy what git tracks, links as links."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_symlink() or (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name, follow_symlinks=False)


def passes(folder: Path, tests: Sequence[str], *, timeout: float | None = None) -> bool:
    """Run tests in a folder, in a forked process; return whether all pass in time."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    process = forking.Process(target=_run_tests, args=(str(folder), list(tests)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode == 0


def _run_tests(folder: str, tests: list[str]) -> None:
    os.chdir(folder)
    os.setsid()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("tools", "tests", "bundles", "evidence", "zoo")
    ]:
        del sys.modules[name]
    sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    sys.argv = ["pytest"]
    multiprocessing.set_start_method(None, force=True)
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()  # what was imported before the fork: pytest collects garbage at its end
    options = [
        "-x",
        "-q",
        "-p",
        "xdist.plugin",
        "-n0",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "--disable-warnings",
    ]
    status = pytest.main([*options, *tests])
    os._exit(int(status))


def try_module(
    module: str, *, each: int, seed: int, folder: Path, equivalents: Mapping[tuple[str, str, str], str]
) -> tuple[int, list[Mutant]]:
    """Try a sample of the mutants of a module in a copy of the project.

    Args:
        module: path in the project.
        each: largest number of mutants.
        seed: seed of the sample.
        folder: the copy. The module is put back.
        equivalents: mutants that are not tried, see `EQUIVALENTS`.

    Returns:
        The number that was tried, and those that survived.

    Raises:
        RuntimeError: the tests fail without any change.
    """
    path, tests = folder / module, matching_tests(module)
    source = path.read_text(encoding="utf-8")
    began = time.monotonic()
    if not passes(folder, tests):
        raise RuntimeError(f"{', '.join(tests)} fail without any change of {module}")
    timeout = PATIENCE * (time.monotonic() - began) + 60
    made = [mutant for mutant in mutants_of(module, source) if (module, *mutant.line) not in equivalents]
    chosen = sorted(made, key=lambda mutant: random.Random(f"{seed} {module} {mutant.line}").random())[:each]
    survivors = []
    try:
        for mutant in chosen:
            path.write_text(mutant.source, encoding="utf-8")
            if passes(folder, tests, timeout=timeout):
                survivors.append(mutant)
    finally:
        path.write_text(source, encoding="utf-8")
    return len(chosen), survivors


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants from the command line; return 1 if more than 3% survive."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of the paths of modules (default: all)")
    parser.add_argument("--each", type=int, default=12, help="mutants of a module at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="modules at once (default: one per core)")
    given = parser.parse_args(arguments)
    modules = [module for module in TARGETS if not given.only or any(part in module for part in given.only)]
    tried, survived = 0, 0
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(given.jobs) as pool:

        def work(module: str) -> tuple[int, list[Mutant]]:
            folder = Path(temporary, module.replace("/", "_"))
            copy_project(ROOT, folder)
            return try_module(module, each=given.each, seed=given.seed, folder=folder, equivalents=EQUIVALENTS)

        for module, (number, survivors) in zip(modules, pool.map(work, modules), strict=True):
            tried, survived = tried + number, survived + len(survivors)
            print(f"{module}: {number - len(survivors)} of {number} killed", flush=True)
            for mutant in survivors:
                print(f"    - {mutant.line[0]}\n    + {mutant.line[1]}", flush=True)
    print(f"{tried - survived} of {tried} killed: {100 * (tried - survived) / max(tried, 1):.1f}%")
    return int(survived > 0.03 * tried)


if __name__ == "__main__":
    sys.exit(main())
