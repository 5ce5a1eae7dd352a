# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Places the focal findings of a phantom: where in which organ, how large and how dense."""

import math
from collections.abc import Callable

import numpy as np

from .phantom_canvas import RandomDraws
from .phantom_findings import FINDINGS
from .phantom_scene import Scene

CANDIDATES = 160  # random places tried per lesion


def draw_size(draws: RandomDraws, finding: str) -> float:
    """A diameter in mm within the finding's range; small ones are more common, as in patients."""
    low, high = FINDINGS[finding].size_mm
    share = draws.uniform(0.0, 1.0)
    return low + (high - low) * share * (0.4 + 0.6 * share)


def uneven_shares(draws: RandomDraws, least: float) -> list[float]:
    """Diameters (z, y, x) of an ellipsoid as shares of the largest, from `least` to 1."""
    return draws.shuffled([1.0, draws.uniform(least, 1.0), draws.uniform(least, 1.0)])


def uneven_radii(draws: RandomDraws, size: float, least: float) -> list[float]:
    """Radii (z, y, x) in mm of an ellipsoid of largest diameter `size`, the others at least `least` times that."""
    return [0.5 * size * share for share in uneven_shares(draws, least)]


def fallback_sizes(finding: str, size: float) -> tuple[float, ...]:
    """The wanted diameter in mm, then smaller ones for an organ that has no room for it."""
    low = FINDINGS[finding].size_mm[0]
    return (size, max(0.7 * size, low), low)


def is_free(scene: Scene, centre: tuple[float, float, float], radius: float) -> bool:
    """Whether a sphere keeps clear of the lesions placed before and of consolidated or fluid-filled lung."""
    return all(math.dist(centre, other) > radius + reach + 2.0 for other, reach in scene.occupied)


