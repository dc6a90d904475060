"""Animated WebP, which FFmpeg does not decode, as a source of frames, read with OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from aicsd_deploy.errors import InputError
from aicsd_deploy.video.sources import Frame, Source

UNSAID_MS = 100
"""How long a picture is shown whose duration is given as 0, as browsers do."""


def is_animated_webp(path: Path) -> bool:
    """Tell, by its header, whether a file is an animated WebP that this OpenCV (4.11 or newer) can decode."""
    with path.open("rb") as file:
        head = file.read(21)
    extended = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
    return extended and bool(head[-1] & 0x02) and hasattr(cv2, "imdecodeanimation")


class WebpSource(Source):
    """Every picture of an animated WebP, at its time; all of them are in memory at once.

    Raises:
        InputError: not one of its pictures can be decoded.
    """

    time_base = Fraction(1, 1000)

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        good, animation = cv2.imdecodeanimation(np.fromfile(path, np.uint8))
        if not good or not animation.frames:
            raise InputError(
                f"{path}: not one picture could be decoded. It is damaged or cut off; make or copy it again."
            )
        self._images = [np.ascontiguousarray(image[..., :3], dtype=np.uint8) for image in animation.frames]
        self._durations_ms = [int(duration) or UNSAID_MS for duration in animation.durations]
        self.frame_count = len(self._images)
        self.fps = Fraction(1000 * self.frame_count, sum(self._durations_ms))
        self.size_hw = (self._images[0].shape[0], self._images[0].shape[1])

    def __iter__(self) -> Iterator[Frame]:
        time_ms = 0
        for index, (image, duration_ms) in enumerate(zip(self._images, self._durations_ms, strict=True)):
            yield Frame(index, image.copy(), time_ms / 1000)
            time_ms += duration_ms
