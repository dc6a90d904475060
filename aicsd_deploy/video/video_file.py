"""Video files as a source of frames, read with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sources import CLOCK, Frame, Source, fit, sane_fps

try:
    import av as av  # the sink takes it from here, so that one place explains its absence
    from av.stream import Disposition
except ImportError as missing:
    raise MissingDependencyError(
        "The package av (PyAV), which reads and writes videos, is not installed. Run: pip install 'aicsd-deploy[video]'"
    ) from missing


class FileSource(Source):
    """Every frame of a video file, in order, at its time stamp, turned upright.

    A frame that is damaged beyond decoding is skipped and counted. Frames of another size than the first are fitted to
    the first one's.

    Raises:
        InputError: it is no video, or not one of its frames can be decoded.
    """

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        """Open a file, or an address of something that has an end; `name` is what to call it."""
        self.name = name or str(path)
        try:
            self._container = av.open(str(path))
        except av.error.FFmpegError as error:
            raise InputError(
                f"{self.name} is not a video that can be read ({error.strerror}). Check it in a player."
            ) from error
        try:
            # Cover art is a video stream too, and plain text is read as the screen of a terminal.
            streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams or self._container.format.name == "tty":
                raise InputError(
                    f"{self.name} has no video in it (only {self._contents()}). Give a file with moving pictures."
                )
            self._stream = streams[0]
            self._stream.thread_type = "AUTO"
            self.fps = sane_fps(self._stream.average_rate or self._stream.guessed_rate)
            self.time_base = self._stream.time_base or CLOCK
            self.frame_count = self._stream.frames or None
            self._decoded = self._decode()
            # Only a frame shows that the file can be decoded and which way up it is; it is kept and given out first.
            self._first = next(self._decoded, None)
            if self._first is None:
                raise InputError(
                    f"{self.name}: not one frame could be decoded. It is damaged or cut off; make or copy it again."
                )
        except BaseException:
            self._container.close()
            raise
        self.size_hw = (self._first[0].shape[0], self._first[0].shape[1])

    def __iter__(self) -> Iterator[Frame]:
        waiting, self._first = self._first, None
        index, last_s = 0, 0.0
        while waiting is not None:
            image, time_s = waiting
            if time_s is None:  # raw streams carry no time stamps
                time_s = last_s + float(1 / self.fps) if index else 0.0
            yield Frame(index, fit(image, self.size_hw), time_s)
            index, last_s = index + 1, time_s
            waiting = next(self._decoded, None)

    def close(self) -> None:
        self._container.close()

    def _decode(self) -> Iterator[tuple[UInt8Array, float | None]]:
        start_s = Fraction(self._container.start_time or 0, 1_000_000)  # transport streams begin at an arbitrary time
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:  # the container is damaged from here on
                self.skipped += 1
                packet = None
            try:
                decoded = self._stream.decode(packet)
            except av.error.EOFError:  # the last packet of a demuxer has flushed the decoder already
                return
            except av.error.FFmpegError:
                self.skipped += 1
                decoded = []
            for frame in decoded:
                time_s = None if frame.pts is None else max(0.0, float(frame.pts * self.time_base - start_s))
                yield (
                    upright(np.asarray(frame.to_ndarray(format="bgr24"), dtype=np.uint8), display_matrix(frame)),
                    time_s,
                )
            if packet is None:
                return

    def _contents(self) -> str:
        return ", ".join(sorted({s.type for s in self._container.streams} - {"video"})) or "no moving pictures"


def upright(image_bgr: UInt8Array, matrix: list[int] | None) -> UInt8Array:
    """Turn and mirror a picture as a file's display matrix asks, to the nearest quarter turn.

    Args:
        image_bgr: uint8 (H, W, 3) as it was stored.
        matrix: the nine numbers of FFmpeg's AV_FRAME_DATA_DISPLAYMATRIX: x' = m0 x + m3 y, y' = m1 x + m4 y.
    """
    if matrix is None:
        return image_bgr
    to_x, to_y = (matrix[0], matrix[4])
    if abs(matrix[1]) > abs(matrix[0]):
        image_bgr = image_bgr.transpose(1, 0, 2)
        to_x, to_y = (matrix[3], matrix[1])
    return np.ascontiguousarray(image_bgr[:: -1 if to_y < 0 else 1, :: -1 if to_x < 0 else 1])


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """Return the nine numbers for `upright`, None where a frame has none."""
    found: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if found is None else [int(v) for v in np.frombuffer(found, np.int32)]
