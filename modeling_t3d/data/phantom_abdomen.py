# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Paints the trunk's wall, the abdomen and the spine of a phantom."""

import math

import numpy as np

from .phantom_anatomy import AIR, CARTILAGE, FAT, FLUID, MUSCLE, ORGANS, SKIN
from .phantom_canvas import RandomDraws, as_float32
from .phantom_findings import FINDINGS
from .phantom_scene import Scene

RING_STEPS = 384  # entries per slice of the table that maps the ring coordinate, up to 1.5, to HU


def paint_trunk(scene: Scene, draws: RandomDraws) -> None:
    """Air, table, skin, fat, the muscular wall with its ribs, and the fat inside."""
    canvas, anatomy = scene.canvas, scene.anatomy
    height = canvas.axes[0]
    num_z, num_y, num_x = canvas.shape
    whole = (slice(0, num_z), slice(0, num_y), slice(0, num_x))
    z, y, x = canvas.coordinates(whole)
    ring = anatomy.ring(z, y, x)
    steps = np.arange(RING_STEPS) * (1.5 / (RING_STEPS - 1))
    radius = anatomy.radius(height)[:, None]
    fat = anatomy.fat_thickness(height)[:, None]

    def inside(limit):
        return np.clip(0.5 + (limit - steps) * (0.5 * radius / canvas.voxel), 0.0, 1.0)

    table = AIR + (SKIN - AIR) * inside(np.ones_like(radius))
    table += (FAT - table) * inside((1.0 - 2.0 / radius) ** 2)
    table += (MUSCLE - table) * inside((1.0 - fat / radius) ** 2)
    table += (FAT - table) * inside((1.0 - (fat + anatomy.muscle) / radius) ** 2)
    index = np.minimum(ring * ((RING_STEPS - 1) / 1.5) + 0.5, RING_STEPS - 1).astype(np.int64)
    index += (np.arange(canvas.shape[0]) * RING_STEPS)[:, None, None]
    np.take(as_float32(table).reshape(-1), index, out=canvas.hu)

    # Ribs lie in the inner part of the wall of the chest and fall towards the front.
    box = canvas.box((-70, -1000, -1000), (anatomy.apex + 12, 1000, 1000))
    zs, ys = height[box[0]][:, None], canvas.axes[1][box[1]][None, :]
    phase = (zs + 0.5 * ys) / anatomy.rib_period + anatomy.rib_phase
    distance = np.abs(phase - np.floor(phase) - 0.5) * anatomy.rib_period
    strength = np.clip(0.5 + (6.0 - distance) / canvas.voxel, 0.0, 1.0)
    # No ribs below the costal arch, which stands higher in front than at the flanks.
    strength *= np.clip((zs + 62.0 - 0.55 * np.maximum(ys, -30)) / 10.0, 0.0, 1.0)
    in_front = np.clip((ys - 0.62 * anatomy.depth) / 8.0, 0.0, 1.0)
    bone = as_float32((scene.tissue["bone"] + 280.0) * (1 - in_front) + CARTILAGE * in_front)
    middle = as_float32(anatomy.ring_at(height, anatomy.fat_thickness(height) + anatomy.muscle - 3.5))[box[0]]
    band = np.abs(ring[box] - middle[:, None, None])
    band *= as_float32(-0.5 * anatomy.radius(height)[box[0]] / canvas.voxel)[:, None, None]
    band += 0.5 + 3.5 / canvas.voxel
    np.clip(band, 0.0, 1.0, out=band)
    band *= as_float32(strength)[:, :, None]
    canvas.blend(box, band, bone[:, :, None])

    table_top = -anatomy.depth - 4.0
    box = canvas.box((-1e4, table_top - 12, -220), (1e4, table_top, 220))
    _, ys, xs = canvas.coordinates(box)
    sheet = np.clip(0.5 + (4.0 - np.abs(ys - (table_top - 6) - 0.0007 * xs * xs)) / canvas.voxel, 0.0, 1.0)
    canvas.hu[box] += np.where(canvas.hu[box] < -800, 1.0, 0.0).astype(np.float32) * sheet * 700.0
    if anatomy.female:
        size = draws.uniform(20, 38)
        for sign in (-1, 1):
            centre = (92.0 * anatomy.height, 0.80 * anatomy.depth, sign * 0.5 * anatomy.width)
            canvas.ellipsoid(centre, (1.3 * size, 0.9 * size, 1.4 * size), FAT)
            canvas.ellipsoid(centre, (0.7 * size, 0.5 * size, 0.7 * size), draws.uniform(-60, 10), softness=6.0)


