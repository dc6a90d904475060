"""What there is: the classes, and what a seed decides about street, camera, weather and every slot along the road."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from aicsd_deploy.metadata import SegClass

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.floating[Any]]
Rgb = tuple[float, float, float]
Point = tuple[float, float, float]

NATIVE_SIZE_HW = (192, 256)
CLASSES: tuple[SegClass, ...] = (
    SegClass("sky", (70, 130, 180)),
    SegClass("building", (70, 70, 70)),
    SegClass("road", (128, 64, 128)),
    SegClass("lane marking", (240, 240, 240)),
    SegClass("sidewalk", (244, 35, 232)),
    SegClass("vegetation", (107, 142, 35)),
    SegClass("pole", (153, 153, 153)),
    SegClass("traffic sign", (220, 220, 0)),
    SegClass("car", (0, 0, 142)),
    SegClass("truck", (0, 160, 160)),
    SegClass("pedestrian", (220, 20, 60)),
    SegClass("cyclist", (255, 128, 0)),
)
SKY, BUILDING, ROAD, MARKING, SIDEWALK, VEGETATION, POLE, SIGN, CAR, TRUCK, PEDESTRIAN, CYCLIST = range(12)

FAR_M = 110.0
NEAR_M = 1.2
CROSSING_EVERY_M, CROSSING_M = 84.0, 9.0
ROWS = 20  # 0 crossings; 1, 3 lots; 4, 6 furniture; 7, 9 parked cars; 10 to 13 lanes; 14 to 17 walkers; 18, 19 cyclists
PAINTS: tuple[Rgb, ...] = (
    (225, 225, 222), (150, 153, 158), (92, 96, 102), (34, 35, 38), (150, 28, 30), (35, 62, 120),
    (168, 150, 118), (52, 92, 62), (205, 165, 40), (120, 128, 140),
)  # fmt: skip
RED, WHITE, BLUE, GREY, DARK = (190, 24, 30), (236, 236, 232), (24, 84, 178), (112, 114, 116), (30, 30, 32)


@dataclass(frozen=True)
class Weather:
    """Light and air; colours are gains (1 leaves an object's own colour) except the sky's, which are 0 to 255."""

    ambient: Rgb
    sun: Rgb
    sky_top: Rgb
    sky_low: Rgb
    haze_m: tuple[float, float]
    sun_height: float = 0.6
    glare: float = 0.0
    night: float = 0.0


WEATHERS = (
    Weather((0.58, 0.60, 0.66), (0.62, 0.58, 0.50), (72, 122, 190), (188, 208, 226), (150, 600)),  # day
    Weather((0.82, 0.84, 0.86), (0, 0, 0), (168, 174, 180), (206, 208, 210), (60, 300)),  # overcast
    Weather((0.46, 0.44, 0.50), (0.80, 0.58, 0.34), (96, 122, 172), (250, 206, 150), (70, 250), 0.22, 1.0),  # low sun
    Weather((0.36, 0.34, 0.42), (0.12, 0.07, 0.04), (58, 66, 104), (206, 142, 112), (90, 300), 0.3, 0.2, 0.4),  # dusk
    Weather((0.17, 0.18, 0.23), (0, 0, 0), (14, 17, 30), (46, 44, 52), (80, 250), night=1.0),  # night
)
WEATHER_ODDS = (0.32, 0.26, 0.18, 0.13, 0.11)


@dataclass(frozen=True)
class Scene:
    """What a seed fixes for the whole drive: street, camera, light. Lengths are metres, or fractions of the image."""

    seed: int
    weather: Weather
    focal: float  # fraction of the image's width
    horizon: float  # fraction of the image's height, from the top
    camera_height: float
    speed: float
    curve: float  # 1 / radius
    lanes: int  # in each direction
    lane_width: float
    camera_x: float
    half_road: float
    parking: bool
    sidewalk: float
    verge: float
    haze_m: float
    sun: FloatArray  # unit vector towards the sun
    green: float
    crowd: float
    asphalt: FloatArray
    paving: FloatArray
    cast: FloatArray
    blur: float
    noise: float
    bonnet: bool
    mirror: bool


@lru_cache(maxsize=64)
def scene_of(seed: int) -> Scene:
    rng = np.random.default_rng((seed, 0))
    weather = WEATHERS[int(rng.choice(len(WEATHERS), p=WEATHER_ODDS))]
    lanes, lane_width, parking = int(rng.integers(1, 3)), rng.uniform(2.9, 3.5), bool(rng.random() < 0.5)
    azimuth = rng.uniform(-0.6, 0.6) if weather.glare == 1 else rng.uniform(-math.pi, math.pi)
    sun = np.array([math.sin(azimuth), weather.sun_height, math.cos(azimuth)])
    grey = rng.uniform(78, 125)
    return Scene(
        seed=seed, weather=weather, lanes=lanes, lane_width=lane_width, parking=parking,
        focal=rng.uniform(0.72, 1.05), horizon=rng.uniform(0.36, 0.50), camera_height=rng.uniform(1.2, 2.3),
        speed=rng.uniform(6.0, 12.0), curve=rng.normal(0, 0.0016),
        camera_x=(rng.integers(0, lanes) + 0.5) * lane_width + rng.uniform(-0.3, 0.3),
        half_road=lanes * lane_width + (2.3 if parking else 0.4),
        sidewalk=rng.uniform(2.6, 5.0), verge=float(rng.choice([0.0, 0.0, 3.0, 5.0])),
        haze_m=rng.uniform(*weather.haze_m), sun=sun / np.linalg.norm(sun), green=rng.random(),
        crowd=rng.uniform(0.3, 1.0), asphalt=grey + rng.normal(0, 3, 3),
        paving=grey + rng.uniform(-12, 38) + rng.normal(0, 4, 3),
        cast=rng.normal(1, 0.045, 3) * rng.uniform(0.82, 1.15),
        blur=float(rng.choice([0.0, 0.0, 0.5, 0.9])), noise=rng.uniform(1.5, 7.0),
        bonnet=bool(rng.random() < 0.3), mirror=bool(rng.random() < 0.35),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _dice_table(seed: int, chunk: int) -> FloatArray:
    return np.random.default_rng((seed, 1, chunk + 2**20)).random((ROWS, 64, 10))


def dice_of(seed: int, row: int, slot: int) -> list[float]:
    """Return the ten numbers in 0 to 1 that decide what stands in a slot of a row (0 to ROWS - 1)."""
    chunk, index = divmod(slot + 8, 64)
    dice: list[float] = _dice_table(seed, chunk)[row, index].tolist()
    return dice


def find_crossing(scene: Scene, slot: int) -> tuple[float, list[float]] | None:
    """Return where, in metres along the road, the side road of this slot begins, and its dice; or None."""
    dice = dice_of(scene.seed, 0, slot)
    return (slot * CROSSING_EVERY_M + 24 + 36 * dice[1], dice) if dice[0] < 0.6 else None


def is_crossing(scene: Scene, at_m: float, margin_m: float) -> bool:
    crossing = find_crossing(scene, math.floor(at_m / CROSSING_EVERY_M))
    return crossing is not None and crossing[0] - margin_m < at_m < crossing[0] + CROSSING_M + margin_m
