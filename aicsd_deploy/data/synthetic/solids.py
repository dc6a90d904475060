"""The shapes of cars and trucks: flat faces, each in one colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aicsd_deploy.data.synthetic.world import CAR, DARK, PAINTS, RED, WHITE, FloatArray, Rgb


@dataclass(frozen=True)
class Solid:
    """Flat faces of a vehicle: a metres ahead of its rear, b to its right, y up."""

    points: FloatArray  # (N, 3), all faces one after the other
    counts: tuple[int, ...]  # how many points each face has
    normals: FloatArray  # (P, 3), outwards
    rgb: FloatArray  # (P, 3)


Face = tuple[FloatArray, Rgb]


def _box(
    a: tuple[float, float], b: float, y: tuple[float, float], taper: tuple[float, float, float], rgb: Rgb
) -> list[Face]:
    """Return rear, front, left, right and top of a box, its top shorter by `taper` (rear, front, each side)."""
    rear, front, side = a[0] + taper[0], a[1] - taper[1], b - taper[2]
    low = [(a[0], -b, y[0]), (a[0], b, y[0]), (a[1], b, y[0]), (a[1], -b, y[0])]
    top = [(rear, -side, y[1]), (rear, side, y[1]), (front, side, y[1]), (front, -side, y[1])]
    walls = [[low[i], low[j], top[j], top[i]] for i, j in ((0, 1), (2, 3), (3, 0), (1, 2))]
    return [(np.array(points), rgb) for points in [*walls, top]]


def _panel(face: Face, u: tuple[float, float], v: tuple[float, float], rgb: Rgb) -> Face:
    """Return the part of a wall from u[0] to u[1] of its width and v[0] to v[1] of its height, in another colour."""
    p = face[0]
    corners = [(u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1])]
    return np.array([(p[0] * (1 - s) + p[1] * s) * (1 - t) + (p[3] * (1 - s) + p[2] * s) * t for s, t in corners]), rgb


def _wheels(at: Sequence[float], b: float, radius: float) -> list[Face]:
    turn = np.linspace(0, 2 * math.pi, 11)[:-1]
    faces: list[Face] = []
    for a, side, (size, rgb) in (
        (a, s, w) for a in at for s in (-b, b) for w in ((1.0, (22, 22, 24)), (0.55, (120, 122, 126)))
    ):
        ring = [a + size * radius * np.cos(turn), np.full(10, side), radius + size * radius * np.sin(turn)]
        faces.append((np.stack(ring, 1), rgb))
    return faces


def _solid(faces: Sequence[Face]) -> Solid:
    points = [p for p, _ in faces]
    middle = np.concatenate(points).mean(0)
    normals = np.stack([np.cross(p[1] - p[0], p[2] - p[1]) for p in points])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    normals *= np.sign(np.sum(normals * np.stack([p.mean(0) - middle for p in points]), 1, keepdims=True))
    counts, rgb = tuple(len(p) for p in points), np.array([rgb for _, rgb in faces], dtype=float)
    return Solid(np.concatenate(points), counts, normals, rgb)


@lru_cache(maxsize=256)
def vehicle(label: int, variant: int) -> tuple[Solid, ...]:
    """Return the convex parts of a car, or of a truck: its cargo box and its cab."""
    rng = np.random.default_rng((6, label, variant))
    paint, glass = PAINTS[variant % len(PAINTS)], (38, 46, 56)
    ends = ((0.03, 0.18), (0.82, 0.97))
    if label == CAR:
        length, width, tall = rng.uniform(3.7, 4.8), rng.uniform(0.82, 0.92), rng.uniform(1.38, 1.8)
        body = _box((0, length), width, (0.28, 0.55 * tall), (0.1, 0.15, 0.04), paint)
        boot = rng.choice([0.05, 0.1, 0.75])  # estate, hatchback, saloon
        cabin = _box((boot, length - 1.1), width - 0.05, (0.55 * tall, tall), (0.35, 0.75, 0.16), paint)
        decals = [_panel(body[0], (0, 1), (0, 0.22), DARK), _panel(body[1], (0, 1), (0, 0.3), DARK)]
        decals += [_panel(body[0], (0.36, 0.64), (0.3, 0.55), (215, 212, 190))]
        decals += [_panel(body[k], u, (0.5, 0.85), (RED, WHITE)[k]) for k in (0, 1) for u in ends]
        windows = [_panel(side, (0.07, 0.93), (0.08, 0.88), glass) for side in cabin[:4]]
        return (_solid([*body, *decals, *cabin, *windows, *_wheels((0.8, length - 0.85), width + 0.01, 0.32)]),)
    length, width, tall = rng.uniform(5.0, 8.5), rng.uniform(1.0, 1.25), rng.uniform(2.3, 3.5)
    cargo = _box((0, length - 1.7), width, (0.5, tall), (0, 0, 0), PAINTS[(variant + variant % 2 * 3) % len(PAINTS)])
    cab = _box((length - 1.65, length), width - 0.05, (0.45, min(tall - 0.1, 2.6)), (0, 0.45, 0.05), paint)
    decals = [_panel(cargo[0], (0, 1), (0, 0.07), DARK), _panel(cargo[0], (0.49, 0.51), (0.07, 0.95), DARK)]
    decals += [_panel(cargo[0], u, (0.02, 0.1), RED) for u in ends]
    windows = [_panel(side, (0.07, 0.93), (0.5, 0.92), glass) for side in cab[1:4]]
    lamps = [_panel(cab[1], u, (0.08, 0.2), WHITE) for u in ends]
    return (
        _solid([*cargo, *decals, *_wheels((1.3,), width + 0.01, 0.42)]),
        _solid([*cab, *windows, *lamps, *_wheels((length - 0.9,), width + 0.01, 0.42)]),
    )