def paint_ascites(scene: Scene) -> None:
    """Fluid between the abdominal wall and the organs, deepest at the flanks and around the liver."""
    canvas, anatomy = scene.canvas, scene.anatomy
    thickness = 14.0 + 18.0 * scene.diffuse["ascites"]
    box = canvas.box((-1e4, -0.62 * anatomy.inner_depth, -1e4), (anatomy.dome_right + 5, 1e4, 1e4))
    z, y, x = canvas.coordinates(box)
    shell = anatomy.wall_depth(z, y, x)
    depth = np.minimum(shell, thickness - shell)
    depth = np.minimum(depth, -0.75 * anatomy.above_diaphragm(z, y, x))
    depth = np.minimum(depth, y + 0.55 * anatomy.inner_depth)
    canvas.blend(box, canvas.coverage(depth), FLUID, finding=FINDINGS["ascites"].index)
    middle = (-110.0, 0.0, anatomy.inner_width - thickness / 2)
    scene.record("ascites", "none", "in the abdomen", thickness, middle, scene.diffuse["ascites"])


def paint_upper_abdomen(scene: Scene, draws: RandomDraws) -> None:
    """Liver with its vessels, gallbladder, spleen, stomach and pancreas."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    inset = 3.0 + (0.6 * (14.0 + 18.0 * scene.diffuse["ascites"]) if "ascites" in scene.diffuse else 0.0)
    box = canvas.box(
        (anatomy.dome_right - 42 - anatomy.liver_length, -anatomy.inner_depth - 4, -anatomy.liver_tip - 3),
        (anatomy.dome_right + 4, anatomy.inner_depth + 4, anatomy.inner_width + 4),
    )
    z, y, x = canvas.coordinates(box)
    cover = canvas.coverage(anatomy.liver_depth(z, y, x, inset))
    fatty = "hepatic steatosis" in scene.diffuse
    index = FINDINGS["hepatic steatosis"].index if fatty else 0
    canvas.blend(box, cover, tissue["liver"], ORGANS["liver"], index)
    if fatty:
        centre = (anatomy.dome_right - 60, 0.0, 0.5 * anatomy.inner_width)
        scene.record("hepatic steatosis", "none", "liver", 0.0, centre, scene.diffuse["hepatic steatosis"])
    inside = (box, cover)
    for sign, length in ((0.35, 40.0), (-0.5, 34.0), (1.1, 46.0)):
        # Hepatic and portal veins as flat spindles that fan out from the middle of the liver.
        centre = (
            anatomy.dome_right - 42 - 20 * sign,
            -6 + draws.uniform(-8, 8),
            0.42 * anatomy.inner_width + draws.uniform(-14, 14),
        )
        canvas.ellipsoid(centre, (5.0, 5.5, length), tissue["portal"], angle=sign, inside=inside)
    gall = (anatomy.dome_right - 108 + draws.uniform(-8, 8), 0.42 * anatomy.inner_depth, 0.42 * anatomy.inner_width)
    size = draws.uniform(0.75, 1.2)
    scene.occupied.append((gall, 26.0 * size))
    canvas.ellipsoid(gall, (26 * size, 16 * size, 14 * size), 12.0, organ=ORGANS["gallbladder"])

    canvas.ellipsoid(anatomy.spleen_centre, anatomy.spleen_radii, tissue["spleen"], angle=0.35, organ=ORGANS["spleen"])
    centre, radii = anatomy.stomach_centre, anatomy.stomach_radii
    scene.occupied.append((centre, max(radii)))
    canvas.ellipsoid(centre, radii, tissue["wall"], organ=ORGANS["stomach"])
    canvas.ellipsoid(centre, [r - 5 for r in radii], draws.uniform(0, 40))
    gas = draws.uniform(0.2, 0.55)
    top = (centre[0] + 4, centre[1] + radii[1] * (1 - gas) - 5, centre[2])
    canvas.ellipsoid(top, (radii[0] * 0.7, radii[1] * gas, radii[2] * 0.75), -960.0)
    z_pancreas = -78.0 * anatomy.height + draws.uniform(-6, 6)
    y_pancreas = float(anatomy.spine_y(z_pancreas)) + 46
    scene.occupied.append(((z_pancreas - 8, y_pancreas - 5, 24.0), 22.0))
    for x_part, radius in ((24.0, 15.0), (-6.0, 11.0), (-34.0, 11.0)):
        canvas.ellipsoid(
            (z_pancreas + (-8 if x_part > 20 else 4), y_pancreas - 0.2 * abs(x_part), x_part),
            (radius, radius * 0.9, 22.0),
            tissue["pancreas"],
            organ=ORGANS["pancreas"],
        )


def paint_bowel(scene: Scene, draws: RandomDraws) -> None:
    """Small bowel loops in the middle, the colon with gas and stool as their frame."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    organ = ORGANS["bowel"]
    width, depth = anatomy.inner_width, anatomy.inner_depth * anatomy.belly
    contrast = draws.chance(0.3)
    for _ in range(20):
        centre = (
            draws.uniform(-215, -118),
            draws.uniform(-0.02, 0.66) * depth,
            draws.uniform(-0.56, 0.56) * width,
        )
        radius, angle = draws.uniform(10, 15), draws.uniform(-1.5, 1.5)
        content = draws.uniform(120, 260) if contrast and draws.chance(0.5) else draws.uniform(8, 32)
        canvas.ellipsoid(centre, (radius, radius, 26.0), tissue["wall"] + 5, angle=angle, organ=organ)
        canvas.ellipsoid(centre, (radius - 4, radius - 4, 20.0), content, angle=angle)
    inset = 14.0 if "ascites" in scene.diffuse else 0.0
    for sign, top in ((1.0, -128.0), (-1.0, -72.0)):
        radius = draws.uniform(20, 27)
        centre_x, centre_y = sign * (width - radius - 6 - inset), draws.uniform(-0.12, 0.12) * depth
        stool, gas = draws.uniform(-40, 60), draws.uniform(0.2, 0.75)
        canvas.column(-300, top, centre_x, centre_y, radius, radius, tissue["wall"], organ=organ)
        canvas.column(-300, top - 3, centre_x, centre_y, radius - 4, radius - 4, stool)
        pockets = RandomDraws(8, draws.integer(0, 10**6)).uniforms(0.0, 1.0, 24)
        shape = (radius - 4) * gas
        front = centre_y + (radius - 4) * (1 - gas)
        canvas.column(-300, top - 6, centre_x, front, shape, shape, lambda z, p=pockets, s=stool: fill(z, p, s))
    radius = draws.uniform(17, 23)
    centre = (-112.0 + draws.uniform(-10, 10), 0.72 * depth - radius, draws.uniform(-10, 10))
    canvas.ellipsoid(centre, (radius, radius, 0.66 * width), tissue["wall"], organ=organ)
    canvas.ellipsoid(centre, (radius - 4, radius - 4, 0.62 * width), draws.uniform(-950, -400))


