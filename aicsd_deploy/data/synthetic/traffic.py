"""What drives and walks: cars, trucks, pedestrians and cyclists, and the cars that are parked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from aicsd_deploy.data.synthetic.painter import Painter
from aicsd_deploy.data.synthetic.solids import vehicle
from aicsd_deploy.data.synthetic.world import (
    CAR,
    CROSSING_M,
    CYCLIST,
    DARK,
    PAINTS,
    PEDESTRIAN,
    TRUCK,
    Rgb,
    is_crossing,
)

CLOTHES: tuple[Rgb, ...] = (
    (30, 32, 40), (60, 62, 68), (40, 55, 95), (140, 40, 45),
    (190, 185, 175), (85, 100, 60), (200, 120, 50), (110, 90, 75),
)  # fmt: skip


def add_vehicles(p: Painter) -> None:
    """Place the lanes of traffic, parked cars and, at crossings, those who wait to turn in."""
    scene = p.scene
    for k in range(scene.lanes):
        x = (k + 0.5) * scene.lane_width
        ours = abs(x - scene.camera_x) < 1
        for lane, at, speed in ((10 + k, x, scene.speed * (1 if ours else 0.8 + 0.07 * k)), (12 + k, -x, -9.0 - k)):
            for z, dice in p.slots(lane, 17.0, speed):
                z += 6 * dice[1] + 1.2 * math.sin(0.5 * p.time_s + 9 * dice[2])
                if dice[0] < 0.3 + 0.4 * scene.crowd and (at < 0 or not ours or z > 9):
                    _place(p, at + 0.5 * dice[3] - 0.25, z, 0.0 if at > 0 else math.pi, dice, 0.24)
    for side in (-1, 1) if scene.parking else ():
        for z, dice in p.slots(8 + side, 6.6):
            if dice[0] < 0.72 and not is_crossing(scene, p.at_m + z + 3, 7):
                x = side * (scene.lanes * scene.lane_width + 1.15 + 0.2 * dice[1])
                _place(p, x, z + dice[2] + (4.5 if side < 0 else 0), 0.0 if side > 0 else math.pi, dice, 0.12)
    for z, dice in p.crossings():
        for side in (-1, 1):
            if dice[4 + side] < 0.65:
                x = side * (scene.half_road + 6.5 + 4 * dice[6])
                _place(p, x, z + CROSSING_M / 2 + 2.0 * side, -side * math.pi / 2, dice, 0.3)


def _place(p: Painter, x: float, z: float, heading: float, dice: list[float], trucks: float) -> None:
    """Place a vehicle with its rear at (x, z); `trucks` is the share of trucks."""
    if not p.sees(x, z, 9):
        return
    label = TRUCK if dice[9] < trucks else CAR
    solids = vehicle(label, int(dice[8] * 60))
    ahead, length = (math.sin(heading), math.cos(heading)), float(solids[-1].points[:, 0].max())
    corners = [
        (x + ahead[0] * a + ahead[1] * b, z + ahead[1] * a - ahead[0] * b) for a in (0.0, length) for b in (-0.95, 0.95)
    ]
    p.shadow([corners[0], corners[1], corners[3], corners[2]], (0, 1.3 if label == CAR else 2.8), contact=True)
    for solid in solids:
        p.solid(solid, (x, 0.0, z), heading, label)
    rear = ahead[1] > 0
    for corner in corners[:2] if rear else corners[2:]:
        p.lamps.append((x + 0.7 * (corner[0] - x), 0.75, corner[1], 0.3, *((255, 40, 30) if rear else (255, 240, 205))))


def add_people(p: Painter) -> None:
    """Let people walk on both sidewalks and over crossings, and cyclists ride along the kerbs."""
    scene = p.scene
    for row, side, speed in ((14, -1, 1.3), (15, -1, -1.2), (16, 1, 1.2), (17, 1, -1.4)):
        for z, dice in p.slots(row, 5.0, speed):
            if dice[0] < 0.55 * scene.crowd:
                x = side * (scene.half_road + 0.9 + (scene.sidewalk - 1.2) * dice[2])
                _pedestrian(p, x, z + 3 * dice[1], (0.0, math.copysign(1, speed)), dice)
    for row, side in ((18, -1), (19, 1)):
        for z, dice in p.slots(row, 13.0, side * 4.2):
            if dice[0] < 0.25 + 0.5 * scene.crowd:
                x = side * (scene.lanes * scene.lane_width - 0.3 - 0.3 * dice[2])
                _cyclist(p, x, z + 6 * dice[1], 0.0 if side > 0 else math.pi, dice)
    for z, dice in p.crossings():
        for k in range(4):
            reach = scene.half_road + 2.5
            way = (1.2 * p.time_s + 60 * dice[3 + k]) / reach  # to and fro
            x, ahead = reach * 2 / math.pi * math.asin(math.sin(way)), math.copysign(1, math.cos(way))
            if k == 0 and dice[8] < 0.6:
                _cyclist(p, x, z - 3.6, ahead * math.pi / 2, dice)
            else:
                _pedestrian(p, x, z - 3.6 + 0.6 * k, (ahead, 0.0), dice[k:] + dice)


def _pedestrian(p: Painter, x: float, z: float, ahead: tuple[float, float], dice: list[float]) -> None:
    if not p.sees(x, z, 1) or not 2.5 < z < 75:
        return
    p.shadow([(x - 0.25, z), (x + 0.25, z)], (0, 1.7))
    tall, swing = 1.5 + 0.4 * dice[3], math.sin(7.5 * p.time_s + 20 * dice[4])
    coat, trousers = CLOTHES[int(dice[5] * len(CLOTHES))], CLOTHES[int(dice[6] * 5)]
    skin: Rgb = (206, 160, 130) if dice[7] < 0.6 else (120, 84, 62)

    def bar(start: tuple[float, float, float], end: tuple[float, float, float], width: float, rgb: Rgb) -> None:
        points = [
            (x + a * ahead[0] + b * ahead[1], y * tall, z + a * ahead[1] - b * ahead[0]) for a, b, y in (start, end)
        ]
        p.bar(points[0], points[1], width, rgb, PEDESTRIAN, z)

    for side, step in ((-1, swing), (1, -swing)):  # metres ahead, metres aside, body heights up
        bar((0, 0.09 * side, 0.52), (0.42 * step, 0.1 * side, 0.02 + 0.04 * max(step, 0)), 0.15, trousers)
        bar((0, 0.2 * side, 0.8), (-0.2 * step, 0.25 * side, 0.48), 0.1, coat)
    bar((0, 0, 0.5), (0, 0, 0.84), 0.36 if ahead[1] else 0.26, coat)
    bar((0, 0, 0.87), (0, 0, 1.0), 0.16, skin)
    bar((0, 0, 0.95), (0, 0, 1.01), 0.18, (52, 40, 32) if dice[8] < 0.7 else (180, 150, 100))


def _cyclist(p: Painter, x: float, z: float, heading: float, dice: list[float]) -> None:
    if not p.sees(x, z, 1.5) or not 3 < z < 75:
        return
    sin, cos, pedal = math.sin(heading), math.cos(heading), 6 * p.time_s + 20 * dice[3]
    p.shadow([(x - 0.2 * cos, z), (x + 0.2 * cos, z), (x + sin, z + cos)], (0, 1.5), contact=True)
    frame = PAINTS[int(dice[4] * len(PAINTS))]
    coat, trousers = CLOTHES[int(dice[5] * len(CLOTHES))], CLOTHES[int(dice[6] * 5)]

    def line(points: Sequence[tuple[float, ...]], width: float, rgb: Rgb) -> None:
        """Join points: metres ahead, up and, if not 0, to the right."""
        world = [(x + a * sin + sum(b) * cos, y, z + a * cos - sum(b) * sin) for a, y, *b in points]
        for start, end in pairwise(world):
            p.bar(start, end, width, rgb, CYCLIST, z)

    ring = [(0.34 * math.cos(k * math.pi / 4), 0.34 + 0.34 * math.sin(k * math.pi / 4)) for k in range(9)]
    line(ring, 0.05, DARK)
    line([(a + 1.05, y) for a, y in ring], 0.05, DARK)
    crank, seat, stem = (0.45, 0.3), (0.28, 0.92), (0.88, 0.95)
    line([seat, (0, 0.34), crank, seat, stem, crank], 0.06, frame)
    line([stem, (1.05, 0.34)], 0.06, frame)
    line([(0.9, 1.02, -0.28), (0.9, 1.02, 0.28)], 0.06, DARK)
    for side, turn in ((-1, pedal), (1, pedal + math.pi)):
        foot = (0.45 + 0.17 * math.cos(turn), 0.3 + 0.17 * math.sin(turn), 0.1 * side)
        line([(0.32, 0.98, 0.09 * side), (0.41 + foot[0] / 3, 0.6 + foot[1] / 2, 0.1 * side), foot], 0.14, trousers)
        line([(0.68, 1.4, 0.17 * side), (0.9, 1.05, 0.25 * side)], 0.1, coat)
    line([(0.3, 0.95), (0.68, 1.48)], 0.34, coat)
    line([(0.74, 1.5), (0.76, 1.74)], 0.18, (200, 156, 128))
    line([(0.76, 1.68), (0.76, 1.78)], 0.2, (210, 210, 205) if dice[7] < 0.5 else (60, 45, 36))
