"""Streams over the network (RTSP, HTTP, UDP, …) and GStreamer pipelines: live sources, but for those that read a file."""

from __future__ import annotations

import atexit
import gc
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError, MissingDependencyError, first_line
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.live import Connection, ConnectionLostError, LiveSource
from aicsd_deploy.video.sources import Frame, Source
from aicsd_deploy.video.video_file import ANY_METADATA, FileSource, ToBgr, av, display_matrix, upright

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 3.0
"""A stream that is silent for so long counts as lost."""
UNDECODABLE_S = 20.0
"""So does one of which nothing can be decoded for so long; key frames are hardly further apart."""
IN_SEGMENTS = ("hls", "dash")
"""Formats that come some seconds at a time, so that their newest frame is one of many that came together."""
NETWORK_SOURCE = re.compile(r"\b(rtsp|rtmp|rtp|udp|tcpclient|srt|souphttp|curlhttp)\w*src\b")
"""Elements of a GStreamer pipeline that read from a server."""
FILE_READER = re.compile(r"\b((multi|split)?filesrc|splitmuxsrc|imagesequencesrc)\b|\buri=\W?file:")
"""What in a GStreamer pipeline reads from a file, which has no newest frame."""


class StreamConnection(Connection):
    """A stream that FFmpeg can open; the decoder holds no frame back."""

    def __init__(self, address: str, *, name: str, container_format: str | None = None) -> None:
        options = {"fflags": "nobuffer", "flags": "low_delay"}
        if address.startswith(("rtsp://", "rtsps://")):
            options["rtsp_transport"] = "tcp"  # a lost UDP packet spoils the picture until the next key frame
        try:
            self._container = av.open(
                address,
                format=container_format,
                options=options,
                timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
                **ANY_METADATA,
            )
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(
                f"{name} cannot be opened ({_reason(error)}). Check the address and that its server is running."
            ) from error
        if not self._container.streams.video or self._container.format.name == "tty":  # which is how text is read
            self._container.close()
            raise InputError(f"{name} has no video in it.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "SLICE"  # decoding several frames at once would delay each of them
        self.fps = self._stream.average_rate or self._stream.guessed_rate or self.fps
        self._decoded: Iterator[UInt8Array] = self._decode()

    @property
    def duration_s(self) -> float | None:
        """How long it lasts in all; None where nobody knows, as with everything that is live."""
        duration = self._container.duration
        return duration / 1e6 if duration is not None and duration > 0 else None

    @property
    def is_like_a_file(self) -> bool:
        """Whether every frame is to be read: it has a duration, or a size (though cameras make one up), or comes in segments."""
        kind = self._container.format.name
        sized = (self._container.size or 0) > 0 and kind != "mpjpeg"  # PyAV 19 has None where it is unknown
        return sized or kind in IN_SEGMENTS or self.duration_s is not None

    def read(self) -> UInt8Array | None:
        try:
            return next(self._decoded, None)
        except (av.error.FFmpegError, OSError) as error:
            raise ConnectionLostError(_reason(error)) from error

    def close(self) -> None:
        self._container.close()
        self._decoded = iter(())  # it refers back to this object
        gc.collect()  # PyAV's containers and streams refer to each other; a lost connection's decoder is large

    def _decode(self) -> Iterator[UInt8Array]:
        last_s, to_bgr, good_s = 0.0, ToBgr(), time.monotonic()
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # the end of a demuxer that was cut off reads like the end of the stream
                break
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self.skipped += 1
                frames = []
            for frame in frames:
                last_s = float(frame.time or 0.0)
                yield upright(to_bgr(frame), display_matrix(frame))
                good_s = time.monotonic()
            if time.monotonic() > good_s + UNDECODABLE_S:
                raise ConnectionLostError(f"for {UNDECODABLE_S:.0f} s nothing came that could be decoded")
        if not self._reached_end(last_s):
            raise ConnectionLostError("the server closed the connection")

    def _reached_end(self, last_s: float) -> bool:
        return self.duration_s is not None and last_s >= self.duration_s - 1


class Launched:
    """A GStreamer pipeline that gst-launch-1.0 runs, its pictures in a pipe: any build of OpenCV will do.

    Args:
        pipeline: as for gst-launch-1.0, without a sink or, as for OpenCV, with appsink at its end, which is replaced.
        newest: a frame that nobody has taken when the next one comes is left out, so that the pipeline never waits.

    Raises:
        InputError: its quotes are wrong.
        MissingDependencyError: GStreamer is not installed.
    """

    def __init__(self, pipeline: str, *, newest: bool) -> None:
        if shutil.which("gst-launch-1.0") is None:
            raise MissingDependencyError(
                "A GStreamer pipeline needs the program gst-launch-1.0. Install it (on Debian: apt install "
                "gstreamer1.0-tools gstreamer1.0-plugins-good)."
            )
        elements = re.sub(r"!\s*appsink\b[^!]*$", "", pipeline).strip().rstrip("!")
        tail = (
            f"! {'queue leaky=downstream max-size-buffers=1 ! ' if newest else ''}videoconvert ! videoscale ! "
            "video/x-raw,format=YUY2,width=[2,65534,2] ! matroskamux streamable=true ! fdsink fd=1 sync=false"
        )
        try:
            words = shlex.split(f"{elements} {tail}")
        except ValueError as error:
            raise InputError(
                f"The GStreamer pipeline cannot be read: {first_line(error)}. Write it as for gst-launch-1.0."
            ) from error
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            ["gst-launch-1.0", "-q", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for us: what is under way is finished first
        )
        atexit.register(self.kill)  # the thread that reads it may have been left behind
        assert self._process.stdout is not None
        self.address = f"pipe:{self._process.stdout.fileno()}"

    def kill(self) -> None:
        """End it, so that what reads from it comes to an end."""
        self._process.kill()

    @contextmanager
    def killed_after(self, seconds: float) -> Iterator[None]:
        """Kill it if the block takes longer: FFmpeg's own time limits do not hold for pipes."""
        silent = threading.Timer(seconds, self.kill)
        silent.start()
        try:
            yield
        finally:
            silent.cancel()
            silent.join()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """End it if the block raises InputError, and have the error say what GStreamer says."""
        try:
            yield
        except InputError as error:
            said = self._complaint() or f"it ended, or was silent for {OPEN_TIMEOUT_S:.0f} s, before its first picture"
            self.close()
            raise InputError(
                f"The GStreamer pipeline gives no video: {said.rstrip('.')}. Write it as for gst-launch-1.0, without a "
                "sink, and try it there with ! fakesink at its end."
            ) from error

    def failure(self) -> str | None:
        """Return what broke, once its pictures have ended; None where that was the end of the stream."""
        with self.killed_after(READ_TIMEOUT_S):
            code = self._process.wait()
        return None if code == 0 else self._complaint() or "gst-launch-1.0 failed"

    def close(self) -> None:
        self.kill()
        self._process.wait()
        atexit.unregister(self.kill)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def _complaint(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return next((line for line in lines if "ERROR" in line or "erroneous" in line), lines[0] if lines else "")


class GStreamerConnection(StreamConnection):
    """A GStreamer pipeline from something live.

    It ends well at the end of the stream, and with an error when something broke; but where the stream comes over a network, a
    server that is gone looks like an end too.
    """

    def __init__(self, pipeline: str) -> None:
        self._from_network = NETWORK_SOURCE.search(pipeline) is not None
        self._launched = Launched(pipeline, newest=True)
        with self._launched.explaining(), self._launched.killed_after(OPEN_TIMEOUT_S):
            super().__init__(self._launched.address, name="The pipeline", container_format="matroska")

    def read(self) -> UInt8Array | None:
        with self._launched.killed_after(READ_TIMEOUT_S):
            return super().read()

    def _reached_end(self, last_s: float) -> bool:
        if failure := self._launched.failure():
            raise ConnectionLostError(failure)
        return not self._from_network

    def cancel(self) -> None:
        self._launched.kill()

    def close(self) -> None:
        self._launched.close()
        super().close()


class GStreamerFile(FileSource):
    """A GStreamer pipeline that reads a file: every frame, which waits in the pipeline until it is taken."""

    def __init__(self, pipeline: str) -> None:
        self._cancelled = False
        self._launched = Launched(pipeline, newest=False)
        with self._launched.explaining(), self._launched.killed_after(OPEN_TIMEOUT_S):
            super().__init__(self._launched.address, name="GStreamer pipeline")

    def __iter__(self) -> Iterator[Frame]:
        yield from super().__iter__()
        failure = self._launched.failure()
        if failure and not self._cancelled:
            say(f"{self.name} broke off ({failure})")
            self.lost = True

    def cancel(self) -> None:
        self._cancelled = True
        self._launched.kill()

    def close(self) -> None:
        self._launched.close()
        super().close()


def open_stream(address: str) -> Source:
    """Open a network address. A file on a web server, and what comes in segments, is read like a file, every frame.

    Raises:
        InputError: it cannot be opened, or has no video in it.
    """
    name = without_password(address)

    def open_it() -> Source:
        opened: list[StreamConnection] = []
        if not address.startswith(("rtsp://", "rtsps://")):
            first = StreamConnection(address, name=name)
            if first.is_like_a_file:
                first.close()
                return FileSource(address, name=name)
            opened.append(first)  # some servers answer only once
        return LiveSource(name, lambda: opened.pop() if opened else StreamConnection(address, name=name))

    return interruptible(open_it)


def open_gstreamer(pipeline: str) -> Source:
    """Open a GStreamer pipeline as one writes it for gst-launch-1.0; of one that reads a file, every frame is given.

    Raises:
        InputError: the pipeline is wrong, or gives no video.
        MissingDependencyError: GStreamer is not installed.
    """
    if FILE_READER.search(pipeline):
        return interruptible(lambda: GStreamerFile(pipeline))
    return interruptible(lambda: LiveSource("GStreamer pipeline", lambda: GStreamerConnection(pipeline)))


def interruptible(work: Callable[[], Source]) -> Source:
    """Return what `work` opens. Ctrl-C ends the waiting at once: it runs in a thread, which FFmpeg may hold for ten seconds.

    What is opened after that is closed again.
    """
    outcome: Future[Source] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=target, name="opening", daemon=True).start()
        return outcome.result()
    except KeyboardInterrupt:
        outcome.add_done_callback(lambda done: None if done.exception() else done.result().close())
        raise


def without_password(address: str) -> str:
    """Return an address fit to be printed: what stands before an @ is left out."""
    return re.sub(r"://[^/?#]*@", "://…@", address)  # to the last @, as FFmpeg reads it: a password may hold one


def _reason(error: BaseException) -> str:
    if isinstance(error, av.error.ExitError):
        return "it did not answer in time"
    return getattr(error, "strerror", None) or first_line(error)
