# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Lay a labelled CT scan over another one: a start from positions, then an affine map, then a smooth deformation.

Both steps maximise Mattes mutual information (Mattes et al., IEEE TMI 2003), which does not mind the phase of contrast;
the deformation is made of cubic B-splines (Rueckert et al., IEEE TMI 1999).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from monai.transforms import generate_spatial_bounding_box
from scipy import ndimage

from ...common.errors import InputError
from ...common.run.options import check_option
from ...common.scans.reading import Volume
from ...common.value_rules import (
    ABOVE_ZERO,
    SEED,
    SHARE_ABOVE_ZERO,
    ZERO_OR_ABOVE,
    Rule,
    is_number,
    whole_from,
)
from .itk_images import as_volume, one_thread, simple_itk, to_image, to_lps

if TYPE_CHECKING:
    import SimpleITK

RIM = 8.0  # mm around the body that count as well, so that the skin's outline takes part
REACH = 24.0  # mm beyond the compared part of the fixed scan, where the moving scan is kept for the deformation
STARTS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # on head-and-neck CT the best start was at most 30 mm from that by positions
LEAST_SAMPLES = 4000  # samples of the metric, at coarse resolutions with few voxels; else its histogram is nearly empty
LEAST_BODY = 1000  # voxels of the working grid; with fewer the histogram of mutual information is empty
LEAST_INFORMATION = 0.1  # nats; pairs of patients have 0.6 to 1, a body and noise less than 0.03
KEPT = 0.95  # share of the information at the start: a start that is right already loses some to interpolation
STEPS = whole_from(1, 100_000)
BINS = whole_from(8, 1024)
SCALES = (0.4, 2.5)  # an affine map that stretches any direction by less or more is not one between two adults


@dataclass(frozen=True)
class RegistrationOptions:
    """How scans are registered.

    Attributes:
        hu_window: HU are clipped to it, so that air and metal do not take the histogram.
        spacing: (x, y, z) of the grid on which both scans are compared, in mm. Half of it takes 8 times as long.
        body_above: HU above which a voxel may be body. The largest connected part counts, with its air.
        start_shift: mm along z; the start is tried as given, and moved by it and by twice as much down and up.
        control_spacing: mm between the control points of the deformation. Smaller follows smaller organs, folds sooner
            and takes longer.
        affine_iterations: most steps of the affine map at each of three resolutions.
        deformation_iterations: most steps of the deformation at each of two resolutions. Nothing else keeps it smooth.
            On eight pairs of head-and-neck CT, 12 with control points at 60 mm gave a mean Dice of 0.56; L-BFGS-B with
            8 at 45 mm gave 0.54 and took longer.
        sampling: share of the voxels that the metric is computed from, a regular pattern with a seeded jitter, but at
            least `LEAST_SAMPLES` voxels. The time of the deformation is proportional to it. On three pairs of
            head-and-neck CT 0.03 was no worse than 0.1.
        bins: bins of the joint histogram along each axis.
        min_overlap: share of the fixed body that must lie in the moving scan's field of view, before and after.
        seed: seed of the jitter.
    """

    hu_window: Sequence[float] = (-300.0, 900.0)
    spacing: Sequence[float] = (4.0, 4.0, 2.5)
    body_above: float = -300.0
    start_shift: float = 15.0
    control_spacing: float = 60.0
    affine_iterations: int = 100
    deformation_iterations: int = 12
    sampling: float = 0.03
    bins: int = 32
    min_overlap: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hu_window", "spacing"):
            check_option(name, getattr(self, name), not_null=True)
        low, high = self.hu_window
        Rule(
            f"must be a value in HU in hu_window, from {low} to below {high}",
            lambda v: is_number(v) and low <= v < high,
        ).check("body_above", self.body_above)
        ABOVE_ZERO.check("control_spacing", self.control_spacing)
        STEPS.check("affine_iterations", self.affine_iterations)
        STEPS.check("deformation_iterations", self.deformation_iterations)
        ZERO_OR_ABOVE.check("start_shift", self.start_shift)
        for name in ("sampling", "min_overlap"):
            SHARE_ABOVE_ZERO.check(name, getattr(self, name))
        BINS.check("bins", self.bins)
        SEED.check("seed", self.seed)


