# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One patient's thorax and abdomen as formulas in millimetres, and the HU of every tissue by contrast phase.

Positions are in a body frame (x right, y anterior, z superior) whose z = 0 lies near the top of the diaphragm.
"""

import math

import numpy as np

from .phantom_canvas import RandomDraws

# Mean HU by contrast phase. Each study moves them by some per cent.
TISSUE_HU: dict[str, dict[str, float]] = {
    "non-contrast": {
        "artery": 42, "right heart": 42, "vein": 42, "liver": 58, "spleen": 48, "cortex": 34, "medulla": 32,
        "pancreas": 40, "myocardium": 45, "wall": 35, "node": 40, "portal": 42,
    },
    "arterial": {
        "artery": 300, "right heart": 220, "vein": 85, "liver": 72, "spleen": 112, "cortex": 135, "medulla": 65,
        "pancreas": 90, "myocardium": 95, "wall": 60, "node": 60, "portal": 95,
    },
    "portal venous": {
        "artery": 150, "right heart": 150, "vein": 150, "liver": 106, "spleen": 116, "cortex": 130, "medulla": 115,
        "pancreas": 85, "myocardium": 95, "wall": 65, "node": 75, "portal": 165,
    },
}  # fmt: skip
FAT, MUSCLE, SKIN, AIR, CARTILAGE, FLUID = -102.0, 52.0, 20.0, -1000.0, 90.0, 10.0

ORGANS = {
    "right lung": 1, "left lung": 2, "heart": 3, "aorta": 4, "liver": 5, "spleen": 6, "right kidney": 7,
    "left kidney": 8, "stomach": 9, "bowel": 10, "pancreas": 11, "gallbladder": 12, "spine": 13, "trachea": 14,
    "great vessels": 15, "muscle": 16,
}  # fmt: skip


def tissue_values(phase: str, draws: RandomDraws) -> dict[str, float]:
    """HU of the tissues whose enhancement differs between studies, by name."""
    native, enhanced = TISSUE_HU["non-contrast"], TISSUE_HU[phase]
    dose = draws.uniform(0.88, 1.12)
    values = {
        name: native[name] + dose * (enhanced[name] - native[name]) + draws.uniform(-3, 3) for name in sorted(native)
    }
    values["lung"] = draws.uniform(-868, -830)
    values["bone"] = draws.uniform(150, 230)
    return values


def profile(heights: tuple[float, ...], values: tuple[float, ...]):
    """The piecewise linear function through the given points, for arrays of z in mm."""
    return lambda z: np.interp(z, heights, values)


class Anatomy:
    """Sizes and positions of one patient's organs, in mm.

    Args:
        draws (`RandomDraws`): the patient's own stream.
        breath (`float`): mm by which the diaphragm stands lower than usual in this study.
        heart_enlargement (`float` or `None`): 0 to 1 for an enlarged heart, `None` for a normal one.
        hyperinflation (`float`): mm by which emphysema lowers and flattens the diaphragm.
    """

    def __init__(
        self,
        draws: RandomDraws,
        *,
        breath: float = 0.0,
        heart_enlargement: float | None = None,
        hyperinflation: float = 0.0,
    ):
        self.female = draws.chance(0.5)
        self.inner_width = draws.uniform(124, 144) - 6 * self.female
        self.inner_depth = draws.uniform(86, 102) - 4 * self.female
        self.height = draws.uniform(0.92, 1.05) - 0.02 * self.female
        self.fat = 6 + 24 * draws.uniform(0, 1) * draws.uniform(0.2, 1)
        self.muscle = draws.uniform(9, 14)
        self.width = self.inner_width + self.fat + self.muscle
        self.depth = self.inner_depth + 0.8 * self.fat + self.muscle
        self.belly = draws.uniform(0.94, 1.04) + 0.005 * self.fat
        shoulders, waist = draws.uniform(0.86, 0.94), draws.uniform(0.9, 0.97)
        self.body_width = profile(
            (-260, -190, -100, -20, 90, 160, 205, 250), (1.0, 0.98, waist, 0.97, 1.0, 0.97, shoulders, 0.6)
        )
        self.body_depth = profile(
            (-260, -190, -100, 0, 90, 170, 210, 250), (self.belly, self.belly, self.belly, 1.0, 1.0, 0.9, 0.8, 0.6)
        )
        self.fat_thickness = profile((-100, 40), (1.25 * self.fat, 0.75 * self.fat))
        self.bend = draws.uniform(-7, 7)
        self.spine_radius = draws.uniform(17, 21)
        self.vertebra = draws.uniform(0.95, 1.05) * self.height
        self.rib_period = draws.uniform(25, 29) * self.height
        self.rib_phase = draws.uniform(0, 1)

        lowered = breath + hyperinflation
        self.dome_right = draws.uniform(-4, 10) - lowered
        self.dome_left = self.dome_right - draws.uniform(7, 18)
        self.dome_drop = draws.uniform(54, 66) - 0.8 * hyperinflation
        self.apex = (draws.uniform(196, 206)) * self.height
        self.mediastinum = draws.uniform(20, 27)

        self.aorta_radius = draws.uniform(11, 14.5)
        self.arch_height = draws.uniform(126, 138) * self.height
        ratio = draws.uniform(0.40, 0.455)
        if heart_enlargement is not None:
            ratio = 0.575 + 0.075 * heart_enlargement
        self.heart_angle = -draws.uniform(0.25, 0.6)
        self.heart_shift = draws.uniform(-22, -12)
        half = ratio * (self.inner_width - 4)
        self.heart_radii = (0.80 * half, 0.72 * half, half)  # (z, y, x)
        self.heart_centre = (
            self.dome_left - 28 + 0.80 * half,
            0.20 * self.inner_depth + draws.uniform(-4, 4),
            self.heart_shift * (1.0 if heart_enlargement is None else 1.25),
        )

        self.liver_tip = draws.uniform(45, 85)
        self.liver_length = draws.uniform(100, 132) * self.height
        self.spleen_radii = (draws.uniform(38, 52), draws.uniform(30, 40), draws.uniform(19, 25))
        self.spleen_centre = (
            self.dome_left - 16 - 0.75 * self.spleen_radii[0],
            -0.36 * self.inner_depth,
            -(self.inner_width - self.spleen_radii[2] - 8),
        )
        self.kidney_radii = (draws.uniform(48, 58), draws.uniform(22, 27), draws.uniform(24, 29))
        kidney_x, kidney_y = draws.uniform(54, 64), -0.30 * self.inner_depth + draws.uniform(-6, 4)
        kidney_z = draws.uniform(-112, -96) * self.height - 0.5 * breath
        self.kidney_centres = {
            "right": (kidney_z - draws.uniform(4, 16), kidney_y, kidney_x + 2),
            "left": (kidney_z, kidney_y, -kidney_x),
        }
        self.stomach_centre = (self.dome_left - draws.uniform(46, 62), draws.uniform(8, 24), -draws.uniform(46, 62))
        self.stomach_radii = (draws.uniform(34, 46), draws.uniform(28, 40), draws.uniform(26, 38))

    def spine_x(self, z):
        """Sideways position of the spine at height z (mm), a slight curve."""
        return self.bend * np.clip(1.0 - (np.asarray(z) / 180.0) ** 2, -1.0, 1.0)

    def spine_y(self, z):
        """Front-to-back position of the vertebral bodies' centres at height z (mm)."""
        return np.interp(z, (-200, -120, -20, 80, 200, 250), (-26, -22, -36, -50, -34, -22)) * (self.inner_depth / 95)

    def radius(self, z):
        """Mean radius of the body's section at height z, mm."""
        return np.sqrt(self.width * self.body_width(z) * self.depth * self.body_depth(z))

    def ring(self, z, y, x):
        """Where a point lies in its section: 0 at the middle, 1 on the skin; grows with the square of the distance."""
        across = (x / np.asarray(self.width * self.body_width(z), dtype=np.float32)) ** 2
        along = (y / np.asarray(self.depth * self.body_depth(z), dtype=np.float32)) ** 2
        # A little squarer than an ellipse, as bodies are: the product term pushes the corners out.
        return (along + across) - (0.3 * along) * across

    def ring_at(self, z, below_skin):
        """The value of `ring` at a depth in mm below the skin."""
        return np.maximum(1.0 - below_skin / self.radius(z), 0.05) ** 2

    def cavity(self, z):
        """Value of `ring` at the inner side of the trunk's wall."""
        return self.ring_at(z, self.fat_thickness(z) + self.muscle)

    def wall_depth(self, z, y, x, inset: float = 0.0):
        """Distance in mm below the inner side of the trunk's wall, moved in by `inset` mm."""
        limit = self.ring_at(z, self.fat_thickness(z) + self.muscle + inset)
        scale = np.asarray(0.5 * self.radius(z), dtype=np.float32)
        return (np.asarray(limit, dtype=np.float32) - self.ring(z, y, x)) * scale

    def above_diaphragm(self, z, y, x):
        """Height in mm above the diaphragm (negative below it), each side with its own dome."""
        centre = 0.47 * self.inner_width
        across = (np.abs(x) - centre) / (0.56 * self.inner_width)
        along = (y - 5.0) / (0.85 * self.inner_depth)
        fall = self.dome_drop * np.minimum(across**2 + along**2, 1.5)
        tops = np.where(x > 0, np.float32(self.dome_right), np.float32(self.dome_left))
        return z - (tops - fall)

    def lung_depth(self, z, y, x):
        """Depth in mm below the surface of the lungs (negative outside), both lungs in one field."""
        middle = 70.0
        taper = np.clip((z - middle) / (self.apex - middle), 0.0, 1.0) ** 2
        limit = self.ring_at(z, self.fat_thickness(z) + self.muscle + 2.0) * (1.0 - taper * taper)
        scale = np.asarray(0.5 * self.radius(z), dtype=np.float32)
        wall = (np.asarray(limit, dtype=np.float32) - self.ring(z, y, x)) * scale
        bulge = np.maximum(1.0 - ((y + 6.0) / (0.6 * self.inner_depth)) ** 2, 0.0)
        medial = np.abs(x) - (7.0 + self.mediastinum * bulge)
        base = 0.75 * self.above_diaphragm(z, y, x)
        return np.minimum(np.minimum(wall, medial), base)

    def liver_depth(self, z, y, x, inset: float = 3.0):
        """Depth in mm below the liver's surface (negative outside); `inset` mm of fluid part it from the wall."""
        roof = -0.75 * self.above_diaphragm(z, y, x) - inset
        wall = self.wall_depth(z, y, x, inset)
        share = np.clip((x + self.liver_tip) / (0.85 * self.inner_width + self.liver_tip), 0.0, 1.0)
        # The left lobe is thin and lies in front: its lower surface rises towards the left and the back.
        rise = 1.2 * np.clip(-y, 0.0, 60.0) * np.clip((50.0 - x) / 80.0, 0.0, 1.0)
        floor = z - ((self.dome_right - 38.0) - self.liver_length * share + rise)
        return np.minimum(np.minimum(roof, wall), np.minimum(0.8 * floor, x + self.liver_tip))

    def aorta_axis(self, z):
        """Centre (x, y) in mm of the descending aorta at height z."""
        x = self.spine_x(z) - np.interp(z, (-190, -60, 40, 140), (4, 10, 22, 28))
        y = self.spine_y(z) + np.interp(z, (-60, 60), (self.spine_radius + 9, self.spine_radius - 1))
        return x, y

    def aorta_width(self, z):
        """Radius in mm of the descending aorta at height z."""
        return self.aorta_radius * np.interp(z, (-190, -20, 100), (0.72, 0.92, 1.0))

    def ascending_aorta(self, z):
        """Centre (x, y) in mm of the ascending aorta at height z."""
        start = self.heart_centre[0]
        share = np.clip((z - start) / (self.arch_height - start), 0.0, 1.0)
        return 12.0 - 18.0 * share, 0.24 * self.inner_depth - 10 * share

    def arch_ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(x, y) of the arch's front and back end, mm."""
        front, back = self.ascending_aorta(self.arch_height), self.aorta_axis(self.arch_height)
        return (float(front[0]), float(front[1])), (float(back[0]), float(back[1]))

    def kidney_point(self, side: str, along: float, turn: float, share: float) -> tuple[float, float, float]:
        """A point (z, y, x) in a kidney: height `along` in [-1, 1], direction `turn` in radians, radius in shares."""
        centre, radii = self.kidney_centres[side], self.kidney_radii
        ring = math.sqrt(max(1.0 - along * along, 0.0)) * share
        outward = 1.0 if side == "right" else -1.0
        return (
            centre[0] + radii[0] * along,
            centre[1] + radii[1] * ring * math.sin(turn),
            centre[2] + outward * radii[2] * ring * math.cos(turn),
        )


__all__ = ["AIR", "CARTILAGE", "FAT", "FLUID", "MUSCLE", "ORGANS", "SKIN", "Anatomy", "profile", "tissue_values"]
