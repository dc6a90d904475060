"""Video files as a source of frames, read with PyAV."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sources import CLOCK, Frame, Source, fit, sane_fps
from aicsd_deploy.video.timestamps import Timeline

try:
    import av as av  # the sink takes it from here, so that one place explains its absence
    from av.stream import Disposition
    from av.video import reformatter as reformatter
except ImportError as missing:
    raise MissingDependencyError(
        "The package av (PyAV), which reads and writes videos, is not installed. Run: pip install 'aicsd-deploy[video]'"
    ) from missing

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""For `av.open`: titles that are no UTF-8 are no reason to refuse a file, which PyAV knows by itself from 19 on."""
RESERVED_MATRIX = 3
"""Says as little about the colours as 2, "unspecified", but FFmpeg converts only that."""
AVFMT_TS_DISCONT = 0x0200  # of FFmpeg's libavformat/avformat.h
SERVER_TIMEOUT_S = 20.0
"""A server that is silent for so long is taken to be gone. The segments of HLS may be ten seconds apart."""
MOST_PIXELS_ALONE = 1920 * 1088
"""Up to this size one thread decodes fast enough. Of several, each holds a picture, and damage at the end costs them all."""


class FileSource(Source):
    """Every frame of a video file, in order, at its time stamp, turned upright.

    A frame that is damaged beyond decoding is skipped and counted. Frames of another size than the first are fitted to
    the first one's. An address whose server is gone before the end is `lost`.

    Raises:
        InputError: it is no video, or not one of its frames can be decoded.
    """

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        """Open a file, or an address of something that has an end; `name` is what to call it."""
        self.name, self._is_address = name or str(path), name is not None
        try:
            self._container = open_container(path)
        except av.error.FFmpegError as error:
            raise InputError(
                f"{self.name} is not a video that can be read ({error.strerror}). Check it in a player."
            ) from error
        try:
            stream = picture_of(self._container)
            if stream is None:
                raise InputError(
                    f"{self.name} has no video in it (only {self._contents()}). Give a file with moving pictures."
                )
            self._stream = stream
            if self._stream.codec_context is None:
                raise InputError(
                    f"{self.name} is coded in a way that this FFmpeg has no decoder for. Convert it to H.264, for example."
                )
            self._stream.thread_type = "AUTO"
            if self._stream.width * self._stream.height <= MOST_PIXELS_ALONE:
                self._stream.codec_context.thread_count = 1
            self.fps = sane_fps(self._stream.average_rate or self._stream.guessed_rate)
            self.time_base = Fraction(self._stream.time_base or CLOCK)
            self.frame_count = self._stream.frames or None
            self._to_bgr = ToBgr()
            self._first_dts: int | None = None
            self._decoded = self._decode()
            # Only a frame shows that the file can be decoded and which way up it is; it is kept and given out first.
            self._first = next(self._decoded, None)
            if self.lost:
                raise InputError(
                    f"{self.name}: its server answered, but gave no frame. Check that it is still running. If it is, and this is an "
                    "mp4, the index may stand behind the frames, and the server cannot go back (it knows no byte ranges): "
                    "download the file first, or put the index in front: ffmpeg -i IN.mp4 -c copy -movflags +faststart OUT.mp4"
                )
            if self._first is None:
                raise InputError(
                    f"{self.name}: not one frame could be decoded. It is damaged or cut off; make or copy it again."
                )
        except BaseException:
            self._container.close()
            raise
        self.size_hw = (self._first[0].shape[0], self._first[0].shape[1])
        if aspect := self._stream.sample_aspect_ratio:
            self.pixel_aspect = 1 / Fraction(aspect) if self._turned else Fraction(aspect)

    def __iter__(self) -> Iterator[Frame]:
        waiting, self._first = self._first, None
        index = 0
        while waiting is not None:
            image, time_s = waiting
            yield Frame(index, fit(image, self.size_hw), time_s)
            index += 1
            waiting = next(self._decoded, None)

    def close(self) -> None:
        self._container.close()

    def _decode(self) -> Iterator[tuple[UInt8Array, float]]:
        timeline = timeline_of(self._container, step_s=1 / self.fps)
        packets = demux_noted(self._container, timeline)
        while True:
            asked_s = time.monotonic()
            try:
                packet = next(packets, None)
                if packet is not None and packet.size == 0 and time.monotonic() - asked_s >= SERVER_TIMEOUT_S:
                    self.lost = self._is_address  # FFmpeg gives out a playlist that has stopped growing like an end
            except (av.error.FFmpegError, IndexError) as error:
                # Damaged from here on, which for PyAV are streams that appear on the way too; or the server is gone.
                damaged = isinstance(error, av.error.InvalidDataError | IndexError)
                self.lost = self._is_address and not damaged
                self.skipped += not self.lost
                packet = None
            if packet is not None and packet.stream_index != self._stream.index:
                continue
            try:
                decoded = self._stream.decode(packet)
            except av.error.EOFError:  # the last packet of a demuxer has flushed the decoder already
                return
            except av.error.FFmpegError:
                self.skipped += 1
                decoded = []
            for frame in decoded:
                time_s = timeline.place(self._stamp_s(frame))
                matrix = display_matrix(frame)
                self._turned = is_turned(matrix)
                yield upright(self._to_bgr(frame), matrix), max(0.0, float(time_s))
            if packet is None:
                return

    def _stamp_s(self, frame: av.VideoFrame) -> Fraction | None:
        stamp = frame.pts
        if (
            self._container.format.name == "avi"
        ):  # has decoding times only; what FFmpeg guesses from them goes back and forth
            if self._first_dts is None:
                self._first_dts = frame.dts
            stamp = None if frame.dts is None or self._first_dts is None else frame.dts - self._first_dts
        return None if stamp is None else stamp * self.time_base

    def _contents(self) -> str:
        return ", ".join(sorted({s.type for s in self._container.streams} - {"video"})) or "no moving pictures"


