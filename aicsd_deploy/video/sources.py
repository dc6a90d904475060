"""Where frames come from: one interface for files (video_file), live sources (live), folders and the built-in scene."""

from __future__ import annotations

import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

import cv2
import numpy as np

from aicsd_deploy.errors import InputError
from aicsd_deploy.files import existing_file
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import centred, resize_image

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
PIPELINE = re.compile(
    r"\s!\s|^\s*[a-z]\w*(\s[^!]*)?!\s*([a-z][\w-]*(\s|!|$)|(video|image|application)/)|^\s*[a-z]\w*src(\s+[\w-]+=.*)?$",
    re.I,
)
"""A GStreamer pipeline: a ! with spaces around it, or one between what can be two elements, or an element and its caps; or a
source element alone."""
CLOCK = Fraction(1, 90_000)
"""The time base of sources that have none of their own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, owned by whoever holds it.

    Attributes:
        index: its number, from 0.
        image_bgr: uint8 (H, W, 3); the overlay is drawn on it in place.
        time_s: when it is to be shown, in seconds from the first one.
        arrived_s: `time.perf_counter()` when it came in; 0 where it is not live.
        labels: uint8 (H, W), once it is segmented.
        plain_bgr: the picture without the overlay, for sinks that ask for it (`Sink.wants_plain`).
        picture: of a folder, the name of its file.
    """

    index: int
    image_bgr: UInt8Array
    time_s: float
    arrived_s: float = 0.0
    labels: UInt8Array | None = None
    plain_bgr: UInt8Array | None = None
    picture: str | None = None


