# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What pre-training gains, measured through the bundles' command line: studies, their runs, and the report."""
