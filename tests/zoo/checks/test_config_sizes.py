# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Configs that grow without limit are refused before anything else reads them, in well under a second."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from zoo.checks.config_sizes import check_config_sizes
from zoo.verify import verify

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)

HOSTILE = {
    "aliases of aliases": ("train.yaml", BOMB, "stands for more than 200000 values"),
    "an alias of itself": ("train.yaml", "a: &a [*a]", "contains itself through an alias"),
    "deep brackets": ("train.yaml", "a: " + "[" * 3000, "nested too deeply"),
    "deep blocks": ("large_files.yml", "- " * 3000, "nested too deeply"),
    "deep JSON": ("metadata.json", "[" * 200_000, "nested too deeply"),
    "too large": ("train.yaml", "# " + "x" * (3 * 2**20), "has 3145730 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_they_are_refused_and_nothing_else_is_read(tmp_path, kind):
    name, text, words = HOSTILE[kind]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / name).write_text(text)
    first, second = verify(tmp_path, build=False)
    assert (first.check, first.outcome) == ("sizes of the configs", "FAILED")
    assert first.reason.startswith(f"configs/{name} ") and words in first.reason
    assert second.outcome == "not checked"


def test_aliases_of_real_configs_and_broken_files_are_left_to_the_other_checks(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: [2, 3]}\ny: *x\nz: {<<: *x, c: 4}\n")
    (tmp_path / "b.yaml").write_text("a: [")
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.yaml").write_text("")
    check_config_sizes(tmp_path)
    with pytest.raises(InputError, match="d.yaml stands for"):
        (tmp_path / "d.yaml").write_text(BOMB)
        check_config_sizes(tmp_path)
