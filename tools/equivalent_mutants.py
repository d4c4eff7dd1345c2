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
        "bundles/common/networks/fast/bias_gradient.py",
        "CHUNK = 2 ** 25",
        "CHUNK = 3 ** 25",
    ): "how many windows at a time: speed and memory",
    (
        "bundles/common/weights/dialects.py",
        "windows.add((round(table.shape[0] ** (1 / 3)) + 1) // 2)",
        "windows.add((round(table.shape[0] ** (1 / 3)) + 2) // 2)",
    ): "the root is odd, 2 w - 1, and (2 w + 1) // 2 is w",
    (
        "bundles/common/networks/roi_size.py",
        "nearest[plane[0]] = 2 * STRIDE",
        "nearest[plane[1]] = 2 * STRIDE",
    ): "both sides of the plane become the larger one",
    (
        "bundles/common/training/checkpoint.py",
        "np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))",
        "np.random.set_state((kind, np.asarray(keys), *rest))",
    ): "NumPy converts the keys itself",
    (
        "bundles/common/weights/dialects.py",
        "return {'in_channels': proj.shape[1], 'feature_size': proj.shape[0], 'depths': depths, 'num_heads': heads, 'window_size': windows.pop() if len(windows) == 1 else sorted(windows), 'patch_size': proj.shape[2], 'use_v2': any((re.match('layers[1-4]c\\\\.', name) for name in state))}",
        "return {'in_channels': proj.shape[1], 'feature_size': proj.shape[0], 'depths': depths, 'num_heads': heads, 'window_size': windows.pop() if len(windows) == 1 else sorted(windows), 'patch_size': proj.shape[3], 'use_v2': any((re.match('layers[1-4]c\\\\.', name) for name in state))}",
    ): "patches are cubes",
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
    (
        "bundles/common/weights/whole_network.py",
        "weight = OUTPUT[0]",
        "weight = OUTPUT[1]",
    ): "weight and bias have one row for each class",
    (
        "bundles/pretraining/proxy_tasks/augmented_views.py",
        "def __call__(self, batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool=False, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:",
        "def __call__(self, batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool=True, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:",
    ): "on a CPU there is nothing to wait for",
    (
        "bundles/pretraining/proxy_tasks/masking.py",
        "sums = sums.view(batch, x, y, z).cumsum(axis, dtype=torch.int32)",
        "sums = sums.view(batch, x, y, z).cumsum(axis)",
    ): "the same counts in more memory",
    (
        "bundles/pretraining/proxy_tasks/masking.py",
        "uniform = draw(generators, lambda g: torch.rand(each, 2, number, generator=g, device=device, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12))",
        "uniform = draw(generators, lambda g: torch.rand(each, 3, number, generator=g, device=device, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12))",
    ): "one number more that nobody reads",
    (
        "bundles/pretraining/proxy_tasks/tasks.py",
        "masked = reads_masked_views(tasks) * (2 if 'position' in tasks else 3)",
        "masked = reads_masked_views(tasks) * (2 if 'position' in tasks else 4)",
    ): "more views than there are: all of them",
    (
        "bundles/segmentation/results/metrics.py",
        "nsd = compute_surface_dice(*tensors, class_thresholds=[limit], include_background=True, spacing=[float(size) for size in spacing], use_subvoxels=True)",
        "nsd = compute_surface_dice(*tensors, class_thresholds=[limit], spacing=[float(size) for size in spacing], use_subvoxels=True)",
    ): "MONAI drops the first of several channels only",
}
