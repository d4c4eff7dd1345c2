# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""All metadata are valid under MONAI's schema. Needs a copy of it in the folder SCHEMAS.

By default that is ``shared/reference/schema`` next to the project.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from zoo.package.bundle_files import BUNDLES
from zoo.package.flat_task import find_task, flat_name, task_metadata

from .conftest import ROWS

SCHEMAS = Path(os.environ.get("SCHEMAS", BUNDLES.parents[1] / "shared" / "reference" / "schema"))
MSD = BUNDLES / "swin_unetr_msd" / "configs"


def metadata(name: str) -> dict:
    if name not in ROWS:
        return json.loads((BUNDLES / name / "configs" / "metadata.json").read_text())
    task = find_task(name, MSD / "tasks.yaml")
    return task_metadata(
        metadata("swin_unetr_msd"), bundle=flat_name(name), task=task, row={"hu_window": None, **task.row}
    )


@pytest.mark.parametrize("name", ["swin_unetr_btcv_seg", "swin_unetr_msd", "swin_unetr_pretrain", *ROWS])
def test_metadata_fit_the_schema_that_they_name(name):
    jsonschema = pytest.importorskip("jsonschema")
    path = SCHEMAS / Path(metadata(name)["schema"]).name
    if not path.is_file():
        pytest.skip("no copy of the schema here: set SCHEMAS")
    jsonschema.validate(instance=metadata(name), schema=json.loads(path.read_text()))
