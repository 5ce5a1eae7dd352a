# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Paints the lungs, the heart and the great vessels of a phantom, with the diffuse findings of the chest."""

import math

import numpy as np

from .phantom_anatomy import FAT, ORGANS
from .phantom_canvas import RandomDraws
from .phantom_findings import FINDINGS
from .phantom_scene import Scene

LUNG_BLOOD_RADIUS = 3.6  # mm, of a pulmonary vessel at the hilum


def paint_lungs(scene: Scene, draws: RandomDraws) -> None:
    """Air spaces with their vessels, and emphysema."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    half = anatomy.inner_width + 6
    box = canvas.box((-100, -anatomy.inner_depth - 6, -half), (anatomy.apex + 4, anatomy.inner_depth + 6, half))
    z, y, x = canvas.coordinates(box)
    cover = canvas.coverage(anatomy.lung_depth(z, y, x))
    scene.lungs = (box, cover)
    severity = scene.diffuse.get("emphysema")
    slope = -0.25 if severity is None else -0.1
    air = tissue["lung"] if severity is None else -926.0 - 32.0 * severity
    # Blood gathers at the back of a patient who lies on the table.
    canvas.blend(box, cover, air + slope * y)
    organ = np.where(x > 0, ORGANS["right lung"], ORGANS["left lung"]).astype(np.uint8)
    np.copyto(canvas.organs[box], np.broadcast_to(organ, cover.shape), where=cover >= 0.5)

    points, volumes = lung_vessels(scene, draws)
    filled = canvas.scatter(box, points, volumes)
    filled *= cover
    canvas.blend(box, filled, tissue["right heart"])
    holes = draws.uniforms(0.0, 1.0, 36, 5)
    if severity is None:
        return
    index = FINDINGS["emphysema"].index
    np.copyto(canvas.lesions[box], index, where=cover >= 0.5)
    for hole in holes[: 16 + int(20 * severity)]:
        side = 1.0 if hole[0] < 0.5 else -1.0
        centre = (
            30 + 150 * hole[1] * anatomy.height,
            (1.6 * hole[2] - 0.8) * anatomy.inner_depth,
            side * (0.25 + 0.7 * hole[3]) * anatomy.inner_width,
        )
        size = 7.0 + 14.0 * hole[4]
        canvas.ellipsoid(centre, (size, size, size), -985.0, inside=scene.lungs)
    scene.record("emphysema", "bilateral", "upper lobes", 0.0, (100.0, 0.0, 0.5 * anatomy.inner_width), severity)


def lung_vessels(scene: Scene, draws: RandomDraws) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) in (z, y, x) mm along two generations of branches, and their volumes (N,) in mm^3."""
    anatomy = scene.anatomy
    branches, steps, twigs, twig_steps = 64, 44, 5, 14
    start = np.empty((branches, 3))
    side = np.where(np.arange(branches) % 2 == 0, 1.0, -1.0)
    start[:, 0], start[:, 1], start[:, 2] = 88.0 * anatomy.height, -4.0, 26.0 * side
    goal = np.stack(
        [
            (draws.uniforms(-0.28, 1.0, branches)) * anatomy.apex,
            draws.uniforms(-0.9, 0.85, branches) * anatomy.inner_depth,
            draws.uniforms(0.3, 0.95, branches) * anatomy.inner_width * side,
        ],
        axis=1,
    )
    share = (np.arange(steps) + 0.5) / steps
    bend = draws.uniforms(-26, 26, branches, 1, 3)
    way = goal - start
    points = start[:, None] + share[None, :, None] * way[:, None] + bend * (share * (1 - share))[None, :, None]
    length = np.sqrt(way[:, 0] ** 2 + way[:, 1] ** 2 + way[:, 2] ** 2)
    radius = LUNG_BLOOD_RADIUS * (1 - share) + 0.9
    volumes = np.pi * (radius**2)[None, :] * (length / steps)[:, None]
    roots = points[:, 9 :: (steps - 9) // twigs][:, :twigs].reshape(-1, 1, 3)
    offset = draws.uniforms(-38, 38, len(roots), 1, 3)
    twig_share = (np.arange(twig_steps) + 0.5) / twig_steps
    twig_points = roots + offset * twig_share[None, :, None]
    twig_length = np.sqrt(offset[:, 0, 0] ** 2 + offset[:, 0, 1] ** 2 + offset[:, 0, 2] ** 2)
    twig_volumes = np.pi * ((1.5 - 0.8 * twig_share) ** 2)[None, :] * (twig_length / twig_steps)[:, None]
    points = np.concatenate([points.reshape(-1, 3), twig_points.reshape(-1, 3)])
    volumes = np.concatenate([volumes.reshape(-1), twig_volumes.reshape(-1)])
    reach = np.concatenate([np.tile(radius, branches), np.tile(1.5 - 0.8 * twig_share, len(roots))])
    # On grids finer than the vessels each point is spread over its vessel's width.
    copies = max(1, round((5.0 / scene.canvas.voxel) ** 2))
    if copies > 1:
        spread = RandomDraws(9, copies).uniforms(-1, 1, len(points), copies, 3)
        points = (points[:, None] + spread * reach[:, None, None]).reshape(-1, 3)
        volumes = np.repeat(volumes / copies, copies)
    return points, volumes


def paint_heart(scene: Scene) -> None:
    """Epicardial fat, muscle and the four chambers; sizes follow the heart's own."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    (cz, cy, cx), (rz, ry, rx), angle = anatomy.heart_centre, anatomy.heart_radii, anatomy.heart_angle
    index = FINDINGS["cardiomegaly"].index if "cardiomegaly" in scene.diffuse else 0
    canvas.ellipsoid((cz + 4, cy, cx + 3), (rz + 6, ry + 5, rx + 5), FAT, angle=angle)
    canvas.ellipsoid(
        (cz, cy, cx), (rz, ry, rx), tissue["myocardium"], angle=angle, organ=ORGANS["heart"], finding=index
    )
    chambers = (
        ((-0.1, 0.02, -0.42), (0.52, 0.42, 0.36), "artery"),  # left ventricle
        ((-0.15, 0.40, 0.10), (0.60, 0.42, 0.44), "right heart"),
        ((0.1, -0.02, 0.58), (0.56, 0.44, 0.32), "right heart"),
        ((0.4, -0.58, 0.02), (0.40, 0.34, 0.46), "artery"),  # left atrium
    )
    for place, size, blood in chambers:
        centre = (cz + place[0] * rz, cy + place[1] * ry, cx + place[2] * rx)
        canvas.ellipsoid(centre, (size[0] * rz, size[1] * ry, size[2] * rx), tissue[blood], angle=angle)
    if index:
        scene.record("cardiomegaly", "none", "heart", 2 * rx, (cz, cy, cx), scene.diffuse["cardiomegaly"])


def paint_great_vessels(scene: Scene) -> None:
    """Aorta, caval veins, pulmonary trunk, trachea with its main bronchi, and the oesophagus."""
    canvas, anatomy, tissue = scene.canvas, scene.anatomy, scene.tissue
    aorta, veins = ORGANS["aorta"], ORGANS["great vessels"]
    radius, arch, heart_z = anatomy.aorta_radius, anatomy.arch_height, anatomy.heart_centre[0]

    def caval(z):
        return anatomy.spine_x(z) + 22.0

    canvas.column(-300, -12, caval, lambda z: anatomy.spine_y(z) + 27, 12.5, 10, tissue["vein"], organ=veins)
    canvas.column(-12, heart_z - 8, 24.0, 2.0, 12.5, 11, tissue["vein"], organ=veins)
    canvas.column(heart_z + 12, arch + 42, 31.0, 14.0, 9.5, 9.5, tissue["right heart"], organ=veins)
    lung_z = heart_z + 0.62 * anatomy.heart_radii[0] + 10
    canvas.ellipsoid((lung_z - 8, 24.0, -16.0), (26.0, 15.0, 14.0), tissue["right heart"], organ=veins)
    canvas.ellipsoid((lung_z, 2.0, 2.0), (11.0, 10.0, 46.0), tissue["right heart"], angle=0.15, organ=veins)

    descending = [lambda z, part=part: anatomy.aorta_axis(z)[part] for part in (0, 1)]
    ascending = [lambda z, part=part: anatomy.ascending_aorta(z)[part] for part in (0, 1)]
    canvas.column(
        -300,
        arch + 4,
        descending[0],
        descending[1],
        anatomy.aorta_width,
        anatomy.aorta_width,
        tissue["artery"],
        organ=aorta,
    )
    canvas.column(
        heart_z + 8, arch + 4, ascending[0], ascending[1], radius * 1.15, radius * 1.15, tissue["artery"], organ=aorta
    )
    (front_x, front_y), (back_x, back_y) = anatomy.arch_ends()
    span = math.hypot(front_x - back_x, front_y - back_y)
    canvas.ellipsoid(
        (arch + 4, 0.5 * (front_y + back_y), 0.5 * (front_x + back_x)),
        (radius * 1.05, 0.5 * span + 0.9 * radius, radius * 1.05),
        tissue["artery"],
        angle=-math.atan2(front_x - back_x, front_y - back_y),
        organ=aorta,
    )
    for x, y in ((14.0, 12.0), (0.0, 16.0), (-16.0, 4.0)):
        canvas.column(arch + 8, 260, x, y, 4.5, 4.5, tissue["artery"])

    carina = arch - 32
    middle, behind = 9.0, 0.0
    canvas.column(carina, 260, middle, behind, 11.5, 10.5, 45.0)
    canvas.column(carina - 6, 260, middle, behind, 9.0, 8.0, -975.0, organ=ORGANS["trachea"])
    for sign, drop in ((1.0, 26.0), (-1.0, 20.0)):
        for share in (0.15, 0.4, 0.65, 0.9):
            centre = (carina - 4 - drop * share, behind - 4 * share, middle + (sign * 40.0 - 6.0) * share)
            canvas.ellipsoid(centre, (9.0, 8.5, 10.0), 40.0)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            centre = (carina - 4 - drop * share, behind - 4 * share, middle + (sign * 40.0 - 6.0) * share)
            canvas.ellipsoid(centre, (6.5, 6.0, 7.5), -960.0, organ=ORGANS["trachea"])
    canvas.column(-10, carina + 100, lambda z: anatomy.spine_x(z) - 3, -17.0, 8, 6, 38.0)


LOBES = {
    # (height as a share of the lung's, front-to-back position as a share of the inner depth), by place
    "right upper lobe": (0.66, 0.15),
    "right middle lobe": (0.30, 0.50),
    "right lower lobe": (0.12, -0.42),
    "left upper lobe": (0.62, 0.25),
    "left lower lobe": (0.12, -0.42),
}


def paint_consolidation(scene: Scene, draws: RandomDraws) -> None:
    """A lobe's air replaced by fluid, with streaks of air in its bronchi."""
    canvas, anatomy = scene.canvas, scene.anatomy
    index, severity = FINDINGS["consolidation"].index, scene.diffuse["consolidation"]
    first = draws.choice(list(LOBES))
    places = [first]
    if draws.chance(0.25):
        places.append(draws.choice([place for place in LOBES if place.split()[0] != first.split()[0]]))
    for place in places:
        height, along = LOBES[place]
        side = 1.0 if place.startswith("right") else -1.0
        centre = (height * anatomy.apex, along * anatomy.inner_depth, side * 0.52 * anatomy.inner_width)
        size = 22.0 + 24.0 * severity + draws.uniform(0, 4)
        for _ in range(4):
            part = [c + draws.uniform(-0.4, 0.4) * size for c in centre]
            scale = draws.uniform(0.75, 1.0) * size
            canvas.ellipsoid(
                part, (0.9 * scale, scale, 0.9 * scale), draws.uniform(15, 45), finding=index, inside=scene.lungs,
                softness=2.5,
            )  # fmt: skip
        for _ in range(5):
            part = [c + draws.uniform(-0.6, 0.6) * size for c in centre]
            canvas.ellipsoid(part, (3.0, 3.0, 14.0), -800.0, angle=draws.uniform(-1.5, 1.5), inside=scene.lungs)
        scene.record("consolidation", place.split()[0], place, 2 * size, centre, severity)
        scene.occupied.append((centre, 1.3 * size))


def paint_effusion(scene: Scene, draws: RandomDraws) -> None:
    """Fluid that lies at the back and the base of one or both pleural spaces, as in a patient on the back."""
    canvas, anatomy = scene.canvas, scene.anatomy
    index, severity = FINDINGS["pleural effusion"].index, scene.diffuse["pleural effusion"]
    if scene.lungs is None:
        raise ValueError("the scene has no lungs; paint them before an effusion")
    box, cover = scene.lungs
    z, y, x = canvas.coordinates(box)
    side = draws.choice(("right", "left", "bilateral"))
    sign = {"right": 1.0, "left": -1.0, "bilateral": 0.0}[side]
    thickness = 18.0 + 57.0 * severity
    back = -anatomy.inner_depth * 0.97
    hu = draws.uniform(4, 18)
    fall = np.clip((z + 60.0) / (anatomy.apex + 60.0), 0.0, 1.0)
    level = back + thickness * (1.0 - fall * fall)
    depth = np.minimum(level - y, x * sign + 1.0 if sign else np.float32(1e3))
    # The recess below the lung's base fills as well.
    base = (0.35 * thickness - 2.0) - 0.75 * anatomy.above_diaphragm(z, y, x)
    if sign:
        base = np.minimum(base, x * sign)
    filled = canvas.coverage(np.maximum(depth, np.minimum(base, 0.6 * thickness - 0.4 * (y - back))))
    filled *= cover
    canvas.blend(box, filled, hu, finding=index)
    centre = (0.0, back + thickness / 2, (sign or 1.0) * 0.5 * anatomy.inner_width)
    scene.record("pleural effusion", side, "pleural space", thickness, centre, severity)


__all__ = ["LOBES", "paint_consolidation", "paint_effusion", "paint_great_vessels", "paint_heart", "paint_lungs"]
