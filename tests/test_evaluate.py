"""Scoring: every image once and with its own labels, however many are read ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from aicsd_deploy.data.dataset import LabelledImage, SegmentationDataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.runtime.base import Backend, UInt8Array

CLASSES = tuple(SegClass(name, color) for name, color in (("a", (0, 0, 0)), ("b", (255, 0, 0)), ("c", (0, 255, 0))))


class Levels(SegmentationDataset):
    """Images whose one grey level is their class, for `GreyBackend`."""

    classes, spec, split = CLASSES, "levels", "val"

    def __init__(self, length: int, *, wait_for: int | None = None, broken: int | None = None) -> None:
        self.length, self.wait_for, self.broken = length, wait_for, broken
        self.begun = [threading.Event() for _ in range(length)]

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> LabelledImage:
        self.begun[index].set()
        if index == self.broken:
            raise InputError(f"image {index} is broken")
        if index == 0 and self.wait_for is not None:
            assert self.begun[self.wait_for].wait(20), "nothing was read ahead"
        level = index % 3
        return np.full((4, 6 + index, 3), level, np.uint8), np.full((4, 6 + index), level, np.uint8)


class GreyBackend(Backend):
    """Says that a pixel's class is its grey level."""

    name = "grey"

    def __init__(self, device: str) -> None:
        self.device, self.metadata = device, Metadata("grey", CLASSES, (4, 6))

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        return frames_NHWC[..., 0]


def test_the_same_classes_in_another_order_are_other_classes() -> None:
    other = Levels(3)
    other.classes = CLASSES[::-1]
    with pytest.raises(InputError, match="classes are not those of levels"):
        evaluate(GreyBackend("cpu"), other)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_image_counts_once_with_its_own_labels(device: str) -> None:
    matrix = evaluate(GreyBackend(device), Levels(11))
    assert matrix.images == 11
    sizes = [sum(4 * (6 + index) for index in range(11) if index % 3 == level) for level in range(3)]
    assert matrix.counts.tolist() == np.diag(sizes).tolist()


def test_images_are_read_ahead_of_a_gpu() -> None:
    assert evaluate(GreyBackend("cuda:0"), Levels(6, wait_for=3)).images == 6


def test_nothing_is_read_ahead_of_a_cpu_which_it_would_take_cores_from() -> None:
    dataset = Levels(3)

    def segment(_frame: UInt8Array) -> UInt8Array:
        assert not dataset.begun[2].is_set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(GreyBackend("cpu"), dataset, segmenter=segment)


def test_an_image_that_cannot_be_read_ahead_is_an_error() -> None:
    with pytest.raises(InputError, match="image 4 is broken"):
        evaluate(GreyBackend("cuda:0"), Levels(9, broken=4))