class ToBgr:
    """Turns decoded frames into arrays, uint8 (H, W, 3), with one converter: a frame's own makes threads for each frame.

    Raises:
        InputError: FFmpeg cannot convert their colours.
    """

    def __init__(self) -> None:
        self._converter = reformatter.VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> UInt8Array:
        matrix = reformatter.Colorspace.DEFAULT if frame.colorspace == RESERVED_MATRIX else None
        try:
            converted = self._converter.reformat(frame, format="bgr24", src_colorspace=matrix, threads=1)
        except av.error.FFmpegError as error:
            raise InputError(
                f"FFmpeg cannot convert the colours of this video ({frame.format.name} with matrix {int(frame.colorspace)} of "
                f"H.273: {error.strerror}). Convert it to BT.709 with another program."
            ) from error
        return np.asarray(converted.to_ndarray(), dtype=np.uint8)


def open_container(path: Path | str) -> InputContainer:
    """Open a file, or an address, and nothing else that its name could mean to FFmpeg.

    Raises:
        av.error.FFmpegError: it cannot be opened.
    """
    is_file = os.path.isfile(path)
    name = os.path.abspath(path) if is_file else str(path)  # a colon in a name is no protocol
    options = {"pattern_type": "none"} if "%" in name else {}  # nor is img%03d.png a series
    timeout = None if is_file else SERVER_TIMEOUT_S
    container: InputContainer = av.open(name, options=options, timeout=timeout, **ANY_METADATA)
    return container


def picture_of(container: InputContainer) -> VideoStream | None:
    """Return the moving picture that FFmpeg's players show: an animated AVIF, for example, begins with a still one."""
    # Cover art is a video stream too, and plain text is read as the screen of a terminal.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or container.format.name == "tty":
        return None
    best = container.streams.best("video")
    return next((s for s in streams if s == best), streams[0])


def demux_noted(container: InputContainer, timeline: Timeline) -> Iterator[Packet[Any]]:
    """Return the packets of the picture and of the first sound, each noted in a timeline of one of them."""
    picture = picture_of(container)
    streams = [*([picture] if picture else []), *container.streams.audio[:1]]
    return map(partial(_noted, timeline), container.demux(streams))


def _noted(timeline: Timeline, packet: Packet[Any]) -> Packet[Any]:
    if packet.dts is not None:
        timeline.note(packet.dts * packet.time_base, stream=packet.stream_index)
    return packet


def timeline_of(container: InputContainer, *, step_s: Fraction) -> Timeline:
    """Return a timeline for one stream of a file; all begin together."""
    start_s = Fraction(container.start_time or 0, 1_000_000)  # transport streams begin at an arbitrary time
    return Timeline(start_s=start_s, step_s=step_s, may_jump=bool(container.format.flags & AVFMT_TS_DISCONT))


_QUARTER_TURNS = {90: [0, -1, 0, 1, 0], -90: [0, 1, 0, -1, 0], 180: [-1, 0, 0, 0, -1], -180: [-1, 0, 0, 0, -1]}
"""Display matrices, as far as `upright` reads them, by the angle that PyAV tells; whether it mirrors too, that does not tell."""


def upright(image_bgr: UInt8Array, matrix: list[int] | None) -> UInt8Array:
    """Turn and mirror a picture as a file's display matrix asks, to the nearest quarter turn.

    Args:
        image_bgr: uint8 (H, W, 3) as it was stored.
        matrix: the nine numbers of FFmpeg's AV_FRAME_DATA_DISPLAYMATRIX: x' = m0 x + m3 y, y' = m1 x + m4 y.
    """
    if matrix is None:
        return image_bgr
    to_x, to_y = (matrix[0], matrix[4])
    if is_turned(matrix):
        image_bgr = image_bgr.transpose(1, 0, 2)
        to_x, to_y = (matrix[3], matrix[1])
    return np.ascontiguousarray(image_bgr[:: -1 if to_y < 0 else 1, :: -1 if to_x < 0 else 1])


def is_turned(matrix: list[int] | None) -> bool:
    """Tell whether a display matrix turns by a quarter, so that rows become columns."""
    return matrix is not None and abs(matrix[1]) > abs(matrix[0])


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """Return the numbers for `upright`, None where a frame has none."""
    try:
        found: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for something that lies beside it, such as EXIF
        return _QUARTER_TURNS.get(frame.rotation)
    return None if found is None else [int(v) for v in np.frombuffer(found, np.int32)]
