"""How a frame is painted: camera, light, and from far to near whatever the street holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from aicsd_deploy.data.synthetic.solids import Solid
from aicsd_deploy.data.synthetic.world import (
    CROSSING_EVERY_M,
    FAR_M,
    NEAR_M,
    FloatArray,
    Point,
    Rgb,
    Scene,
    UInt8Array,
    dice_of,
    find_crossing,
)

FACING = (0.0, 0.25, -0.6)  # the normal of what has no faces: shaded a little from above


class Painter:
    """One frame in the making: the camera, the light, the canvas (colour and label), and what is to be painted on it.

    What is given to `bar`, `plate`, `solid` and `texture` is kept, and `paint` does it all from far to near: one
    projection of many points costs as much as one of few. At the same `depth` (metres), bars come before plates and
    solids, and those before textures.
    """

    def __init__(self, scene: Scene, time_s: float, size_hw: tuple[int, int]) -> None:
        self.scene, self.time_s, (self.height, self.width) = scene, time_s, size_hw
        self.scale = 2 if self.height * self.width <= 512 * 1024 else 1  # drawn at twice the size against jagged edges
        self.canvas: UInt8Array = np.empty((self.height * self.scale, self.width * self.scale, 4), np.uint8)
        self.focal = scene.focal * self.width * self.scale
        self.center = np.array([self.width / 2, self.height * scene.horizon]) * self.scale
        self.eye = np.array([scene.camera_x, scene.camera_height, 0.0])
        self.at_m = scene.speed * time_s
        self.ambient, self.sun = np.array(scene.weather.ambient), np.array(scene.weather.sun)
        self.haze = np.array(scene.weather.sky_low) * 0.95
        self.shadows: list[FloatArray] = []  # outlines (N, 2) on the ground, x and z
        self.contacts: list[FloatArray] = []
        self.lamps: list[tuple[float, ...]] = []  # x, y, z, radius in metres, red, green, blue
        self._bars: list[tuple[float, ...]] = []
        self._faces: list[tuple[FloatArray, Sequence[int], FloatArray, FloatArray, int, float]] = []
        self._textures: list[tuple[UInt8Array, Sequence[Point], Point, int, float]] = []

    def sees(self, x: float, z: float, radius: float = 2.0) -> bool:
        """Return whether something of this radius (metres) at this place is within the field of view."""
        across = x - self.scene.camera_x + 0.5 * self.scene.curve * z * z
        return NEAR_M < z < FAR_M and abs(across) < 0.5 * z / self.scene.focal + radius

    def project(self, points: FloatArray) -> FloatArray:
        """Return canvas pixels (N, 2) of world points (N, 3); what is behind the near plane is moved onto it."""
        x, y, z = points[:, 0], points[:, 1], np.maximum(points[:, 2], NEAR_M)
        across = x - self.eye[0] + 0.5 * self.scene.curve * z**2
        return self.center + self.focal * np.stack([across / z, (self.eye[1] - y) / z], 1)

    def shade(self, rgb: FloatArray, normals: FloatArray, at: FloatArray) -> FloatArray:
        """Return colours (P, 3) as light and air change them on faces with these normals and at these places."""
        z = np.maximum(at[:, 2:], 0)
        light = (
            self.ambient * (0.82 + 0.18 * normals[:, 1:2]) + self.sun * np.maximum(normals @ self.scene.sun, 0)[:, None]
        )
        light += (
            0.75 * self.scene.weather.night * np.exp(-z / 16 - ((at[:, :1] - self.eye[0]) / 5) ** 2)
        )  # our headlights
        clear = np.exp(-z / self.scene.haze_m)
        return np.asarray(np.clip(rgb * light * clear + self.haze * (1 - clear), 0, 255))

    def fill(self, outlines: Sequence[FloatArray], rgb: Sequence[float] | FloatArray, label: int) -> None:
        """Fill polygons of canvas pixels (N, 2) now, in colour and label."""
        cv2.fillPoly(self.canvas, [fixed(o) for o in outlines], (*(float(v) for v in rgb), float(label)), shift=4)

    def bar(self, start: Point, end: Point, width_m: float, rgb: Rgb, label: int, depth: float) -> None:
        """Have a bar painted from point to point: legs, poles, bicycle frames."""
        self._bars.append((*start, *end, width_m, *rgb, label, depth))

    def plate(self, points: FloatArray, rgb: Rgb, label: int, depth: float) -> None:
        """Have a flat polygon (N, 3) painted that faces the camera."""
        self._faces.append((points, (len(points),), np.array([FACING]), np.array([rgb], dtype=float), label, depth))

    def solid(self, solid: Solid, at: Point, heading: float, label: int) -> None:
        """Have those faces of a solid painted that look towards the camera; heading 0 drives as we do."""
        cos, sin = math.cos(heading), math.sin(heading)
        turn = np.array([[sin, 0, cos], [cos, 0, -sin], [0, 1, 0]])
        world, depth = solid.points @ turn + np.array(at), at[2] + cos * float(solid.points[:, 0].mean())
        self._faces.append((world, solid.counts, solid.normals @ turn, solid.rgb, label, depth))

    def texture(self, rgba: UInt8Array, corners: Sequence[Point], normal: Point, label: int, depth: float) -> None:
        """Have a texture painted onto the quadrilateral top left, top right, bottom right, bottom left."""
        self._textures.append((rgba, corners, normal, label, depth))

    def shadow(
        self, footprint: Sequence[tuple[float, float]], y: tuple[float, float], *, contact: bool = False
    ) -> None:
        """Cast the shadow of a prism with this footprint (x, z) that reaches from y[0] to y[1]."""
        if contact:
            self.contacts.append(np.array(footprint))
        if not self.sun.any() or (footprint[0][1] > 60 and y[1] < 8):
            return
        shift_x, shift_z = (-self.scene.sun[[0, 2]] / self.scene.sun[1]).tolist()
        low, high = ([(px + shift_x * h, pz + shift_z * h) for px, pz in footprint] for h in y)
        if len(footprint) == 2:
            self.shadows.append(np.array([*low, *high[::-1]]))
        else:
            hull = cv2.convexHull(np.array([*low, *high], np.float32))
            self.shadows.append(np.asarray(hull[:, 0], dtype=float))

    def slots(self, row: int, gap_m: float, speed: float = 0.0) -> Iterator[tuple[float, list[float]]]:
        """Yield where along the road, in metres ahead of the camera, each slot of a row begins, and its dice."""
        ahead = self.at_m - speed * self.time_s
        for slot in range(math.floor(ahead / gap_m) - 1, math.floor((ahead + FAR_M) / gap_m) + 1):
            yield slot * gap_m - ahead, dice_of(self.scene.seed, row, slot)

    def crossings(self) -> Iterator[tuple[float, list[float]]]:
        """Yield where, in metres ahead of the camera, each side road begins, and its dice."""
        first = math.floor(self.at_m / CROSSING_EVERY_M)
        found = [find_crossing(self.scene, slot) for slot in range(first - 1, first + 3)]
        yield from ((c[0] - self.at_m, c[1]) for c in found if c and -20 < c[0] - self.at_m < FAR_M)

    def paint(self) -> None:
        """Paint all that was given, from far to near."""
        bars = np.array(self._bars, dtype=float).reshape(-1, 12)
        world = np.concatenate([f[0] for f in self._faces] or [np.zeros((0, 3))])
        counts = np.array([n for f in self._faces for n in f[1]], dtype=int)
        ends = np.concatenate([4 * np.arange(1, len(bars) + 1), 4 * len(bars) + np.cumsum(counts)]).astype(int)
        first = np.concatenate([bars[:, :3], world[np.cumsum(counts) - counts]])
        empty = np.zeros((0, 3))
        normals = np.concatenate([np.tile(FACING, (len(bars), 1)), *(f[2] for f in self._faces), empty])
        rgb = np.concatenate([bars[:, 7:10], *(f[3] for f in self._faces), empty])
        tags = np.array([(f[4], f[5]) for f in self._faces for _ in f[1]], dtype=float).reshape(-1, 2)
        tags = np.concatenate([bars[:, 10:], tags])
        pixels = fixed(np.concatenate([self._quads(bars), self.project(world)]))
        colors = [tuple(c) for c in np.concatenate([self.shade(rgb, normals, first), tags[:, :1]], 1).tolist()]
        hidden = np.sum(normals * (self.eye - first), 1) <= 0
        hidden[: len(bars)] = False
        texture_depths = np.array([t[4] for t in self._textures])
        corners, recolor = self._place_textures()
        for i in np.argsort(-np.concatenate([tags[:, 1], texture_depths]), kind="stable").tolist():
            if i >= len(ends):
                k = i - len(ends)
                self._paste(self._textures[k][0], corners[k], recolor[k])
            elif not hidden[i]:
                cv2.fillPoly(self.canvas, [pixels[ends[i - 1] if i else 0 : ends[i]]], colors[i], shift=4)

    def _quads(self, bars: FloatArray) -> FloatArray:
        """Return the corners (4 B, 2) of bars (B, 12) in pixels."""
        line = self.project(bars[:, :6].reshape(-1, 3)).reshape(-1, 2, 2)
        along = line[:, 1] - line[:, 0]
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
        half = (
            np.stack([-along[:, 1], along[:, 0]], 1)
            * (bars[:, 6] * self.focal / np.maximum(bars[:, 2], NEAR_M) / 2)[:, None]
        )
        return np.stack([line[:, 0] - half, line[:, 0] + half, line[:, 1] + half, line[:, 1] - half], 1).reshape(-1, 2)

    def _place_textures(self) -> tuple[FloatArray, FloatArray]:
        """Return the textures' corners (K, 4, 2) in pixels, and matrices (K, 4, 5) from RGBA to colour and label."""
        world = np.array([t[1] for t in self._textures], dtype=float).reshape(-1, 4, 3)
        normals, at = np.array([t[2] for t in self._textures], dtype=float).reshape(-1, 3), world.mean(1)
        black, white = (self.shade(np.full(at.shape, level), normals, at) for level in (0.0, 255.0))
        recolor = np.zeros((len(world), 4, 5))
        recolor[:, [0, 1, 2], [0, 1, 2]], recolor[:, :3, 4] = (white - black) / 255, black
        recolor[:, 3, 4] = [t[3] for t in self._textures]
        return self.project(world.reshape(-1, 3)).reshape(-1, 4, 2), recolor

    def _paste(self, rgba: UInt8Array, corners: FloatArray, recolor: FloatArray) -> None:
        left, top = (max(math.floor(v), 0) for v in corners.min(0))
        right, bottom = (
            min(math.ceil(v) + 1, n) for v, n in zip(corners.max(0), self.canvas.shape[1::-1], strict=True)
        )
        if right <= left or bottom <= top:
            return
        height, width = rgba.shape[:2]
        source = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) - np.float32(0.5)
        matrix = cv2.getPerspectiveTransform(source, (corners - (left, top)).astype(np.float32))
        warped = np.asarray(cv2.warpPerspective(rgba, matrix, (right - left, bottom - top)), dtype=np.uint8)
        mask = cv2.threshold(warped[..., 3], 127, 255, cv2.THRESH_BINARY)[1]
        cv2.copyTo(cv2.transform(warped, recolor), mask, self.canvas[top:bottom, left:right])


def fixed(pixels: FloatArray) -> npt.NDArray[np.int32]:
    """Return pixels as OpenCV draws them with shift=4: in sixteenths."""
    return np.clip(pixels * 16, -1e6, 1e6).astype(np.int32)
