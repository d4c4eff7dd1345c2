# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