def fill(z: np.ndarray, pockets: np.ndarray, stool: float) -> np.ndarray:
    """HU along the colon: pockets of gas that alternate with stool, one draw per 16 mm."""
    chosen = pockets[np.clip(((z + 300) / 16).astype(np.int64), 0, len(pockets) - 1)]
    return np.where(chosen < 0.6, -930.0, stool)


def paint_spine(scene: Scene, draws: RandomDraws) -> None:
    """Vertebrae with discs, canal and processes, the muscles beside them, the sternum and the pelvis' wings."""
    canvas, anatomy = scene.canvas, scene.anatomy
    muscle, spine, marrow = ORGANS["muscle"], ORGANS["spine"], scene.tissue["bone"]
    radius, period = anatomy.spine_radius, 31.0 * anatomy.vertebra

    def along(inner, disc):
        def value(z):
            phase = z / period - np.floor(z / period)
            share = np.clip((np.abs(phase - 0.5) - 0.36) * period / 4.0, 0.0, 1.0)
            return inner + (disc - inner) * share

        return value

    def behind(distance):
        return lambda z: anatomy.spine_y(z) - distance

    for sign in (-1.0, 1.0):
        canvas.column(
            -300, 230, lambda z, s=sign: anatomy.spine_x(z) + s * 33, behind(36), 27, 17, MUSCLE, organ=muscle
        )
        canvas.column(
            -300, -60, lambda z, s=sign: anatomy.spine_x(z) + s * np.interp(z, (-190, -60), (46, 28)), behind(-2),
            lambda z: np.interp(z, (-190, -60), (23, 8)), lambda z: np.interp(z, (-190, -60), (25, 10)), MUSCLE,
            organ=muscle,
        )  # fmt: skip
    canvas.column(-300, 250, anatomy.spine_x, anatomy.spine_y, radius, 0.8 * radius, along(430.0, 110.0), organ=spine)
    canvas.column(-300, 250, anatomy.spine_x, anatomy.spine_y, radius - 2.5, 0.8 * radius - 2.5, along(marrow, 85.0))
    canvas.column(-300, 250, anatomy.spine_x, behind(29), 30, 6, along(330.0, 60.0), organ=spine)
    canvas.column(-300, 250, anatomy.spine_x, behind(44), 4.5, 14, along(330.0, 60.0), organ=spine)
    canvas.column(-300, 250, anatomy.spine_x, behind(0.8 * radius + 8), 11, 8.5, 22.0)
    front = as_float32(anatomy.ring_at(np.asarray([100.0]), float(anatomy.fat_thickness(100.0)) + 7))[0]
    y_sternum = anatomy.depth * math.sqrt(float(front)) * 0.97
    canvas.column(20 * anatomy.height, 172 * anatomy.height, 0.0, y_sternum, 19, 6.5, 260.0)
    for sign in (-1.0, 1.0):
        centre = (-214.0, -0.3 * anatomy.inner_depth, sign * 0.72 * anatomy.inner_width)
        canvas.ellipsoid(centre, (48.0, 42.0, 7.0), 420.0, angle=-0.5 * sign)
    # Bone islands and osteophytes: as dense and small as stones and plaques, and no finding.
    for _ in range(draws.integer(2, 10)):
        z, turn, share = draws.uniform(-185, 200), draws.uniform(-3.14, 3.14), draws.uniform(0.4, 1.1)
        centre = (
            z,
            float(anatomy.spine_y(z)) + 0.8 * radius * share * math.sin(turn),
            float(anatomy.spine_x(z)) + radius * share * math.cos(turn),
        )
        radii = [draws.uniform(1.5, 5.0) for _ in range(3)]
        canvas.lesion(centre, radii, draws.uniform(600, 1200), finding=0)


def paint_kidneys(scene: Scene) -> None:
    """Cortex, medulla and the fat of the hilum."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    for side, sign in (("right", 1.0), ("left", -1.0)):
        centre, radii = anatomy.kidney_centres[side], anatomy.kidney_radii
        canvas.ellipsoid(centre, [r + 7 for r in radii], FAT)
        canvas.ellipsoid(centre, radii, tissue["cortex"], organ=ORGANS[f"{side} kidney"])
        canvas.ellipsoid(centre, [r - 8 for r in radii], tissue["medulla"])
        hilum = (centre[0], centre[1] + 5, centre[2] - sign * 0.45 * radii[2])
        canvas.ellipsoid(hilum, (17.0, 8.0, 12.0), -40.0)


__all__ = ["paint_ascites", "paint_bowel", "paint_kidneys", "paint_spine", "paint_trunk", "paint_upper_abdomen"]
