"""Frames into an H.264 file, with PyAV and x264."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.files import atomic_path
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sinks import VIDEO_SUFFIXES, Sink, keep_partial, partial_path, require_room
from aicsd_deploy.video.sources import Frame, Source
from aicsd_deploy.video.video_file import av, demux_noted, open_container, reformatter, timeline_of

if TYPE_CHECKING:
    from av import Packet
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.video.stream import VideoStream
    from typing_extensions import Self


QUALITY = {"crf": "21", "preset": "superfast"}
"""Of x264: a little better than its default, 23; half the CPU time of "veryfast", which goes to the network, for files a sixth larger."""
SPARE_BYTES, SPARE_BYTES_PER_FRAME, SPARE_FRAMES = 1 << 16, 128, 16
"""Room on the disk that is left for what ends a file: buffers, the index of frames and sound, frames that x264 holds back."""
MOST_TICKS, REORDERED = 1 << 28, 2
"""Of mp4 and mov: with more between a frame's time and that of its decoding, which is that of the second frame before it, FFmpeg 5
reads all frames of the file out of order."""


class Mp4Sink(Sink):
    """An H.264 file that browsers play: 8-bit 4:2:0, index in front, the source's time stamps kept.

    The file appears under its name when it is complete, or when the user interrupts. If the work fails midway, or the disk
    has room left only for the end of the file, the frames until then are kept, playable, as NAME.partial.SUFFIX. Without a
    frame there is no file.

    Args:
        path: where to write; the suffix (.mp4, .mkv, .mov) chooses the container.
        audio_of: copy the sound of this file, as it is coded there, beside the frames.

    Raises:
        InputError: the suffix is another one, or the path is a folder.
    """

    def __init__(self, path: Path | str, *, audio_of: str | None = None) -> None:
        self.path, self.name = Path(path), str(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise InputError(f"Cannot write {path}: the output must end in {', '.join(VIDEO_SUFFIXES)}.")
        if self.path.is_dir():
            raise InputError(f"Cannot write {path}: it is a folder. Give a file name.")
        self._audio_of = audio_of
        self._audio: AudioCopy | None = None
        self._container: OutputContainer | None = None
        self._converter = (
            reformatter.VideoReformatter()
        )  # one for all frames: a frame's own makes threads for each frame

    def open(self, source: Source) -> Self:
        """Start the file.

        Raises:
            InputError: the file, or the one that an error would leave, is the source itself; it cannot be written; or there is no sound that could be copied.
            MissingDependencyError: PyAV is missing or was built without x264.
        """
        partial = partial_path(self.path)
        unfinished = f"{partial}, which takes the frames where {self.path} cannot be finished,"
        for path, what in ((self.path, f"The output {self.path}"), (partial, unfinished)):
            if path.exists() and os.path.exists(source.name) and path.samefile(source.name):
                raise InputError(f"{what} is the input itself, which would be lost. Choose another name with -o.")
        if self._audio_of is not None and source.live:
            raise InputError(f"The sound of a file can be copied, but {source.name} is live. Leave out --audio.")
        if "libx264" not in av.codecs_available:
            raise MissingDependencyError(
                "This PyAV was built without libx264, the H.264 encoder. Install av from its wheels."
            )
        self._last_pts: deque[int] = deque([-1], maxlen=REORDERED)
        self._left_out_ticks = 0
        self._spare_bytes, self._largest_bytes = SPARE_BYTES, 0
        self._output = atomic_path(self.path)
        self._temporary = self._output.__enter__()
        try:
            # Matroska would hold back five seconds, which a disk that fills up would then have no room for.
            is_matroska = self.path.suffix.lower() == ".mkv"
            options = {"cluster_size_limit": "32768"} if is_matroska else {"movflags": "+faststart"}
            self._container = av.open(str(self._temporary), "w", options=options)
            self._stream = self._add_stream(self._container, source)
            try:
                self._stream.codec_context.open()
            except av.error.FFmpegError as error:
                height, width = source.size_hw
                raise InputError(
                    f"H.264 cannot hold frames of {width}x{height} (x264: at most 16384 a side). Write labels instead: -o FOLDER."
                ) from error
            if self._audio_of is not None:
                self._audio = AudioCopy(self._audio_of, self._container, name=source.name)
            self._container.start_encoding()  # writes the header; were a full disk met later, PyAV would crash
            longest = MOST_TICKS * Fraction(self._stream.time_base or self._time_base) / self._time_base
            self._longest_ticks = None if is_matroska else int(longest)
        except BaseException as error:
            self._container = None
            self._output.__exit__(type(error), error, None)
            raise
        return self

    def _add_stream(self, container: OutputContainer, source: Source) -> VideoStream:
        stream = container.add_stream("libx264", rate=source.fps.limit_denominator(1001), options=QUALITY)
        stream.height, stream.width = (side + side % 2 for side in source.size_hw)  # 4:2:0 needs even sides
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = source.pixel_aspect
        self._fps = source.fps
        self._time_base = stream.time_base = stream.codec_context.time_base = source.time_base
        # Said in the file, since players guess the matrix by the size otherwise: BT.709, limited range.
        stream.color_primaries = stream.color_trc = stream.colorspace = 1
        stream.color_range = 1
        return stream

    def write(self, frame: Frame) -> bool:
        assert self._container is not None
        self._require_room()
        picture = av.VideoFrame.from_numpy_buffer(pad_to_even(frame.image_bgr), format="bgr24")
        picture = self._converter.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=reformatter.Colorspace.ITU709,
            dst_color_range=reformatter.ColorRange.MPEG,
            threads=1,
        )
        picture.pts, picture.time_base = self._place(frame.time_s), self._time_base
        packets = self._stream.encode(picture)
        self._spare_bytes += SPARE_BYTES_PER_FRAME
        self._largest_bytes = max([self._largest_bytes, *(packet.size for packet in packets)])
        self._container.mux(packets)
        if self._audio is not None:
            self._audio.copy_until(frame.time_s)
        return True

    def _place(self, time_s: float) -> int:
        """Return a frame's time in ticks, as the container takes it: damaged files repeat their times, go back, or jump by years."""
        ticks = round(time_s / self._time_base) - self._left_out_ticks
        if self._longest_ticks is not None and (beyond := ticks - self._last_pts[0] - self._longest_ticks) > 0:
            say(
                f"warning: {self.path}: {float(beyond * self._time_base):.0f} s of the pause before the frame at {time_s:.0f} s are "
                "left out, since this kind of file cannot hold so long a one; .mkv can"
            )
            self._left_out_ticks += beyond
            ticks -= beyond
            if self._audio is not None:
                self._audio.leave_out(time_s - beyond * self._time_base, time_s)
        self._last_pts.append(max(ticks, self._last_pts[-1] + 1))
        return self._last_pts[-1]

    def _require_room(self) -> None:
        """Raise OSError where the disk is about to be full: a file whose index does not fit could not be played."""
        require_room(self.path, self._spare_bytes + SPARE_FRAMES * self._largest_bytes)

    def close(self, error: BaseException | None) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        wanted = error is None or isinstance(error, KeyboardInterrupt)
        failure: Exception | None = None
        try:
            if self._last_pts[-1] >= 0:
                container.mux(self._stream.encode(None))
                if self._audio is not None and wanted:
                    last_s = (self._last_pts[-1] + self._left_out_ticks) * self._time_base
                    self._audio.copy_until(last_s + 1 / self._fps)
            container.close()
        except Exception as full_disk:
            failure = full_disk
        if self._audio is not None:
            self._audio.close()
        if self._last_pts[-1] >= 0 and wanted and failure is None:
            self._output.__exit__(None, None, None)
            return
        playable = failure is None or (self.path.suffix.lower() == ".mkv" and self._temporary.stat().st_size > 0)
        if self._last_pts[-1] >= 0 and playable:
            keep_partial(self._temporary, self.path)
        unfinished = error or failure or InputError("no frame was written")
        self._output.__exit__(type(unfinished), unfinished, None)
        if error is None and failure is not None:
            raise failure


