"""What lies behind and below everything: the sky, the ground, and the light and the shadows on it."""

from __future__ import annotations

import math

import cv2
import numpy as np

from aicsd_deploy.data.synthetic.painter import FACING, Painter, fixed
from aicsd_deploy.data.synthetic.textures import ground_tiles, noise_tile
from aicsd_deploy.data.synthetic.world import (
    BUILDING,
    CROSSING_M,
    FAR_M,
    MARKING,
    NEAR_M,
    ROAD,
    SIDEWALK,
    SKY,
    VEGETATION,
    FloatArray,
    is_crossing,
)


def paint_sky(p: Painter) -> None:
    """Paint the sky with clouds and, far off, roofs and woods; all turn as the road turns."""
    scene, turned = p.scene, p.scene.curve * p.at_m
    size = (p.canvas.shape[1], int(p.center[1]) + 8)
    up = np.linspace(1, 0, size[1] // 4, dtype=np.float32)[:, None]  # 0 at the horizon; a quarter of the size is enough
    azimuth = (np.arange(size[0] // 4, dtype=np.float32)[None] * 4 - p.center[0]) / p.focal
    depth = 60 / (up + 0.25)
    texel = (depth * 1.2).astype(np.int32) & 511, ((azimuth + turned + 20) * depth * 2).astype(np.int32) & 511
    clouds = noise_tile()[texel][..., None] / np.float32(128) - 1
    fade = (1 - up[..., None]) ** 1.3
    sky = np.array(scene.weather.sky_top) * (1 - fade) + np.array(scene.weather.sky_low) * fade
    sky = np.clip(sky * (1 + clouds * (0.1 + 0.15 * scene.green)), 0, 255).astype(np.uint8)
    p.canvas[: size[1]] = cv2.resize(np.dstack([sky, np.full(sky.shape[:2], SKY, np.uint8)]), size)
    x = np.arange(0, size[0] + 4, 4.0)
    angle = (x - p.center[0]) / p.focal + turned + 20
    for label, step, tall, rgb in ((BUILDING, 40, 0.07, (96, 98, 108)), (VEGETATION, 400, 0.028, (62, 82, 56))):
        bumps = noise_tile()[step % 256, (np.floor(angle * step) % 512).astype(int)] / 255.0
        y = p.center[1] + 2 - p.focal * tall * np.maximum(bumps * 1.6 - 0.35 * (label == BUILDING), 0)
        outline = np.concatenate([np.stack([x, y], 1), [[x[-1], p.center[1] + 4], [0, p.center[1] + 4]]])
        color = p.shade(np.array([rgb], dtype=float), np.array([FACING]), np.array([[0, 0, 0.8 * FAR_M]]))
        p.fill([outline], color[0], label)


def paint_ground(p: Painter) -> None:
    """Paint lawns, sidewalks, road and markings in their own colours: light comes later, for all the ground at once."""
    scene, road, everywhere = p.scene, p.scene.half_road, np.geomspace(NEAR_M, FAR_M, 24)

    def strip(left: float, right: float, z: FloatArray | tuple[float, float], rgb: FloatArray, label: int) -> None:
        edges = [np.stack([np.full(len(z), x), np.zeros(len(z)), z], 1) for x in (left, right)]
        p.fill([p.project(np.concatenate([edges[0], edges[1][::-1]]))], rgb, label)

    bottom, right = p.canvas.shape[:2]
    top = int(p.center[1]) + 1
    p.fill([np.array([(0, top), (right, top), (right, bottom), (0, bottom)])], (84, 100, 54), VEGETATION)
    for side in (-1, 1):
        strip(side * road, side * (road + scene.sidewalk), everywhere, scene.paving, SIDEWALK)
        strip(side * road, side * (road + 0.18), everywhere, scene.paving * 0.8 + 40, SIDEWALK)
    strip(-road, road, everywhere, scene.asphalt, ROAD)
    markings: list[tuple[float, float, float, float]] = []  # left, right, near, far
    for z, dice in p.crossings():
        for side in (-1, 1):
            walk = (z - scene.sidewalk, z + CROSSING_M + scene.sidewalk)
            strip(side * 70, side * road, walk, scene.paving, SIDEWALK)
        strip(-70, 70, (z, z + CROSSING_M), scene.asphalt, ROAD)
        markings += [(0.1, road - 0.2, z - 5.6, z - 5.2)]
        markings += [(x, x + 0.5, z - 4.2, z - 1.2) for x in np.arange(-road + 0.5, road - 0.5) if dice[2] < 0.8]
    for slot in range(math.floor(p.at_m / 9), math.floor(p.at_m / 9) + 8):
        if not is_crossing(scene, slot * 9 + 4.5, 9.5):
            for k in range(-scene.lanes, scene.lanes + 1):
                dashed = scene.parking or abs(k) != scene.lanes
                x, z = k * scene.lane_width, slot * 9 - p.at_m
                markings.append((x - 0.07, x + 0.07, z, z + (3.5 if dashed else 9.0)))
    edges = np.array([m for m in markings if m[3] > NEAR_M])
    corners = np.stack([edges[:, [0, 2]], edges[:, [1, 2]], edges[:, [1, 3]], edges[:, [0, 3]]], 1).reshape(-1, 2)
    white = 0.55 * np.array([225.0, 225, 220]) + 0.45 * scene.asphalt * (1 + 0.6 * scene.crowd)
    p.fill(list(p.project(np.insert(corners, 1, 0.0, axis=1)).reshape(-1, 4, 2)), white, MARKING)


def light_ground(p: Painter) -> None:
    """Give the ground its grain, shadows, headlights and haze; the grain fades where a pixel covers many metres."""
    scene, top, focal = p.scene, int(p.height * p.scene.horizon) + 1, p.scene.focal * p.width
    rows, columns = np.ogrid[top + 0.5 : p.height, 0.5 : p.width]
    z = np.minimum(focal * scene.camera_height / (rows - p.height * scene.horizon), 4 * FAR_M)
    x = (columns - p.width / 2) * (z / focal) + (scene.camera_x - 0.5 * scene.curve * z**2)
    paved = p.canvas[top * p.scale :: p.scale, :: p.scale, 3] == SIDEWALK
    texel = ((z + p.at_m) * 64).astype(np.int32) & 511, (x * 64).astype(np.int32) & 511
    sharp = (0.5 / (1 + z**2 / (focal * scene.camera_height) / 0.15) / 128).astype(np.float32)
    clear = np.exp(-z / scene.haze_m).astype(np.float32)
    grain = (ground_tiles()[paved.view(np.uint8), texel[0], texel[1]] * sharp + (1 - 128 * sharp)) * clear
    shadow, contact = (_blot(p, outlines)[top:] for outlines in (p.shadows, p.contacts))
    beam = np.zeros(1, np.float32)
    if scene.weather.night:
        reach = ((x - scene.camera_x) / (1.5 + 0.12 * z)).astype(np.float32) ** 2
        beam = np.float32(1.3 * scene.weather.night) * np.exp(-reach - (z / 16).astype(np.float32))
    gain = np.ones((*x.shape, 4), np.float32)  # the label's channel stays as it is
    for k in range(3):
        direct = np.float32(p.sun[k] * (0.35 + 0.65 * scene.sun[1])) * (1 - shadow)
        gain[..., k] = (np.float32(p.ambient[k]) * (1 - np.float32(0.55) * contact) + direct + beam) * grain
    full = p.canvas[top * p.scale :]
    lit = np.asarray(cv2.multiply(full.astype(np.float32), cv2.resize(gain, full.shape[1::-1])), dtype=np.float32)
    haze = np.pad(p.haze * (1 - clear) + 0.5, ((0, 0), (0, 1))).astype(np.float32)
    lit += np.tile(np.repeat(haze, p.scale, 0), (1, full.shape[1])).reshape(lit.shape)
    full[:] = np.minimum(lit, 255)


def _blot(p: Painter, outlines: list[FloatArray]) -> FloatArray:
    """Return (H, W) how much of each pixel of the ground the outlines (N, 2) cover, 0 to 1."""
    mask = np.zeros((p.height, p.width), np.uint8)
    if outlines:
        points = np.concatenate(outlines)
        pixels = fixed(p.project(np.insert(points, 1, 0.0, axis=1)) / p.scale)
        for outline in np.split(pixels, np.cumsum([len(o) for o in outlines])[:-1]):
            cv2.fillConvexPoly(mask, outline, (255,), shift=4)
    covered: FloatArray = np.asarray(cv2.blur(mask, (3, 3)), dtype=np.float32) / np.float32(255)
    return covered
