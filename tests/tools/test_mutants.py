# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Mutants are single changes; those that a test notices are killed, the others are shown; the module is put back."""

from __future__ import annotations

from tools.mutants import ROOT, TARGETS, Mutant, matching_tests, mutants_of, try_module

MODULE = """
def share(part: int, *, whole: int) -> float:
    if whole < 1:
        return 0.0
    return part / whole


def half(part: int) -> float:
    return share(part, whole=2)
"""
TESTS = """
from zoo.shares import half, share

def test_share():
    assert share(3, whole=4) == 0.75 and share(1, whole=1) == 1.0
"""


def test_every_change_is_one_change_of_the_code():
    lines = {mutant.line for mutant in mutants_of("m.py", MODULE)}
    assert {
        ("if whole < 1:", "if whole <= 1:"),
        ("if whole < 1:", "if whole < 2:"),
        ("if whole < 1:", "if not whole < 1:"),
        ("return 0.0", "return 1.0"),
        ("return part / whole", "return part * whole"),
        ("return part / whole", "return None"),
        ("return share(part, whole=2)", "return share(part)"),
        ("return share(part, whole=2)", "return share(part, whole=3)"),
    } <= lines
    assert len(lines) == len(list(mutants_of("m.py", MODULE))) == 10


def test_survivors_are_what_no_test_notices(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "tests" / "zoo").mkdir(parents=True)
    (tmp_path / "zoo" / "shares.py").write_text(MODULE)
    (tmp_path / "tests" / "zoo" / "test_shares.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    equivalents = {("zoo/shares.py", "return 0.0", "return 1.0"): "for the test"}
    tried, survivors = try_module("zoo/shares.py", each=99, seed=0, folder=tmp_path, equivalents=equivalents)
    assert tried == 9
    assert {mutant.line for mutant in survivors} == {
        ("return 0.0", "return None"),
        ("return share(part, whole=2)", "return share(part)"),
        ("return share(part, whole=2)", "return share(part, whole=3)"),
        ("return share(part, whole=2)", "return None"),
    }
    assert all(isinstance(mutant, Mutant) for mutant in survivors)
    assert (tmp_path / "zoo" / "shares.py").read_text() == MODULE


def test_every_target_exists_with_its_tests():
    tests = [test.removeprefix("--deselect=").partition("::") for module in TARGETS for test in matching_tests(module)]
    assert [name for name in (*TARGETS, *(file for file, _, _ in tests)) if not (ROOT / name).exists()] == []
    assert [test for file, _, test in tests if test and f"\ndef {test}(" not in (ROOT / file).read_text()] == []