class AudioCopy:
    """Copies the first sound track of a file, packet by packet as far as the frames have come.

    Raises:
        InputError: the file has no sound, or the container cannot hold it.
    """

    def __init__(self, path: str, output: OutputContainer, *, name: str) -> None:
        """Open a file or an address; `name` is what to call it, without its password."""
        try:
            self._input = open_container(path)
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"{name} has no sound that can be copied: it is no file. Leave out --audio.") from error
        self._output = output
        if not self._input.streams.audio:
            self._input.close()
            raise InputError(f"{name} has no sound to copy. Leave out --audio.")
        track = self._input.streams.audio[0]
        try:
            self._stream = output.add_stream_from_template(track)
            output.start_encoding()  # writes the header, which fails where the container does not take the codec
        except (ValueError, NotImplementedError) as error:
            self._input.close()
            others = [suffix for suffix in VIDEO_SUFFIXES if not output.name.lower().endswith(suffix)]
            raise InputError(
                f"The sound of {name} ({track.codec_context.name}) cannot be copied into this kind of file. "
                f"Try {' or '.join(others)}, or leave out --audio."
            ) from error
        step_s = Fraction(track.codec_context.frame_size or 1024, track.codec_context.sample_rate or 48000)
        self._timeline = timeline_of(self._input, step_s=step_s)
        self._packets = self._demux(track)
        self._next = next(self._packets, None)
        self._last_dts: int | None = None
        self._left_out_s = Fraction(0)

    def copy_until(self, time_s: float | Fraction) -> None:
        """Copy the packets that begin before a time of the source."""
        while self._next is not None:
            packet, begins_s = self._next
            if begins_s >= time_s:
                return
            self._next = next(self._packets, None)
            # Sound is coded in the order it is heard.
            packet.dts = packet.pts = round((begins_s - self._left_out_s) / packet.time_base)
            if self._last_dts is not None and packet.dts <= self._last_dts:  # damaged: no container takes it
                continue
            self._last_dts = packet.dts
            packet.stream = self._stream
            self._output.mux(packet)

    def leave_out(self, begin_s: float | Fraction, end_s: float | Fraction) -> None:
        """Copy the packets that begin before a span of the source's time, drop those that begin in it and close the gap."""
        self.copy_until(begin_s)
        while self._next is not None and self._next[1] < end_s:
            self._next = next(self._packets, None)
        self._left_out_s += Fraction(end_s) - Fraction(begin_s)

    def _demux(self, track: AudioStream) -> Iterator[tuple[Packet[AudioStream], Fraction]]:
        """Give the packets with the times at which they begin, up to the end or to damage that ends the file."""
        packets = demux_noted(self._input, self._timeline)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, IndexError):
                return
            if packet is None:
                return
            if packet.dts is not None and packet.stream_index == track.index:
                yield packet, self._timeline.place(packet.dts * packet.time_base)

    def close(self) -> None:
        self._input.close()


def pad_to_even(image_bgr: UInt8Array) -> UInt8Array:
    """Return the picture with its last row and column repeated where its height or width is odd."""
    height, width = image_bgr.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return np.ascontiguousarray(image_bgr)
    return np.asarray(cv2.copyMakeBorder(image_bgr, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE), dtype=np.uint8)
