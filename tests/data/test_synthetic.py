"""The built-in street scenes: the same for everyone, with labels that fit, in motion."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
import pytest

from aicsd_deploy.data.synthetic import CLASSES, NATIVE_SIZE_HW, render_scene, world
from aicsd_deploy.data.synthetic.world import UInt8Array
from aicsd_deploy.metadata import IGNORE_LABEL

SEEDS = range(24)
NAMES = [c.name for c in CLASSES]


@lru_cache
def scenes() -> tuple[UInt8Array, UInt8Array]:
    """Return the images and labels of SEEDS."""
    images, labels = zip(*(render_scene(seed) for seed in SEEDS), strict=True)
    return np.stack(images), np.stack(labels)


def digest(seed: int, time_s: float) -> str:
    image, labels = render_scene(seed, time_s=time_s)
    return hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()


def test_same_arguments_give_same_bytes_in_any_order_and_process() -> None:
    first = digest(3, 0.4)
    render_scene(4)
    np.random.default_rng().random()
    assert digest(3, 0.4) == first
    code = "import sys; sys.path.insert(0, 'tests/data'); from test_synthetic import digest; print(digest(3, 0.4))"
    root = __file__.rsplit("/tests/", 1)[0]
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert fresh.stdout.strip() == first


def test_every_seed_is_another_scene() -> None:
    images, labels = scenes()
    assert len({image.tobytes() for image in images}) == len(SEEDS)
    assert len({label.tobytes() for label in labels}) == len(SEEDS)


def test_types_shapes_and_values() -> None:
    images, labels = scenes()
    assert images.shape == (len(SEEDS), *NATIVE_SIZE_HW, 3)
    assert labels.shape == (len(SEEDS), *NATIVE_SIZE_HW)
    assert images.dtype == labels.dtype == np.uint8
    assert set(np.unique(labels).tolist()) == {*range(len(CLASSES)), IGNORE_LABEL}
    assert (labels == IGNORE_LABEL).mean() < 0.05
    image, label = render_scene(0)
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous


def test_classes_have_their_own_names_and_colours() -> None:
    assert len(CLASSES) >= 8
    assert len({c.name for c in CLASSES}) == len({c.color_rgb for c in CLASSES}) == len(CLASSES)
    assert NAMES[world.TRUCK] == "truck"
    assert NAMES[world.CYCLIST] == "cyclist"


@pytest.mark.parametrize("index", range(len(CLASSES)), ids=NAMES)
def test_every_class_is_common_enough_to_learn(index: int) -> None:
    _, labels = scenes()
    per_image = (labels == index).mean(axis=(1, 2))
    assert per_image.mean() > 0.003
    assert (per_image > 0).mean() > 0.25


@pytest.mark.parametrize("seed", [1, 2, 6, 8, 10])
def test_labels_fit_the_picture(seed: int) -> None:
    """Colours vary least within the classes where the labels belong: not shifted, not mirrored."""
    image, labels = (values[seed] for values in scenes())

    def spread(mask: UInt8Array) -> float:
        parts = [image[mask == k] for k in np.unique(mask)]
        return float(sum(part.astype(float).var(0).sum() * len(part) for part in parts))

    shifted = [np.roll(labels, by, (0, 1)) for by in ((0, 3), (0, -3), (3, 0), (-3, 0))]
    assert spread(labels) < min(spread(mask) for mask in [*shifted, labels[:, ::-1]])


def test_masks_are_where_they_should_be() -> None:
    _, labels = scenes()
    rows = np.arange(NATIVE_SIZE_HW[0])[:, None]
    heights = [float((rows * (labels == k)).sum() / (labels == k).sum()) for k in range(len(CLASSES))]
    assert heights[world.SKY] < heights[world.BUILDING] < heights[world.CAR] < heights[world.ROAD]


def test_people_drive_on_the_left_in_some_scenes() -> None:
    """Our lane is on one side of the road, so most of the road lies on the other: the picture's left, or right."""
    _, labels = scenes()
    road = np.isin(labels[:, 100:125], (world.ROAD, world.MARKING))
    columns = np.arange(NATIVE_SIZE_HW[1]) - (NATIVE_SIZE_HW[1] - 1) / 2
    middle = (road * columns).sum((1, 2)) / road.sum((1, 2))
    assert 0.1 < (middle > 1).mean() < 0.5


@pytest.mark.parametrize("seed", [6, 11])
def test_video_moves_smoothly(seed: int) -> None:
    frames = [render_scene(seed, time_s=k / 25) for k in range(10)]
    steps = [np.mean(a[1] != b[1]) for a, b in pairwise(frames)]
    assert min(steps) > 0, "a frame repeats the one before"
    assert max(steps) < 0.06, "something jumps"
    assert np.mean(frames[0][1] != frames[-1][1]) > 1.5 * np.mean(steps), "it trembles but gets nowhere"
    change = np.abs(frames[0][0].astype(float) - frames[1][0]).mean()
    other = np.abs(frames[0][0].astype(float) - render_scene(seed + 1)[0]).mean()
    assert 0 < change < 0.5 * other


@pytest.mark.parametrize("seed", [6, 8, 12])
def test_car_drives_forward(seed: int) -> None:
    """The road comes nearer: what is on it moves down the picture."""
    (before, labels), (after, _) = (render_scene(seed, time_s=t) for t in (1.0, 1.04))
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (before, after)]
    flow = cv2.calcOpticalFlowFarneback(
        grey[0], grey[1], np.zeros((*labels.shape, 2), np.float32), 0.5, 3, 21, 3, 7, 1.5, 0
    )
    ground = np.isin(labels[110:150], (world.ROAD, world.MARKING))
    assert np.median(flow[110:150, :, 1][ground]) > 0.4


def test_drive_goes_on() -> None:
    _, labels = render_scene(2, time_s=600.0)
    assert len(np.unique(labels)) > 6


@pytest.mark.parametrize("size_hw", [(96, 160), (75, 101), (600, 960)])
def test_other_sizes_show_the_same_street(size_hw: tuple[int, int]) -> None:
    image, labels = render_scene(5, size_hw=size_hw)
    assert image.shape == (*size_hw, 3)
    assert labels.shape == size_hw
    assert {world.SKY, world.ROAD, world.BUILDING} <= set(np.unique(labels).tolist())


def test_size_only_changes_the_grid() -> None:
    labels, larger = render_scene(5)[1], render_scene(5, size_hw=(384, 512))[1]
    assert np.mean(larger[::2, ::2] == labels) > 0.9