@dataclass(frozen=True)
class Registration:
    """What came of one pair.

    Attributes:
        transform: maps points of the fixed scan to points of the moving scan, mm in LPS; None if the pair failed. It
            can be pickled.
        reason: why the pair failed, else "".
        start: the shift along z in mm whose start won.
        starts: mutual information of each start, by its shift.
        before: mutual information in nats at the start as given; NaN if only a moved start has enough overlap.
        affine: the same after the affine map.
        after: the same after the deformation.
        overlap: share of the fixed body that the transform maps into the moving scan's field of view.
        least_jacobian: smallest determinant of the transform's Jacobian in the fixed body. It is the volume of the
            moving scan for a volume of the fixed scan; where it is not above 0 the transform folds.
    """

    transform: SimpleITK.Transform | None = field(default=None, repr=False)
    reason: str = ""
    start: float = math.nan
    starts: dict[float, float] = field(default_factory=dict)
    before: float = math.nan
    affine: float = math.nan
    after: float = math.nan
    overlap: float = math.nan
    least_jacobian: float = math.nan


class _Failed(Exception):
    """The pair cannot be registered; the text is the reason."""


def register(
    moving: Volume | str | os.PathLike,
    fixed: Volume | str | os.PathLike,
    *,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    shift: Sequence[float] = (0.0, 0.0, 0.0),
    options: RegistrationOptions | None = None,
) -> Registration:
    """Register a moving (labelled) scan to a fixed (unlabelled) one.

    The start is ``moving point = scale * fixed point + shift`` along each axis in RAS mm, the form in which a map of
    positions is fitted. From there: the best of five starts by mutual information, an affine map at three resolutions
    (regular step gradient descent), and cubic B-splines at two (L-BFGS).

    The same input gives the same bytes, in any process and on any number of cores: one thread, a seed for the samples.
    Run pairs in parallel in processes, not in threads: the number of threads is a setting of the whole process.

    A pair that cannot be registered is a result with a reason: no body, no common field of view, an optimiser that
    fails or ends worse than it began, a stretched affine map, a transform that folds in the body.

    Args:
        moving: scan in HU, or its NIfTI or MetaImage file.
        fixed: the same.
        scale: (x, y, z), each above 0.
        shift: (x, y, z) in mm.
        options: None for the defaults.

    Raises:
        InputError: a file cannot be read, scale or shift are not three numbers, or SimpleITK is not installed.
    """
    options = options or RegistrationOptions()
    for name, values in (("scale", scale), ("shift", shift)):
        if len(values) != 3 or not all(is_number(float(value)) for value in values):
            raise InputError(f"{name} is {list(values)}: it must be three finite numbers.")
    if min(scale) <= 0:
        raise InputError(f"scale is {list(scale)}: each must be above 0.")
    moving, fixed = as_volume(moving), as_volume(fixed)
    given = np.diag([*map(float, scale), 1.0])
    given[:3, 3] = shift
    so_far = Registration()
    try:
        with one_thread():
            pair = _Pair(_WorkingScan.of(moving, options, "moving"), _WorkingScan.of(fixed, options, "fixed"), options)
            starts = {}
            for along in sorted({step * options.start_shift for step in STARTS}, key=lambda z: (abs(z), z)):
                moved = given.copy()
                moved[2, 3] += along
                affine = pair.affine(moved)
                if pair.overlap(affine) >= options.min_overlap:
                    starts[along] = (pair.information(affine), affine)
            if not starts:
                raise _Failed(
                    f"no common field of view: at the start {pair.overlap(pair.affine(given)):.0%} of the fixed body is "
                    f"in the moving scan, and {options.min_overlap:.0%} must be"
                )
            start = max(starts, key=lambda along: starts[along][0])
            information = {along: value for along, (value, _) in starts.items()}
            so_far = replace(so_far, start=start, starts=information, before=information.get(0.0, math.nan))
            affine = pair.fit_affine(starts[start][1])
            so_far = replace(so_far, affine=pair.information(affine))
            transform = pair.fit_deformation(affine)
            shifts = pair.shifts(transform)
            so_far = replace(so_far, least_jacobian=pair.least_jacobian(shifts))
            looked_up = simple_itk().DisplacementFieldTransform(shifts)
            so_far = replace(so_far, after=pair.information(looked_up), overlap=pair.overlap(looked_up))
            if so_far.overlap < options.min_overlap:
                raise _Failed(
                    f"no common field of view: at the end {so_far.overlap:.0%} of the fixed body is in the moving scan"
                )
            if not so_far.after > max(LEAST_INFORMATION, KEPT * information[start]):
                raise _Failed(
                    f"the optimiser found nothing: mutual information is {so_far.after:.3f} after and "
                    f"{information[start]:.3f} before"
                )
            if not so_far.least_jacobian > 0:
                raise _Failed(
                    f"the transform folds in the body: the smallest determinant of its Jacobian is "
                    f"{so_far.least_jacobian:.3f}"
                )
    except _Failed as failure:
        return replace(so_far, reason=str(failure))
    except RuntimeError as error:  # what ITK raises, whatever the cause; the last line says it
        if "alloc" in str(error).lower():
            raise MemoryError(str(error)) from error  # not a property of the pair
        return replace(so_far, reason=f"the optimiser stopped: {str(error).strip().splitlines()[-1].strip()}")
    return replace(so_far, transform=transform)


