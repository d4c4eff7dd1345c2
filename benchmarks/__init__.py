# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Reproducible benchmarks of training, inference and data loading."""
