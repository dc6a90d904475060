"""Where finished frames go: an H.264 file or a window."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.files import atomic_path
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sources import Frame, Source

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")


class Sink(ABC):
    """Takes frames in order. `with sink.open(source):` brackets the work, and an error inside tells it how to end.

    Attributes:
        name: what to call it to the user.
    """

    name: str

    def open(self, source: Source) -> Self:
        """Get ready for the frames of `source`: their size, rate and time base. Returns itself."""
        return self

    @abstractmethod
    def write(self, frame: Frame) -> bool:
        """Take one frame; False says that whoever watches has seen enough."""

    def close(self, error: BaseException | None) -> None:  # noqa: B027 - not every sink holds something
        """Finish; `error` is what ended the work early, None where it ended well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


class Mp4Sink(Sink):
    """An H.264 file that browsers play: 8-bit 4:2:0, index in front, the source's time stamps kept.

    The file appears under its name when it is complete, or when the user interrupts. If the work fails midway, the
    frames until then are kept, playable, as NAME.partial.SUFFIX. Without a frame there is no file.

    Args:
        path: where to write; the suffix (.mp4, .mkv, .mov) chooses the container.
        crf: constant rate factor of x264, 0 (lossless) to 51; 23 is its default.
        preset: speed preset of x264. "veryfast" leaves the CPU to the network at a somewhat larger file.

    Raises:
        InputError: the suffix is another one, or the path is a folder.
    """

    def __init__(self, path: Path | str, *, crf: int = 21, preset: str = "veryfast") -> None:
        self.path, self.name = Path(path), str(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise InputError(f"Cannot write {path}: the output must end in {', '.join(VIDEO_SUFFIXES)}.")
        if self.path.is_dir():
            raise InputError(f"Cannot write {path}: it is a folder. Give a file name.")
        self._options = {"crf": str(crf), "preset": preset}
        self._container: OutputContainer | None = None
        self._last_pts = -1

    def open(self, source: Source) -> Self:
        """Start the file.

        Raises:
            InputError: the file is the source itself, or cannot be written.
            MissingDependencyError: PyAV is missing or was built without x264.
        """
        from aicsd_deploy.video.video_file import av

        if self.path.exists() and Path(source.name).exists() and self.path.samefile(source.name):
            raise InputError(
                f"The output {self.path} is the input itself, which would be lost. Choose another name with -o."
            )
        if "libx264" not in av.codecs_available:
            raise MissingDependencyError(
                "This PyAV was built without libx264, the H.264 encoder. Install av from its wheels."
            )
        self._output = atomic_path(self.path)
        self._temporary = self._output.__enter__()
        try:
            faststart = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
            self._container = av.open(str(self._temporary), "w", options=faststart)
            self._stream = self._add_stream(self._container, source)
        except BaseException as error:
            self._container = None
            self._output.__exit__(type(error), error, None)
            raise
        return self

    def _add_stream(self, container: OutputContainer, source: Source) -> VideoStream:
        stream = container.add_stream("libx264", rate=source.fps.limit_denominator(1001), options=self._options)
        stream.height, stream.width = (side + side % 2 for side in source.size_hw)  # 4:2:0 needs even sides
        stream.pix_fmt = "yuv420p"
        self._time_base = stream.time_base = stream.codec_context.time_base = source.time_base
        # Said in the file, since players guess the matrix by the size otherwise: BT.709, limited range.
        stream.color_primaries = stream.color_trc = stream.colorspace = 1
        stream.color_range = 1
        return stream

    def write(self, frame: Frame) -> bool:
        from aicsd_deploy.video.video_file import av

        assert self._container is not None
        picture = av.VideoFrame.from_numpy_buffer(pad_to_even(frame.image_bgr), format="bgr24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        # Damaged files repeat time stamps or go back, which no container takes.
        self._last_pts = picture.pts = max(round(frame.time_s / self._time_base), self._last_pts + 1)
        picture.time_base = self._time_base
        self._container.mux(self._stream.encode(picture))
        return True

    def close(self, error: BaseException | None) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if self._last_pts >= 0:
                container.mux(self._stream.encode(None))
            container.close()
        except Exception as failure:  # a full disk
            self._output.__exit__(type(failure), failure, None)
            if error is None:
                raise
            return
        if self._last_pts >= 0 and (error is None or isinstance(error, KeyboardInterrupt)):
            self._output.__exit__(None, None, None)
            return
        if self._last_pts >= 0:
            partial = self.path.with_suffix(f".partial{self.path.suffix}")
            self._temporary.replace(partial)
            say(f"The frames until the error are kept in {partial}")
        unfinished = error or InputError("no frame was written")
        self._output.__exit__(type(unfinished), unfinished, None)


class WindowSink(Sink):
    """A window that shows frames at their time at the earliest; q, Esc or its close button end it.

    Raises:
        MissingDependencyError: there is no display, or this OpenCV was built without windows.
    """

    name = "window"

    def __init__(self, title: str = "aicsd-deploy") -> None:
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise MissingDependencyError(
                "There is no display (DISPLAY is not set), so no window can open. Write a file with -o."
            )
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error as error:
            raise MissingDependencyError(
                "This OpenCV was built without windows. Write a file with -o, or install opencv-python in place of "
                "opencv-python-headless."
            ) from error
        self._title = title

    def open(self, source: Source) -> Self:
        cv2.resizeWindow(self._title, source.size_hw[1], source.size_hw[0])
        self._live, self._start_s = source.live, -1.0
        return self

    def write(self, frame: Frame) -> bool:
        now_s = time.perf_counter() - frame.time_s
        self._start_s = now_s if self._start_s < 0 or self._live else self._start_s
        wait_ms = max(1, round(1000 * (self._start_s - now_s)))
        cv2.imshow(self._title, frame.image_bgr)
        pressed = cv2.waitKey(wait_ms) & 0xFF
        return pressed not in (ord("q"), 27) and cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1

    def close(self, error: BaseException | None) -> None:
        cv2.destroyAllWindows()


def pad_to_even(image_bgr: UInt8Array) -> UInt8Array:
    """Return the picture with its last row and column repeated where its height or width is odd."""
    height, width = image_bgr.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return np.ascontiguousarray(image_bgr)
    return np.asarray(cv2.copyMakeBorder(image_bgr, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE), dtype=np.uint8)
