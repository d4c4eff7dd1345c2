# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Hide lines that libraries write in every run and that need no action: each is matched by its own words.

MONAI's line "parsing config_file ...: any "_target_" value in it is resolved ..." comes before any code of a bundle. The
environment hides it: ``PYTHONWARNINGS="ignore:parsing config_file"`` (docs/reference/messages.md).
"""

from __future__ import annotations

import logging
import os
import re
import warnings

#: Beginning of a warning's text, as a regular expression, and its category.
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # An optional decoder of DICOM on the GPU is not installed. Without it pydicom's decoders give the same voxels.
    (r"NvImgCodecPydicomReader: nvImageCodec decoder plugin did not register successfully", UserWarning),
    # --num_workers is above the number of cores. That costs a little speed, and the user chose the number.
    (r"This DataLoader will create \d+ worker processes in total\. Our suggested max number of worker", UserWarning),
    # MONAI's own surface distance passes an argument that MONAI will drop. The masks and distances are the same.
    (r"monai\.metrics\.utils get_mask_edges:always_return_as_numpy: Argument", FutureWarning),
)
#: Logger, and the beginning of the line that it is not to write.
LOG_LINES: tuple[tuple[str, str], ...] = (
    # The same decoder of DICOM.
    ("monai.data.nvimgcodec_pydicom_plugin", r"nvImageCodec is not available; skipping pydicom decoder plugin"),
)


class HideLine(logging.Filter):
    """Filter of a logger: drops the lines that begin with a pattern."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        return not self.beginning.match(record.getMessage())


def without_config_note() -> str:
    """Return ``PYTHONWARNINGS`` for a child that runs one of our configs: the current value, without MONAI's line."""
    return ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:parsing config_file")))


def hide_known_lines() -> None:
    """Hide `WARNINGS` and `LOG_LINES` in this process and those that it forks; leave MLflow's lines to our format."""
    for beginning, category in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning, category=category)
    for name, beginning in LOG_LINES:
        logger = logging.getLogger(name)
        if not any(isinstance(known, HideLine) and known.beginning.pattern == beginning for known in logger.filters):
            logger.addFilter(HideLine(beginning))
    # Else MLflow, when it is imported, gives its loggers a handler with another time format.
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