def find_place(
    scene: Scene,
    draws: RandomDraws,
    sizes: tuple[float, ...],
    low: tuple[float, float, float],
    high: tuple[float, float, float],
    depth: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> tuple[tuple[float, float, float], float] | None:
    """One of many random points (z, y, x) that lies deep in an organ and is free, and the first size that fits."""
    points = draws.uniforms(0.0, 1.0, CANDIDATES, 3) * (np.asarray(high) - low) + low
    depths = depth(*points.T)
    for size in sizes:
        for point in points[depths > 0.5 * size + 1.0]:
            z, y, x = (float(value) for value in point)
            centre = (z, y, x)
            if is_free(scene, centre, 0.5 * size):
                scene.occupied.append((centre, 0.5 * size))
                return centre, size
    return None


def paint_nodules(scene: Scene, draws: RandomDraws) -> None:
    """Solid nodules in aerated lung."""
    anatomy, name = scene.anatomy, "lung nodule"
    (cz, cy, cx), (rz, ry, rx) = anatomy.heart_centre, anatomy.heart_radii
    effusion = [lesion for lesion in scene.lesions if lesion.finding == "pleural effusion"]

    def depth(z, y, x):
        heart = ((z - cz) / (rz + 14)) ** 2 + ((y - cy) / (ry + 14)) ** 2 + ((x - cx) / (rx + 14)) ** 2
        spleen = sum(
            ((point - c) / (r + 14)) ** 2
            for point, c, r in zip((z, y, x), anatomy.spleen_centre, anatomy.spleen_radii, strict=True)
        )
        # The muscles beside the spine and the vessels of the hilum stand in front of the lung.
        across, along = np.abs(x - anatomy.spine_x(z)) - 33, y - anatomy.spine_y(z) + 36
        back = (across / 39) ** 2 + (along / 29) ** 2
        clear = (heart > 1.0) & (spleen > 1.0) & (back > 1.0) & (np.abs(x) > 42.0)
        free = np.where(clear, anatomy.lung_depth(z, y, x), -1.0)
        for lesion in effusion:
            wet = y < 1.3 * lesion.size_mm - anatomy.inner_depth
            wet |= anatomy.above_diaphragm(z, y, x) < 0.8 * lesion.size_mm
            free = np.where(wet, -1.0, free)
        return free

    for _ in range(draws.choice((1, 1, 1, 2, 2, 3))):
        size = draw_size(draws, name)
        shares, hu = uneven_shares(draws, 0.8), draws.uniform(20, 70)
        half, long = anatomy.inner_width, anatomy.inner_depth
        low, high = (-40, -long, -half), (anatomy.apex, long, half)
        found = find_place(scene, draws, fallback_sizes(name, size), low, high, depth)
        if found is None:
            continue
        centre, size = found
        radii = [0.5 * size * share for share in shares]
        scene.canvas.lesion(centre, radii, hu, FINDINGS[name].index)
        side = "right" if centre[2] > 0 else "left"
        scene.record(name, side, f"{side} {lobe(centre, anatomy.apex)} lobe", size, centre)


def lobe(centre: tuple[float, float, float], apex: float) -> str:
    """Which lobe a point (z, y, x) of a lung belongs to."""
    height = centre[0] / apex
    if centre[2] > 0:
        if height > 0.52:
            return "upper"
        return "middle" if centre[1] > 15 and height > 0.05 else "lower"
    return "upper" if height > 0.48 or centre[1] > 35 else "lower"


def paint_liver_lesions(scene: Scene, draws: RandomDraws, name: str) -> None:
    """Cysts (one to three, 40-60 HU below the liver) or metastases (two to five, 20-40 HU below it)."""
    anatomy, liver = scene.anatomy, scene.tissue["liver"]
    low = (anatomy.dome_right - 84, -anatomy.inner_depth, -anatomy.liver_tip)
    high = (anatomy.dome_right, anatomy.inner_depth, anatomy.inner_width)
    cyst = name == "liver cyst"
    inset = 16.0 if "ascites" in scene.diffuse else 4.0
    (hz, hy, hx), (rz, _, rx) = anatomy.heart_centre, anatomy.heart_radii
    (kz, ky, kx), kidney = anatomy.kidney_centres["right"], anatomy.kidney_radii

    def depth(z, y, x):
        near = (
            ((z - kz) / (kidney[0] + 16)) ** 2
            + ((y - ky) / (kidney[1] + 16)) ** 2
            + ((x - kx) / (kidney[2] + 16)) ** 2
        )
        heart = ((z - hz) / (rz + 12)) ** 2 + ((y - hy) / (rx + 12)) ** 2 + ((x - hx) / (rx + 12)) ** 2
        front = (y < 0.25 * anatomy.inner_depth) | (x > 0.65 * anatomy.inner_width) | (z > anatomy.dome_right - 75)
        middle = (x > 34.0) | (y > 10.0)
        return np.where((near > 1.0) & (heart > 1.0) & front & middle, anatomy.liver_depth(z, y, x, inset), -1.0)

    for _ in range(draws.choice((1, 1, 2, 3) if cyst else (2, 3, 4, 5))):
        size = draw_size(draws, name)
        shares = uneven_shares(draws, 0.9 if cyst else 0.75)
        contrast = draws.uniform(40, 60) if cyst else draws.uniform(24, 42)
        # Neither falls below the HU of water by more than a few units, however fatty the liver is.
        contrast = max(min(contrast, liver + (6.0 if cyst else -2.0)), 20.0)
        found = find_place(scene, draws, fallback_sizes(name, size), low, high, depth)
        if found is None:
            continue
        centre, size = found
        radii = [0.5 * size * share for share in shares]
        scene.canvas.lesion(centre, radii, liver - contrast, FINDINGS[name].index)
        place = "right lobe of the liver" if centre[2] > 28 else "left lobe of the liver"
        scene.record(name, "right" if centre[2] > 28 else "left", place, size, centre)


def paint_kidney_lesions(scene: Scene, draws: RandomDraws, name: str) -> None:
    """Cysts at the kidney's surface (20-60 HU below its cortex) or stones in its collecting system."""
    anatomy = scene.anatomy
    side = draws.choice(("right", "left", "bilateral"))
    for part in ("right", "left") if side == "bilateral" else (side,):
        size = draw_size(draws, name)
        if name == "kidney cyst":
            along, turn, share = draws.uniform(-0.75, 0.75), draws.uniform(-1.7, 1.7), draws.uniform(0.75, 1.05)
            radii = uneven_radii(draws, size, 0.9)
            cortex = scene.tissue["cortex"]
            hu = cortex - max(min(draws.uniform(35, 60), cortex + 5.0), 20.0)
        else:
            along, turn, share = draws.uniform(-0.6, 0.6), draws.uniform(-3.1, 3.1), draws.uniform(0.1, 0.5)
            radii, hu = uneven_radii(draws, size, 0.7), draws.uniform(450, 1100)
        centre = anatomy.kidney_point(part, along, turn, share)
        scene.canvas.lesion(centre, radii, hu, FINDINGS[name].index)
        third = "upper pole" if along > 0.33 else "lower pole" if along < -0.33 else "interpolar region"
        scene.record(name, part, f"{third} of the {part} kidney", size, centre)


# Directions (z, y, x) from the heart's middle in which the coronary arteries run, start and end.
CORONARIES = {
    "left anterior descending artery": ((0.62, 0.72, -0.30), (-0.05, 0.86, -0.50)),
    "left circumflex artery": ((0.55, -0.20, -0.80), (0.05, -0.45, -0.89)),
    "right coronary artery": ((0.45, 0.70, 0.55), (-0.35, 0.40, 0.85)),
}


def paint_coronary_calcification(scene: Scene, draws: RandomDraws) -> None:
    """Calcified plaques along the coronary arteries, on the heart's surface."""
    anatomy, name = scene.anatomy, "coronary calcification"
    cosine, sine = math.cos(anatomy.heart_angle), math.sin(anatomy.heart_angle)
    vessels = draws.shuffled(list(CORONARIES))[: draws.choice((1, 2, 2, 3))]
    for vessel in vessels:
        start, end = CORONARIES[vessel]
        for _ in range(draws.integer(1, 2)):
            share, size = draws.uniform(0, 1), draw_size(draws, name)
            way = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
            length = math.sqrt(sum(value * value for value in way))
            dz, dy, dx = (0.96 * r * value / length for r, value in zip(anatomy.heart_radii, way, strict=True))
            centre = (
                anatomy.heart_centre[0] + dz,
                anatomy.heart_centre[1] + dy * cosine + dx * sine,
                anatomy.heart_centre[2] + dx * cosine - dy * sine,
            )
            scene.canvas.lesion(centre, uneven_radii(draws, size, 0.6), draws.uniform(500, 1000), FINDINGS[name].index)
            scene.record(name, "none", vessel, size, centre)


def paint_aortic_calcification(scene: Scene, draws: RandomDraws) -> None:
    """Calcified plaques in the wall of the aorta."""
    anatomy, name = scene.anatomy, "aortic calcification"
    parts = draws.shuffled(["aortic arch", "descending thoracic aorta", "abdominal aorta"])[: draws.integer(1, 3)]
    for part in parts:
        for _ in range(draws.integer(1, 2)):
            turn, size, share = draws.uniform(-3.14, 3.14), draw_size(draws, name), draws.uniform(0, 1)
            if part == "aortic arch":
                (front_x, front_y), (back_x, back_y) = anatomy.arch_ends()
                x = front_x + (0.2 + 0.7 * share) * (back_x - front_x)
                y = front_y + (0.2 + 0.7 * share) * (back_y - front_y)
                centre = (anatomy.arch_height + 4 + 0.9 * anatomy.aorta_radius, y, x)
            else:
                z = -170 + 130 * share if part == "abdominal aorta" else 10 + 90 * share
                x, y = (float(value) for value in anatomy.aorta_axis(z))
                radius = 0.88 * float(anatomy.aorta_width(z))
                centre = (z, y + radius * math.sin(turn), x + radius * math.cos(turn))
            scene.canvas.lesion(centre, uneven_radii(draws, size, 0.6), draws.uniform(500, 1000), FINDINGS[name].index)
            scene.record(name, "none", part, size, centre)


def paint_nodes(scene: Scene, draws: RandomDraws) -> None:
    """Two to four enlarged lymph nodes of the mediastinum, the hila or the retroperitoneum."""
    anatomy, name = scene.anatomy, "lymphadenopathy"
    carina = anatomy.arch_height - 32
    aorta_x, aorta_y = (float(value) for value in anatomy.aorta_axis(-105.0))
    places = {
        "right paratracheal": (carina + 26, -10.0, 29.0),
        "prevascular": (carina + 34, 0.42 * anatomy.inner_depth, -4.0),
        "aortopulmonary": (carina + 2, 0.0, -20.0),
        "subcarinal": (carina - 30, -12.0, 3.0),
        "right hilar": (carina - 28, -8.0, 46.0),
        "left hilar": (carina - 24, -10.0, -44.0),
        "left para-aortic": (-105.0, aorta_y, aorta_x - 26.0),
    }
    for place in draws.shuffled(list(places))[: draws.integer(2, 4)]:
        size = draw_size(draws, name)
        centre = tuple(value + draws.uniform(-4, 4) for value in places[place])
        scene.canvas.lesion(
            centre, uneven_radii(draws, size, 0.75), scene.tissue["node"] + draws.uniform(-6, 6), FINDINGS[name].index
        )
        scene.record(name, place.split()[0] if place.startswith(("right", "left")) else "none", place, size, centre)


def paint_focal(scene: Scene, name: str, draws: RandomDraws) -> None:
    """Paint every lesion of one focal finding."""
    if name == "lung nodule":
        paint_nodules(scene, draws)
    elif name in ("liver cyst", "liver metastasis"):
        paint_liver_lesions(scene, draws, name)
    elif name in ("kidney cyst", "kidney stone"):
        paint_kidney_lesions(scene, draws, name)
    elif name == "coronary calcification":
        paint_coronary_calcification(scene, draws)
    elif name == "aortic calcification":
        paint_aortic_calcification(scene, draws)
    else:
        paint_nodes(scene, draws)


__all__ = ["CORONARIES", "paint_focal"]
