"""One frame of a drive: the street is painted, then taken as a camera would take it."""

from __future__ import annotations

import cv2
import numpy as np

from aicsd_deploy.data.synthetic.ground import light_ground, paint_ground, paint_sky
from aicsd_deploy.data.synthetic.painter import Painter, fixed
from aicsd_deploy.data.synthetic.street import add_furniture, add_lots
from aicsd_deploy.data.synthetic.textures import grain
from aicsd_deploy.data.synthetic.traffic import add_people, add_vehicles
from aicsd_deploy.data.synthetic.world import NATIVE_SIZE_HW, PAINTS, FloatArray, UInt8Array, scene_of
from aicsd_deploy.metadata import IGNORE_LABEL


def _expose(p: Painter) -> UInt8Array:
    """Return the picture (H, W, 3) as a camera takes it: lamps that dazzle, lens, colour cast, noise."""
    scene = p.scene
    small = cv2.resize(p.canvas, (p.width, p.height), interpolation=cv2.INTER_AREA)
    image = cv2.cvtColor(small, cv2.COLOR_RGBA2RGB).astype(np.float32)
    if scene.weather.night or scene.weather.glare:
        image += _dazzle(p)
    image = np.asarray(cv2.transform(image, np.diag(scene.cast)), dtype=np.float32)
    if scene.blur:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), scene.blur * p.width / 256), dtype=np.float32)
    top, left = np.random.default_rng((scene.seed, 7, round(abs(p.time_s) * 1e4))).integers(0, 64, 2)
    image += np.float32(scene.noise) * grain(p.height + 64, p.width + 64)[top:, left:][: p.height, : p.width]
    return np.clip(image, 0, 255).astype(np.uint8)


def _dazzle(p: Painter) -> FloatArray:
    """Return the light (H, W, 3) that lamps and a low sun scatter over the picture; drawn small, since it is soft."""
    scene, small = p.scene, 4 * p.scale
    layer = np.zeros((-(-p.height // 4), -(-p.width // 4), 3), np.float32)
    lamps = np.array([lamp for lamp in p.lamps if lamp[2] > 2 and scene.weather.night], dtype=float).reshape(-1, 7)
    radii = np.minimum(p.focal * lamps[:, 3] / np.maximum(lamps[:, 2], 1) / small, layer.shape[1] / 12)
    colors = lamps[:, 4:] * np.minimum(radii, 1)[:, None] * scene.weather.night
    at = fixed(p.project(lamps[:, :3]) / small)
    for center, radius, color in zip(at.tolist(), radii.tolist(), colors.tolist(), strict=True):
        cv2.circle(layer, center, round(max(radius, 0.7) * 16), color, -1, shift=4)
    layer = np.asarray(cv2.GaussianBlur(layer, (0, 0), layer.shape[1] / 50), dtype=np.float32)
    if scene.weather.glare and scene.sun[2] > 0:
        x, y = p.center / small + p.focal / small * np.array([scene.sun[0], -scene.sun[1]]) / scene.sun[2]
        rows, columns = np.ogrid[: layer.shape[0], : layer.shape[1]]
        away = np.hypot(columns - x, rows - y) / layer.shape[1]
        glare = scene.weather.glare * (150 * np.exp(-away / 0.16) + 40)
        layer += (glare[..., None] * np.array([1, 0.85, 0.6])).astype(np.float32)
    return np.asarray(cv2.resize(layer, (p.width, p.height)), dtype=np.float32)


def render_scene(
    seed: int, *, time_s: float = 0.0, size_hw: tuple[int, int] = NATIVE_SIZE_HW
) -> tuple[UInt8Array, UInt8Array]:
    """Draw one frame of the drive that a seed stands for.

    Args:
        seed: which street, traffic, weather and camera; 0 or more.
        time_s: when, in seconds; what moves does so continuously in it.
        size_hw: height and width of the frame in pixels; its width is the field of view, whatever the size.

    Returns:
        The image, uint8 (H, W, 3), red, green, blue; and the labels, uint8 (H, W), indices into CLASSES, or 255 on the
        bonnet of the own car. The same arguments give the same bytes, in every process.
    """
    scene = scene_of(seed)
    p = Painter(scene, time_s, size_hw)
    for side in (-1, 1):
        add_lots(p, side)
        add_furniture(p, side)
    add_vehicles(p)
    add_people(p)
    paint_sky(p)
    paint_ground(p)
    light_ground(p)
    p.paint()
    if scene.bonnet:
        x = np.linspace(-0.05, 1.05, 24)
        bonnet = np.stack([x * p.canvas.shape[1], p.canvas.shape[0] * (0.93 + 0.35 * (x - 0.5) ** 2)], 1)
        bonnet = np.concatenate(
            [bonnet, [[p.canvas.shape[1] + 40, p.canvas.shape[0] + 40], [-40, p.canvas.shape[0] + 40]]]
        )
        p.fill([bonnet], np.array(PAINTS[seed % len(PAINTS)]) * p.ambient.mean(), IGNORE_LABEL)
    image, labels = _expose(p), p.canvas[:: p.scale, :: p.scale, 3]
    if scene.mirror:  # where people drive on the left
        image, labels = image[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)
