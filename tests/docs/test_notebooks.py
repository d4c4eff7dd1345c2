# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The notebooks run, with the results that their texts tell of, and are saved small and without a machine's folders."""

from __future__ import annotations

import base64
import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tools.notebooks import NOTEBOOKS, few_colours, run, without_logs
from tools.site_pages import notebook_text

SAVED = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def jupyter():
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs the extra docs: make docs installs it")


@pytest.fixture
def outputs(jupyter, tmp_path, monkeypatch):
    """Run a notebook with its temporary folder in the test's, and return that folder and what was printed."""

    def of(name: str):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        notebook = run(NOTEBOOKS / f"{name}.ipynb")
        (folder,) = tmp_path.glob(f"{name}-*")
        printed = "".join(
            output.text
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.output_type == "stream"
        )
        saved = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
        shown = [[output.output_type for output in cell.get("outputs", [])] for cell in without_logs(notebook).cells]
        assert shown == [[output["output_type"] for output in cell.get("outputs", [])] for cell in saved["cells"]]
        return folder, printed

    return of


@pytest.mark.slow
def test_demo(outputs):
    folder, printed = outputs("demo")
    assert re.search(r"all encoder weights loaded \(\d+ tensors\)", printed)
    losses = [float(value) for value in re.findall(r"step \d+/20  loss (\S+) dice", printed)]
    assert losses[-1] < 0.9 * losses[0]
    assert (folder / "masks" / "img0005_seg.nii.gz").is_file()


@pytest.mark.slow
def test_my_own_scans(outputs):
    folder, printed = outputs("my-own-scans")
    assert 'modality: "CT"' in printed
    rows = [line.split(",") for line in (folder / "scores" / "scores.csv").read_text().splitlines()[1:]]
    assert {row[1] for row in rows} == {"liver", "spleen"} and len({row[0] for row in rows}) == 2
    assert np.mean([float(row[2]) for row in rows if row[1] == "liver"]) > 0.4
    scan, mask = (nib.load(folder / name) for name in ("new/patient_7.nii.gz", "result/patient_7_seg.nii.gz"))
    assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-4)


def test_saved_pictures_keep_the_colours_of_a_legend():
    picture = np.repeat(np.random.default_rng(0).integers(0, 256, (200, 200, 1), np.uint8), 3, axis=2)
    legend = [(255, 20, 20), (250, 240, 20), (30, 60, 250), (30, 20, 160), (160, 20, 250), (250, 30, 130)]
    for number, colour in enumerate(legend):
        picture[10 * number : 10 * number + 5, :8] = colour
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    small = base64.b64decode(few_colours(base64.b64encode(file.getvalue()).decode()))
    kept = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    for number, colour in enumerate(legend):
        assert np.abs(kept[10 * number + 2, 4] - colour).max() < 20
    assert len(small) < len(file.getvalue())


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_saved_small_and_without_folders_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] is None for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not re.search(r"/(tmp|home|work|root|Users)/", text)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_the_page_shows_commands_and_pictures(path):
    text = notebook_text(path)
    assert "```bash\npython -m monai.bundle run" in text and "%%bash" not in text
    assert 'src="data:image/png;base64,' in text
