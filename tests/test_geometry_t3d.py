# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Orientation and spacing against world coordinates and brute force."""

import doctest
import itertools

import nibabel
import numpy as np
import pytest
import torch

from modeling_t3d import geometry_t3d
from modeling_t3d.geometry_t3d import (
    Box,
    Volume,
    VolumeGeometryError,
    VolumeIntensityError,
    affine_from_axes,
    body_box,
    check_affine,
    crop_affine,
    scale_affine,
    shear,
    spacing_from_affine,
)


def rotation(degrees: float, axis: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> np.ndarray:
    """Rotation matrix about `axis` (Rodrigues)."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def make_affine(linear: np.ndarray, origin=(-31.25, 12.7, 103.3)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = origin
    return affine


def reoriented(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...], through_nifti: bool) -> Volume:
    """The same volume stored with its axes permuted and flipped; the affine takes the float noise of that route."""
    transform = np.zeros((4, 4))
    transform[3, 3] = 1
    array = volume.array.transpose(order)
    for axis, (old, flip) in enumerate(zip(order, flips, strict=True)):
        transform[old, axis] = -1 if flip else 1
        transform[old, 3] = array.shape[axis] - 1 if flip else 0
    array = np.flip(array, [axis for axis, flip in enumerate(flips) if flip])
    affine = volume.affine @ transform
    if through_nifti:
        affine = affine.astype(np.float32).astype(np.float64)
    return Volume(array, affine)


ALL_48 = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("through_nifti", [False, True])
@pytest.mark.parametrize(
    "linear",
    [
        np.diag([0.7, 0.78125, 2.5]),
        rotation(20) @ np.diag([0.7, 0.7, 2.5]),
        rotation(20, (1.0, 2.0, -0.5)) @ np.diag([0.3515625, 0.7, 1.25]),
        np.diag([4e-6, 4e-6, 4e-5]),
    ],
)
def test_all_48_orientations_are_one_volume(linear, through_nifti):
    array = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    reference = reoriented(Volume(array, make_affine(linear)), (0, 1, 2), (False,) * 3, through_nifti)
    expected = reference.to_canonical()
    corner = expected.affine[:3, 3]
    for order, flips in ALL_48:
        canonical = reoriented(reference, order, flips, through_nifti).to_canonical()
        assert torch.equal(torch.from_numpy(canonical.array), torch.from_numpy(expected.array))
        assert canonical.spacing == expected.spacing
        assert canonical.axis_codes == "SAR"
        np.testing.assert_array_equal(canonical.affine[:3, :3], expected.affine[:3, :3])
        np.testing.assert_allclose(canonical.affine[:3, 3], corner, atol=1e-3 if through_nifti else 1e-9)


def test_canonical_keeps_every_voxel_at_its_world_position():
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    volume = Volume(array, make_affine(rotation(-33, (0.2, 1, 0.1)) @ np.diag([-1.0, 2.0, -3.0])[[2, 0, 1]]))
    canonical = volume.to_canonical()
    for value in (0, 17, 63, 119):
        old = np.argwhere(array == value)[0]
        new = np.argwhere(canonical.array == value)[0]
        world = volume.affine @ [*old, 1]
        np.testing.assert_allclose(canonical.affine @ [*new, 1], world, atol=1e-9)
    assert np.linalg.det(canonical.affine[:3, :3][:, ::-1]) > 0


def test_axis_codes_are_nibabels():
    for order, flips in ALL_48:
        volume = reoriented(
            Volume(np.zeros((2, 3, 4)), make_affine(rotation(25, (1, 1, 0)))), order, flips, through_nifti=False
        )
        assert volume.axis_codes == "".join(nibabel.aff2axcodes(volume.affine))


@pytest.mark.parametrize("axis", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_exactly_45_degrees_is_refused_and_44_is_not(axis):
    with pytest.raises(VolumeGeometryError, match="45 degrees"):
        Volume(np.zeros((2, 3, 4)), make_affine(rotation(45, axis))).to_canonical()
    assert Volume(np.zeros((2, 3, 4)), make_affine(rotation(44, axis))).to_canonical().shape == (4, 3, 2)


@pytest.mark.parametrize(
    ("affine", "match"),
    [
        (np.eye(3), r"\(3, 3\)"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.diag([1.0, 1.0, np.inf, 1.0]), "infinite"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "not believable"),
        (np.diag([1.0, 1.0, 1e9, 1.0]), "not believable"),
        (np.diag([1.0, 1.0, 1e-9, 1.0]), "not believable"),
        (np.diag([0.01, 1.0, 5.0, 1.0]), "times another"),
        (np.diag([1.0, 1.0, 1.0, 2.0]), "last row"),
        (make_affine(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])), "singular"),
        ("affine", "numeric"),
    ],
)
def test_impossible_affines_are_refused(affine, match):
    with pytest.raises(VolumeGeometryError, match=match):
        check_affine(affine)


def test_spacing_is_rounded_but_usual_values_are_kept():
    for value in (0.7, 0.78125, 0.390625, 0.3515625, 0.9765625, 1.25, 2.5, 3.0, 5.0, 10.0, 0.4297):
        noisy = np.diag([value * (1 + 8e-8), -value, value * (1 - 8e-8), 1.0])
        assert spacing_from_affine(noisy) == (value, value, value)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 4), (2, 3, 4, 5)])
def test_a_volume_has_three_axes_with_voxels(shape):
    with pytest.raises(VolumeGeometryError, match="shape"):
        Volume(np.zeros(shape), np.eye(4))


def test_shear_is_found_and_refused():
    sheared = make_affine(np.array([[1.0, 0, 0], [0, 1.0, 0.3], [0, 0, 1.0]]))
    assert shear(sheared) == pytest.approx(0.3 / np.hypot(1, 0.3))
    volume = Volume(np.zeros((2, 3, 4)), sheared)
    assert volume.is_sheared
    with pytest.raises(VolumeGeometryError, match="right angles"):
        volume.to_canonical()
    assert not Volume(np.zeros((2, 3, 4)), make_affine(rotation(20).astype(np.float32))).is_sheared


def test_affine_from_axes():
    affine = affine_from_axes((2.5, 0.7, 0.8), "SPL")
    assert spacing_from_affine(affine) == (2.5, 0.7, 0.8)
    assert geometry_t3d.axis_codes(affine) == "SPL"
    for axes in ("zyx", "SAA", "SA", "", None, 3):
        with pytest.raises(VolumeGeometryError, match="axes="):
            affine_from_axes((1, 1, 1), axes)
    for spacing in ((1, 1), (1, 1, "a"), (1, 1, -1), 3):
        with pytest.raises(VolumeGeometryError, match="spacing"):
            affine_from_axes(spacing, "SAR")


def test_crop_and_scale_keep_world_coordinates():
    affine = make_affine(rotation(10) @ np.diag([2.0, 0.7, 0.7]))
    np.testing.assert_allclose(crop_affine(affine, (3, -2, 5)) @ [0, 0, 0, 1], affine @ [3, -2, 5, 1])
    scaled = scale_affine(affine, (2.0, 0.5, 3.0))
    for corner in itertools.product((0, 4), repeat=3):  # edge coordinates of the new grid
        old = np.array(corner) * (2.0, 0.5, 3.0)
        np.testing.assert_allclose(
            scaled[:3] @ [*(np.array(corner) - 0.5), 1], affine[:3] @ [*(old - 0.5), 1], atol=1e-9
        )


def test_body_box():
    mask = np.zeros((6, 7, 8), dtype=bool)
    mask[1, 2, 3] = mask[4, 3, 7] = True
    assert body_box(mask) == Box((1, 2, 3), (5, 4, 8))
    with pytest.raises(VolumeIntensityError, match="no body"):
        body_box(np.zeros((2, 2, 2), dtype=bool))


def test_examples_in_the_docstrings():
    assert doctest.testmod(geometry_t3d).failed == 0
