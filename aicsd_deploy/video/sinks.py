"""Where finished frames go: the interface of all sinks, several of them at once, and a window."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import cv2

from aicsd_deploy.console import say
from aicsd_deploy.errors import MissingDependencyError
from aicsd_deploy.files import make_readable
from aicsd_deploy.video.figures import Figures
from aicsd_deploy.video.sources import Frame, Source

if TYPE_CHECKING:
    from typing_extensions import Self

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")


def partial_path(path: Path) -> Path:
    """Return where the frames until an error are kept: NAME.partial.SUFFIX, on the disk that a link leads to."""
    real = path.resolve() if path.is_symlink() else path
    return real.with_suffix(f".partial{path.suffix}")


def keep_partial(temporary: Path, path: Path) -> None:
    """Keep what there is of the file `path`, which an error ended early, beside it, and say so."""
    make_readable(temporary)
    temporary.replace(partial_path(path))
    say(f"The frames until the error are kept in {partial_path(path)}")


def require_room(path: Path, needed_bytes: int) -> None:
    """Raise OSError, which names the output `path`, where its disk has not the room for what ends it."""
    real = path.resolve()  # a link may lead to another disk
    folder = next(place for place in (real, *real.parents) if place.is_dir())
    if shutil.disk_usage(folder).free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class Sink(ABC):
    """Takes frames in order. `with sink.open(source):` brackets the work, and an error inside tells it how to end.

    Attributes:
        name: what to call it to the user.
        wants_overlay: it shows `Frame.image_bgr` with the overlay drawn on.
        wants_plain: it needs `Frame.plain_bgr`, the picture without the overlay.
        paced: people watch, so that frames of a file are given at their time at the earliest.
    """

    name: str
    wants_overlay: bool = True
    wants_plain: bool = False
    paced: bool = False

    def open(self, source: Source) -> Self:
        """Get ready for the frames of `source`: their size, rate and time base. Returns itself."""
        return self

    @abstractmethod
    def write(self, frame: Frame) -> bool:
        """Take one frame; False says that whoever watches has seen enough."""

    def note(self, figures: Figures) -> None:  # noqa: B027 - few sinks show them
        """Take the figures of the run, after each frame."""

    def close(self, error: BaseException | None) -> None:  # noqa: B027 - not every sink holds something
        """Finish; `error` is what ended the work early, None where it ended well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


class SinkGroup(Sink):
    """Several sinks at once; an error in one ends all."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self.name = ", ".join(sink.name for sink in sinks)
        self.wants_overlay = any(sink.wants_overlay for sink in sinks)
        self.wants_plain = any(sink.wants_plain for sink in sinks)
        self.paced = all(sink.paced for sink in sinks)

    def open(self, source: Source) -> Self:
        with ExitStack() as opened:  # if one cannot be opened, those before it are closed with that error
            for sink in self.sinks:
                opened.enter_context(sink.open(source))
            self._opened = opened.pop_all()
        return self

    def write(self, frame: Frame) -> bool:
        return all([sink.write(frame) for sink in self.sinks])  # noqa: C419 - each of them gets it

    def note(self, figures: Figures) -> None:
        for sink in self.sinks:
            sink.note(figures)

    def close(self, error: BaseException | None) -> None:
        self._opened.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


class WindowSink(Sink):
    """A window; q, Esc or its close button end it.

    Raises:
        MissingDependencyError: there is no display, or this OpenCV was built without windows.
    """

    name, paced, title = "window", True, "aicsd-deploy"

    def __init__(self) -> None:
        require_display()
        try:
            cv2.namedWindow(self.title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error as error:
            raise MissingDependencyError(
                "This OpenCV was built without windows. Write a file with -o, or install opencv-python in place of "
                "opencv-python-headless."
            ) from error

    def open(self, source: Source) -> Self:
        cv2.resizeWindow(self.title, source.size_hw[1], source.size_hw[0])
        return self

    def write(self, frame: Frame) -> bool:
        cv2.imshow(self.title, frame.image_bgr)
        pressed = cv2.waitKey(1) & 0xFF
        return pressed not in (ord("q"), 27) and cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1

    def close(self, error: BaseException | None) -> None:
        cv2.destroyAllWindows()


def require_display() -> None:
    """Raise MissingDependencyError unless a window can have a place."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise MissingDependencyError(
            "There is no display (DISPLAY is not set), so no window can open. Write a file with -o, or use --preview."
        )
