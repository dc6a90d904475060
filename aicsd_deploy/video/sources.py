"""Where frames come from: one interface for files (in video_file), folders of pictures, cameras, the built-in scene."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np

from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import resize_image

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CLOCK = Fraction(1, 90_000)
"""The time base of sources that have none of their own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: uint8 (H, W, 3) in BGR, owned by whoever holds the frame, shown at `time_s` seconds from the start."""

    index: int
    image_bgr: UInt8Array
    time_s: float


class Source(ABC):
    """Frames in the order in which they are to be shown; read once, then closed.

    Attributes:
        name: what to call it to the user.
        fps: nominal frames per second; the frames' own times may vary.
        size_hw: height and width of every frame, in pixels.
        frame_count: how many frames are expected (a file's header may be wrong); None where nobody knows.
        live: frames come when they come, and the newest matters more than every one.
        time_base: the unit of which all frame times are whole multiples, in seconds.
        skipped: frames that could not be decoded so far.
    """

    name: str
    fps: Fraction
    size_hw: tuple[int, int]
    frame_count: int | None = None
    live: bool = False
    time_base: Fraction = CLOCK
    skipped: int = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:  # noqa: B027 - not every source holds something
        """Release the file or device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FolderSource(Source):
    """The pictures of a folder in the order of their names (img2 before img10), all fitted to the first one's size.

    Raises:
        InputError: the folder holds no picture, or none that can be decoded.
    """

    def __init__(self, path: Path | str, *, fps: int = 25) -> None:
        folder = Path(path)
        self.name, self.fps = str(folder), Fraction(fps)
        self._paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_by_number)
        if not self._paths:
            raise InputError(
                f"The folder {folder} has no pictures. It needs files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        self.frame_count = len(self._paths)
        first = next((image for image in map(read_image, self._paths) if image is not None), None)
        if first is None:
            raise InputError(f"None of the {len(self._paths)} pictures in {folder} can be decoded; they are damaged.")
        self.size_hw = (first.shape[0], first.shape[1])

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        for path in self._paths:
            image = read_image(path)
            if image is None:
                self.skipped += 1
                continue
            yield Frame(index, fit(image, self.size_hw), float(index / self.fps))
            index += 1


class CameraSource(Source):
    """A camera by its index, stamped with the time of arrival; it ends when the camera gives no more frames.

    Raises:
        InputError: there is no such camera, or it gives no picture.
    """

    live = True

    def __init__(self, index: int) -> None:
        self.name = f"camera {index}"
        self._camera = cv2.VideoCapture(index)
        self._first = self._camera.read()[1] if self._camera.isOpened() else None
        if self._first is None:
            self._camera.release()
            raise InputError(
                f"Camera {index} cannot be opened or gives no picture. Check that it is plugged in and that you may "
                "read /dev/video*, or give --source FILE."
            )
        self.size_hw = (self._first.shape[0], self._first.shape[1])
        self.fps = sane_fps(Fraction(self._camera.get(cv2.CAP_PROP_FPS) or 30).limit_denominator(1001))

    def __iter__(self) -> Iterator[Frame]:
        start_s, index, image = time.perf_counter(), 0, self._first
        while image is not None:
            yield Frame(index, np.asarray(image, dtype=np.uint8), time.perf_counter() - start_s)
            index, image = index + 1, self._camera.read()[1]

    def close(self) -> None:
        self._camera.release()


class SyntheticSource(Source):
    """The built-in street scene: ten seconds by default, drawn as it is read."""

    def __init__(self, size_hw: tuple[int, int], *, seed: int = 1, seconds: float = 10.0, fps: int = 25) -> None:
        self.name, self.size_hw, self.fps = "synthetic", size_hw, Fraction(fps)
        self.frame_count = round(seconds * fps)
        self._seed = seed

    def __iter__(self) -> Iterator[Frame]:
        from aicsd_deploy.data.synthetic import render_scene

        for index in range(self.frame_count or 0):
            time_s = float(index / self.fps)
            image_rgb, _ = render_scene(self._seed, time_s=time_s, size_hw=self.size_hw)
            yield Frame(index, np.ascontiguousarray(image_rgb[..., ::-1]), time_s)


def open_source(spec: str, *, synthetic_hw: tuple[int, int] = (360, 640)) -> Source:
    """Open what the user named: `synthetic`, a camera's number, a folder of pictures, or a video file.

    Args:
        spec: the name, number or path.
        synthetic_hw: height and width to draw the built-in scene in.

    Raises:
        InputError: it cannot be opened; the message says why.
    """
    if spec == "synthetic":
        return SyntheticSource(synthetic_hw)
    if spec.isdecimal() and len(spec) < 4:
        return CameraSource(int(spec))
    if "://" in spec:
        raise InputError(
            f"{spec} is a network stream, which this version cannot read. Give a file, a folder or a camera number."
        )
    if Path(spec).is_dir():
        return FolderSource(spec)
    from aicsd_deploy.video.video_file import FileSource  # here, so that a camera needs no PyAV

    return FileSource(spec)


def fit(image_bgr: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Return the picture scaled into `size_hw`, its shape kept, centred on black; itself if it has that size."""
    height, width = image_bgr.shape[:2]
    if (height, width) == size_hw:
        return image_bgr
    scale = min(size_hw[0] / height, size_hw[1] / width)
    inner_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (size_hw[0] - inner_hw[0]) // 2, (size_hw[1] - inner_hw[1]) // 2
    canvas = np.zeros((*size_hw, 3), np.uint8)
    canvas[top : top + inner_hw[0], left : left + inner_hw[1]] = resize_image(image_bgr, inner_hw)
    return canvas


def read_image(path: Path) -> UInt8Array | None:
    """Return a picture file as uint8 (H, W, 3) in BGR; None if it cannot be decoded."""
    data = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    return None if image is None else np.asarray(image, dtype=np.uint8)


def sane_fps(rate: Fraction | None) -> Fraction:
    """Return a rate that can be true, or 25: a stream without time stamps may claim 0 or 90000 frames a second."""
    return rate if rate is not None and 0 < rate <= 1000 else Fraction(25)


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