class Source(ABC):
    """Frames in the order in which they are to be shown; read once, then closed.

    Attributes:
        name: what to call it to the user.
        fps: nominal frames per second; the frames' own times may vary.
        size_hw: height and width of every frame, in pixels.
        frame_count: how many frames are expected (a file's header may be wrong); None where nobody knows.
        live: frames come when they come, and the newest matters more than every one.
        pixel_aspect: width of a pixel by its height, for players.
        time_base: the unit of which all frame times are whole multiples, in seconds.
        skipped: frames that could not be decoded so far.
        reconnects: how often a live source was lost and came back.
        lost: a live source, a server or a pipeline went away and did not come back, which is not the same as its end.
        left: a thread still waits in it, so that it cannot be closed; the thread ends by itself, or with the process.
    """

    name: str
    fps: Fraction
    size_hw: tuple[int, int]
    frame_count: int | None = None
    pixel_aspect: Fraction = Fraction(1)
    live: bool = False
    time_base: Fraction = CLOCK
    skipped: int = 0
    reconnects: int = 0
    lost: bool = False
    left: bool = False

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]: ...

    def cancel(self) -> None:  # noqa: B027 - files never keep anyone waiting
        """End the iteration soon, from another thread, although frames may be missing."""

    def close(self) -> None:  # noqa: B027 - not every source holds something
        """Release the file or device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.left:
            self.close()


class FolderSource(Source):
    """The pictures of a folder in the order of their names (img2 before img10), all fitted to the first one's size.

    Hidden files are left out.

    Raises:
        InputError: the folder holds no picture, or none that can be decoded.
    """

    fps = Fraction(25)

    def __init__(self, path: Path | str) -> None:
        folder = Path(path)
        self.name = str(folder)
        self._paths = in_order(folder, IMAGE_SUFFIXES)
        if not self._paths:
            raise InputError(
                f"The folder {folder} has no pictures. It needs files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        self.frame_count = len(self._paths)
        first = next((image for image in map(read_image_bgr, self._paths) if image is not None), None)
        if first is None:
            raise InputError(
                f"None of the {len(self._paths)} pictures in {folder} can be decoded; they are damaged. Make or copy them again."
            )
        self.size_hw = (first.shape[0], first.shape[1])

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        for path in self._paths:
            image = read_image_bgr(path)
            if image is None:
                self.skipped += 1
                continue
            yield Frame(index, fit(image, self.size_hw), float(index / self.fps), picture=path.name)
            index += 1


class SyntheticSource(Source):
    """The built-in street scene, drawn as it is read: ten seconds by default."""

    name, fps = "synthetic", Fraction(25)

    def __init__(self, size_hw: tuple[int, int], *, seconds: float | None = 10.0) -> None:
        """Take the size of the frames; with `seconds` None the drive does not end."""
        self.size_hw = size_hw
        self.frame_count = None if seconds is None else round(seconds * self.fps)

    def __iter__(self) -> Iterator[Frame]:
        from aicsd_deploy.data.synthetic import render_scene

        for index in count() if self.frame_count is None else range(self.frame_count):
            time_s = float(index / self.fps)
            # Back and forth: a drive is planned for a stretch of road, and this has no seam.
            image_rgb, _ = render_scene(1, time_s=60 - abs(time_s % 120 - 60), size_hw=self.size_hw)
            yield Frame(index, np.ascontiguousarray(image_rgb[..., ::-1]), time_s)


class LoopedSource(Source):
    """A source that is opened again whenever it ends, its times going on.

    Raises:
        InputError: the source is live, so that there is nothing to repeat.
    """

    def __init__(self, reopen: Callable[[], Source]) -> None:
        self._reopen, self._source, self._cancelled = reopen, reopen(), False
        if self._source.live:
            self._source.close()
            raise InputError(f"{self._source.name} is live and cannot be looped. Leave out --loop.")
        self.name, self.fps, self.size_hw = self._source.name, self._source.fps, self._source.size_hw
        self.time_base, self.pixel_aspect = self._source.time_base, self._source.pixel_aspect

    def __iter__(self) -> Iterator[Frame]:
        index, start_s, last_s = 0, 0.0, 0.0
        while True:
            for frame in self._source:
                last_s = start_s + frame.time_s
                image = fit(frame.image_bgr, self.size_hw)  # the file may have been replaced by another
                yield replace(frame, index=index, image_bgr=image, time_s=last_s)
                index += 1
            self.skipped += self._source.skipped
            self.lost = self._source.lost
            if self.lost or self._cancelled:
                return
            self._source.close()
            start_s = last_s + float(1 / self.fps)
            self._source = self._reopen()

    def cancel(self) -> None:
        self._cancelled = True
        self._source.cancel()

    def close(self) -> None:
        self._source.close()


def open_source(
    spec: str | None, *, synthetic_hw: tuple[int, int] = (360, 640), endless: bool = False, loop: bool = False
) -> Source:
    """Open what the user named.

    Args:
        spec: `synthetic`; a camera's number or device; a network address (rtsp://, http://, udp://, …); a GStreamer pipeline, with
            `!` between its elements; a folder of pictures; or a video file. None is the first camera, and the built-in
            scene where there is none.
        synthetic_hw: height and width to draw the built-in scene in.
        endless: the built-in scene goes on until it is stopped.
        loop: begin anew when a file, a folder or the scene ends.

    Raises:
        InputError: it cannot be opened; the message says why.
    """
    if spec is None:
        return _first_camera() or SyntheticSource(synthetic_hw, seconds=None if endless or loop else 10.0)
    if loop:
        return LoopedSource(lambda: open_source(spec, synthetic_hw=synthetic_hw))
    if spec == "synthetic":
        return SyntheticSource(synthetic_hw)
    if not spec:
        raise InputError("--source is empty. Name a file, a folder, a camera's number or an address, or leave it out.")
    spec = without_file_scheme(spec)
    if (number := spec.removeprefix("/dev/video")).isdecimal() and len(number) < 4:
        from aicsd_deploy.video.live import open_camera

        return open_camera(int(number))
    is_pipeline = PIPELINE.search(spec) is not None
    if (is_pipeline or "://" in spec) and not os.path.exists(spec):  # Path.exists raises where a pipeline is long
        from aicsd_deploy.video.streams import open_gstreamer, open_stream  # here, so that a camera needs no PyAV

        return open_gstreamer(spec) if is_pipeline else open_stream(spec)
    if Path(spec).is_dir():
        return FolderSource(spec)
    from aicsd_deploy.video.video_file import FileSource
    from aicsd_deploy.video.webp import WebpSource, is_animated_webp

    path = existing_file(spec, "The video")
    return WebpSource(path) if is_animated_webp(path) else FileSource(path)


def without_file_scheme(spec: str) -> str:
    """Return the path that a file:// address stands for; anything else as it is."""
    return url2pathname(urlsplit(spec).path) if spec.startswith("file://") else spec


def _first_camera() -> Source | None:
    from aicsd_deploy.video.live import open_camera

    if sys.platform.startswith("linux") and not Path("/dev/video0").exists():
        return None
    try:
        return open_camera(0)
    except InputError:
        return None


def fit(image_bgr: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Return the picture scaled into `size_hw`, its shape kept, centred on black; itself if it has that size."""
    image_hw = (image_bgr.shape[0], image_bgr.shape[1])
    if image_hw == size_hw:
        return image_bgr
    top, left, height, width = centred(image_hw, size_hw)
    canvas = np.zeros((*size_hw, 3), np.uint8)
    canvas[top : top + height, left : left + width] = resize_image(image_bgr, (height, width))
    return canvas


def read_image_bgr(path: Path) -> UInt8Array | None:
    """Return a picture file as uint8 (H, W, 3) in BGR; None if it cannot be decoded."""
    data = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:  # its header claims more pixels than OpenCV takes
        return None
    return None if image is None else np.asarray(image, dtype=np.uint8)


def sane_fps(rate: Fraction | None) -> Fraction:
    """Return a rate that can be true, or 25: a stream without time stamps may claim 0 or 90000 frames a second."""
    return Fraction(rate) if rate is not None and 0 < rate <= 1000 else Fraction(25)


def in_order(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files of a folder with these suffixes, hidden ones left out, in the order of their names: img2 before img10."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return sorted(found, key=lambda path: (_by_number(path), path.name))  # 1.png and 01.png have the same number


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
