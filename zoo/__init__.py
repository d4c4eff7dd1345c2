# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pack a bundle for the model zoo and verify it: ``python -m zoo.pack``, ``python -m zoo.verify``."""
