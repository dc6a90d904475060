"""Surfaces, made once and shared by all scenes: ground, house fronts, leaves, and the grain of the sensor."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from aicsd_deploy.data.synthetic.world import PAINTS, FloatArray, Rgb, UInt8Array

WALLS: tuple[Rgb, ...] = (  # two of them as green as leaves
    (142, 74, 58), (196, 178, 148), (150, 148, 144), (214, 208, 196), (92, 122, 80), (70, 104, 62), (112, 120, 132),
)  # fmt: skip


@lru_cache(maxsize=1)
def noise_tile() -> UInt8Array:
    """Return (512, 512) noise with detail at every scale that repeats without a seam; mean 128, deviation 40."""
    white = np.random.default_rng(1).standard_normal((512, 512))
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)[None, :])
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(white) / frequency**0.9).real
    return np.asarray(np.clip(128 + 40 * field / field.std(), 0, 255), dtype=np.uint8)


@lru_cache(maxsize=1)
def ground_tiles() -> UInt8Array:
    """Return (2, 512, 512), 8 x 8 metres of asphalt and of slabs with joints between them; mean near 128."""
    slabs = np.random.default_rng(2).normal(134, 12, (8, 8)).clip(80, 180)
    paving = np.kron(slabs, np.ones((64, 64))) + noise_tile() / 5.0 - 25
    joint = np.arange(512) % 64 < 4
    paving[joint], paving[:, joint] = 70, 70
    return np.stack([noise_tile(), np.clip(paving, 0, 255).astype(np.uint8)])


@lru_cache(maxsize=4)
def grain(height: int, width: int) -> FloatArray:
    """Return sensor noise, float32 (height, width, 3), deviation 1, mostly the same in the three channels."""
    noise = np.random.default_rng(3).standard_normal((height, width, 4), np.float32)
    return 0.85 * noise[..., :1] + 0.5 * noise[..., 1:]


@lru_cache(maxsize=512)
def facade(variant: int, level: int) -> UInt8Array:
    """Return a house's front, RGBA, 4 bays by 6 floors of 3 x 3 metres; each level halves its 16 pixels a metre."""
    if level:
        return np.asarray(cv2.pyrDown(facade(variant, level - 1)), dtype=np.uint8)
    rng = np.random.default_rng((4, variant))
    wall = np.array(WALLS[variant % len(WALLS)]) * rng.uniform(0.8, 1.15)
    height, width, bay = 288, 192, 48
    noise = np.roll(noise_tile(), int(rng.integers(512)), 0)[:height, :width].astype(np.float32)
    face = wall * (1 + (noise[..., None] - 128) / 128 * rng.uniform(0.15, 0.5))
    if variant % 3 == 0:  # bricks
        face[::4] *= 0.72
        face[:, ::8] *= 0.85
    face = np.clip(face, 0, 255).astype(np.uint8)
    margin, frame = int(rng.integers(8, 16)), [rng.uniform(60, 235)] * 3
    for top in range(0, height - bay, bay):
        for left in range(0, width, bay):
            glass = rng.uniform(25, 120) * np.array([0.85, 0.95, 1.1])
            low, right = top + 42 - margin // 3, left + bay - margin
            cv2.rectangle(face, (left + margin - 2, top + 7), (right + 2, low + 2), frame, -1)
            cv2.rectangle(face, (left + margin, top + 9), (right, low), glass.tolist(), -1)
            cv2.line(face, (left + 24, top + 9), (left + 24, low), frame, 1)
    street = height - bay
    if rng.random() < 0.6:  # a shop: glass, a coloured board with marks like road signs, posters of cars and people
        cv2.rectangle(face, (6, street + 14), (width - 6, height - 8), (48, 54, 60), -1)
        board = rng.permutation(rng.uniform((170, 20, 10), (235, 180, 60))).tolist()
        cv2.rectangle(face, (4, street), (width - 4, street + 13), board, -1)
        cv2.circle(face, (int(rng.integers(20, 170)), street + 6), 6, (235, 235, 235), -1)
        cv2.circle(face, (int(rng.integers(20, 170)), street + 6), 6, (200, 30, 30), 2)
    for _ in range(int(rng.integers(0, 3))):
        left, top = int(rng.integers(8, 140)), int(rng.choice([street + 15, street - 50]))
        cv2.rectangle(face, (left, top), (left + 46, top + 28), rng.uniform(120, 250, 3).tolist(), -1)
        paint = PAINTS[int(rng.integers(len(PAINTS)))]
        if rng.random() < 0.6:
            cv2.rectangle(face, (left + 4, top + 13), (left + 42, top + 22), paint, -1)
            cv2.rectangle(face, (left + 12, top + 6), (left + 33, top + 13), (50, 56, 66), -1)
            cv2.circle(face, (left + 12, top + 22), 4, (25, 25, 25), -1)
            cv2.circle(face, (left + 34, top + 22), 4, (25, 25, 25), -1)
        else:
            cv2.rectangle(face, (left + 18, top + 10), (left + 28, top + 27), paint, -1)
            cv2.circle(face, (left + 23, top + 6), 4, (214, 170, 140), -1)
    return np.dstack([face, np.full((height, width), 255, np.uint8)])


@lru_cache(maxsize=128)
def foliage(variant: int, level: int, hedge: bool) -> UInt8Array:
    """Return a tree's crown (or a hedge, without gaps), RGBA, 128 x 128; each level halves it."""
    if level:
        return np.asarray(cv2.pyrDown(foliage(variant, level - 1, hedge)), dtype=np.uint8)
    rng = np.random.default_rng((5, variant))
    noise = np.roll(noise_tile(), rng.integers(0, 512, 2), (0, 1))[:128, :128].astype(np.float32) / 128 - 1
    fine = np.asarray(cv2.resize(noise_tile()[64:128, 64:128], (128, 128)), dtype=np.float32) / 128 - 1
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    base = np.array(((72, 104, 44), (56, 88, 50), (104, 116, 48), (150, 104, 44))[variant % 4]) * rng.uniform(0.8, 1.1)
    shade = 1 + 0.75 * noise - 0.22 * y - 0.15 * x
    rgb = np.clip(base * shade[..., None], 0, 255)
    alpha = np.full((128, 128), True) if hedge else x**2 + y**2 + 0.38 * noise + 0.16 * fine < 0.62
    return np.dstack([rgb, alpha * 255.0]).astype(np.uint8)
