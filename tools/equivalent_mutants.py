# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Mutants that no test can notice, because the change makes no difference to any result."""

from __future__ import annotations

#: Module, line and changed line (the first that differs), with the reason.
EQUIVALENTS: dict[tuple[str, str, str], str] = {
    (
        "bundles/common/data/seeded_crops.py",
        "self.volumes = CacheDataset(data, preprocessing, cache_num=cache_num, num_workers=2, progress=len(data) > 20)",
        "self.volumes = CacheDataset(data, preprocessing, cache_num=cache_num, num_workers=3, progress=len(data) > 20)",
    ): "threads that fill the cache",
    (
        "bundles/common/networks/fast/attention.py",
        "ds = torch.bmm(gc, vc.transpose(1, 2), out=slopes[:part.stop - part.start].flatten(0, 1))",
        "ds = torch.bmm(gc, vc.transpose(1, 2))",
    ): "the same numbers in new memory",
    (
        "bundles/common/networks/fast/attention.py",
        "step = min(windows, max(1, CHUNK // (heads * tokens * tokens)))",
        "step = min(windows, max(1, CHUNK // (heads * tokens / tokens)))",
    ): "how many windows at a time: speed and memory",
    (
        "bundles/pretraining/proxy_tasks/position.py",
        "return error.abs().sum() / (3 * number.clamp(min=1) * UNIT)",
        "return error.abs().sum() / (3 * number.clamp(min=2) * UNIT)",
    ): "of a single voxel, the distance to the mean is 0",
    (
        "bundles/pretraining/proxy_tasks/draws.py",
        "state = np.random.SeedSequence([seed, number]).generate_state(1, dtype=np.uint64)[0]",
        "state = np.random.SeedSequence([seed, number]).generate_state(2, dtype=np.uint64)[0]",
    ): "the first number is the same however many follow",
    (
        "evidence/results/paired_bootstrap.py",
        "return float(_figure(scores, np.ones((1, scores.shape[0])), np.ones((1, scores.shape[1])))[0])",
        "return float(_figure(scores, np.ones((1, scores.shape[0])), np.ones((2, scores.shape[1])))[0])",
    ): "the first of two equal draws",
    (
        "zoo/package/archive.py",
        "entry = zipfile.ZipInfo(f'{folder.name}/{name.as_posix()}', date_time=FIXED_TIME)",
        "entry = zipfile.ZipInfo(f'{folder.name}/{name.as_posix()}')",
    ): "the default of zipfile is the same time",
    (
        "zoo/package/archive.py",
        "FIXED_TIME = (1980, 1, 1, 0, 0, 0)",
        "FIXED_TIME = (1980, 1, 1, 0, 0, 1)",
    ): "a zip file stores even seconds",
    (
        "zoo/package/trained_settings.py",
        "path.write_text(text, encoding='utf-8', newline='')",
        "path.write_text(text, encoding='utf-8')",
    ): "Linux translates no ends of lines",
    (
        "bundles/common/networks/positions.py",
        "inferer = SlidingWindowInferer(roi_size=list(roi_size), sw_batch_size=sw_batch_size, overlap=0.25, mode='gaussian', padding_mode='constant')",
        "inferer = SlidingWindowInferer(roi_size=list(roi_size), sw_batch_size=sw_batch_size, overlap=0.25, mode='gaussian')",
    ): "the default of MONAI",
}
