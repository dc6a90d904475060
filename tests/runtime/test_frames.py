"""Frames of any size through a network of one size: stretched, padded, or cut into tiles."""

from __future__ import annotations

import numpy as np
import pytest

from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.runtime.frames import Fit, Segmenter, segment


class RedValue(Backend):
    """Labels each pixel with its red value, so that labels show where pixels went; black is 0."""

    name, device = "red", "cpu"

    def __init__(self, size_hw: tuple[int, int], *, channel_order: str = "rgb") -> None:
        self.metadata = Metadata("red", (SegClass("a", (0, 0, 0)), SegClass("b", (9, 9, 9))), size_hw)
        self.metadata = self.metadata.replace(channel_order=channel_order)
        self.inputs: list[UInt8Array] = []

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        self.inputs.append(frames_NHWC.copy())
        return frames_NHWC[..., 0 if self.metadata.channel_order == "rgb" else 2].copy()


def ramp(height: int, width: int) -> UInt8Array:
    """A picture whose red value rises from left to right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 2] = np.linspace(1, 250, width).astype(np.uint8)
    return image


@pytest.mark.parametrize("fit", ["stretch", "pad", "tile"])
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size_hw", [(32, 48), (31, 97), (100, 48), (20, 30), (64, 96), (200, 40), (7, 3)])
def test_labels_lie_where_their_pixels_are(fit: Fit, channel_order: str, size_hw: tuple[int, int]) -> None:
    image = ramp(*size_hw)
    segmenter = Segmenter(RedValue((32, 48), channel_order=channel_order), fit=fit)
    labels = segmenter(image)
    assert labels.shape == size_hw
    one_pixel = 250 / min(size_hw[1], segmenter.describe(size_hw)["resized_hw"][1])
    assert np.abs(labels.astype(int) - image[..., 2]).max() <= one_pixel + 3


def test_stretching_is_what_evaluation_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    backend = RedValue((32, 48))
    np.testing.assert_array_equal(segment(backend, image), Segmenter(backend, fit="stretch")(image))


@pytest.mark.parametrize(
    ("size_hw", "rows", "columns"), [((48, 48), slice(0, 32), slice(8, 40)), ((24, 72), slice(8, 24), slice(0, 48))]
)
def test_padding_keeps_the_aspect_and_puts_the_frame_in_the_middle(
    size_hw: tuple[int, int], rows: slice, columns: slice
) -> None:
    backend = RedValue((32, 48))
    segmenter = Segmenter(backend, fit="pad")
    segmenter(np.full((*size_hw, 3), 200, np.uint8))
    expected = np.zeros((1, 32, 48, 3), np.uint8)
    expected[:, rows, columns] = 200
    np.testing.assert_array_equal(backend.inputs, [expected])
    assert segmenter.describe(size_hw)["resized_hw"] == [rows.stop - rows.start, columns.stop - columns.start]


def test_borders_are_black_after_a_frame_of_another_shape() -> None:
    backend = RedValue((32, 32))
    segmenter = Segmenter(backend, fit="pad")
    segmenter(np.full((64, 32, 3), 200, np.uint8))
    segmenter(np.full((32, 64, 3), 200, np.uint8))
    expected = np.zeros((1, 32, 32, 3), np.uint8)
    expected[:, 8:24] = 200
    np.testing.assert_array_equal(backend.inputs[1], expected)


def test_tiles_are_at_full_resolution_and_leave_no_seam() -> None:
    image = np.random.default_rng(0).integers(0, 256, (75, 130, 3), np.uint8)
    backend = RedValue((32, 48))
    segmenter = Segmenter(backend, fit="tile")
    np.testing.assert_array_equal(segmenter(image), image[..., 2])
    assert segmenter.describe((75, 130))["tiles"] == len(backend.inputs) > 6
    assert all(seen.shape == (1, 32, 48, 3) for seen in backend.inputs)


def test_pixels_near_the_border_of_a_tile_come_from_its_neighbour() -> None:
    class Unsure(RedValue):
        """Knows nothing within 3 pixels of a border."""

        def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
            labels = super().infer(frames_NHWC)
            labels[:, :3] = labels[:, -3:] = labels[:, :, :3] = labels[:, :, -3:] = 0
            return labels

    image = np.full((80, 120, 3), 200, np.uint8)
    labels = Segmenter(Unsure((32, 48)), fit="tile")(image)
    assert (labels[3:-3, 3:-3] == 200).all()


@pytest.mark.parametrize(("size_hw", "tiles"), [((30, 40), 1), ((32, 48), 1), ((33, 48), 2), ((30, 49), 2)])
def test_a_frame_is_cut_into_tiles_where_one_side_is_larger_than_the_networks(
    size_hw: tuple[int, int], tiles: int
) -> None:
    backend = RedValue((32, 48))
    segmenter = Segmenter(backend, fit="tile")
    segmenter(ramp(*size_hw))
    assert segmenter.describe(size_hw)["tiles"] == len(backend.inputs) == tiles
