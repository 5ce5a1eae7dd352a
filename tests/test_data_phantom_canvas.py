# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The phantoms' rasteriser keeps volumes and positions at every voxel size."""

import numpy as np
import pytest

from modeling_t3d.data.phantom_canvas import BELL_DEVIATION, Canvas, RandomDraws


@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (2.0, 1.0, 1.5), (5.0, 3.0, 3.0)])
@pytest.mark.parametrize("diameter", [4.0, 6.0, 20.0])
def test_small_lesions_keep_their_volume_and_position(spacing, diameter):
    draws = RandomDraws(5, int(10 * diameter))
    volumes, centres = [], []
    for _ in range(20):
        canvas = Canvas((24, 30, 30), spacing, (0.0, 0.0, 0.0))
        canvas.hu[:] = 0.0
        centre = [draws.uniform(0.4, 0.6) * n * s for n, s in zip(canvas.shape, spacing, strict=True)]
        canvas.lesion(centre, [diameter / 2] * 3, 1.0, finding=3)
        weights = canvas.hu / canvas.hu.sum()
        found = [(weights * axis).sum() for axis in np.meshgrid(*canvas.axes, indexing="ij")]
        centres.append(np.abs(np.subtract(found, centre)).max())
        volumes.append(canvas.hu.sum() * np.prod(spacing))
        assert (canvas.lesions == 3).any()
        assert set(np.unique(canvas.lesions)) == {0, 3}
    assert np.mean(volumes) == pytest.approx(np.pi / 6 * diameter**3, rel=0.03)
    assert max(centres) < 0.3 * max(spacing)


def test_ellipsoids_keep_their_volume():
    for radii in ((12.0, 20.0, 30.0), (40.0, 25.0, 25.0)):
        canvas = Canvas((40, 40, 40), (3.0, 3.0, 3.0), (-58.0, -59.0, -57.5))
        canvas.hu[:] = 0.0
        canvas.ellipsoid((0.0, 0.0, 0.0), radii, 1.0, angle=0.7, organ=5)
        expected = 4 / 3 * np.pi * np.prod(radii)
        assert canvas.hu.sum() * 27.0 == pytest.approx(expected, rel=0.04)
        assert (canvas.organs == 5).sum() * 27.0 == pytest.approx(expected, rel=0.04)


def test_scattered_points_keep_their_volume():
    draws = RandomDraws(3)
    canvas = Canvas((20, 20, 20), (4.0, 3.0, 2.0), (0.0, 0.0, 0.0))
    points = draws.uniforms(0.0, 1.0, 500, 3) * (60.0, 45.0, 30.0) + (6.0, 4.0, 3.0)
    filled = canvas.scatter((slice(0, 20),) * 3, points, np.full(500, 1.5))
    assert filled.sum() * 24.0 == pytest.approx(750.0, rel=1e-5)


def test_draws_have_the_stated_moments():
    noise = RandomDraws(4).bell_curve(200_001).astype(np.float64)
    assert noise.shape == (200_001,)
    assert abs(noise.mean()) < 4 * BELL_DEVIATION / np.sqrt(200_001)
    assert noise.std() == pytest.approx(BELL_DEVIATION, rel=0.01)
    values = [RandomDraws(6, number).integer(2, 4) for number in range(300)]
    assert set(values) == {2, 3, 4}
