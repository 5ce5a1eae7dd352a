# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A body of known shape in HU and its 48 orientations, for the tests of everything between file and tensor."""

import itertools
from collections.abc import Iterator

import numpy as np

from modeling_t3d.geometry_t3d import Volume


def body_array(shape: tuple[int, int, int] = (32, 28, 36), seed: int = 0, noise: float = 20.0) -> np.ndarray:
    """(z, y, x) int16 HU: an elliptic trunk that runs through all slices, two lungs in its upper half, air around."""
    generator = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    array = np.full(shape, -1000.0)
    array[(y / 0.8) ** 2 + (x / 0.85) ** 2 < 1] = 40.0
    array[(y / 0.4) ** 2 + ((np.abs(x) - 0.4) / 0.25) ** 2 + ((z - 0.5) / 0.6) ** 2 < 1] = -850.0
    return np.clip(np.rint(array + generator.normal(0, noise, shape)), -1024, 3000).astype(np.int16)


def upright_affine(spacing: tuple[float, float, float], origin: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Affine of a (z, y, x) array whose indices grow towards superior, anterior, right; the origin is (x, y, z)."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:3, 3] = origin
    affine[3, 3] = 1.0
    return affine


def rotation(degrees: float, axis: tuple[float, float, float]) -> np.ndarray:
    """(4, 4) world rotation about an axis through the origin."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    result = np.eye(4)
    result[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return result


def orientations(array: np.ndarray, affine: np.ndarray) -> Iterator[Volume]:
    """The same voxels at the same places in the world, stored in each of the 48 axis orders and directions."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            index = np.zeros((4, 4))  # new index -> old index
            index[3, 3] = 1.0
            for new, old in enumerate(order):
                index[old, new] = signs[new]
                index[old, 3] = 0 if signs[new] > 0 else array.shape[old] - 1
            stored = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
            yield Volume(np.ascontiguousarray(stored), affine @ index)