@dataclass(frozen=True)
class _WorkingScan:
    """A scan on the working grid, whose axes are those of the body (LPS).

    Attributes:
        image: float32, clipped HU.
        seen: bool (Z, Y, X), the field of view.
        body: bool (Z, Y, X).
    """

    image: SimpleITK.Image
    seen: np.ndarray
    body: np.ndarray

    @classmethod
    def of(cls, volume: Volume, options: RegistrationOptions, role: str) -> _WorkingScan:
        sitk = simple_itk()
        low, high = options.hu_window
        clipped = np.clip(volume.voxels, low, high, dtype=np.float32, casting="unsafe")
        image = to_image(Volume(clipped, volume.affine))
        # Averaging before resampling keeps the noise of small voxels out. The axis of a voxel's edge that is closest to
        # an axis of the body decides how many fit into a voxel of the working grid.
        steps = np.abs(np.asarray(volume.affine)[:3, :3])
        sizes = [options.spacing[axis] for axis in steps.argmax(axis=0)]
        factors = [
            max(1, min(int(size / own + 1e-3), count))
            for size, own, count in zip(sizes, image.GetSpacing(), image.GetSize(), strict=True)
        ]
        image = sitk.BinShrink(image, factors)
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in image.GetSize()])).reshape(3, -1).T
        points = np.array([image.TransformIndexToPhysicalPoint(corner.tolist()) for corner in corners])
        # Any point of the scan must lie in the grid: the body may reach to its edge.
        origin = points.min(axis=0) - options.spacing
        size = np.ceil((points.max(axis=0) - origin) / options.spacing).astype(int) + 2
        grid = (size.tolist(), sitk.Transform(), sitk.sitkLinear, origin.tolist(), [*map(float, options.spacing)])
        grid = (*grid, np.eye(3).ravel().tolist())
        working = sitk.Resample(image, *grid, float(low), sitk.sitkFloat32)
        ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
        ones.CopyInformation(image)
        seen = sitk.GetArrayFromImage(sitk.Resample(ones, *grid, 0, sitk.sitkUInt8)) > 0
        body = _body((sitk.GetArrayFromImage(working) > options.body_above) & seen)
        if body.sum() < LEAST_BODY:
            raise _Failed(
                f"no body: in the {role} scan {int(body.sum())} voxels of the working grid are connected and above "
                f"{options.body_above:g} HU, and {LEAST_BODY} must be"
            )
        inside = sitk.GetArrayViewFromImage(working)[body]
        if inside.min() == inside.max():
            raise _Failed(f"nothing to compare: the {role} scan is {inside.min():g} HU everywhere in its body")
        return cls(working, seen, body)


