"""Live sources: what all of them do about a connection that breaks, and cameras."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction

import cv2
import numpy as np

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.video.sources import Frame, Source, fit, sane_fps

PATIENCE_S = 60.0
"""How long a lost source is tried again, with pauses that double from 0.25 s to 4 s."""


class ConnectionLostError(Exception):
    """A live source broke off and may come back; its text says what happened."""


class Connection(ABC):
    """One connection to something live.

    Attributes:
        fps: nominal frames per second.
        skipped: frames that could not be decoded so far.
    """

    fps: Fraction = Fraction(25)
    skipped: int = 0

    @abstractmethod
    def read(self) -> UInt8Array | None:
        """Return the next picture, uint8 (H, W, 3) in BGR; None is the end of the stream.

        Raises:
            ConnectionLostError: it broke off.
        """

    def cancel(self) -> None:  # noqa: B027 - most reads end by themselves after a few seconds
        """End a `read` that another thread is waiting in."""

    def close(self) -> None:  # noqa: B027 - not every connection holds something
        """Release it."""


class LiveSource(Source):
    """Frames as they come, stamped with the time of arrival. A source that breaks off is tried again for a minute.

    The stream's end ends it; if it is lost and does not come back, `lost` is set. Frames of another size than the first
    are fitted to it.

    Args:
        name: what to call it to the user.
        connect: opens a connection; called again after a loss. Raises InputError or ConnectionLostError if it cannot.
        patience_s: how long to try again.

    Raises:
        InputError: it cannot be opened, or gives no picture.
    """

    live = True

    def __init__(self, name: str, connect: Callable[[], Connection], *, patience_s: float = PATIENCE_S) -> None:
        self.name, self._connect, self._patience_s = name, connect, patience_s
        self._cancelled = threading.Event()
        self._connection = connect()
        try:
            self._first = self._connection.read()
            if self._first is None:
                raise InputError(
                    f"{name} ended before its first picture. Check that it is running, and that it lasts: what is not paced, such as "
                    "GStreamer's videotestsrc without is-live=true, can be over before it is read."
                )
        except ConnectionLostError as error:
            self._connection.close()
            raise InputError(f"{name} gives no picture: {error}. Check that it is running and reachable.") from error
        except InputError:
            self._connection.close()
            raise
        self._first_arrived_s = time.perf_counter()  # it waits until the network is loaded
        self.size_hw = (self._first.shape[0], self._first.shape[1])
        self.fps = sane_fps(self._connection.fps)

    def __iter__(self) -> Iterator[Frame]:
        index, image, arrived_s = 0, self._first, self._first_arrived_s
        start_s = time.perf_counter()
        while image is not None and not self._cancelled.is_set():
            yield Frame(index, fit(image, self.size_hw), max(0.0, arrived_s - start_s), arrived_s)
            index += 1
            lost = None
            try:
                image = self._connection.read()
            except ConnectionLostError as error:
                lost = str(error)
            self.skipped += self._connection.skipped
            self._connection.skipped = 0
            if lost is not None:
                # Not above: what is opened while an exception is handled holds on to it, and so to the connection that it came
                # from (PyAV keeps the exception it finds in the generator that decodes).
                image = None if self._cancelled.is_set() else self._reconnect(lost)
            arrived_s = time.perf_counter()

    def _reconnect(self, reason: str) -> UInt8Array | None:
        say(f"{self.name} broke off ({reason}); trying again for {self._patience_s:.0f} s")
        deadline_s, pause_s = time.monotonic() + self._patience_s, 0.25
        self._connection.close()
        while time.monotonic() < deadline_s and not self._cancelled.wait(pause_s):
            pause_s = min(2 * pause_s, 4.0)
            image = None
            with suppress(ConnectionLostError, InputError):
                self._connection = self._connect()
                image = self._connection.read()
            if image is not None and not self._cancelled.is_set():
                self.reconnects += 1
                say(f"{self.name} is back")
                return image
            self._connection.close()
        self.lost = not self._cancelled.is_set()
        return None

    def cancel(self) -> None:
        self._cancelled.set()
        self._connection.cancel()

    def close(self) -> None:
        self.cancel()
        self._connection.close()


class CameraConnection(Connection):
    """A camera by its index, through OpenCV."""

    def __init__(self, index: int) -> None:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # what it warns of is said below
        self._camera = cv2.VideoCapture(index)
        if not self._camera.isOpened():
            self._camera.release()
            raise InputError(
                f"Camera {index} cannot be opened. Check that it is plugged in and that you may read /dev/video*, or "
                "give --source FILE."
            )
        self._camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # older pictures are of no use; not every driver listens
        self.fps = Fraction(self._camera.get(cv2.CAP_PROP_FPS) or 30).limit_denominator(1001)

    def read(self) -> UInt8Array | None:
        good, image = self._camera.read()
        if not good:  # a camera has no end: it was unplugged, or its driver gave up
            raise ConnectionLostError("no picture came")
        return np.asarray(image, dtype=np.uint8)

    def close(self) -> None:
        self._camera.release()


def open_camera(index: int) -> LiveSource:
    """Open a camera by its index.

    Raises:
        InputError: there is no such camera, or it gives no picture.
    """
    return LiveSource(f"camera {index}", lambda: CameraConnection(index))
