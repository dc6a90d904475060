"""What stands along the road: houses, hedges, trees, lamps, signs and bollards."""

from __future__ import annotations

import math

import numpy as np

from aicsd_deploy.data.synthetic.painter import Painter
from aicsd_deploy.data.synthetic.textures import facade, foliage
from aicsd_deploy.data.synthetic.world import (
    BLUE,
    BUILDING,
    GREY,
    POLE,
    RED,
    SIGN,
    VEGETATION,
    WHITE,
    Rgb,
    UInt8Array,
    is_crossing,
)

LOT_M = 12.0
FLOOR_M = 3.0
SIGNS: tuple[tuple[int, float, Rgb, Rgb], ...] = (  # corners, first corner's angle in quarter turns, rim, face
    (14, 0.0, RED, WHITE), (3, 1.0, RED, WHITE), (14, 0.0, BLUE, BLUE), (4, 1.0, WHITE, (232, 184, 20)),
    (8, 0.25, WHITE, RED), (4, 0.5, WHITE, BLUE), (3, 3.0, RED, WHITE), (4, 0.5, GREY, (96, 98, 100)),
)  # fmt: skip


def add_lots(p: Painter, side: int) -> None:
    """Line one side of the road with houses, hedges, gardens and gaps."""
    scene = p.scene
    edge = scene.half_road + scene.sidewalk + scene.verge
    nearer = (0.0, 0.0, 0.0)  # where the wall of the house before stands, how tall it is and where it ends
    for z, dice in p.slots(2 + side, LOT_M):
        if z + LOT_M < 5 or is_crossing(scene, p.at_m + z + LOT_M / 2, LOT_M / 2 + scene.sidewalk):
            continue
        wall, variant = side * (edge + (3.0 if dice[3] > 0.8 else 0.0)), int(dice[2] * 56)
        if dice[0] < 0.86 - 0.5 * scene.green:
            tall = FLOOR_M * (2 + int(dice[1] ** 1.5 * 5))
            level = max(0, min(4, int(math.log2(max(z, 4) + 3) + math.log2(22 / p.focal))))
            texture = facade(variant, level)
            texture = texture[int(texture.shape[0] * (1 - tall / (6 * FLOOR_M))) :]
            covered = nearer[0] == wall and nearer[1] >= tall and z - nearer[2] < 0.1
            _wall(p, texture, wall, side, z, tall, BUILDING, covered)
            nearer = (wall, tall, z + LOT_M)
        elif dice[0] < 0.95:
            high = 1.0 + 1.4 * dice[4]
            _wall(p, foliage(variant % 8, min(4, int(max(z, 4) / 20)), True), wall, side, z, high, VEGETATION, False)
            for k in range(3):
                x, at = wall + side * (2 + 5 * dice[5 + k]), z + 4 * k + 3 * dice[6 + k]
                _tree(p, x, at, 2 + 2.5 * dice[7], 5 + 4 * dice[4 + k], int(dice[5 + k] * 12))


def _wall(
    p: Painter, texture: UInt8Array, wall: float, side: int, z: float, tall: float, label: int, covered: bool
) -> None:
    """Put up a house's or a hedge's side along the road and, if not covered, the one that faces the camera."""
    near, end = max(z, 4.0), z + LOT_M
    far = wall + side * (LOT_M if label == BUILDING else 1.5)
    p.shadow([(wall, z), (wall, end), (far, z), (far, end)], (0, tall))
    if near == z and not covered:
        p.texture(texture, [(wall, tall, z), (far, tall, z), (far, 0, z), (wall, 0, z)], (0, 0, -1), label, end)
    corners = [(wall, tall, near), (wall, tall, end), (wall, 0, end), (wall, 0, near)]
    p.texture(texture[:, int(texture.shape[1] * (near - z) / LOT_M) :], corners, (-side, 0, 0), label, end)


def _tree(p: Painter, x: float, z: float, radius: float, top: float, variant: int) -> None:
    if p.sees(x, z, radius):
        p.bar((x, 0, z), (x, top - radius, z), 0.28, (84, 70, 56), VEGETATION, z)
        level = max(0, min(4, int(math.log2(64 * z / p.focal / radius))))
        left, right, low = x - radius, x + radius, top - 2 * radius
        corners = [(left, top, z), (right, top, z), (right, low, z), (left, low, z)]
        p.texture(foliage(variant, level, False), corners, (-0.2, 0.6, -0.5), VEGETATION, z)


def add_furniture(p: Painter, side: int) -> None:
    """Plant trees, lamps, signs and bollards along one kerb."""
    scene = p.scene
    for z, dice in p.slots(5 + side, 6.5):
        z += 3 * dice[1]
        x, kind = side * (scene.half_road + 0.5), dice[0] - 0.25 * scene.green
        if not p.sees(x, z, 5) or is_crossing(scene, p.at_m + z, 2.0):
            continue
        if kind < 0.15:
            radius, top = 1.3 + 1.3 * dice[2], 4.6 + 2.5 * dice[3]
            p.shadow([(x + radius * math.cos(a), z + radius * math.sin(a)) for a in range(6)], (top - 2 * radius, top))
            _tree(p, x, z, radius, top, int(dice[4] * 12))
        elif kind < 0.68:
            p.shadow([(x - 0.1, z), (x + 0.1, z)], (0, 6.5 if kind < 0.38 else 2.8))
            (_lamp if kind < 0.38 else _sign)(p, x, z, dice)
        elif kind < 0.74:
            for at in (z, z + 1, z + 2, z + 3):
                p.bar((x, 0, at), (x, 0.95, at), 0.14, (70, 72, 76), POLE, at)


def _lamp(p: Painter, x: float, z: float, dice: list[float]) -> None:
    tall, arm = 5.5 + 2 * dice[2], x - math.copysign(1.6 if dice[3] < 0.7 else 0.0, x)
    rgb: Rgb = (105, 108, 110) if dice[4] < 0.7 else (96, 78, 58)
    p.bar((x, 0, z), (x, tall, z), 0.15, rgb, POLE, z)
    p.bar((x, 0, z), (x, 1.2, z), 0.26, rgb, POLE, z)
    p.bar((x, tall, z), (arm, tall + 0.2, z), 0.1, rgb, POLE, z)
    p.bar((arm - 0.35, tall + 0.15, z), (arm + 0.35, tall + 0.15, z), 0.16, rgb, POLE, z)
    p.lamps.append((arm, tall, z, 0.9, 255, 200, 120))


def _sign(p: Painter, x: float, z: float, dice: list[float]) -> None:
    """Put up one or two plates on a post; some show their grey backs."""
    high, radius = 2.1 + 0.9 * dice[2], 0.38 + 0.2 * dice[7]
    p.bar((x, 0, z), (x, high + 0.3, z), 0.09, (128, 130, 132), POLE, z)
    for k in range(1 + (dice[3] < 0.35)):
        corners, first, rim, face = SIGNS[int(dice[4 + k] * len(SIGNS))]
        if dice[6] < 0.2:
            rim = face = GREY
        turn = np.linspace(0, 2 * math.pi, corners, endpoint=False) + first * math.pi / 2
        ring, middle = np.stack([np.cos(turn), np.sin(turn), 0 * turn], 1) * radius, np.array([x, high - 0.85 * k, z])
        mark = (255 - face[0], 255 - face[1], 255 - face[2])
        for size, rgb in ((1.0, rim), (0.72, face), (0.25, mark)):
            p.plate(middle + ring * size, rgb, SIGN, z)
