# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write docs/reference/options.md from the configs: python -m tools.options_page"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from bundles.common.files import write_text
from bundles.common.run.option_help import default_of, options_of, values_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "options.md"
#: Configs by bundle; both segmentation bundles share theirs.
CONFIGS = {
    "swin_unetr_pretrain": ("prepare", "train", "evaluate", "inference", "convert"),
    "swin_unetr_btcv_seg": ("train", "evaluate", "inference", "propagate"),
    "swin_unetr_msd": ("submit", "results"),
}
START = """# Options

The options of each config with their defaults, as `--help` prints them:

```bash
# in the project's top folder
source .venv/bin/activate
cd bundles/swin_unetr_pretrain
python -m monai.bundle run --config_file configs/train.yaml --help
```

`BUNDLE` is the bundle's folder. *From the task*: the task's row in `tasks.yaml`. *Automatic*: worked out at the start of
the run. This page is written by `python -m tools.options_page`.

## Options of MONAI's runner

Every config takes these as well:

| option | |
|---|---|
| `--config_file` | the config; or a list of a config and overlays, `"['configs/train.yaml','configs/multi_gpu_train.yaml']"` |
| `--args_file` | a YAML or JSON file with further options, one entry each |
| `--tracking` | `mlflow`: keep the run in MLflow ([how](../how-to/run-a-bundle.md#look-at-a-run-in-mlflow)) |
| `--tracking_uri` | MLflow store or server; without it `OUTPUT_DIR/mlruns.db` |
| `--experiment_name`, `--run_name` | its experiment and the run's name in MLflow |
"""


def page() -> str:
    """Return the page."""
    lines = [START]
    for bundle, names in CONFIGS.items():
        both = " (and of swin_unetr_msd)" if bundle == "swin_unetr_btcv_seg" else ""
        for name in names:
            file = ROOT / "bundles" / bundle / "configs" / f"{name}.yaml"
            preset, values = values_of(file)
            under = f" Defaults are those of the preset `{preset}`." if preset else ""
            lines.append(f"## {name}.yaml of {bundle}{both}\n{under and chr(10) + under.strip() + chr(10)}")
            for group, options in groupby(options_of(file), key=lambda option: option.group):
                if group:
                    lines.append(f"### {group}\n")
                lines += ["| option | default | |", "|---|---|---|"]
                for option in options:
                    default, comment = (
                        text.replace("|", "\\|") for text in (default_of(option, values), option.comment)
                    )
                    lines.append(f"| `--{option.name}` | `{default}` | {comment} |")
                lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
