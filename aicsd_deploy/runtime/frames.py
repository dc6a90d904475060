"""Frames of any size through a backend of one size: the only place where frames and label maps are resized."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, Literal

import cv2
import numpy as np

from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.base import Backend, UInt8Array

Fit = Literal["stretch", "pad", "tile"]
FITS: tuple[Fit, ...] = ("stretch", "pad", "tile")
TILE_OVERLAP = 0.25
"""Neighbouring tiles share at least this part of their side; each gives its labels up to the middle of what is shared."""


def scaled(size_hw: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return a height and width times a factor, in whole pixels."""
    return round(size_hw[0] * factor), round(size_hw[1] * factor)


def resize_image(image_HWC: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Resize a picture: area averaging where it shrinks, bilinear where it grows; training uses the same."""
    if image_HWC.shape[:2] == size_hw:
        return image_HWC
    shrinks = size_hw[0] * size_hw[1] < image_HWC.shape[0] * image_HWC.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_HWC, size_hw[::-1], interpolation=method), dtype=np.uint8)


def resize_labels(labels_HW: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Resize a label map to the nearest pixel centre, so that no label is invented and none is shifted."""
    if labels_HW.shape == size_hw:
        return labels_HW
    return np.asarray(cv2.resize(labels_HW, size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)


def centred(image_hw: tuple[int, int], size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width that a picture gets within `size_hw` where it is as large as fits, its shape kept."""
    scale = min(size_hw[0] / image_hw[0], size_hw[1] / image_hw[1])
    height, width = max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))
    return (size_hw[0] - height) // 2, (size_hw[1] - width) // 2, height, width


def as_input(frame_bgr: UInt8Array, metadata: Metadata) -> UInt8Array:
    """Return a frame, uint8 (H, W, 3) as OpenCV gives it, as an artefact takes it: uint8 (1, h, w, 3) in its channel order."""
    frame = resize_image(frame_bgr, metadata.image_size_hw)
    return np.ascontiguousarray(frame if metadata.channel_order == "bgr" else frame[..., ::-1])[None]


def segment(backend: Backend, frame_bgr: UInt8Array) -> UInt8Array:
    """Segment one frame of any size, stretched to the network's; see `Segmenter`."""
    return Segmenter(backend)(frame_bgr)


class Segmenter:
    """Segments frames of any size; it keeps its buffer from frame to frame, so one thread at a time may use it.

    Args:
        backend: the network, which takes frames of `metadata.image_size_hw`.
        fit: how a frame of another size gets to it. "stretch" resizes height and width each by its own factor, as training
            does; "pad" keeps the aspect, with black at the sides; "tile" cuts a frame that is larger than the network's
            into tiles that overlap, each at full resolution, and stretches a smaller one.
    """

    def __init__(self, backend: Backend, *, fit: Fit = "stretch") -> None:
        self.backend, self.fit = backend, fit
        self._input = np.zeros((1, *backend.metadata.image_size_hw, 3), np.uint8)
        self._last_spot = (0, 0, 0, 0)

    def __call__(self, frame_bgr: UInt8Array) -> UInt8Array:
        """Segment one frame.

        Args:
            frame_bgr: uint8 (H, W, 3), channels as OpenCV gives them.

        Returns:
            uint8 (H, W): class index of every pixel of the frame.
        """
        frame_hw = (frame_bgr.shape[0], frame_bgr.shape[1])
        if self.fit == "tile" and self._is_larger(frame_hw):
            return self._tiled(frame_bgr)
        top, left, height, width = self._placed(frame_hw)
        labels = self._infer(resize_image(frame_bgr, (height, width)), top, left)
        return resize_labels(labels[top : top + height, left : left + width], frame_hw)

    def describe(self, frame_hw: tuple[int, int]) -> dict[str, Any]:
        """Return how frames of a size reach the network, for the record."""
        tiles = len(list(self._tiles(frame_hw))) if self.fit == "tile" and self._is_larger(frame_hw) else 1
        inner_hw = self._placed(frame_hw)[2:] if tiles == 1 else self._network_hw
        return {
            "fit": self.fit,
            "frame_hw": list(frame_hw),
            "network_hw": list(self._network_hw),
            "resized_hw": list(inner_hw),
            "tiles": tiles,
        }

    @property
    def _network_hw(self) -> tuple[int, int]:
        return self.backend.metadata.image_size_hw

    def _is_larger(self, frame_hw: tuple[int, int]) -> bool:
        return frame_hw[0] > self._network_hw[0] or frame_hw[1] > self._network_hw[1]

    def _placed(self, frame_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the frame within the network's input."""
        return centred(frame_hw, self._network_hw) if self.fit == "pad" else (0, 0, *self._network_hw)

    def _infer(self, image_bgr: UInt8Array, top: int = 0, left: int = 0) -> UInt8Array:
        height, width = image_bgr.shape[:2]
        if (top, left, height, width) != self._last_spot:  # else the borders would show the frame before
            self._input.fill(0)
            self._last_spot = (top, left, height, width)
        spot = self._input[0, top : top + height, left : left + width]
        if self.backend.metadata.channel_order == "rgb":
            cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB, dst=spot)
        else:
            np.copyto(spot, image_bgr)
        labels: UInt8Array = self.backend.infer(self._input)[0]
        return labels

    def _tiled(self, frame_bgr: UInt8Array) -> UInt8Array:
        frame_hw = (frame_bgr.shape[0], frame_bgr.shape[1])
        # A side that is shorter than the network's is stretched to it, as without tiles.
        grown_hw = (max(frame_hw[0], self._network_hw[0]), max(frame_hw[1], self._network_hw[1]))
        grown = resize_image(frame_bgr, grown_hw)
        labels = np.empty(grown_hw, np.uint8)
        height, width = self._network_hw
        for (y, keep_y), (x, keep_x) in self._tiles(frame_hw):
            tile = self._infer(grown[y : y + height, x : x + width])
            labels[y + keep_y :, x + keep_x :][: height - keep_y, : width - keep_x] = tile[keep_y:, keep_x:]
        return resize_labels(labels, frame_hw)

    def _tiles(self, frame_hw: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yield where the tiles begin, and how much of each is left to the one before it, along both axes."""
        return product(_cuts(frame_hw[0], self._network_hw[0]), _cuts(frame_hw[1], self._network_hw[1]))


def _cuts(side_px: int, tile_px: int) -> list[tuple[int, int]]:
    if side_px <= tile_px:
        return [(0, 0)]
    number = -(-(side_px - tile_px) // max(1, round(tile_px * (1 - TILE_OVERLAP)))) + 1
    starts = [round(i * (side_px - tile_px) / (number - 1)) for i in range(number)]
    shared = [0, *(start + tile_px - following for start, following in pairwise(starts))]
    return [(start, overlap // 2) for start, overlap in zip(starts, shared, strict=True)]