def _body(tissue: np.ndarray) -> np.ndarray:
    """Return the largest connected part of a mask (Z, Y, X), with the holes of every axial slice filled."""
    parts, count = ndimage.label(tissue)
    if not count:
        return tissue
    largest = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return np.stack([ndimage.binary_fill_holes(plane) for plane in largest])


def _around_body(scan: _WorkingScan) -> tuple[_WorkingScan, np.ndarray]:
    """Crop a scan to its body and the rim that is compared, and return it with that mask.

    Control points in the air around would be fitted as well, and take the time of those in the body. Outside the box
    the deformation is 0: what is not part of the body (an arm next to it) follows only the affine map.
    """
    distance = ndimage.distance_transform_edt(~scan.body, sampling=scan.image.GetSpacing()[::-1])
    compared = (distance <= RIM) & scan.seen
    # One voxel more on each side, for the interpolation at the edge.
    ends = generate_spatial_bounding_box(compared[None], margin=1, allow_smaller=True)
    z, y, x = box = tuple(slice(int(low), int(high)) for low, high in zip(*ends, strict=True))
    return _WorkingScan(scan.image[x, y, z], scan.seen[box], scan.body[box]), compared[box]


class _Pair:
    """Two scans on their working grids, and the steps between them."""

    def __init__(self, moving: _WorkingScan, fixed: _WorkingScan, options: RegistrationOptions) -> None:
        fixed, compared = _around_body(fixed)
        self.moving, self.fixed, self.options = moving, fixed, options
        self.voxels = int(compared.sum())
        self.mask = _as_mask(compared, fixed.image)
        self.field_of_view = _as_mask(moving.seen, moving.image)
        voxels = np.argwhere(fixed.body)[:, ::-1]
        self.middle = fixed.image.GetOrigin() + voxels.mean(axis=0) * fixed.image.GetSpacing()

    def affine(self, matrix: np.ndarray) -> SimpleITK.AffineTransform:
        """Return a (4, 4) map in RAS, with the middle of the fixed body as its centre."""
        matrix = to_lps(matrix)
        transform = simple_itk().AffineTransform(3)
        transform.SetCenter(self.middle.tolist())
        transform.SetMatrix(matrix[:3, :3].ravel().tolist())
        transform.SetTranslation((matrix[:3, :3] @ self.middle + matrix[:3, 3] - self.middle).tolist())
        return transform

    def information(self, transform: SimpleITK.Transform) -> float:
        """Return the mutual information at a transform, in nats."""
        method = self._method(transform, ())
        method.SetMetricUseMovingImageGradientFilter(False)  # an image of gradients, which nothing here reads
        method.SetMetricUseFixedImageGradientFilter(False)
        return -method.MetricEvaluate(self.fixed.image, self.moving.image)

    def overlap(self, transform: SimpleITK.Transform) -> float:
        """Return the share of the fixed body that a transform maps into the moving field of view."""
        sitk = simple_itk()
        seen = sitk.Resample(self.field_of_view, self.fixed.image, transform, sitk.sitkNearestNeighbor, 0)
        return float((sitk.GetArrayFromImage(seen) > 0)[self.fixed.body].mean())

    def fit_affine(self, start: SimpleITK.AffineTransform) -> SimpleITK.AffineTransform:
        sitk = simple_itk()
        transform = sitk.AffineTransform(start)
        method = self._method(transform, ((4, 8.0), (2, 4.0), (1, 0.0)))
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=2.0,
            minStep=0.01,
            numberOfIterations=int(self.options.affine_iterations),
            relaxationFactor=0.6,
            gradientMagnitudeTolerance=1e-8,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.Execute(self.fixed.image, self.moving.image)
        stretch = np.linalg.svd(np.reshape(transform.GetMatrix(), (3, 3)), compute_uv=False)
        if not (np.isfinite(stretch).all() and SCALES[0] <= stretch.min() and stretch.max() <= SCALES[1]):
            raise _Failed(
                f"the affine map is degenerate: it stretches by {stretch.min():.2f} to {stretch.max():.2f}, and "
                f"{SCALES[0]} to {SCALES[1]} is allowed"
            )
        return transform

    def fit_deformation(self, affine: SimpleITK.AffineTransform) -> SimpleITK.CompositeTransform:
        """Return the affine map after a deformation of the fixed scan's space."""
        sitk = simple_itk()
        image = self.fixed.image
        lengths = (np.array(image.GetSize()) - 1) * image.GetSpacing()
        mesh = [max(1, round(length / self.options.control_spacing)) for length in lengths]
        deformation = sitk.BSplineTransformInitializer(image, mesh, order=3)
        method = self._method(deformation, ((2, 4.0), (1, 0.0)))
        # Not SetMovingInitialTransform: multiplying the Jacobian of each sample by the affine map takes a quarter of
        # the time.
        moving = self._moved(self.moving.image, affine, sitk.sitkLinear, float(self.options.hu_window[0]))
        method.SetMetricMovingMask(self._moved(self.field_of_view, affine, sitk.sitkNearestNeighbor, 0))
        method.SetOptimizerAsLBFGS2(
            solutionAccuracy=1e-5,
            numberOfIterations=int(self.options.deformation_iterations),
            hessianApproximateAccuracy=5,
            lineSearchMaximumEvaluations=20,
        )
        method.Execute(image, moving)
        return sitk.CompositeTransform([affine, deformation])  # the last is applied first

    def _moved(
        self, scan: SimpleITK.Image, affine: SimpleITK.AffineTransform, interpolator: int, outside: float
    ) -> SimpleITK.Image:
        """Return a moving image on the fixed grid, and as far beyond it as a deformation may reach."""
        fixed = self.fixed.image
        border = [math.ceil(REACH / size) for size in fixed.GetSpacing()]
        size = [own + 2 * more for own, more in zip(fixed.GetSize(), border, strict=True)]
        origin = fixed.TransformIndexToPhysicalPoint([-more for more in border])
        grid = (size, affine, interpolator, origin, fixed.GetSpacing(), fixed.GetDirection())
        return simple_itk().Resample(scan, *grid, outside)

    def shifts(self, transform: SimpleITK.Transform) -> SimpleITK.Image:
        """Return where a transform moves each voxel of the fixed grid, in mm: computed once, then only looked up."""
        image = self.fixed.image
        return simple_itk().TransformToDisplacementField(
            transform, simple_itk().sitkVectorFloat64, image.GetSize(), image.GetOrigin(), image.GetSpacing()
        )

    def least_jacobian(self, shifts: SimpleITK.Image) -> float:
        """Return the smallest determinant of the Jacobian in the fixed body, from the shifts of the fixed grid."""
        sitk = simple_itk()
        return float(sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(shifts))[self.fixed.body].min())

    def _method(
        self, transform: SimpleITK.Transform, levels: Sequence[tuple[int, float]]
    ) -> SimpleITK.ImageRegistrationMethod:
        """Return a registration that changes ``transform``; levels are (shrink factor, smoothing in mm)."""
        sitk = simple_itk()
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=self.options.bins)
        method.SetMetricFixedMask(self.mask)
        method.SetMetricMovingMask(self.field_of_view)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetInitialTransform(transform, inPlace=True)
        if levels:
            method.SetMetricSamplingStrategy(method.REGULAR)
            voxels = [self.voxels / factor**3 for factor, _ in levels]
            shares = [min(1.0, max(self.options.sampling, LEAST_SAMPLES / number)) for number in voxels]
            method.SetMetricSamplingPercentagePerLevel(shares, seed=self.options.seed % (2**32 - 1) + 1)  # 0: the clock
            method.SetShrinkFactorsPerLevel([factor for factor, _ in levels])
            method.SetSmoothingSigmasPerLevel([sigma for _, sigma in levels])
            method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        return method


def _as_mask(mask: np.ndarray, like: SimpleITK.Image) -> SimpleITK.Image:
    image = simple_itk().GetImageFromArray(mask.astype(np.uint8))
    image.CopyInformation(like)
    return image
