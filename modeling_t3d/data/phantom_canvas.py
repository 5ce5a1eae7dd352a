# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Painting soft-edged shapes into a CT grid: the rasteriser of the phantoms, which knows no anatomy.

Only additions, multiplications, divisions, square roots and comparisons touch whole arrays, and every random number
comes from uniform draws: these give the same bits on every machine, where vectorised exponentials and sines do not.
"""

import math
from collections.abc import Sequence

import numpy as np

Box = tuple[slice, slice, slice]


class RandomDraws:
    """Uniform draws from one named stream; numpy keeps this stream fixed over its releases.

    Args:
        *key (`int`): whole numbers that name the stream, for instance its purpose and a patient number.

    Example:
        >>> RandomDraws(1, 7).uniform(0.0, 1.0) == RandomDraws(1, 7).uniform(0.0, 1.0)
        True
    """

    def __init__(self, *key: int):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))
        self.generator = np.random.Generator(self.bits)

    def uniform(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return low + (high - low) * float(self.generator.random())

    def uniforms(self, low: float, high: float, *shape: int) -> np.ndarray:
        """An array of numbers in [low, high), float64."""
        return low + (high - low) * self.generator.random(shape)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self.generator.random()) < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(float(self.generator.random()) * (high - low + 1))

    def choice(self, options: Sequence):
        """One of the options, each as likely."""
        return options[int(float(self.generator.random()) * len(options))]

    def shuffled(self, items: Sequence) -> list:
        """The items in random order."""
        order = np.argsort(self.generator.random(len(items)), kind="stable")
        return [items[i] for i in order]

    def bell_curve(self, count: int) -> np.ndarray:
        """`count` int16 numbers, sums of four centred bytes: mean 0, deviation `BELL_DEVIATION`, close to normal."""
        raw = self.bits.random_raw((count + 1) // 2).view(np.uint8).reshape(4, -1)
        total = raw[0].astype(np.int16)
        for part in raw[1:]:
            total += part
        total -= 510
        return total[:count]


BELL_DEVIATION = math.sqrt(4 * (256.0**2 - 1) / 12)


def as_float32(values: np.ndarray) -> np.ndarray:
    """The array in single precision."""
    return np.asarray(values, dtype=np.float32)


class Canvas:
    """A CT grid under construction, in a body frame of millimetres (x right, y anterior, z superior).

    Args:
        shape (`tuple[int, int, int]`): voxels along (z, y, x).
        spacing (`tuple[float, float, float]`): mm along (z, y, x).
        origin (`tuple[float, float, float]`): body-frame mm of the first voxel's centre, (z, y, x).
    """

    def __init__(
        self, shape: tuple[int, int, int], spacing: tuple[float, float, float], origin: tuple[float, float, float]
    ):
        self.shape, self.spacing, self.origin = shape, spacing, origin
        self.axes = tuple(o + s * np.arange(n) for o, s, n in zip(origin, spacing, shape, strict=True))
        self.hu = np.empty(shape, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.lesions = np.zeros(shape, dtype=np.uint8)
        self.voxel = float((spacing[0] * spacing[1] * spacing[2]) ** (1 / 3))

    def box(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """Slices of the voxels whose centres lie within one voxel of the given mm bounds, (z, y, x)."""
        slices = []
        for lo, hi, origin, spacing, size in zip(low, high, self.origin, self.spacing, self.shape, strict=True):
            start = min(max(math.floor((lo - origin) / spacing), 0), size)
            stop = min(max(math.ceil((hi - origin) / spacing) + 1, start), size)
            slices.append(slice(start, stop))
        return slices[0], slices[1], slices[2]

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Body-frame mm of a box's voxels as float32 arrays of shapes (d, 1, 1), (1, h, 1), (1, 1, w)."""
        z, y, x = (as_float32(axis[part]) for axis, part in zip(self.axes, box, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def coverage(self, depth: np.ndarray) -> np.ndarray:
        """Fraction of each voxel inside a surface, from the depth below that surface in mm; overwrites `depth`."""
        depth *= 1.0 / self.voxel
        depth += 0.5
        return np.clip(depth, 0.0, 1.0, out=depth)

    def blend(self, box: Box, coverage: np.ndarray, hu, organ: int = 0, finding: int = 0) -> None:
        """Mix tissue of `hu` into a box: (1 - coverage) old + coverage new; labels go where coverage reaches a half.

        An organ painted over a lesion clears its label there.
        """
        region = self.hu[box]
        region += coverage * (hu - region)
        if organ:
            most = coverage >= 0.5
            np.copyto(self.organs[box], organ, where=most)
            np.copyto(self.lesions[box], finding, where=most)
        elif finding and coverage.size:
            # A lesion smaller than a voxel is still marked, in the voxel that holds most of it.
            np.copyto(self.lesions[box], finding, where=coverage >= min(0.5, max(float(coverage.max()), 0.02)))

    def ellipsoid(
        self,
        centre: Sequence[float],
        radii: Sequence[float],
        hu: float,
        *,
        angle: float = 0.0,
        organ: int = 0,
        finding: int = 0,
        inside: tuple[Box, np.ndarray] | None = None,
        softness: float = 1.0,
    ) -> None:
        """Paint an ellipsoid, (z, y, x) mm, turned by `angle` radians about the z axis.

        `inside` confines it to a coverage array that lies in a given box; `softness` > 1 blurs its edge.
        """
        reach = radii if angle == 0.0 else (radii[0], max(radii[1:]), max(radii[1:]))
        margin = self.voxel * max(softness, 1.0) * 0.5
        box = self.box(
            [c - r - margin for c, r in zip(centre, reach, strict=True)],
            [c + r + margin for c, r in zip(centre, reach, strict=True)],
        )
        if inside is not None:
            z_part, y_part, x_part = (
                slice(max(a.start, b.start), max(min(a.stop, b.stop), max(a.start, b.start)))
                for a, b in zip(box, inside[0], strict=True)
            )
            box = (z_part, y_part, x_part)
        z, y, x = self.coordinates(box)
        z, y, x = z - centre[0], y - centre[1], x - centre[2]
        cosine, sine = math.cos(angle), math.sin(angle)
        across, along = (x * cosine + y * sine) / radii[2], (y * cosine - x * sine) / radii[1]
        plane, axis = across * across + along * along, z / radii[0]
        effective = (radii[0] * radii[1] * radii[2]) ** (1 / 3)
        depth = (1.0 - axis * axis) - plane
        depth *= 0.5 * effective / softness
        coverage = self.coverage(depth)
        if inside is not None:
            coverage *= inside[1][
                tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, inside[0], strict=True))
            ]
        self.blend(box, coverage, hu, organ, finding)

    def lesion(self, centre: Sequence[float], radii: Sequence[float], hu: float, finding: int) -> None:
        """Paint a small ellipsoid with exact partial volumes: 4 x 4 x 4 samples per voxel."""
        samples = 4
        box = self.box(
            [c - r - s / 2 for c, r, s in zip(centre, radii, self.spacing, strict=True)],
            [c + r + s / 2 for c, r, s in zip(centre, radii, self.spacing, strict=True)],
        )
        offsets = (np.arange(samples) + 0.5) / samples - 0.5
        z, y, x = (
            as_float32((((axis[part][:, None] + offsets * spacing) - c) / r).reshape(-1) ** 2)
            for axis, part, spacing, c, r in zip(self.axes, box, self.spacing, centre, radii, strict=True)
        )
        hit = (z[:, None, None] + y[None, :, None]) + x[None, None, :] <= 1.0
        depth, height, width = (len(axis) // samples for axis in (z, y, x))
        counts = hit.reshape(depth, samples, height, samples, width, samples).sum(axis=(1, 3, 5), dtype=np.int32)
        self.blend(box, as_float32(counts) * (1.0 / samples**3), hu, finding=finding)

    def column(
        self,
        bottom: float,
        top: float,
        x_centre,
        y_centre,
        x_radius,
        y_radius,
        hu,
        *,
        organ: int = 0,
    ) -> None:
        """Paint an upright tube; centres, radii (mm) and `hu` are numbers or functions of z in mm."""
        box_z = self.box((bottom, 0.0, 0.0), (top, 0.0, 0.0))[0]
        height = self.axes[0][box_z]
        if not len(height):
            return
        xc, yc, xr, yr, values = (
            np.broadcast_to(np.asarray(v(height) if callable(v) else v, dtype=np.float64), height.shape)
            for v in (x_centre, y_centre, x_radius, y_radius, hu)
        )
        margin = 0.5 * self.voxel
        _, box_y, box_x = self.box(
            (bottom, float((yc - yr).min()) - margin, float((xc - xr).min()) - margin),
            (top, float((yc + yr).max()) + margin, float((xc + xr).max()) + margin),
        )
        box = (box_z, box_y, box_x)
        across = as_float32((self.axes[2][box_x] - xc[:, None]) / xr[:, None])
        along = as_float32((self.axes[1][box_y] - yc[:, None]) / yr[:, None])
        depth = (1.0 - along * along)[:, :, None] - (across * across)[:, None, :]
        depth *= as_float32(0.5 * np.sqrt(xr * yr))[:, None, None]
        # The first and last slice hold the fraction of their thickness that the tube reaches.
        ends = np.clip(0.5 + np.minimum(height - bottom, top - height) / self.spacing[0], 0.0, 1.0)
        coverage = self.coverage(depth)
        coverage *= as_float32(ends)[:, None, None]
        self.blend(box, coverage, as_float32(values)[:, None, None], organ)

    def scatter(self, box: Box, points: np.ndarray, volumes: np.ndarray) -> np.ndarray:
        """Fraction of each voxel of a box filled by points (N, 3) in (z, y, x) mm that carry `volumes` (N,) in mm^3.

        Each point is shared between its eight nearest voxels, so thin vessels keep their mean HU at every resolution.
        """
        sizes = [part.stop - part.start for part in box]
        lower, weights = [], []
        for axis, part in enumerate(box):
            position = (points[:, axis] - self.origin[axis]) / self.spacing[axis] - part.start
            floor = np.floor(position)
            lower.append(floor.astype(np.int64))
            weights.append(position - floor)
        inside = np.ones(len(points), dtype=bool)
        for low, size in zip(lower, sizes, strict=True):
            inside &= (low >= 0) & (low < size - 1)
        lower, weights = [a[inside] for a in lower], [a[inside] for a in weights]
        volumes = volumes[inside] / (self.spacing[0] * self.spacing[1] * self.spacing[2])
        start = (lower[0] * sizes[1] + lower[1]) * sizes[2] + lower[2]
        indices, shares = [], []
        for dz in (0, 1):
            wz = volumes * (weights[0] if dz else 1.0 - weights[0])
            for dy in (0, 1):
                wy = wz * (weights[1] if dy else 1.0 - weights[1])
                for dx in (0, 1):
                    indices.append(start + ((dz * sizes[1] + dy) * sizes[2] + dx))
                    shares.append(wy * (weights[2] if dx else 1.0 - weights[2]))
        count = sizes[0] * sizes[1] * sizes[2]
        filled = np.bincount(np.concatenate(indices), weights=np.concatenate(shares), minlength=count)
        return np.minimum(as_float32(filled), 1.0).reshape(sizes)


__all__ = ["BELL_DEVIATION", "Box", "Canvas", "RandomDraws", "as_float32"]
