"""A network that needs no training, and videos that need no download."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.runtime.base import Backend, UInt8Array
from aicsd_deploy.video.sources import Frame, Source

CLASSES = (SegClass("dark", (10, 200, 30)), SegClass("bright", (250, 0, 120)))
SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "video"


class Threshold(Backend):
    """Class 1 where a frame is bright, class 0 elsewhere; at frame `fail_at` it breaks instead."""

    name, device = "threshold", "cpu"

    def __init__(self, *, image_size_hw: tuple[int, int] = (24, 32), fail_at: int | None = None) -> None:
        self.metadata = Metadata("threshold", CLASSES, image_size_hw)
        self.calls, self._fail_at = 0, fail_at

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        if self._fail_at == self.calls - 1:  # the first call is the warm-up
            raise RuntimeError("the network broke")
        self.calls += 1
        return (frames_NHWC.mean(axis=3) > 127).astype(np.uint8)


class Numbered(Source):
    """Frames whose grey value is their number times 4; at frame `fail_at` it breaks."""

    name, fps = "numbered", Fraction(25)

    def __init__(
        self, count: int, *, size_hw: tuple[int, int] = (24, 32), fail_at: int | None = None, live: bool = False
    ) -> None:
        self.frame_count, self.size_hw, self.live = count, size_hw, live
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[Frame]:
        for index in range(self.frame_count or 0):
            if index == self._fail_at:
                raise RuntimeError("the source broke")
            yield Frame(index, np.full((*self.size_hw, 3), min(255, index * 4), np.uint8), index / 25)


def encode(
    path: Path,
    images: list[Any],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    rotation: tuple[float, bool, bool] | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write BGR pictures as a video; `options` are the encoder's own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = time_base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = (pts[number] if pts else number), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def grey_frames(count: int, size_hw: tuple[int, int] = (48, 64)) -> list[UInt8Array]:
    """Pictures that can be told apart after lossy coding: grey value 4 per frame."""
    return [np.full((*size_hw, 3), 20 + 4 * number, np.uint8) for number in range(count)]


def read_back(path: Path) -> tuple[list[float], list[UInt8Array]]:
    """Decode a video: times in seconds, BGR pictures."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [float(frame.pts * frame.time_base) for frame in frames], [f.to_ndarray(format="bgr24") for f in frames]


@contextmanager
def room_for_files(size_bytes: int) -> Iterator[None]:
    """Let no file grow larger than this, as on a full disk."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread; fail if it hangs, else return what it returns or raise what it raises."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def target() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
